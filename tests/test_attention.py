"""The attention maths against a naive float64 loop."""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from probe.attention import AttentionCall
from probe.errors import InputError
from probe.filling import fill
from tests.naive import INF, SITES, Case, attends, call_of, cases, close, naive, pick, read


@settings(max_examples=250, deadline=None)
@given(cases())
def test_scores_and_pattern_of_any_selection_are_those_of_a_naive_loop(case: Case) -> None:
    scores, pattern = naive(case.call)
    where: dict[str, Any] = {"heads": case.heads, "queries": case.queries, "keys": case.keys}
    close(case.call.scores(**where), pick(scores, **where), 1e-5)
    close(case.call.pattern(**where), pick(pattern, **where), 1e-5)
    got = case.call.pattern(**where)
    assert torch.equal(got == 0, pick(pattern, **where) == 0)


@settings(max_examples=100, deadline=None)
@given(cases())
def test_keep_says_what_the_naive_loop_attends_to(case: Case) -> None:
    scores, _ = naive(case.call)
    keep = case.call.keep().expand_as(scores)
    assert torch.equal(keep, scores > -INF)
    some = case.call.keep(case.queries, case.keys)
    wanted = pick(scores > -INF, None, case.queries, case.keys)
    assert torch.equal(some.expand_as(wanted), wanted)


@settings(max_examples=100, deadline=None)
@given(cases())
def test_rows_sum_to_one_without_sinks_and_to_nothing_where_nothing_is_attended(case: Case) -> None:
    total = case.call.pattern().sum(-1)
    scores, pattern = naive(case.call)
    alive = (scores > -INF).any(-1)
    assert torch.equal(total[~alive], torch.zeros_like(total[~alive]))
    if case.call.sinks is None:
        torch.testing.assert_close(total[alive], torch.ones_like(total[alive]))
    else:  # below 1, unless by less than the sum of a row in float32 can show
        wanted = pattern.sum(-1)
        assert bool((total < 1)[wanted < 1 - 1e-6].all())
        close(total, wanted)


@settings(max_examples=100, deadline=None)
@given(cases())
def test_the_call_of_one_head_is_that_head_of_the_call(case: Case) -> None:
    scores, pattern = naive(case.call)
    for h in range(case.call.n_heads):
        one = case.call.head(h)
        assert (one.n_heads, one.n_kv_heads) == (1, 1)
        close(one.scores(), scores[:, h : h + 1], 1e-5)
        close(one.pattern(), pattern[:, h : h + 1], 1e-5)
        z = case.call.mix(pattern)[:, :, h : h + 1]
        close(one.mix(pattern[:, h : h + 1]), z, 1e-5)


@settings(max_examples=100, deadline=None)
@given(cases())
def test_mix_is_the_pattern_times_the_values_of_the_head_that_is_read(case: Case) -> None:
    call = case.call
    pattern = torch.rand(*call.query.shape[:3], call.n_keys)
    z = call.mix(pattern)
    assert z.is_contiguous()
    for h in range(call.n_heads):
        value = call.value[:, h * call.n_kv_heads // call.n_heads].double()
        close(z[:, :, h], pattern[:, h].double() @ value, 1e-5)


@settings(max_examples=100, deadline=None)
@given(cases(), st.integers(1, 5), st.integers(0, 1))
def test_cut_is_the_call_without_what_comes_after(case: Case, length: int, item: int) -> None:
    n = case.call.n_queries
    mask = case.call.mask
    if mask is not None:
        mask = mask[..., :n]
    square = replace(
        case.call, key=case.call.key[:, :, :n], value=case.call.value[:, :, :n], mask=mask
    )
    length, item = min(length, n), min(item, square.query.shape[0] - 1)
    cut = square.cut(slice(item, item + 1), length)
    # without causality a row sees what is cut away, so only its scores stay
    close(cut.scores(), square.scores()[item : item + 1, :, :length, :length], 1e-5)
    assert cut.value.shape[2] == length
    assert square.cut(slice(None), n) is square


# ------------------------------------------------------------------------- precision and sinks


def test_query_heads_that_cannot_share_key_heads_are_refused() -> None:
    q, k = torch.zeros(1, 3, 2, 4), torch.zeros(1, 2, 2, 4)
    with pytest.raises(InputError, match="3 query heads cannot share 2 key heads evenly"):
        AttentionCall(q, k, k)


def test_half_precision_is_computed_in_float32() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        call = call_of(5, 5)
        half = replace(call, query=call.query.to(dtype), key=call.key.to(dtype))
        assert half.scores().dtype == half.pattern().dtype == torch.float32
        scores, pattern = naive(half)  # of the rounded numbers, in float64
        close(half.scores(), scores)
        close(half.pattern(), pattern)


def test_float64_stays_float64() -> None:
    call = call_of(5, 5)
    wide = replace(call, query=call.query.double(), key=call.key.double())
    for site, wanted in zip(SITES, reversed(naive(wide)), strict=True):
        assert read(wide, site).dtype == torch.float64
        close(read(wide, site), wanted, 1e-13)
        out = torch.empty(2, 4, 5, 5, dtype=torch.float64)
        close(fill(wide, out, site), wanted, 1e-13)


def test_reading_leaves_query_key_and_mask_as_they_were() -> None:
    mask = torch.zeros(1, 1, 5, 5).masked_fill(~torch.ones(5, 5).tril().bool(), -INF)
    call = call_of(5, 5, mask, softcap=2.0)
    before = [x.clone() for x in (call.query, call.key, call.value, mask)]
    fill(call, torch.empty(2, 4, 5, 5))
    call.mix(call.softmax(call.scores()))
    after = (call.query, call.key, call.value, mask)
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_softmax_of_edited_scores_counts_the_sinks() -> None:
    call = call_of(4, 4, sinks=torch.tensor([0.0, 1.0, -1.0, 2.0]))
    edited = call.scores()
    edited[..., 0] += 1
    both = torch.cat([edited, call.sinks.view(1, 4, 1, 1).expand(2, 4, 4, 1)], -1)  # type: ignore[union-attr]
    torch.testing.assert_close(call.softmax(edited), both.softmax(-1)[..., :-1])


def test_dropout_acts_in_mix_and_never_on_the_pattern() -> None:
    call = call_of(5, 5, dropout=0.5)
    torch.testing.assert_close(call.pattern().sum(-1), torch.ones(2, 4, 5))
    torch.manual_seed(0)
    q, k, v = (x.repeat(3000, 1, 1, 1) for x in (call.query, call.key, call.value))
    many = replace(call, query=q, key=k, value=v)
    wanted = replace(call, dropout=0.0).mix(call.pattern())
    mean = many.mix(many.pattern()).view(3000, *wanted.shape).mean(0)
    torch.testing.assert_close(mean, wanted, atol=0.15, rtol=0)


# ------------------------------------------------------------------------------------ gradients


def options() -> Iterator[dict[str, Any]]:
    blocked = torch.zeros(1, 1, 5, 5, dtype=torch.float64)
    blocked[..., 3, :] = torch.finfo(torch.float64).min
    blocked[..., 4] = -INF
    yield {}
    yield {"mask": blocked}
    yield {"mask": torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]])}
    yield {"mask": torch.zeros(2, 5, dtype=torch.bool), "window": 2}
    yield {"softcap": 1.5}
    yield {"sinks": torch.linspace(-1, 1, 4, dtype=torch.float64), "mask": blocked}
    yield {"window": 2, "causal": False}


@pytest.mark.parametrize("option", list(options()), ids=str)
@pytest.mark.parametrize("part", ["whole", "heads", "softmax"])
def test_gradients_are_finite_and_those_of_a_naive_implementation(
    option: dict[str, Any], part: str
) -> None:
    call = call_of(5, 5, **option)
    query, key = (x.double().requires_grad_() for x in (call.query, call.key))
    call = replace(call, query=query, key=key)
    weight = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    got = {
        "whole": lambda: call.pattern(),
        "heads": lambda: call.pattern(heads=[0, 1, 2, 3]),
        "softmax": lambda: call.softmax(call.scores()),
    }[part]()
    grads = torch.autograd.grad((got * weight).sum(), (query, key))

    s = query @ key[:, [0, 0, 1, 1]].transpose(-1, -2) / math.sqrt(3)
    s = s if call.softcap is None else call.softcap * (s / call.softcap).tanh()
    s = s.exp() * attends(call)  # small numbers: an exponential needs no maximum taken off
    rest = 0 if call.sinks is None else call.sinks.view(4, 1, 1).exp()
    total = s.sum(-1, keepdim=True) + rest
    pattern = s / torch.where(total > 0, total, torch.ones_like(total))
    wanted = torch.autograd.grad((pattern * weight).sum(), (query, key))
    close(got.detach(), pattern.detach(), 1e-12)
    for a, b in zip(grads, wanted, strict=True):
        assert bool(a.isfinite().all())
        close(a, b, 1e-10)


def test_gradients_reach_query_and_key_through_scores_and_value_through_mix() -> None:
    call = call_of(4, 4, softcap=2.0)
    tensors = [x.clone().requires_grad_() for x in (call.query, call.key, call.value)]
    call = replace(call, query=tensors[0], key=tensors[1], value=tensors[2])
    scores = call.scores()
    loss = scores[scores > -INF].square().sum() + call.mix(call.pattern()).square().sum()
    grads = torch.autograd.grad(loss, tensors)
    assert all(bool(g.isfinite().all()) and bool((g != 0).any()) for g in grads)
