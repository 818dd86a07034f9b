"""What the tap reads against eager copies of the same model, in five families."""

from collections.abc import Mapping
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

from probe.tap import Tap
from tests.conftest import Tiny
from tests.references import (
    LENGTHS,
    WINDOW,
    batch_of,
    each_dtype,
    each_kernel,
    each_padding,
    eager,
    projections,
    real_rows,
    same,
    tapped,
    untouched,
    watch,
)
from tests.references import no_grad as no_grad


def allowed(model: Any, layer: int, batch: Mapping[str, Tensor]) -> Tensor:
    """What a layer may attend to, from its config alone: (batch, query, key)."""
    n = LENGTHS[0]
    behind = torch.arange(n)[:, None] - torch.arange(n)
    keep = (behind >= 0)[None].repeat(2, 1, 1)
    kind = model.config.model_type
    if kind == "mistral" or (kind.startswith("qwen") and layer >= 1):
        keep &= behind < WINDOW
    if "attention_mask" in batch:
        keep &= batch["attention_mask"].bool()[:, None]
    return keep


# ----------------------------------------------------------------------------- against eager


@each_padding
@each_kernel
def test_patterns_are_those_of_an_eager_copy(family: str, kernel: str, padding: str) -> None:
    batch = batch_of(family, padding)
    _, seen = watch(tapped(family, kernel), batch, "pattern")
    rows = real_rows(batch)[:, None, :, None]
    for layer, (got, want) in enumerate(zip(seen["pattern"], eager(family, batch), strict=True)):
        assert got.dtype == torch.float32
        # after the first layer sdpa hands on other last bits than eager does
        tolerance = 3e-6 if kernel == "sdpa" and layer > 0 else 1e-6
        torch.testing.assert_close(got * rows, want * rows, atol=tolerance, rtol=0)


@each_padding
@each_kernel
def test_patterns_of_a_bfloat16_model_differ_from_an_eager_copy_by_its_rounding_alone(
    family: str, kernel: str, padding: str
) -> None:
    # Eager rounds scores to 8 bits (in the product, the factor and the mask) and the pattern once
    # more; d pattern <= d score / 2. Under sdpa later layers also start from other roundings.
    batch = batch_of(family, padding)
    _, seen = watch(tapped(family, kernel, torch.bfloat16), batch, "scores", "pattern")
    rows = real_rows(batch)[:, None, :, None]
    unit = 2.0**-9
    for layer, want in enumerate(eager(family, batch, torch.bfloat16)):
        scores, got = seen["scores"][layer], seen["pattern"][layer]
        assert got.dtype == torch.float32
        size = scores.masked_fill(scores == -torch.inf, 0).abs().max()
        tolerance = 3 * unit * float(size) / 2 * 2 + unit
        if kernel == "sdpa" and layer > 0:
            tolerance *= 3
        torch.testing.assert_close(got * rows, want.float() * rows, atol=tolerance, rtol=0)


@each_kernel
def test_a_mask_that_the_user_made_is_read_as_the_model_uses_it(family: str, kernel: str) -> None:
    low = torch.finfo(torch.float32).min
    bias = torch.zeros(2, 1, 11, 11).masked_fill(torch.ones(11, 11).triu(1).bool(), low)
    bias[0, 0, 4:, 2] = low
    bias[1, 0, :, 0] = -1.5
    batch = batch_of(family, "no") | {"attention_mask": bias}
    _, seen = watch(tapped(family, kernel), batch, "pattern")
    same(seen["pattern"], eager(family, batch), 1e-6)


@each_kernel
def test_asking_transformers_for_attentions_gives_what_it_gives_without_the_tap(
    family: str, kernel: str
) -> None:
    batch = batch_of(family, "right")
    wanted = untouched(family, kernel)(**batch, output_attentions=True).attentions
    got = tapped(family, kernel).module(**batch, output_attentions=True).attentions
    assert len(got) == len(wanted)
    for a, b in zip(got, wanted, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)


def other(name: str) -> Any:
    """A model with a softcap or one with sinks."""
    shape: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "sliding_window": WINDOW,
        "initializer_range": 0.2,
        "attn_implementation": "eager",
    }
    torch.manual_seed(0)
    if name == "gemma2":
        gemma = Gemma2Config(**shape, attn_logit_softcapping=2.0, query_pre_attn_scalar=5)
        return Gemma2ForCausalLM(gemma)
    return GptOssForCausalLM(GptOssConfig(**shape, num_local_experts=2, num_experts_per_tok=1))


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss"])
@each_padding
def test_softcaps_and_sinks_are_read_as_the_model_uses_them(name: str, padding: str) -> None:
    model = other(name)
    model.train(mode=False)
    batch = batch_of("llama", padding)
    plain = model(**batch, output_attentions=True)
    output, seen = watch(Tap(model), batch, "call", "pattern")
    assert torch.equal(output.logits, plain.logits)
    for call in seen["call"]:
        assert (call.softcap, call.sinks is None) == (
            (2.0, True) if name == "gemma2" else (None, False)
        )
    wanted = [attention[..., :11] for attention in plain.attentions]
    same(seen["pattern"], wanted, 1e-6, real_rows(batch)[:, None, :, None])


def test_gradients_of_patterns_are_those_of_an_eager_copy(family: str, tiny: Tiny) -> None:
    batch = batch_of(family, "right")
    rows = real_rows(batch)[:, None, :, None]
    with torch.enable_grad():
        copy = tiny(family, "eager")
        attentions = copy(**batch, output_attentions=True).attentions
        sum((a * rows).square().sum() for a in attentions).backward()
        tap = Tap(tiny(family))
        output, seen = watch(tap, batch, "pattern")
        loss = sum((p * rows).square().sum() for p in seen["pattern"]) + 0 * output.logits.sum()
        loss.backward()
    for (name, got), want in zip(tap.module.named_parameters(), copy.parameters(), strict=True):
        if want.grad is not None:
            near = 1e-5 * float(want.grad.abs().max().clamp_min(1))  # rounding of a whole matrix
            torch.testing.assert_close(got.grad, want.grad, atol=near, rtol=1e-4, msg=name)


# ------------------------------------------------------------------------------ what is read


@each_dtype
@each_padding
@each_kernel
def test_scores_are_minus_infinity_exactly_where_nothing_is_attended(
    family: str, kernel: str, padding: str, dtype: torch.dtype
) -> None:
    batch = batch_of(family, padding)
    tap = tapped(family, kernel, dtype)
    _, seen = watch(tap, batch, "scores", "pattern")
    rows = real_rows(batch)
    for layer in tap.layers:
        scores, pattern = seen["scores"][layer], seen["pattern"][layer]
        keep = allowed(tap.module, layer, batch)[:, None].expand_as(scores)
        for b in range(2):
            finite = scores[b, :, rows[b]] > -torch.inf
            assert torch.equal(finite, keep[b, :, rows[b]])
            torch.testing.assert_close(
                scores[b, :, rows[b]].softmax(-1), pattern[b, :, rows[b]], atol=1e-7, rtol=1e-6
            )
        assert bool((scores[scores > -torch.inf].abs() < 1e4).all())
        assert torch.equal(scores == -torch.inf, pattern == 0)
        if padding == "left":  # a row before the text sees nothing
            assert bool((pattern[1, :, : LENGTHS[0] - LENGTHS[1]] == 0).all())


@each_dtype
@each_kernel
def test_z_is_what_goes_into_the_output_projection(
    family: str, kernel: str, dtype: torch.dtype, tiny: Tiny
) -> None:
    batch = batch_of(family, "left")
    model = tiny(family, kernel, dtype)
    inputs: list[Tensor] = []
    for module in projections(model):
        module.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    model(**batch)
    _, seen = watch(tapped(family, kernel, dtype), batch, "z")
    for got, want in zip(seen["z"], inputs, strict=True):
        assert got.shape == (2, LENGTHS[0], 4, 8)
        assert torch.equal(got.flatten(2), want)


def test_calls_hold_the_keys_unrepeated_and_the_layer(family: str) -> None:
    tap = tapped(family)
    _, seen = watch(tap, batch_of(family, "right"), "call")
    kv = 4 if family == "gpt2" else 2
    assert [call.layer for call in seen["call"]] == [0, 1, 2]
    assert {call.key.shape for call in seen["call"]} == {(2, kv, LENGTHS[0], 8)}
    assert {call.query.shape for call in seen["call"]} == {(2, 4, LENGTHS[0], 8)}
    assert (tap.shapes[0][:2], tap.causal) == ((4, kv), True)
    assert list(tap.layers) == [0, 1, 2]


@pytest.mark.parametrize("padding", ["left", "right"])
@each_kernel
def test_a_sequence_alone_reads_as_it_does_in_a_padded_batch(
    family: str, kernel: str, padding: str
) -> None:
    batch = batch_of(family, padding)
    tap = tapped(family, kernel)
    rows = real_rows(batch)[1]
    _, together = watch(tap, batch, "scores", "pattern", "z")
    _, alone = watch(tap, {"input_ids": batch["input_ids"][1:, rows]}, "scores", "pattern", "z")
    for layer in tap.layers:
        for site in ("scores", "pattern"):
            got = together[site][layer][1][:, rows][:, :, rows]
            torch.testing.assert_close(got, alone[site][layer][0], atol=5e-6, rtol=1e-5)
            rest = together[site][layer][1][:, rows][:, :, ~rows]
            assert bool((rest == (0 if site == "pattern" else -torch.inf)).all())
        z = together["z"][layer][1, rows]
        torch.testing.assert_close(z, alone["z"][layer][0], atol=5e-6, rtol=1e-5)


@each_kernel
def test_a_single_token_can_be_read(family: str, kernel: str) -> None:
    batch = {"input_ids": torch.tensor([[5]])}
    _, seen = watch(tapped(family, kernel), batch, "scores", "pattern")
    assert all(torch.equal(p, torch.ones(1, 4, 1, 1)) for p in seen["pattern"])
