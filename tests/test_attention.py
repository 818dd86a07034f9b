"""The attention maths against a naive float64 loop."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Literal, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from probe import attention
from probe.attention import AttentionCall, Index
from probe.errors import InputError

Site = Literal["pattern", "scores"]
INF = math.inf
SITES: tuple[Site, ...] = ("pattern", "scores")


# ------------------------------------------------------------------ the independent reference


def attends(call: AttentionCall, b: int, h: int, i: int, j: int) -> bool:
    """Whether query i may see key j, straight from the words of the documentation."""
    mask = call.mask
    n, k = call.query.shape[2], call.key.shape[2]
    if mask is not None and mask.ndim == 4:
        value = element(mask, b, h, i, j)
        if mask.dtype == torch.bool:
            return bool(value)
        return value > torch.finfo(mask.dtype).min / 2
    if mask is not None and not mask[b, j].item():
        return False
    # a missing mask is aligned at the top left, but a single row sees everything
    own = i if mask is None and n > 1 else i + k - n
    if call.causal and j > own:
        return False
    return call.window is None or abs(own - j) < call.window


def element(mask: Tensor, b: int, h: int, i: int, j: int) -> float:
    where = (b, h, i, j)
    return float(
        mask[tuple(0 if size == 1 else w for size, w in zip(mask.shape, where, strict=True))]
    )


def naive(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """(scores, pattern) in float64, one number at a time."""
    batch, n_heads, n, width = call.query.shape
    kv_heads, k = call.key.shape[1:3]
    query, key = call.query.double(), call.key.double()
    scores = torch.full((batch, n_heads, n, k), -INF, dtype=torch.float64)
    pattern = torch.zeros_like(scores)
    scaling = 1 / math.sqrt(width) if call.scaling is None else call.scaling
    for b in range(batch):
        for h in range(n_heads):
            for i in range(n):
                row: dict[int, float] = {}
                for j in range(k):
                    if not attends(call, b, h, i, j):
                        continue
                    read = h * kv_heads // n_heads
                    s = scaling * sum(
                        float(x) * float(y)
                        for x, y in zip(query[b, h, i], key[b, read, j], strict=True)
                    )
                    if call.softcap is not None:
                        s = call.softcap * math.tanh(s / call.softcap)
                    mask = call.mask
                    if mask is not None and mask.ndim == 4 and mask.dtype != torch.bool:
                        s += element(mask, b, h, i, j)
                    row[j] = s
                    scores[b, h, i, j] = s
                if not row:
                    continue
                sink = [] if call.sinks is None else [float(call.sinks[h])]
                top = max([*row.values(), *sink])
                total = sum(math.exp(s - top) for s in [*row.values(), *sink])
                for j, s in row.items():
                    pattern[b, h, i, j] = math.exp(s - top) / total
    return scores, pattern


def read(call: AttentionCall, site: Site, **selection: Any) -> Tensor:
    return call.pattern(**selection) if site == "pattern" else call.scores(**selection)


def pick(whole: Tensor, heads: Index, queries: Index, keys: Index) -> Tensor:
    for dim, index in ((1, heads), (2, queries), (3, keys)):
        every = list(range(whole.shape[dim]))
        chosen = every if index is None else every[index] if isinstance(index, slice) else index
        whole = whole[(slice(None),) * dim + (torch.tensor(chosen, dtype=torch.long),)]
    return whole


def close(got: Tensor, wanted: Tensor, tolerance: float = 1e-6) -> None:
    """Equal in what is -inf and what is 0, close in all else."""
    assert got.shape == wanted.shape
    torch.testing.assert_close(got.double(), wanted.double(), atol=tolerance, rtol=tolerance)
    assert torch.equal(got == -INF, wanted == -INF)


# ------------------------------------------------------------------------------- any call at all


@dataclass(frozen=True)
class Case:
    call: AttentionCall
    heads: Index
    queries: Index
    keys: Index


def masks(draw: st.DrawFn, kind: str, batch: int, heads: int, n: int, k: int) -> Tensor | None:
    if kind == "none":
        return None
    random = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    if kind == "2d":
        mask = torch.ones(batch, k, dtype=draw(st.sampled_from([torch.bool, torch.int64])))
        for b in range(batch):
            left, right = draw(st.integers(0, k)), draw(st.integers(0, k))
            mask[b, :left] = 0
            mask[b, right:] = 0
        return mask
    shape = (
        draw(st.sampled_from([1, batch])),
        draw(st.sampled_from([1, heads])),
        draw(st.sampled_from([1, n])),
        k,
    )
    keep = torch.rand(shape, generator=random) < draw(st.sampled_from([0.0, 0.3, 0.7, 1.0]))
    if kind == "bool":
        return keep
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]))
    block = -INF if draw(st.booleans()) else torch.finfo(dtype).min
    return torch.randn(shape, generator=random).to(dtype).masked_fill(~keep, block)


@st.composite
def selections(draw: st.DrawFn, size: int) -> Index:
    kind = draw(st.sampled_from(["all", "list", "slice"]))
    if kind == "all":
        return None
    if kind == "list":
        return draw(st.lists(st.integers(0, size - 1), max_size=size + 1))
    end = st.none() | st.integers(-size - 1, size + 1)
    return slice(draw(end), draw(end), draw(st.none() | st.integers(1, 3)))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    batch, kv, share = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    n, width = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    kind = draw(st.sampled_from(["none", "2d", "bool", "float"]))
    k = n + draw(st.integers(0, 4))
    random = torch.Generator().manual_seed(draw(st.integers(0, 999)))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    heads = kv * share
    call = AttentionCall(
        2 * normal(batch, heads, n, width),
        2 * normal(batch, kv, k, width),
        normal(batch, kv, k, 2),
        masks(draw, kind, batch, heads, n, k),
        scaling=draw(st.sampled_from([None, 0.3])),
        softcap=draw(st.sampled_from([None, 1.5])),
        sinks=normal(heads) if draw(st.booleans()) else None,
        window=draw(st.none() | st.integers(1, k + 1)),
        causal=draw(st.booleans()),
    )
    return Case(call, draw(selections(heads)), draw(selections(n)), draw(selections(k)))


@settings(max_examples=250, deadline=None)
@given(cases())
def test_scores_and_pattern_of_any_selection_are_those_of_a_naive_loop(case: Case) -> None:
    scores, pattern = naive(case.call)
    where = {"heads": case.heads, "queries": case.queries, "keys": case.keys}
    close(case.call.scores(**where), pick(scores, **where), 1e-5)
    close(case.call.pattern(**where), pick(pattern, **where), 1e-5)
    got = case.call.pattern(**where)
    assert torch.equal(got == 0, pick(pattern, **where) == 0)


@settings(max_examples=200, deadline=None)
@given(cases(), st.sampled_from([(1, 1), (2, 64), (3, 256), (64, 1 << 20)]), st.booleans())
def test_fill_writes_what_scores_and_pattern_return_whatever_the_tiles(
    case: Case, tiles: tuple[int, int], half: bool
) -> None:
    dtype = torch.float16 if half else torch.float32
    where = {"heads": case.heads, "queries": case.queries, "keys": case.keys}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "_TILES", {"cpu": tiles})
        for site, whole in zip(SITES, reversed(naive(case.call)), strict=True):
            wanted = pick(whole, **where)
            out = torch.full(wanted.shape, math.nan, dtype=dtype)
            assert case.call.fill(out, site, **where) is out
            close(out, wanted.to(dtype), 2e-3 if half else 1e-5)


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
    alive = (naive(case.call)[0] > -INF).any(-1)
    assert torch.equal(total[~alive], torch.zeros_like(total[~alive]))
    if case.call.sinks is None:
        torch.testing.assert_close(total[alive], torch.ones_like(total[alive]))
    else:
        assert bool((total < 1).all())


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


# --------------------------------------------------------------------------- forms of the mask


def call_of(n: int, k: int, mask: Tensor | None = None, **kwargs: Any) -> AttentionCall:
    torch.manual_seed(n * 100 + k)
    return AttentionCall(
        torch.randn(2, 4, n, 3), torch.randn(2, 2, k, 3), torch.randn(2, 2, k, 5), mask, **kwargs
    )


def seen(call: AttentionCall, batch: int = 0) -> list[str]:
    """Each row of the first head as a string: x where it attends."""
    rows = (call.pattern()[batch, 0] > 0).tolist()
    return ["".join("x" if on else "." for on in row) for row in rows]


def test_without_a_mask_rows_are_causal_from_the_top_left() -> None:
    assert seen(call_of(3, 3)) == ["x..", "xx.", "xxx"]


def test_without_a_mask_a_prefill_into_a_static_cache_sees_nothing_of_the_empty_rest() -> None:
    assert seen(call_of(2, 5)) == ["x....", "xx..."]


def test_without_a_mask_a_single_row_sees_every_key() -> None:
    assert seen(call_of(1, 4)) == ["xxxx"]


def test_a_missing_mask_means_what_torch_makes_of_it() -> None:
    for n, k in ((4, 4), (3, 6), (1, 5), (5, 3)):
        call = call_of(n, k)
        z = torch.nn.functional.scaled_dot_product_attention(
            call.query, call.key, call.value, is_causal=n > 1, enable_gqa=True
        )
        torch.testing.assert_close(call.mix(call.pattern()), z.transpose(1, 2))


def test_a_two_dimensional_mask_is_aligned_at_the_bottom_right() -> None:
    mask = torch.ones(2, 5, dtype=torch.long)
    assert seen(call_of(2, 5, mask)) == ["xxxx.", "xxxxx"]


def test_a_two_dimensional_mask_hides_padding_on_either_side() -> None:
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]])
    assert seen(call_of(4, 4, mask), 0) == ["....", "....", "..x.", "..xx"]
    assert seen(call_of(4, 4, mask), 1) == ["x...", "xx..", "xxx.", "xxx."]


def test_a_window_holds_the_row_itself() -> None:
    assert seen(call_of(4, 4, window=2)) == ["x...", "xx..", ".xx.", "..xx"]
    assert seen(call_of(1, 4, window=2)) == ["..xx"]
    assert seen(call_of(2, 4, torch.ones(2, 4), window=2)) == [".xx.", "..xx"]
    assert seen(call_of(3, 3, window=2, causal=False)) == ["xx.", "xxx", ".xx"]


def test_a_mask_of_four_dimensions_brings_its_own_window() -> None:
    mask = torch.ones(1, 1, 3, 3, dtype=torch.bool).tril()
    assert seen(call_of(3, 3, mask, window=1)) == ["x..", "xx.", "xxx"]


def test_small_biases_of_a_float_mask_are_added_and_minus_infinity_hides() -> None:
    mask = torch.zeros(1, 1, 3, 3)
    mask[..., 1] = -1e4  # makes a key negligible, but attended all the same
    mask[..., 2] = -INF
    call = call_of(3, 3, mask)
    plain = call_of(3, 3, causal=False).scores()
    assert torch.equal(call.scores()[..., 0], plain[..., 0])
    assert torch.equal(call.scores()[..., 1], plain[..., 1] - 1e4)
    assert bool((call.scores()[..., 2] == -INF).all())


def test_a_bias_beside_the_smallest_number_still_hides() -> None:
    mask = torch.full((1, 1, 2, 2), torch.finfo(torch.float32).min)
    mask[..., 0] = 0
    mask = mask * 0.9  # as a product of masks would leave it
    assert seen(call_of(2, 2, mask)) == ["x.", "x."]


@pytest.mark.parametrize("sinks", [None, torch.zeros(4)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_fully_padded_row_is_zero_and_never_nan(dtype: torch.dtype, sinks: Tensor | None) -> None:
    hidden = torch.zeros(1, 1, 3, 3).tril() + torch.full((3, 3), torch.finfo(dtype).min)
    for mask in (
        hidden.to(dtype),
        torch.zeros(1, 1, 3, 3, dtype=torch.bool),
        torch.zeros(2, 3, dtype=torch.bool),
        torch.full((1, 1, 3, 3), -INF, dtype=dtype),
    ):
        call = call_of(3, 3, mask, sinks=sinks)
        assert bool((call.pattern() == 0).all())
        assert bool((call.scores() == -INF).all())
        out = call.fill(torch.full((2, 4, 3, 3), math.nan))
        assert bool((out == 0).all())


# ---------------------------------------------------------------------------- what is selected


def test_the_keys_asked_for_never_change_the_softmax() -> None:
    call = call_of(4, 4)
    assert torch.equal(call.pattern(keys=[3, 1]), call.pattern()[..., [3, 1]])


def test_columns_may_be_taken_in_steps() -> None:
    call = call_of(8, 8)
    close(call.scores(keys=slice(0, None, 2)), call.scores()[..., ::2])
    close(call.scores(queries=[5], keys=slice(0, None, 2)), call.scores()[:, :, 5:6, ::2])
    close(call.scores(queries=[2], keys=slice(1, 8, 3)), call.scores()[:, :, 2:3, 1:8:3])


def test_late_rows_may_be_asked_for_early_columns() -> None:
    call = call_of(8, 8)
    close(call.scores(queries=[5], keys=slice(0, 3)), call.scores()[:, :, 5:6, :3])
    close(call.scores(queries=slice(6, None), keys=slice(1, 3)), call.scores()[:, :, 6:, 1:3])


@pytest.mark.parametrize("nothing", [[], slice(3, 3), slice(5, 2)])
@pytest.mark.parametrize("site", SITES)
def test_nothing_selected_gives_an_empty_tensor(nothing: Index, site: Site) -> None:
    for call in (call_of(6, 6), call_of(6, 6, window=3), call_of(6, 6, torch.ones(2, 6))):
        assert read(call, site, queries=nothing).shape == (2, 4, 0, 6)
        assert read(call, site, keys=nothing).shape == (2, 4, 6, 0)
        assert read(call, site, heads=nothing).shape == (2, 0, 6, 6)
        assert call.fill(torch.empty(2, 4, 0, 6), site, queries=nothing).shape == (2, 4, 0, 6)
        assert call.fill(torch.empty(2, 4, 6, 0), site, keys=nothing).shape == (2, 4, 6, 0)
        assert call.fill(torch.empty(2, 0, 6, 6), site, heads=nothing).shape == (2, 0, 6, 6)


def test_one_token_attends_to_itself() -> None:
    call = call_of(1, 1)
    assert torch.equal(call.pattern(), torch.ones(2, 4, 1, 1))
    assert torch.equal(call.fill(torch.empty(2, 4, 1, 1)), torch.ones(2, 4, 1, 1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("site", SITES)
def test_fill_spans_many_tiles_in_every_dtype(
    dtype: torch.dtype, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_TILES", {"cpu": (16, 4096)})
    ragged = torch.ones(2, 70, dtype=torch.bool)
    ragged[0, :9] = False
    ragged[1, 50:] = False
    for options in ({}, {"window": 12}, {"mask": ragged}, {"mask": ragged, "window": 12}):
        call = call_of(70, 70, **cast(dict[str, Any], options))
        out = torch.full((2, 4, 70, 70), math.nan, dtype=dtype)
        call.fill(out, site)
        tolerance = max(1e-6, torch.finfo(dtype).eps)
        close(out, read(call, site).to(dtype), tolerance)
        some = torch.full((2, 2, 3, 9), math.nan, dtype=dtype)
        where = {"heads": [3, 1], "queries": [69, 0, 33], "keys": list(range(60, 69))}
        call.fill(some, site, **where)
        close(some, read(call, site, **where).to(dtype), tolerance)


def test_fill_writes_into_a_view_and_touches_nothing_else() -> None:
    call = call_of(6, 6)
    store = torch.full((2, 8, 9, 9), 7.0)
    call.fill(store[:, 2:6, 1:7, 2:8])
    close(store[:, 2:6, 1:7, 2:8].clone(), call.pattern())
    store[:, 2:6, 1:7, 2:8] = 7
    assert bool((store == 7).all())


# ------------------------------------------------------------------------------- how it computes


class Largest(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Watches every operation: the largest tensor made, and the elements of all products."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.largest = self.multiplied = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, Tensor) and "view" not in str(func) and "expand" not in str(func):
            if not any(
                made is a
                or (
                    isinstance(a, Tensor)
                    and a.untyped_storage().data_ptr() == made.untyped_storage().data_ptr()
                )
                for a in args
            ):
                self.largest = max(self.largest, made.numel())
            if "mm" in str(func):
                self.multiplied += made.numel()
        return made


def test_no_key_is_ever_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Tensor:
        raise AssertionError("a key was repeated")

    for name in ("repeat_interleave", "repeat"):
        monkeypatch.setattr(Tensor, name, refuse)
    monkeypatch.setattr(torch, "repeat_interleave", refuse)
    call = AttentionCall(
        torch.randn(1, 8, 2, 64), torch.randn(1, 1, 300, 64), torch.randn(1, 1, 300, 64),
        torch.ones(1, 300, dtype=torch.bool),
    )  # fmt: skip
    with Largest() as made:
        call.mix(call.pattern())
        call.fill(torch.empty(1, 8, 2, 300))
        call.fill(torch.empty(1, 1, 2, 300), heads=[5])
    assert made.largest < call.key.numel()


def test_fill_skips_the_upper_triangle_and_works_in_small_tiles(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attention, "_TILES", {"cpu": (16, 16 * 256 * 4 * 2)})
    call = call_of(256, 256)
    out = torch.empty(2, 4, 256, 256, dtype=torch.float16)
    with Largest() as made:
        call.fill(out)
    assert made.multiplied < 0.56 * out.numel()
    assert made.largest <= 16 * 256 * 2
    with Largest() as windowed:
        call_of(256, 256, window=16).fill(out)
    assert windowed.multiplied < 0.13 * out.numel()


def test_only_the_rows_asked_for_are_computed() -> None:
    call = call_of(256, 256)
    with Largest() as made:
        call.pattern(queries=[255], heads=[2])
    assert made.multiplied == 2 * 256


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
        close(wide.fill(out, site), wanted, 1e-13)


def test_reading_leaves_query_key_and_mask_as_they_were() -> None:
    mask = torch.zeros(1, 1, 5, 5).masked_fill(~torch.ones(5, 5).tril().bool(), -INF)
    call = call_of(5, 5, mask, softcap=2.0)
    before = [x.clone() for x in (call.query, call.key, call.value, mask)]
    call.fill(torch.empty(2, 4, 5, 5))
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
    many = torch.stack([call.mix(call.pattern()) for _ in range(3000)]).mean(0)
    torch.testing.assert_close(
        many, replace(call, dropout=0.0).mix(call.pattern()), atol=0.15, rtol=0
    )


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

    where = list(product(range(2), range(4), range(5), range(5)))
    keep = torch.tensor([attends(call, *at) for at in where]).view(2, 4, 5, 5)
    s = query @ key[:, [0, 0, 1, 1]].transpose(-1, -2) / math.sqrt(3)
    s = s if call.softcap is None else call.softcap * (s / call.softcap).tanh()
    s = s.exp() * keep  # small numbers: an exponential needs no maximum taken off
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


# --------------------------------------------------------------------------------------- errors


def test_a_mask_of_three_dimensions_is_refused() -> None:
    with pytest.raises(InputError, match=r"shape \(2, 3, 3\) has 3 dimensions\. Give a 4-D mask"):
        call_of(3, 3, torch.ones(2, 3, 3))


def test_query_heads_that_cannot_share_key_heads_are_refused() -> None:
    q, k = torch.zeros(1, 3, 2, 4), torch.zeros(1, 2, 2, 4)
    with pytest.raises(InputError, match="3 query heads cannot share 2 key heads evenly"):
        AttentionCall(q, k, k)


@pytest.mark.parametrize("share", [1, 2])
def test_a_single_query_of_a_window_without_a_mask_is_the_last_token(share: int) -> None:
    torch.manual_seed(share)
    call = AttentionCall(
        torch.randn(1, 2, 1, 3), torch.randn(1, 2 // share, 6, 3), torch.randn(1, 2 // share, 6, 3),
        window=4,
    )  # fmt: skip
    close(call.pattern(), naive(call)[1])
    close(call.fill(torch.full((1, 2, 1, 6), math.nan)), naive(call)[1])
