"""Flow inside a block: the document's arithmetic, the calibrated scores, and naive loops."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

from recipes import flow

N = 6
PREVIOUS = np.eye(N)[[0, 0, 1, 2, 3, 4]]
TO_FIRST = np.eye(N)[[0] * N]
DOCUMENT = np.array(  # the example matrix of the published architecture
    [
        [1.0, 0.0, 0.0, 0.0, 0.0, 0.0],
        [0.3, 0.7, 0.0, 0.0, 0.0, 0.0],
        [0.2, 0.3, 0.5, 0.0, 0.0, 0.0],
        [0.1, 0.2, 0.3, 0.4, 0.0, 0.0],
        [0.1, 0.1, 0.2, 0.3, 0.3, 0.0],
        [0.1, 0.1, 0.1, 0.2, 0.2, 0.3],
    ]
)
BY_HEAD = [flow.flow, flow.hub, flow.skip, flow.sequential, flow.long_range, flow.hub_lift]


def uniform(n: int) -> Any:
    return np.tril(np.ones((n, n))) / np.arange(1, n + 1)[:, None]


def test_the_documents_example_matrix_has_its_scores() -> None:
    assert float(flow.flow(DOCUMENT)) == pytest.approx(2.8 / 6)  # .4667
    assert DOCUMENT.sum(axis=0) == pytest.approx([1.8, 1.4, 1.1, 0.9, 0.5, 0.3])
    assert float(flow.hub(DOCUMENT)) == pytest.approx(0.26)
    assert int(flow.hub_position(DOCUMENT)) == 0
    assert float(flow.skip(DOCUMENT)) == pytest.approx(0.1)


def test_the_documents_own_flow_test_is_a_trap_that_no_implementation_passes() -> None:
    sequential = np.eye(N)
    sequential[range(1, N), range(N - 1)] = 1.0  # rows sum to 2: this is not attention
    assert float(flow.flow(sequential)) == pytest.approx(5 / 11)  # it asserts > 0.8
    assert float(flow.flow(np.ones((N, N)) / N)) == pytest.approx(15 / 21)  # it asserts < 0.3


def test_five_sixths_is_the_most_flow_that_six_rows_allow() -> None:
    assert float(flow.flow(PREVIOUS)) == pytest.approx(5 / 6)
    assert float(flow.flow(TO_FIRST)) == pytest.approx(5 / 6)
    assert float(flow.flow(np.eye(N))) == 0.0


def test_one_hub_has_the_greatest_variance_and_one_third_skips() -> None:
    assert float(flow.hub(TO_FIRST)) == pytest.approx(5.0)
    assert float(flow.hub(0.2 * TO_FIRST)) == pytest.approx(5.0 * 0.2**2)
    assert float(flow.hub(np.eye(N))) == 0.0
    assert float(flow.skip(TO_FIRST)) == pytest.approx(1 / 3)
    assert int(flow.hub_position(np.eye(N)[[0, 1, 2, 2, 2, 2]])) == 2


def test_nulls_are_the_scores_of_uniform_causal_attention() -> None:
    assert flow.nulls(6) == pytest.approx((0.5917, 0.5917, 1 / 6), abs=5e-5)
    assert flow.nulls(2) == pytest.approx((0.25, 0.25, 0.5))
    assert math.isnan(flow.nulls(1).skip)
    with pytest.raises(ValueError, match="at least 1 row, got n=0"):
        flow.nulls(0)


@pytest.mark.parametrize("n", [3, 4, 6, 11])
@pytest.mark.parametrize("mass", [1.0, 0.2])
def test_calibrated_scores_are_zero_under_uniform_attention(n: int, mass: float) -> None:
    p = mass * uniform(n)
    assert float(flow.sequential(p)) == pytest.approx(0.0, abs=1e-12)
    assert float(flow.hub_lift(p)) == pytest.approx(0.0, abs=1e-12)
    np.testing.assert_allclose(flow.lift(p), [1.0] * (n - 2) + [math.nan] * 2)
    if n >= 4:
        assert float(flow.long_range(p)) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("n", [4, 6, 11])
@pytest.mark.parametrize("mass", [1.0, 0.2])
def test_calibrated_scores_are_one_at_their_ideal(n: int, mass: float) -> None:
    previous = mass * np.eye(n)[[0, *range(n - 1)]]
    to_first = mass * np.eye(n)[[0] * n]
    assert float(flow.sequential(previous)) == pytest.approx(1.0)
    assert float(flow.long_range(to_first)) == pytest.approx(1.0)
    assert float(flow.hub_lift(to_first)) == pytest.approx(1.0)
    late_hub = uniform(n)
    late_hub[2:] = mass * np.eye(n)[1]
    assert float(flow.hub_lift(late_hub)) == pytest.approx(1.0)
    assert int(np.nanargmax(flow.lift(late_hub))) == 1


def test_calibrated_scores_go_below_zero_when_less_than_chance() -> None:
    assert float(flow.sequential(TO_FIRST)) == pytest.approx((0 - 77 / 240) / (1 - 77 / 240))
    assert float(flow.long_range(PREVIOUS)) == pytest.approx(-1.5)


def test_blocks_too_small_to_judge_are_nan() -> None:
    one, two, three = (uniform(n) for n in (1, 2, 3))
    assert np.isnan([float(score(one)) for score in (flow.skip, flow.sequential)]).all()
    assert np.isnan([float(score(two)) for score in (flow.sequential, flow.hub_lift)]).all()
    assert np.isnan([float(flow.long_range(block)) for block in (one, two, three)]).all()
    assert float(flow.flow(one)) == 0.0


def test_a_block_without_attention_is_nan_where_the_published_code_says_zero() -> None:
    empty = np.zeros((N, N))
    assert np.isnan([float(score(empty)) for score in BY_HEAD]).all()
    assert np.isnan(flow.lift(empty)).all()
    assert int(flow.hub_position(empty)) == -1


def test_rows_with_under_a_hundredth_on_earlier_rows_are_left_out() -> None:
    p = PREVIOUS.copy()
    p[3] = [0.009, 0, 0, 0.991, 0, 0]  # says nothing about where it looks back to
    assert float(flow.sequential(p)) == pytest.approx(1.0)
    p[3] = [0.011, 0, 0, 0.989, 0, 0]
    assert float(flow.sequential(p)) < 0.8
    p[5] = [0.009, 0, 0, 0, 0, 0.991]
    assert math.isnan(float(flow.long_range(p)))
    assert math.isnan(flow.lift(p)[3])  # rows 4 and 5 follow, but only 4 still reads


def test_nan_in_the_attention_shows_in_every_score() -> None:
    p = uniform(N)
    p[5, :] = np.nan
    assert np.isnan([float(score(p)) for score in BY_HEAD]).all()


# The definitions, as loops over one n x n matrix.


def loop_flow(p: Any) -> float:
    earlier = sum(p[i, j] for i in range(len(p)) for j in range(i))
    total = sum(p[i, j] for i in range(len(p)) for j in range(i + 1))
    return earlier / total if total else math.nan


def loop_hub(p: Any) -> float:
    return float(np.var(p.sum(axis=0))) if p.any() else math.nan


def loop_skip(p: Any) -> float:
    half = list(p[-1, : len(p) // 2])
    return sum(half) / len(half) if half and p.any() else math.nan


def loop_shares(p: Any) -> dict[int, Any]:
    masses = {i: sum(p[i, :i]) for i in range(1, len(p))}
    return {i: [p[i, j] / mass for j in range(i)] for i, mass in masses.items() if mass >= 0.01}


def loop_sequential(p: Any) -> float:
    rows = {i: share for i, share in loop_shares(p).items() if i >= 2}
    if not rows:
        return math.nan
    seen = sum(share[i - 1] for i, share in rows.items()) / len(rows)
    null = sum(1 / i for i in rows) / len(rows)
    return float((seen - null) / (1 - null))


def loop_long_range(p: Any) -> float:
    n, shares = len(p), loop_shares(p)
    if n < 4 or n - 1 not in shares:
        return math.nan
    seen = sum(share for j, share in enumerate(shares[n - 1]) if n - 1 - j >= 3)
    null = (n - 3) / (n - 1)
    return float((seen - null) / (1 - null))


def loop_lift(p: Any) -> list[float]:
    shares = loop_shares(p)
    readers = [[i for i in shares if i > j] for j in range(len(p))]
    return [
        sum(i * shares[i][j] for i in rows) / len(rows) if len(rows) >= 2 else math.nan
        for j, rows in enumerate(readers)
    ]


def loop_hub_lift(p: Any) -> float:
    lifts = loop_lift(p)
    if all(map(math.isnan, lifts)):
        return math.nan
    best = int(np.nanargmax(lifts))
    rows = [i for i in loop_shares(p) if i > best]
    return float((lifts[best] - 1) / (sum(rows) / len(rows) - 1))


LOOPS = dict(
    zip(
        BY_HEAD,
        [loop_flow, loop_hub, loop_skip, loop_sequential, loop_long_range, loop_hub_lift],
        strict=True,
    )
)


def random_block(seed: int, n: int) -> Any:
    """Causal rows of very different mass, some of it outside the block, some rows empty."""
    rng = np.random.default_rng(seed)
    p = np.tril(rng.exponential(size=(n, n)) ** 3)
    p /= p.sum(-1, keepdims=True)
    p *= rng.choice([0.0, 0.02, 0.5, 1.0], size=(n, 1))
    return p


BLOCKS = st.builds(random_block, st.integers(0, 2**32 - 1), st.integers(1, 8))


@pytest.mark.parametrize("score", BY_HEAD)
@settings(max_examples=60, deadline=None)
@given(p=BLOCKS)
def test_scores_equal_naive_loops(score: Callable[..., Any], p: Any) -> None:
    assert float(score(p)) == pytest.approx(LOOPS[score](p), rel=1e-9, abs=1e-9, nan_ok=True)


@settings(max_examples=60, deadline=None)
@given(p=BLOCKS)
def test_lift_and_hub_position_equal_naive_loops(p: Any) -> None:
    np.testing.assert_allclose(flow.lift(p), loop_lift(p), rtol=1e-9)
    expected = int(np.argmax(p.sum(axis=0))) if p.any() else -1
    assert int(flow.hub_position(p)) == expected


@settings(max_examples=60, deadline=None)
@given(p=BLOCKS)
def test_calibrated_scores_never_exceed_one(p: Any) -> None:
    for score in (flow.sequential, flow.long_range, flow.hub_lift):
        value = float(score(p))
        assert math.isnan(value) or value <= 1 + 1e-9


def test_composite_is_min_max_over_layers_and_heads_within_each_problem() -> None:
    rng = np.random.default_rng(0)
    p = np.tril(rng.random((2, 3, 4, N, N)))
    expected = 0.4 * flow.flow(p)
    for weight, part in ((0.4, flow.hub(p)), (0.2, flow.skip(p))):
        low = part.min(axis=(1, 2), keepdims=True)
        expected += weight * (part - low) / (part.max(axis=(1, 2), keepdims=True) - low)
    np.testing.assert_allclose(flow.composite(p), expected)
    dims = ("problem", "layer", "head", "query", "key")
    labelled = flow.composite(xr.DataArray(p, dims=dims))
    assert labelled.dims == dims[:3]
    assert labelled.name == "composite"
    np.testing.assert_allclose(labelled, expected)
    chunked = xr.DataArray(p, dims=dims).chunk(problem=1, layer=2)
    np.testing.assert_allclose(flow.composite(chunked).compute(), expected)
    one_layer = xr.DataArray(p[:, 0], dims=("problem", "head", "query", "key"))
    np.testing.assert_allclose(flow.composite(one_layer), flow.composite(p[:, :1])[:, 0])


def test_composite_takes_weights_and_equal_heads_have_no_spread() -> None:
    p = np.tile(uniform(N), (1, 3, 1, 1))
    np.testing.assert_allclose(flow.composite(p), 0.4 * flow.nulls(N).flow)
    np.testing.assert_allclose(flow.composite(p, (1.0, 0.0, 0.0)), flow.nulls(N).flow)


def test_composite_leaves_heads_without_attention_out_of_the_range() -> None:
    p = np.stack([uniform(N), TO_FIRST, np.zeros((N, N))])[None]
    scores = flow.composite(p)
    assert math.isnan(scores[0, 2])
    np.testing.assert_allclose(scores[:, :2], flow.composite(p[:, :2]))
    assert np.isnan(flow.composite(np.zeros((1, 2, N, N)))).all()


def test_composite_needs_heads_to_compare() -> None:
    with pytest.raises(ValueError, match=r"before query and key p has \(3,\)"):
        flow.composite(np.zeros((3, N, N)))
    with pytest.raises(ValueError, match=r"before query and key p has \('problem',\)"):
        flow.composite(xr.DataArray(np.zeros((3, N, N)), dims=("problem", "query", "key")))


@pytest.mark.parametrize("score", [*BY_HEAD, flow.hub_position, flow.lift])
def test_a_block_that_is_not_square_is_refused(score: Callable[..., Any]) -> None:
    message = rf"{score.__name__} needs a square block, got 2 queries x 6 keys. Select the same"
    with pytest.raises(ValueError, match=message):
        score(uniform(N)[-2:])
    with pytest.raises(ValueError, match=message):
        score(xr.DataArray(uniform(N)[-2:], dims=("query", "key")))


def ragged(sizes: list[int], n: int = 8) -> xr.DataArray:
    """Problems of the given sizes at positions 10, 11, ..., padded with -1; 0 is a failed one."""
    p = np.zeros((len(sizes), 2, n, n))
    position = np.full((len(sizes), n), -1, dtype=np.int32)
    for problem, size in enumerate(sizes):
        for head in range(2):
            p[problem, head, :size, :size] = random_block(100 * problem + head, size)
        position[problem, :size] = 10 + np.arange(size)
    coords = {
        "query_position": (("problem", "query"), position),
        "key_position": (("problem", "key"), position),
        "status": ("problem", np.array([1 if size else 2 for size in sizes], dtype=np.uint8)),
    }
    return xr.DataArray(p, dims=("problem", "head", "query", "key"), coords=coords)


@pytest.mark.parametrize("score", [*BY_HEAD, flow.hub_position])
def test_ragged_problems_are_measured_over_their_own_squares(score: Callable[..., Any]) -> None:
    sizes = [6, 3, 0, 8, 3, 1]
    p = ragged(sizes)
    got = score(p)
    nothing = -1 if score is flow.hub_position else math.nan
    for problem, size in enumerate(sizes):
        own = score(p.values[problem, :, :size, :size]) if size else [nothing] * 2
        np.testing.assert_array_equal(got[problem], own)


def test_lift_of_a_ragged_problem_is_nan_beyond_its_own_keys() -> None:
    p = ragged([6, 3])
    got = flow.lift(p)
    assert got.dims == ("problem", "head", "key")
    assert "key_position" in got.coords
    np.testing.assert_array_equal(got[0, :, :6], flow.lift(p.values[0, :, :6, :6]))
    assert np.isnan(got[0, :, 6:]).all()
    assert np.isnan(got[1, :, 3:]).all()


@pytest.mark.parametrize("score", [*BY_HEAD, flow.hub_position, flow.lift])
def test_dask_measures_one_size_lazily_and_refuses_several(score: Callable[..., Any]) -> None:
    p = ragged([6, 0, 6])
    lazy = score(p.chunk(problem=1))
    assert lazy.chunks is not None
    xr.testing.assert_identical(lazy.compute(), score(p))
    message = rf"{score.__name__} cannot measure blocks of several sizes \[3, 6\] with dask. Open"
    with pytest.raises(ValueError, match=message):
        score(ragged([6, 3]).chunk(problem=1))


def test_dask_with_only_failed_problems_is_undefined() -> None:
    p = ragged([0, 0]).chunk(problem=1)
    assert np.isnan(flow.flow(p).compute()).all()
    assert (flow.hub_position(p).compute() == -1).all()


def test_rows_and_columns_at_different_positions_are_refused() -> None:
    p = ragged([6, 6])
    moved = p.assign_coords(key_position=p["key_position"].where(p["key_position"] < 0, 1))
    message = "the same positions, padded at the end; query_position and key_position differ"
    with pytest.raises(ValueError, match=message):
        flow.flow(moved)
    padded_in_front = p.isel(query=slice(None, None, -1), key=slice(None, None, -1))
    with pytest.raises(ValueError, match=message):
        flow.flow(padded_in_front)
