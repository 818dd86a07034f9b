"""Heads taken out, in every mode, against attention by hand and hooks on plain models."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import probe
from probe.attention import AttentionCall
from probe.errors import InputError
from probe.interventions import SITES
from probe.model import Model
from probe.positions import Positions
from recipes import ablation
from recipes._replacing import deranged
from recipes.ablation import Ablate
from tests.ablated import OUT, PAIRS, PATTERNS, logits_of, mean_of_real, on_z, taken_out, z_of
from tests.edited import STEPS, ByToken, Step, by_token, cache_of, generated, left, watched
from tests.models import bare as bare
from tests.references import (
    batch_of,
    each_kernel,
    each_padding,
    projections,
    real_rows,
    untouched,
)
from tests.references import no_grad as no_grad

TOLERANCE: dict[str, Any] = {"atol": 1e-5, "rtol": 1e-5}

# Modes that need no other input -> (site, what is done there by hand).
STEPWISE: dict[Any, tuple[str, Step]] = {
    "zero": ("z", lambda _, z, *__: 0 * z),
    "mean": ("z", mean_of_real),
    **{mode: ("pattern", step) for mode, step in PATTERNS.items()},
}
each_mode = pytest.mark.parametrize("mode", STEPWISE)


def by_hand(mode: str) -> dict[str, Step]:
    site, step = STEPWISE[mode]
    return {site: taken_out(2 if site == "z" else 1, step)}


def check(model: Model, batch: Any, one: Ablate, hand: Any) -> None:
    plain = model(batch).logits
    with model.intervene(one):
        got = model(batch).logits
    wanted, rows = hand(**model.batch(batch)).logits, real_rows(batch)
    torch.testing.assert_close(got[rows], wanted[rows], **TOLERANCE)
    assert float((got - plain)[rows].abs().max()) > 1e-3
    assert torch.equal(model(batch).logits, plain)


@each_mode
@each_padding
@each_kernel
def test_heads_are_taken_out_as_by_hand(family: str, kernel: str, padding: str, mode: Any) -> None:
    hand = by_token(by_hand(mode), padding).model(family)
    check(watched(family, kernel), batch_of(family, padding), Ablate(PAIRS, mode), hand)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@each_mode
def test_heads_stay_out_while_a_padded_batch_is_generated(
    family: str, mode: Any, cache: str
) -> None:
    model, batch = watched(family), left(family)
    with model.intervene(Ablate(PAIRS, mode)):
        got = generated(model.module, batch, cache_of(cache, model.module))
    hand = by_token(by_hand(mode), "left", grows=True).model(family)
    wanted = generated(hand, batch, cache_of("whole", hand))
    assert torch.equal(got.sequences, wanted.sequences)
    assert len(got.logits) == STEPS
    torch.testing.assert_close(got.logits, wanted.logits, **TOLERANCE)


@each_kernel
def test_a_derangement_takes_z_of_the_run_itself_and_a_cache_that_of_a_run_unchanged(
    family: str, kernel: str
) -> None:
    model, batch = watched(family, kernel), batch_of(family, "no")
    # Of two inputs there is one derangement.
    hand = by_token({"z": taken_out(2, lambda _, z, *__: z.flip(0))}, "no").model(family)
    check(model, batch, Ablate(PAIRS, "resample"), hand)
    _, cache = model.run_with_cache(batch["input_ids"].flip(0), sites="z")
    each = [z_of(untouched(family), ids.tolist()) for ids in batch["input_ids"].flip(0)]
    zs = [torch.stack(layer) for layer in zip(*each, strict=True)]
    steps = {"z": taken_out(2, lambda layer, _, *__: zs[layer][:, :, OUT[layer]])}
    check(model, batch, Ablate(PAIRS, "resample", cache), by_token(steps, "no").model(family))


@pytest.mark.parametrize("side", ["left", "right"])
def test_in_a_padded_batch_inputs_of_the_same_length_are_swapped(side: str) -> None:
    lengths = torch.tensor([6, 3, 6, 3])
    mask = torch.arange(6) < lengths[:, None]
    mask = mask.flip(1) if side == "left" else mask
    random = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 64, (4, 6), generator=random) * mask
    batch = {"input_ids": ids, "attention_mask": mask.long()}
    step = taken_out(2, lambda _, z, *__: z[[2, 3, 0, 1]])
    start = 6 - lengths if side == "left" else torch.zeros(4, dtype=torch.long)
    hand = ByToken({"z": step}, start, lengths).model("llama")
    check(watched("llama"), batch, Ablate(PAIRS, "resample"), hand)


@each_padding
@each_kernel
def test_a_frozen_head_looks_where_it_looks_in_another_input(
    family: str, kernel: str, padding: str
) -> None:
    model, batch = watched(family, kernel), batch_of(family, padding)
    other = {**batch, "input_ids": batch["input_ids"] % 50 + 1}
    _, cache = model.run_with_cache(other, sites="pattern")
    seen = untouched(family, "eager")(**other, output_attentions=True).attentions
    steps = {"pattern": taken_out(1, lambda layer, *_: seen[layer][:, OUT[layer]])}
    hand = by_token(steps, padding).model(family)
    check(model, batch, Ablate(PAIRS, "frozen", cache), hand)


@pytest.mark.parametrize("per", ["all", "position"])
def test_a_mean_reference_is_that_of_the_real_tokens_one_problem_at_a_time(
    family: str, per: Any
) -> None:
    model = watched(family)
    random = torch.Generator().manual_seed(1)
    problems = [torch.randint(1, 64, (n,), generator=random).tolist() for n in (9, 3, 12, 1, 9)]
    got = ablation.reference(model, problems, per=per, batch_size=3)
    each = [z_of(untouched(family), ids) for ids in problems]
    for layer in range(3):
        zs = [z[layer].double() for z in each]
        wanted = torch.cat(zs).mean(0)
        if per == "position":
            reached = [[z[n] for z in zs if len(z) > n] for n in range(12)]
            wanted = torch.stack([torch.stack(some).mean(0) for some in reached])
        torch.testing.assert_close(got.z[layer], wanted.float(), atol=1e-6, rtol=1e-5)
    batch = batch_of(family, "left")

    def mean(layer: int, z: Tensor, rows: Tensor, _: Tensor) -> Tensor:
        found = got.z[layer] if per == "all" else got.z[layer][rows.clamp_min(0)]
        return found.expand(*rows.shape, 4, -1)[:, :, OUT[layer]]

    hand = by_token({"z": taken_out(2, mean)}, "left").model(family)
    check(model, batch, Ablate(PAIRS, "mean", got), hand)
    assert got.source.endswith("of 5 problems of list")


def attention_out(model: Model, batch: Any, layer: int) -> tuple[Tensor, Tensor]:
    """(what goes into the output projection of a layer, what comes out of it)."""
    found: list[Tensor] = []
    module = projections(model.module)[layer]
    handle = module.register_forward_hook(lambda _, args, output: found.extend([args[0], output]))
    model(batch)
    handle.remove()
    return found[0], found[1]


@each_kernel
def test_a_layer_without_a_head_returns_its_output_less_what_the_head_wrote(
    family: str, kernel: str
) -> None:
    model, batch = watched(family, kernel, torch.float64), batch_of(family, "left")
    z, whole = attention_out(model, batch, 0)
    weight = projections(model.module)[0].weight
    assert isinstance(weight, Tensor)
    inward = weight if family == "gpt2" else weight.T  # (in, out)
    rows = real_rows(batch)
    for head in range(4):
        with model.intervene(Ablate([(0, head)])):
            _, ablated = attention_out(model, batch, 0)
        own = slice(8 * head, 8 * head + 8)
        wanted = whole - z[..., own] @ inward[own]
        torch.testing.assert_close(ablated[rows], wanted[rows], atol=1e-12, rtol=0)


def test_with_all_heads_of_a_gpt2_layer_out_the_bias_of_its_projection_stays() -> None:
    model = watched("gpt2")
    bias = projections(model.module)[1].bias
    assert isinstance(bias, Tensor)
    torch.nn.init.normal_(bias)
    with model.intervene(Ablate(layers=1)):
        _, output = attention_out(model, [1, 2, 3], 1)
    torch.nn.init.zeros_(bias)
    assert float(output.std(1).max()) == 0 < float(output.std())


def test_a_slice_of_what_the_projection_returns_is_no_head_and_cannot_be_named(
    family: str,
) -> None:
    assert SITES == ("q", "k", "v", "scores", "pattern", "z")
    for wrong in ("attn_out", "o", "result"):
        with pytest.raises(InputError, match=r"Choose from q, k, v, scores, pattern, z\."):
            probe.Edit(site=wrong, function=lambda x, _: 0 * x)  # type: ignore[arg-type]
    plain, ids = untouched(family), list(range(1, 9))

    def wrong_place(_: Any, __: Any, output: Tensor) -> Tensor:
        return torch.cat([torch.zeros_like(output[..., :8]), output[..., 8:]], -1)

    handle = projections(plain)[0].register_forward_hook(wrong_place)
    wrong_logits = logits_of(plain, ids)
    handle.remove()
    model = watched(family)
    with model.intervene(Ablate([(0, 0)])):
        got = model(ids).logits[0]
    with on_z(plain, lambda la, z: torch.cat([0 * z[:, :, :1], z[:, :, 1:]], 2) if not la else z):
        torch.testing.assert_close(got, logits_of(plain, ids), **TOLERANCE)
    assert float((got - wrong_logits).abs().max()) > 0.01


@given(st.lists(st.integers(1, 5), min_size=1, max_size=12), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_a_derangement_swaps_only_equal_lengths_and_leaves_nobody_in_place(
    lengths: list[int], seed: int
) -> None:
    n = len(lengths)
    at = torch.arange(6).expand(n, -1)
    at = at.masked_fill(at >= torch.tensor(lengths)[:, None], -1)
    x = torch.zeros(n, 2, 6, 3)
    call = AttentionCall(x, x, x, where=Positions(at, at, torch.tensor(lengths)))
    if any(lengths.count(length) == 1 for length in lengths):
        with pytest.raises(InputError, match=r"only one of this batch has \d tokens\. Batch"):
            deranged(call, seed)
        return
    order = deranged(call, seed).tolist()
    assert sorted(order) == list(range(n))
    assert all(i != k and lengths[i] == lengths[k] for i, k in enumerate(order))
    assert order == deranged(call, seed).tolist()


@pytest.mark.parametrize("mode", PATTERNS)
def test_in_float64_patterns_are_as_exact_as_the_model(mode: Any) -> None:
    batch = batch_of("gpt2", "left")
    with watched("gpt2", "sdpa", torch.float64).intervene(Ablate(PAIRS, mode)) as model:
        got = model(batch).logits
    hand = by_token(by_hand(mode), "left").model("gpt2", torch.float64)
    rows = real_rows(batch)
    torch.testing.assert_close(
        got[rows], hand(**model.batch(batch)).logits[rows], atol=1e-12, rtol=0
    )


@each_mode
def test_in_bfloat16_heads_are_taken_out_too(mode: Any) -> None:
    batch, rows = batch_of("qwen3", "left"), real_rows(batch_of("qwen3", "left"))
    exact = watched("qwen3")
    with watched("qwen3", "sdpa", torch.bfloat16).intervene(Ablate(PAIRS, mode)) as model:
        got = model(batch).logits[rows].float()
    with exact.intervene(Ablate(PAIRS, mode)):
        wanted = exact(batch).logits[rows]
    apart, moved = (got - wanted).abs().mean(), (exact(batch).logits[rows] - wanted).abs().mean()
    assert got.isfinite().all()
    assert float(apart) < 0.1 < 2 * float(moved)
