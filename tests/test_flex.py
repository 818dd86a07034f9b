"""Flex attention: block masks made dense, the kernel left running, patterns of an eager copy."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
)

from probe.attention import AttentionCall
from probe.envoys import AttentionEnvoy
from probe.errors import InputError, UnsupportedModelError
from probe.interventions import Bias
from probe.tap import Tap, run
from tests import kernels
from tests.conftest import FAMILIES, Tiny, tiny_model
from tests.references import LENGTHS, ByHand, batch_of, each_padding, eager, real_rows, same, watch
from tests.references import no_grad as no_grad

FLEX = "flex_attention"

# gpt2 refuses flex attention itself
each_family = pytest.mark.parametrize("family", [f for f in FAMILIES if f != "gpt2"])


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels.uncompiled_flex(monkeypatch)


@pytest.fixture
def flexed(uncompiled: None) -> Iterator[Callable[[str], Tap]]:
    taps: list[Tap] = []

    def make(family: str) -> Tap:
        taps.append(Tap(tiny_model(family, FLEX)))
        return taps[-1]

    yield make
    for tap in taps:
        tap.close()


# ------------------------------------------------------------------------------ whole models


@each_family
@each_padding
def test_patterns_and_logits_under_flex_attention(
    family: str, padding: str, flexed: Callable[[str], Tap]
) -> None:
    batch = batch_of(family, padding)
    wanted = tiny_model(family, FLEX)(**batch).logits
    tap = flexed(family)
    output, seen = watch(tap, batch, "pattern")
    assert tap.implementation == FLEX
    assert tap.causal
    assert torch.equal(output.logits, wanted)
    assert torch.equal(tap.module(**batch).logits, wanted)
    same(seen["pattern"], eager(family, batch), 3e-6, real_rows(batch)[:, None, :, None])


@each_family
def test_each_step_of_generate_under_flex_attention(
    family: str, flexed: Callable[[str], Tap]
) -> None:
    batch: dict[str, Any] = batch_of(family, "left")
    batch.pop("position_ids", None)
    steps: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
    copy: Any = tiny_model(family, "eager")
    wanted = copy.generate(**batch, **steps, output_attentions=True, return_dict_in_generate=True)
    tap, seen = flexed(family), []
    with tap.envoy.trace(fn="generate", **batch, **steps) as tracer:
        for _ in tracer.iter[:4]:
            seen.append([envoy.pattern for envoy in tap.layers.values()])
    assert len(seen) == 4
    same(seen[0], wanted.attentions[0], 3e-6, real_rows(batch)[:, None, :, None])
    for step in (1, 2, 3):
        same(seen[step], wanted.attentions[step], 3e-6)


@pytest.mark.filterwarnings("ignore:_compile flag:DeprecationWarning")
@pytest.mark.skipif(shutil.which("g++") is None, reason="compiles its kernel with g++")
def test_the_compiled_kernel_keeps_running(tiny: Tiny) -> None:
    model, batch = tiny("llama", FLEX), batch_of("llama", "left")
    wanted = model(**batch).logits
    tap = Tap(model)
    output, seen = watch(tap, batch, "pattern")
    assert torch.equal(output.logits, wanted)
    same(seen["pattern"], eager("llama", batch), 3e-6, real_rows(batch)[:, None, :, None])
    tap.close()


SHAPE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "sliding_window": 5,
    "initializer_range": 0.2,
}


@pytest.mark.usefixtures("uncompiled")
def test_softcaps_under_flex_attention() -> None:
    def make(kernel: str) -> Any:
        torch.manual_seed(0)
        config = Gemma2Config(**SHAPE, attn_logit_softcapping=2.0, query_pre_attn_scalar=5)
        config._attn_implementation = kernel
        return Gemma2ForCausalLM(config).train(mode=False)

    batch = batch_of("llama", "left")
    tap = Tap(make(FLEX))
    _, seen = watch(tap, batch, "pattern")
    wanted = make("eager")(**batch, output_attentions=True).attentions
    same(seen["pattern"], wanted, 3e-6, real_rows(batch)[:, None, :, None])
    tap.close()


@pytest.mark.usefixtures("uncompiled")
def test_sinks_which_flex_attention_cannot_run_on_a_cpu_are_refused_with_its_words() -> None:
    config = GptOssConfig(**SHAPE, num_local_experts=2, num_experts_per_tok=1)
    config._attn_implementation = FLEX
    model = GptOssForCausalLM(config)
    with pytest.raises(UnsupportedModelError, match="sinks cannot be run on CPU with flex"):
        Tap(model)
    assert model.config._attn_implementation == FLEX


# ------------------------------------------------------------------------------ masks by hand


def knock(_: int, hidden: Tensor) -> Tensor:
    hidden[:, 1, 9:, 8] = True
    return hidden


def as_bool(call: AttentionCall) -> Tensor:
    return ~knock(0, ~call.keep().expand(2, 4, LENGTHS[0], -1))


def as_float(call: AttentionCall) -> Tensor:
    return torch.zeros(2, 4, 11, 11).masked_fill(~as_bool(call), -torch.inf)


@each_family
@pytest.mark.parametrize("form", [as_bool, as_float])
def test_a_dense_mask_assigned_to_a_call_is_computed_explicitly_and_exactly(
    family: str, form: Callable[[AttentionCall], Tensor], flexed: Callable[[str], Tap]
) -> None:
    batch = batch_of(family, "right")
    tap = flexed(family)

    def visit(_: int, attn: AttentionEnvoy) -> None:
        attn.call = replace(attn.call, mask=form(attn.call))

    plain = tap.module(**batch).logits
    got = run(tap, visit, batch, layers=tuple(tap.layers)).logits
    wanted = ByHand(hidden=knock).logits(family, batch)
    rows = real_rows(batch)
    torch.testing.assert_close(got[rows], wanted[rows], atol=1e-5, rtol=1e-5)
    assert float((got[rows] - plain[rows]).abs().max()) > 1e-2
    assert torch.equal(tap.module(**batch).logits, plain)


def test_a_query_assigned_to_a_call_runs_in_flex_attention_under_its_own_mask(
    flexed: Callable[[str], Tap], monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = batch_of("llama", "right")
    tap = flexed("llama")

    def visit(layer: int, attn: AttentionEnvoy) -> None:
        attn.call = replace(attn.call, query=attn.call.query * (1.2 + layer / 4))

    def refuse(*_: Any) -> Tensor:
        raise AssertionError("attention was computed explicitly")

    monkeypatch.setattr(AttentionCall, "mix", refuse)
    got = run(tap, visit, batch, layers=tuple(tap.layers)).logits
    wanted = ByHand(scores=lambda layer, s: s * (1.2 + layer / 4)).logits("llama", batch)
    rows = real_rows(batch)
    torch.testing.assert_close(got[rows], wanted[rows], atol=1e-5, rtol=1e-5)


def test_a_float_mask_given_by_the_user_is_read_as_flex_attention_adds_it(
    flexed: Callable[[str], Tap],
) -> None:
    ids = batch_of("llama", "no")["input_ids"]
    bias = torch.randn(2, 1, 11, 11).masked_fill(torch.ones(11, 11).triu(1).bool(), -1e38)
    batch = {"input_ids": ids, "attention_mask": bias}
    output, seen = watch(flexed("llama"), batch, "pattern")
    same(seen["pattern"], eager("llama", batch), 3e-6)
    torch.testing.assert_close(
        output.logits, tiny_model("llama")(**batch).logits, atol=1e-5, rtol=1e-5
    )


def test_a_mask_of_which_flex_attention_would_see_one_head_is_refused(
    flexed: Callable[[str], Tap],
) -> None:
    ids = batch_of("llama", "no")["input_ids"]
    batch = {"input_ids": ids, "attention_mask": torch.zeros(2, 4, 11, 11)}
    with pytest.raises(InputError, match=r"takes the first head of a mask \(2, 4, 11, 11\)"):
        watch(flexed("llama"), batch, "pattern")


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("kernel", ["eager", FLEX])
def test_a_bool_mask_that_a_kernel_would_add_is_refused(kernel: str, tiny: Tiny) -> None:
    mask = torch.ones(2, 1, 11, 11).tril().bool()
    batch = {"input_ids": batch_of("llama", "no")["input_ids"], "attention_mask": mask}
    tap = Tap(tiny("llama", kernel))
    free = tap.module(input_ids=batch["input_ids"], attention_mask=0.0 * mask).logits
    if kernel == "eager":  # it adds 1 where a row attends, and 0 to what it should not see
        seen = tap.module(**batch).logits - free
        assert float(seen.abs().max()) > 0.1
    with pytest.raises(InputError, match=rf"'{kernel}' attention adds its mask to the scores"):
        watch(tap, batch, "pattern")
    tap.close()


@pytest.mark.usefixtures("uncompiled")
def test_closing_gives_flex_attention_back(tiny: Tiny) -> None:
    model = tiny("llama", FLEX)
    tap = Tap(model)
    assert model.config._attn_implementation != FLEX
    tap.close()
    assert model.config._attn_implementation == FLEX


@each_family
def test_an_intervention_acts_as_it_does_under_sdpa(
    family: str, flexed: Callable[[str], Tap]
) -> None:
    batch = batch_of(family, "left")
    biases = (
        Bias(value=2.0, queries="last:4", heads=[1]),
        Bias(value=-torch.inf, keys=3, queries=5),
    )
    logits = []
    for tap in (Tap(tiny_model(family)), flexed(family)):
        plain = tap.module(**batch).logits
        with tap.watch.on(*biases):
            logits.append(tap.module(**batch).logits)
        assert float((logits[-1] - plain).abs().max()) > 1e-2
        tap.close()
    rows = real_rows(batch)
    torch.testing.assert_close(logits[1][rows], logits[0][rows], atol=1e-5, rtol=1e-5)
