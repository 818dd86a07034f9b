"""Flash attention's masks: what transformers gives such a kernel, and what the tap reads in it."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, Gemma2Config, Gemma2ForCausalLM, StaticCache

from probe.attention import AttentionCall
from probe.envoys import AttentionEnvoy
from probe.errors import InputError, UnsupportedModelError
from probe.interventions import Bias
from probe.proof import prove
from probe.tap import Tap, run
from tests import kernels
from tests.conftest import tiny_model
from tests.references import (
    LENGTHS,
    ByHand,
    batch_of,
    each_padding,
    eager,
    real_rows,
    same,
    untouched,
    watch,
)
from tests.references import no_grad as no_grad

FLASH = "flash_attention_2"
# gpt2 has no Linear beside its attention, whose dtype transformers asks for in float32
each_family = pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
STEPS: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True}


@pytest.fixture(autouse=True)
def library(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels.install_flash(monkeypatch)


@pytest.fixture
def flashed() -> Iterator[Callable[..., Tap]]:
    taps: list[Tap] = []

    def make(family: str, name: str = FLASH) -> Tap:
        taps.append(Tap(tiny_model(family, name)))
        return taps[-1]

    yield make
    for tap in taps:
        tap.close()


# ------------------------------------------------------------------------------ whole models


@pytest.mark.parametrize("name", kernels.FLASH)
@each_family
@each_padding
def test_patterns_and_logits_under_flash_attention(
    family: str, padding: str, name: str, flashed: Callable[..., Tap]
) -> None:
    batch = batch_of(family, padding)
    wanted = tiny_model(family, name)(**batch).logits
    tap = flashed(family, name)
    output, seen = watch(tap, batch, "call", "pattern", "z")
    assert torch.equal(output.logits, wanted)
    assert torch.equal(tap.module(**batch).logits, wanted)
    rows = real_rows(batch)[:, None, :, None]
    same(seen["pattern"], eager(family, batch), 3e-6, rows)
    for call, pattern, z in zip(*seen.values(), strict=True):
        prove(call, z, causal=True)
        # the kernel leaves the rows of padding empty, on either side
        assert torch.equal(pattern.sum(-1) > 0.5, rows[..., 0].expand(2, 4, -1))
    tap.close()
    assert cast(Any, tap.module).config._attn_implementation == name


@each_family
def test_each_step_of_generate_under_flash_attention(
    family: str, flashed: Callable[..., Tap]
) -> None:
    batch = batch_of(family, "left")
    copy: Any = untouched(family, "eager")
    wanted = copy.generate(**batch, **STEPS, output_attentions=True)
    tap, seen = flashed(family), []
    with tap.envoy.trace(fn="generate", **batch, **STEPS) as tracer:
        for _ in tracer.iter[:4]:
            seen.append([envoy.pattern for envoy in tap.layers.values()])
    assert len(seen) == 4
    same(seen[0], wanted.attentions[0], 3e-6, real_rows(batch)[:, None, :, None])
    for step in (1, 2, 3):
        same(seen[step], wanted.attentions[step], 3e-6)


@each_family
@pytest.mark.parametrize("cache", ["static", "dynamic"])
def test_a_prefill_in_pieces_is_aligned_at_the_bottom_right(
    family: str, cache: str, flashed: Callable[..., Tap]
) -> None:
    ids = batch_of(family, "no")["input_ids"]
    tap = flashed(family)
    config: Any = tap.module.config
    mine, its = (
        StaticCache(config=config, max_cache_len=16)
        if cache == "static"
        else DynamicCache(config=config)
        for _ in range(2)
    )
    seen = 0
    for part in (ids[:, :4], ids[:, 4:10], ids[:, 10:]):
        piece = {"input_ids": part, "use_cache": True}
        seen += part.shape[1]
        _, got = watch(tap, piece | {"past_key_values": mine}, "call", "pattern", "z")
        same(got["pattern"], eager(family, piece | {"past_key_values": its}), 3e-6)
        for call, z in zip(got["call"], got["z"], strict=True):
            prove(call, z)


@each_family
@pytest.mark.parametrize("padding", ["no", "left"])
def test_generation_into_a_static_cache_is_what_it_is_without_the_tap(
    family: str, padding: str, flashed: Callable[..., Tap]
) -> None:
    # transformers drops a mask of ones, unless it sees by its name that the kernel needs one
    inputs = {**batch_of(family, padding), **STEPS, "cache_implementation": "static"}
    plain: Any = tiny_model(family, FLASH)
    wanted = plain.generate(**inputs, output_logits=True)
    got = cast(Any, flashed(family).module).generate(**inputs, output_logits=True)
    assert torch.equal(got.sequences, wanted.sequences)
    torch.testing.assert_close(got.logits, wanted.logits, atol=0, rtol=0)
    reference: Any = untouched(family, "sdpa")
    logits = reference.generate(**inputs, output_logits=True).logits
    torch.testing.assert_close(got.logits, logits, atol=1e-5, rtol=1e-5)


def test_softcaps_under_flash_attention() -> None:
    def make(kernel: str) -> Any:
        torch.manual_seed(0)
        config = Gemma2Config(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            sliding_window=5,
            initializer_range=0.2,
            attn_logit_softcapping=2.0,
            query_pre_attn_scalar=5,
        )
        config._attn_implementation = kernel
        return Gemma2ForCausalLM(config).train(mode=False)

    batch = batch_of("llama", "left")
    tap = Tap(make(FLASH))
    _, seen = watch(tap, batch, "pattern")
    wanted = make("eager")(**batch, output_attentions=True).attentions
    same(seen["pattern"], wanted, 3e-6, real_rows(batch)[:, None, :, None])
    tap.close()


# ------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    "packed",
    [
        {"position_ids": torch.tensor([[0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4]])},
        {
            "cu_seq_lens_q": torch.tensor([0, 6, 11], dtype=torch.int32),
            "cu_seq_lens_k": torch.tensor([0, 6, 11], dtype=torch.int32),
            "max_length_q": 6,
            "max_length_k": 6,
        },
    ],
    ids=["position_ids", "cu_seq_lens"],
)
def test_packed_sequences_are_refused_and_still_run(
    packed: dict[str, Any], flashed: Callable[..., Tap]
) -> None:
    batch = {"input_ids": batch_of("llama", "no")["input_ids"][:1], **packed}
    wanted = tiny_model("llama", FLASH)(**batch).logits
    tap = flashed("llama")
    with pytest.raises(UnsupportedModelError, match=r"several sequences are packed into one row"):
        watch(tap, batch, "pattern")
    assert torch.equal(tap.module(**batch).logits, wanted)


def test_packed_sequences_without_flash_attention_are_read_apart(family: str) -> None:
    batch = {
        "input_ids": batch_of(family, "no")["input_ids"],
        "position_ids": torch.tensor([[0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4]]).expand(2, -1),
        "use_cache": False,
    }
    tap = Tap(tiny_model(family))
    _, seen = watch(tap, batch, "pattern")
    same(seen["pattern"], eager(family, batch), 3e-6)
    if family != "gpt2":
        assert all(bool((p[:, :, 6:, :6] == 0).all()) for p in seen["pattern"])
    tap.close()


def test_a_dense_mask_given_by_the_user_is_refused(flashed: Callable[..., Tap]) -> None:
    mask = torch.ones(2, 1, 11, 11).tril().bool()
    batch = {"input_ids": batch_of("llama", "no")["input_ids"], "attention_mask": mask}
    with pytest.raises(InputError, match=r"not padding, and got one of shape \(2, 1, 11, 11\)"):
        watch(flashed("llama"), batch, "pattern")


# ------------------------------------------------------------------------------ masks by hand


def knock(_: int, hidden: Tensor) -> Tensor:
    hidden[:, 1, 9:, 8] = True
    return hidden


@each_family
@each_padding
def test_a_dense_mask_assigned_to_a_call_is_computed_explicitly_and_exactly(
    family: str, padding: str, flashed: Callable[..., Tap]
) -> None:
    batch = batch_of(family, padding)
    tap = flashed(family)

    def visit(_: int, attn: AttentionEnvoy) -> None:
        keep = attn.call.keep().expand(2, 4, LENGTHS[0], -1)
        attn.call = replace(attn.call, mask=~knock(0, ~keep))

    got = run(tap, visit, batch, layers=tuple(tap.layers)).logits
    wanted = ByHand(hidden=knock).logits(family, batch)
    rows = real_rows(batch)
    torch.testing.assert_close(got[rows], wanted[rows], atol=1e-5, rtol=1e-5)


def test_a_value_assigned_to_a_call_runs_in_the_kernel(
    flashed: Callable[..., Tap], monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = batch_of("mistral", "right")
    tap = flashed("mistral")

    def visit(layer: int, attn: AttentionEnvoy) -> None:
        attn.call = replace(attn.call, value=attn.call.value * (1.2 + layer / 4))

    def refuse(*_: Any) -> Tensor:
        raise AssertionError("attention was computed explicitly")

    monkeypatch.setattr(AttentionCall, "mix", refuse)
    got = run(tap, visit, batch, layers=tuple(tap.layers)).logits
    wanted = ByHand(z=lambda layer, z: z * (1.2 + layer / 4)).logits("mistral", batch)
    rows = real_rows(batch)
    torch.testing.assert_close(got[rows], wanted[rows], atol=1e-5, rtol=1e-5)


@each_family
def test_an_intervention_acts_as_it_does_under_sdpa(
    family: str, flashed: Callable[..., Tap]
) -> None:
    batch = batch_of(family, "left")
    biases = (
        Bias(value=2.0, queries="last:4", heads=[1]),
        Bias(value=-torch.inf, keys=3, queries=5),
    )
    logits = []
    for tap in (Tap(tiny_model(family)), flashed(family)):
        plain = tap.module(**batch).logits
        with tap.watch.on(*biases):
            logits.append(tap.module(**batch).logits)
        assert float((logits[-1] - plain).abs().max()) > 1e-2
        tap.close()
    rows = real_rows(batch)
    torch.testing.assert_close(logits[1][rows], logits[0][rows], atol=1e-5, rtol=1e-5)
