"""What is selected of a call, written in tiles, and at what cost."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from probe import filling, inplace
from probe.attention import AttentionCall
from probe.filling import fill
from probe.indexing import Index
from probe.matrices import Matrices
from tests.naive import SITES, Case, Site, call_of, cases, close, naive, pick, read


@settings(max_examples=200, deadline=None)
@given(cases(), st.sampled_from([(1, 1), (2, 64), (3, 256), (64, 1 << 20)]), st.booleans())
def test_fill_writes_what_scores_and_pattern_return_whatever_the_tiles(
    case: Case, tiles: tuple[int, int], half: bool
) -> None:
    dtype = torch.float16 if half else torch.float32
    where = {"heads": case.heads, "queries": case.queries, "keys": case.keys}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(filling, "_TILES", {"cpu": tiles})
        for site, whole in zip(SITES, reversed(naive(case.call)), strict=True):
            wanted = pick(whole, **where)
            out = torch.full(wanted.shape, math.nan, dtype=dtype)
            assert fill(case.call, out, site, **where) is out
            close(out, wanted.to(dtype), 2e-3 if half else 1e-5)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(0, 150),
    batch=st.integers(0, 3),
    groups=st.integers(1, 3),
    share=st.integers(1, 3),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    budget=st.sampled_from([1, 1 << 14, 1 << 21]),
    apart=st.booleans(),
)
def test_plain_calls_are_filled_as_any_other(
    n: int, batch: int, groups: int, share: int, dtype: torch.dtype, budget: int, apart: bool
) -> None:
    """In memory of its own, and between numbers of others, where heads and items are apart."""
    made = torch.Generator().manual_seed(n)
    query, key = (
        torch.randn(batch, n, heads, 8, generator=made, dtype=torch.float64).to(dtype)
        for heads in (groups * share, groups)
    )
    call = AttentionCall(query.transpose(1, 2), key.transpose(1, 2), key.transpose(1, 2))
    assert call.plain
    masked = replace(call, mask=torch.ones(batch, n, dtype=torch.bool))
    assert not masked.plain
    more = torch.full((batch, 2 * groups * share, n, n), math.nan, dtype=call.dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(filling, "_TILES", {"cpu": (64, budget)})
        for site in SITES:
            out = more[:, ::2] if apart else torch.full(call.shape, math.nan, dtype=call.dtype)
            assert fill(call, out, site) is out
            close(out, read(masked, site), 1e-6)
    assert bool(more[:, 1::2].isnan().all())


@pytest.mark.parametrize("copied", [True, False])
@pytest.mark.parametrize("rows", [slice(0, 1), slice(20, 52), slice(-70, None), slice(30, 30)])
@pytest.mark.parametrize(("batch", "heads", "groups"), [(1, 2, 1), (2, 6, 3), (0, 2, 2)])
def test_few_rows_are_filled_with_and_without_a_copy_of_the_keys(
    batch: int, heads: int, groups: int, rows: slice, copied: bool
) -> None:
    """Keys lie as models leave them, those of a token together. Known from a call with a mask that
    hides nothing, which is read in the general way."""
    made = torch.Generator().manual_seed(heads)
    query, key = (torch.randn(batch, 90, n, 8, generator=made) for n in (heads, groups))
    call = AttentionCall(query.transpose(1, 2), key.transpose(1, 2), key.transpose(1, 2))
    masked = replace(call, mask=torch.ones(batch, 90, dtype=torch.bool))
    stop = rows.indices(90)[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(filling, "_MANY_KEYS", math.inf if copied else 0)
        for site, n in ((site, n) for site in SITES for n in (90, stop)):
            shape = (batch, heads, len(range(*rows.indices(90))), n)
            out = torch.full(shape, math.nan)
            fill(call, out, site, queries=rows, keys=slice(0, n))
            close(out, read(masked, site, queries=rows, keys=slice(0, n)), 1e-6)


def test_plain_calls_keep_their_precision_under_autocast() -> None:
    call = call_of(70, 70)
    assert call.plain
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = fill(call, torch.empty(2, 4, 70, 70))
    assert torch.equal(found, fill(call, torch.empty(2, 4, 70, 70)))


def test_the_keys_asked_for_never_change_the_softmax() -> None:
    call = call_of(4, 4)
    assert torch.equal(call.pattern(keys=[3, 1]), call.pattern()[..., [3, 1]])


@pytest.mark.parametrize("kind", ["none", "2-D", "bool", "float", "window", "by head"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_future_stays_hidden_whatever_is_there(dtype: torch.dtype, kind: str) -> None:
    """Of a key of NaN and of infinite ones, and what may be seen keeps its bits."""
    past = torch.ones(1, 1, 70, 70, dtype=torch.bool).tril()
    masks: dict[str, dict[str, Any]] = {
        "none": {},
        "2-D": {"mask": torch.ones(1, 70, dtype=torch.bool)},
        "bool": {"mask": past},
        "float": {"mask": torch.zeros(1, 1, 70, 70).masked_fill(~past, -torch.inf)},
        "window": {"window": 70},
        "by head": {"mask": past.expand(1, 2, 70, 70)},
    }
    query, key = torch.randn(
        2, 1, 2, 70, 4, generator=torch.Generator().manual_seed(0), dtype=dtype
    )
    key[..., 1, :], key[..., 68, :], key[..., 69, :] = math.nan, math.inf, -math.inf
    call = AttentionCall(query, key, key, **masks[kind])
    found = fill(call, torch.empty(1, 2, 70, 70, dtype=dtype), "scores")
    ahead = torch.ones(70, 70, dtype=torch.bool).triu(1)
    assert bool((found[..., ahead] == -torch.inf).all())
    torch.testing.assert_close(found, call.scores(), equal_nan=True)
    assert bool(found[..., 1:, 1].isnan().all())
    pattern = fill(call, torch.empty(1, 2, 70, 70, dtype=dtype))
    assert pattern[..., 0, 0].tolist() == [[1.0, 1.0]]
    assert not pattern[..., 0, 1:].any()


def test_numbers_on_a_cpu_are_read_whatever_the_default_device() -> None:
    call = call_of(19, 19)
    inplace._triangle.cache_clear()
    with torch.device("meta"):
        found = fill(call, torch.empty(2, 4, 19, 19, device="cpu"))
    close(found, call.pattern())


def test_modes_leave_nothing_behind() -> None:
    inplace._triangle.cache_clear()
    call, out = call_of(19, 19), torch.empty(2, 4, 19, 19)
    with FakeTensorMode(allow_non_fake_inputs=True):
        query = torch.empty(1, 2, 19, 4)
        fill(AttentionCall(query, query, query), torch.empty(1, 2, 19, 19))
        fill(call, out)
    close(fill(call, torch.empty(2, 4, 19, 19)), call.pattern())
    inplace._triangle.cache_clear()
    torch.func.functionalize(lambda q: fill(replace(call, query=q), torch.empty(2, 4, 19, 19)))(
        call.query
    )
    close(fill(call, torch.empty(2, 4, 19, 19)), call.pattern())


def test_memory_of_another_shape_is_refused() -> None:
    for shape in ((4, 2, 19, 19), (3, 4, 19, 19), (2, 5, 19, 19), (2, 4, 19, 20)):
        with pytest.raises(ValueError, match=r"and \(2, 4, 19, 19\) is asked for"):
            fill(call_of(19, 19), torch.empty(shape))


def test_places_that_are_not_there_are_said() -> None:
    call = call_of(6, 6)
    for keys in ([-1], [2, 6]):
        with pytest.raises(IndexError, match=f"index {keys[-1]} is out of range: there are 0 to 5"):
            fill(call, torch.empty(2, 4, 6, len(keys)), keys=keys)
    for heads in ([-1], [4]):
        with pytest.raises(IndexError, match=r"is out of range: there are 0 to 3."):
            call.pattern(heads=heads)


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
        assert fill(call, torch.empty(2, 4, 0, 6), site, queries=nothing).shape == (2, 4, 0, 6)
        assert fill(call, torch.empty(2, 4, 6, 0), site, keys=nothing).shape == (2, 4, 6, 0)
        assert fill(call, torch.empty(2, 0, 6, 6), site, heads=nothing).shape == (2, 0, 6, 6)


def test_one_token_attends_to_itself() -> None:
    call = call_of(1, 1)
    assert torch.equal(call.pattern(), torch.ones(2, 4, 1, 1))
    assert torch.equal(fill(call, torch.empty(2, 4, 1, 1)), torch.ones(2, 4, 1, 1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("site", SITES)
def test_fill_spans_many_tiles_in_every_dtype(
    dtype: torch.dtype, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(filling, "_TILES", {"cpu": (16, 4096)})
    ragged = torch.ones(2, 70, dtype=torch.bool)
    ragged[0, :9] = False
    ragged[1, 50:] = False
    for options in ({}, {"window": 12}, {"mask": ragged}, {"mask": ragged, "window": 12}):
        call = call_of(70, 70, **cast(dict[str, Any], options))
        out = torch.full((2, 4, 70, 70), math.nan, dtype=dtype)
        fill(call, out, site)
        tolerance = max(1e-6, torch.finfo(dtype).eps)
        close(out, read(call, site).to(dtype), tolerance)
        some = torch.full((2, 2, 3, 9), math.nan, dtype=dtype)
        where = {"heads": [3, 1], "queries": [69, 0, 33], "keys": list(range(60, 69))}
        fill(call, some, site, **where)
        close(some, read(call, site, **where).to(dtype), tolerance)


def test_fill_writes_into_a_view_and_touches_nothing_else() -> None:
    call = call_of(6, 6)
    store = torch.full((2, 8, 9, 9), 7.0)
    fill(call, store[:, 2:6, 1:7, 2:8])
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
        fill(call, torch.empty(1, 8, 2, 300))
        fill(call, torch.empty(1, 1, 2, 300), heads=[5])
    assert made.largest < call.key.numel()


def test_fill_skips_the_upper_triangle_and_works_in_small_tiles(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(filling, "_TILES", {"cpu": (16, 16 * 256 * 4 * 2)})
    call = call_of(256, 256)
    out = torch.empty(2, 4, 256, 256, dtype=torch.float16)
    with Largest() as made:
        fill(call, out)
    assert made.multiplied < 0.56 * out.numel()
    width = 256 + call_of(256, 256).query.shape[-1]
    assert made.largest <= 2 * 16 * width * 2  # scores and pattern of a tile, and its queries
    with Largest() as windowed:
        fill(call_of(256, 256, window=16), out)
    assert windowed.multiplied < 0.13 * out.numel()


def test_only_the_rows_asked_for_are_computed() -> None:
    call = call_of(256, 256)
    with Largest() as made:
        call.pattern(queries=[255], heads=[2])
    assert made.multiplied == 2 * 256


def test_more_rows_than_keys_of_a_model_that_sees_the_future() -> None:
    query, key = torch.randn(1, 1, 3, 4), torch.randn(1, 1, 1, 4)
    call = AttentionCall(query, key, key, mask=torch.ones(1, 1, dtype=torch.bool), causal=False)
    assert fill(call, torch.empty(1, 1, 3, 1)).flatten().tolist() == [1, 1, 1]
    assert fill(call, torch.empty(1, 1, 1, 1), queries=[0]).item() == 1


def test_memory_of_more_heads_than_are_asked_for_is_refused() -> None:
    query = torch.randn(1, 2, 3, 4)
    call = AttentionCall(query, query, query)
    for seen in (call, Matrices({"pattern": call.pattern()})):
        for heads in ([0], []):
            asked = rf"has shape \(1, 3, 3, 3\), and \(1, {len(heads)}, 3, 3\) is asked for"
            with pytest.raises(ValueError, match=asked):
                fill(seen, torch.empty(1, 3, 3, 3), heads=heads)
