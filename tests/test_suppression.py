"""Suppression against attention by hand, and the identities that define it."""

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import probe
from recipes.suppression import Knockout, Steer, Suppress
from tests.edited import Kind, Step, by_token, cache_of, generated, left, prompt, watched
from tests.references import batch_of, each_kernel, each_padding, real_rows
from tests.references import no_grad as no_grad

TOLERANCE: dict[str, Any] = {"atol": 1e-5, "rtol": 1e-5}
Factor = Callable[[int, int, int], float]  # batch item, row's position, column's position


def table(rows: Tensor, columns: Tensor, factor: Factor) -> Tensor:
    """(batch, 1, query, key): the factor of each edge, by loops."""
    return torch.tensor(
        [
            [[factor(i, r, c) if r >= 0 and c >= 0 else 1.0 for c in own] for r in row]
            for i, (row, own) in enumerate(zip(rows.tolist(), columns.tolist(), strict=True))
        ]
    )[:, None]


def added(factor: Factor, layers: tuple[int, ...] = (0, 1, 2), heads: Any = range(4)) -> Step:
    """Probabilities times a factor, renormalised: a row that would lose all keeps its own token."""

    def step(layer: int, p: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        if layer not in layers:
            return p
        new = p * table(rows, columns, factor)
        total = new.sum(-1, keepdim=True)
        own = (rows[:, None, :, None] == columns[:, None, None, :]).to(p.dtype)
        new = torch.where((total == 0) & (p.sum(-1, keepdim=True) > 0), own, new / total)
        new = new.nan_to_num(0.0)
        chosen = torch.tensor([h in heads for h in range(4)])[:, None, None]
        return torch.where(chosen, new, p)

    return step


def multiplied(factor: Factor) -> Step:
    return lambda _, s, r, c: torch.where(s == -torch.inf, s, s * table(r, c, factor))


def shifted(factor: Factor) -> Step:
    def step(_: int, s: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        out = s.clone()
        f = table(rows, columns, factor)[:, 0]
        for index in torch.cartesian_prod(*[torch.arange(n) for n in s.shape[:3]]).tolist():
            b, h, q = index
            allowed = [x for x in s[b, h, q].tolist() if x > -math.inf]
            for k, x in enumerate(s[b, h, q].tolist()):
                if x > -math.inf:
                    least = min(allowed)
                    out[b, h, q, k] = least + float(f[b, q, k]) * (x - least)
        return out

    return step


def keyed(factors: dict[int, float]) -> Factor:
    return lambda _, __, c: factors.get(c, 1.0)


OF_EACH: list[list[int | None]] = [[1, None], [0, -1]]
PARTS: list[slice | str] = [slice(1, 3), "last:1"]
SUPPRESSIONS: dict[str, Kind] = {
    "log_add": (
        [Suppress(keys=[1, 2], factor=[0.1, 0.5])],
        lambda _: {"pattern": added(keyed({1: 0.1, 2: 0.5}))},
    ),
    "amplified, in some heads, layers and rows": (
        [Suppress(keys=0, factor=3.0, layers=[0, -1], heads=[1, 3], queries=slice(3, None))],
        lambda _: {
            "pattern": added(lambda _, r, c: 3.0 if c == 0 and r > 2 else 1.0, (0, 2), (1, 3))
        },
    ),
    "by pairs": (
        [Suppress(keys="last:2", factor=0.2, heads=[(1, 0), (1, 2)])],
        lambda n: {
            "pattern": added(lambda i, _, c: 0.2 if n[i] - 2 <= c < n[i] else 1.0, (1,), (0, 2))
        },
    ),
    "factors of each item": (
        [Suppress(keys=OF_EACH, factor=[[0.2, 1.0], [0.3, 4.0]])],
        lambda n: {
            "pattern": added(lambda i, _, c: [{1: 0.2}, {0: 0.3, n[1] - 1: 4.0}][i].get(c, 1.0))
        },
    ),
    "hidden, and the first token keeps itself": (
        [Suppress(keys=[0, 1], factor=0)],
        lambda _: {"pattern": added(keyed({0: 0.0, 1: 0.0}))},
    ),
    "logit_mul": (
        [Suppress(keys=1, factor=2.0, mode="logit_mul")],
        lambda _: {"scores": multiplied(keyed({1: 2.0}))},
    ),
    "logit_mul_shifted": (
        [Suppress(keys=[1, 3], factor=[0.0, 0.4], mode="logit_mul_shifted")],
        lambda _: {"scores": shifted(keyed({1: 0.0, 3: 0.4}))},
    ),
    "prob_zero_no_renorm": (
        [Suppress(keys=2, mode="prob_zero_no_renorm", queries=slice(0, None, 2))],
        lambda _: {
            "pattern": lambda _, p, r, c: (
                p * table(r, c, lambda _, r, c: 0.0 if c == 2 and r % 2 == 0 else 1.0)
            )
        },
    ),
    "a knockout": (
        [Knockout(queries=slice(2, None), keys=[0, 2], layers=[1, 2])],
        lambda _: {
            "pattern": added(lambda _, r, c: 0.0 if r >= 2 and c in (0, 2) else 1.0, (1, 2))
        },
    ),
    "everything knocked out leaves each token itself": (
        [Knockout(keys=slice(None))],
        lambda _: {"pattern": added(lambda *_: 0.0)},
    ),
    "steered away from the rest of the prompt": (
        [Steer(keys=PARTS, factor=0.05, heads=[(0, 1), (2, 3)])],
        lambda n: {
            "pattern": lambda layer, p, r, c: added(
                lambda i, _, c: 1.0 if c in (1, 2, n[i] - 1) or c >= n[i] else 0.05,
                (0, 2),
                {0: [1], 2: [3]}.get(layer, []),
            )(layer, p, r, c)
        },
    ),
    "steered away from a part": (
        [Steer(keys=slice(1, 3), mode="include", factor=0.3)],
        lambda _: {"pattern": added(keyed({1: 0.3, 2: 0.3}))},
    ),
}


@pytest.mark.parametrize("kind", SUPPRESSIONS)
@each_padding
@each_kernel
def test_a_forward_is_suppressed_as_attention_by_hand(
    family: str, kernel: str, padding: str, kind: str
) -> None:
    some, steps = SUPPRESSIONS[kind]
    batch, model = batch_of(family, padding), watched(family, kernel)
    plain = model(batch).logits
    with model.intervene(*some):
        got = model(batch).logits
    hand = by_token(steps(prompt(padding)), padding).model(family)
    wanted = hand(**model.batch(batch)).logits
    rows = real_rows(batch)
    torch.testing.assert_close(got[rows], wanted[rows], **TOLERANCE)
    assert float((got[rows] - plain[rows]).abs().max()) > 1e-3
    assert torch.equal(model(batch).logits, plain)


@pytest.mark.parametrize("kind", SUPPRESSIONS)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_suppression_persists_in_each_step_of_a_cached_generation(
    family: str, cache: str, kind: str
) -> None:
    some, steps = SUPPRESSIONS[kind]
    batch, model = left(family), watched(family)
    with model.intervene(*some):
        got = generated(model.module, batch, cache_of(cache, model.module))
    hand = by_token(steps(prompt("left")), "left", grows=True).model(family)
    wanted = generated(hand, batch, cache_of("whole", hand))
    assert torch.equal(got.sequences, wanted.sequences)
    torch.testing.assert_close(got.logits, wanted.logits, **TOLERANCE)


PATTERN = {"sites": "pattern", "return_type": None}


def patterns(model: Any, ids: list[int], *some: Any, layer: int = 0) -> Tensor:
    """Of the first layer, whose inputs no intervention changes."""
    with torch.no_grad(), model.intervene(*some):
        found: Tensor = model.run_with_cache(ids, **PATTERN)[1]["pattern", layer]
    return found


IDS = st.lists(st.integers(1, 63), min_size=2, max_size=12)
FACTORS = st.floats(0.001, 50)


@settings(max_examples=40, deadline=None)
@given(IDS, FACTORS, st.data())
def test_adding_ln_a_multiplies_the_probability_by_a_and_renormalises(
    ids: list[int], a: float, data: st.DataObject
) -> None:
    model = watched("llama")
    key = data.draw(st.integers(0, len(ids) - 1))
    plain = patterns(model, ids)
    wanted = plain.clone()
    wanted[..., key] *= a
    wanted /= wanted.sum(-1, keepdim=True)
    got = patterns(model, ids, Suppress(keys=key, factor=a))
    torch.testing.assert_close(got, wanted, atol=1e-6, rtol=1e-5)


@settings(max_examples=40, deadline=None)
@given(IDS, st.data())
def test_a_knockout_is_a_probability_of_zero_renormalised(
    ids: list[int], data: st.DataObject
) -> None:
    model = watched("gpt2")
    key = data.draw(st.integers(0, len(ids) - 1))
    plain = patterns(model, ids)
    wanted = plain.clone()
    wanted[..., key] = 0
    wanted = (wanted / wanted.sum(-1, keepdim=True)).nan_to_num(0.0)
    if key == 0:
        wanted[:, :, 0, 0] = 1.0  # the first row has no other key
    for one in (Knockout(keys=key), Suppress(keys=key, factor=0)):
        torch.testing.assert_close(patterns(model, ids, one), wanted, atol=1e-6, rtol=1e-5)


@settings(max_examples=30, deadline=None)
@given(IDS, st.floats(0.01, 3), st.sampled_from(["logit_mul", "logit_mul_shifted", "log_add"]))
def test_before_or_after_scaling_is_the_same(ids: list[int], a: float, mode: Any) -> None:
    model = watched("llama")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # logit_mul says where it raises attention
        one, two = (
            patterns(model, ids, Suppress(keys=0, factor=a, mode=mode, after_scaling=after))
            for after in (False, True)
        )
    assert torch.equal(one, two)


@settings(max_examples=30, deadline=None)
@given(IDS, st.floats(0, 0.99), st.data())
def test_the_shifted_form_never_raises_a_key_and_sees_no_future(
    ids: list[int], a: float, data: st.DataObject
) -> None:
    model = watched("llama")
    key = data.draw(st.integers(0, len(ids) - 1))
    one = Suppress(keys=key, factor=a, mode="logit_mul_shifted")
    plain, got = patterns(model, ids), patterns(model, ids, one)
    assert bool((got[..., key] <= plain[..., key] + 1e-6).all())
    longer = patterns(model, [*ids, 63, 62], one)[:, :, : len(ids), : len(ids)]
    torch.testing.assert_close(longer, got, atol=1e-6, rtol=1e-5)


def test_hidden_by_a_factor_of_zero_the_shifted_form_still_leaves_the_least_weight() -> None:
    model = watched("llama")
    with torch.no_grad(), model.intervene():
        scores = model.run_with_cache([1, 5, 9, 2], "scores", return_type=None)[1]["scores", 0]
    got = patterns(model, [1, 5, 9, 2], Suppress(keys=1, factor=0, mode="logit_mul_shifted"))
    last = scores[:, :, -1].clone()
    last[..., 1] = last.amin(-1)
    torch.testing.assert_close(got[:, :, -1], last.softmax(-1), atol=1e-6, rtol=1e-5)
    assert bool((got[:, :, -1, 1] > 0).all())


def test_logit_mul_raises_keys_with_negative_scores_and_says_how_many() -> None:
    model = watched("llama")
    ids = [3, 17, 40, 8, 22]
    with torch.no_grad(), model.intervene():
        scores = model.run_with_cache(ids, "scores", return_type=None)[1]["scores", 0]
    column = scores[0, :, 1:, 1]
    share = float((column < 0).double().mean())
    one = Suppress(keys=1, factor=0.1, mode="logit_mul", layers=0)
    with pytest.warns(
        UserWarning, match=rf"negative: in {share:.0%} of the scaled scores of layer 0"
    ):
        got = patterns(model, ids, one)
    raised = got[0, :, 1:, 1] > patterns(model, ids)[0, :, 1:, 1]
    assert torch.equal(raised, column < 0)
    patterns(model, ids, one)  # said once


def test_unrenormalised_rows_sum_to_what_the_other_keys_had() -> None:
    model = watched("qwen3")
    ids = [3, 17, 40, 8, 22]
    plain = patterns(model, ids)
    got = patterns(model, ids, Suppress(keys=[0, 2], mode="prob_zero_no_renorm"))
    rest = plain[..., [1, 3, 4]].sum(-1)
    torch.testing.assert_close(got.sum(-1), rest, atol=1e-6, rtol=1e-5)
    half = patterns(model, ids, Suppress(keys=0, factor=0.5, mode="prob_zero_no_renorm"))
    torch.testing.assert_close(half[..., 0], plain[..., 0] / 2, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("key", [0, 1, 4])
@pytest.mark.parametrize("one", ["suppressed", "knocked out"])
def test_a_key_hidden_in_all_layers_is_not_felt_anywhere_else_bit_for_bit(
    family: str, one: str, key: int
) -> None:
    model = watched(family)
    first = torch.tensor([[5, 9, 2, 33, 17, 21, 4]])
    second = first.clone()
    second[0, key] = 50
    kinds: dict[str, Any] = {
        "suppressed": Suppress(keys=key, factor=0),
        "knocked out": Knockout(keys=key),
    }
    with model.intervene(kinds[one]):
        some, other = model(first).logits, model(second).logits
    elsewhere = [n for n in range(7) if n != key]
    assert torch.equal(some[:, elsewhere], other[:, elsewhere])
    assert float((model(first).logits - model(second).logits)[:, key + 1 :].abs().max()) > 1e-3


def test_tokens_are_suppressed_by_what_they_say() -> None:
    model = probe.load("demo-llama", device="cpu")
    texts = ["abcab", "zzabz"]  # positions 1 to 5 behind the first token
    found = {
        "text:ab": [[1, 2, 4, 5], [3, 4]],
        "regex:[bc]": [[2, 3, 5], [4]],
        "segment:bos": [[0], [0]],
        "last:2": [[4, 5], [4, 5]],
    }
    for keys, own in found.items():
        logits = []
        for chosen in (keys, own):
            with model.intervene(Suppress(keys=chosen, factor=0.2)):
                logits.append(model(texts).logits)
        assert torch.equal(*logits)
    with model.intervene(Suppress(keys="text:ab", factor=0)):  # those of the prompt, in generation
        steps = model.generate(texts, max_new_tokens=4, do_sample=False)
        whole = model.generate(texts, max_new_tokens=4, do_sample=False, use_cache=False)
    assert torch.equal(steps, whole)
    with model.intervene(Suppress(keys="text:Q")), pytest.warns(UserWarning, match="no input of t"):
        same = model(texts).logits
    assert torch.equal(same, model(texts).logits)
