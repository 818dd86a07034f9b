"""What all metrics share: kinds of input, positions, padding, blocks, dask, precision, errors."""

import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr

from recipes import _metric, flow, heads

DIMS = ("problem", "layer", "head", "query", "key")
PLAIN: dict[str, Callable[..., Any]] = {
    "entropy": heads.entropy,
    "normalised": lambda p, **at: heads.entropy(p, normalised=True, **at),
    "effective_keys": heads.effective_keys,
    "max": heads.concentration,
    "hhi": lambda p, **at: heads.concentration(p, kind="hhi", **at),
    "distance": heads.distance,
    "relative": lambda p, **at: heads.distance(p, relative=True, **at),
    "sink": heads.sink,
    "previous": heads.previous_token,
    "previous_tl": lambda p, **at: heads.previous_token(p, convention="transformerlens", **at),
}
TOKEN: dict[str, Callable[..., Any]] = {
    "duplicate": heads.duplicate_token,
    "induction": heads.induction,
    "induction_tl": lambda p, *x, **at: heads.induction(p, *x, convention="transformerlens", **at),
}
FLOW: dict[str, Callable[..., Any]] = {
    score.__name__: score
    for score in (
        flow.flow,
        flow.hub,
        flow.hub_position,
        flow.skip,
        flow.sequential,
        flow.long_range,
        flow.lift,
        flow.hub_lift,
        flow.composite,
    )
}
HEADS = PLAIN | TOKEN
ALL = HEADS | FLOW


def causal(rng: np.random.Generator, *shape: int) -> Any:
    p = np.tril(rng.exponential(size=shape) ** 2)
    return p / p.sum(-1, keepdims=True)


def store(lengths: list[int], *, n: int, dtype: str = "float64", seed: int = 0) -> xr.DataArray:
    """As `probe.open(...).pattern`: ragged problems padded at the end; length 0 is a failed one."""
    rng = np.random.default_rng(seed)
    p = np.zeros((len(lengths), 2, 3, n, n), dtype)
    position = np.full((len(lengths), n), -1, np.int32)
    for problem, length in enumerate(lengths):
        p[problem, :, :, :length, :length] = causal(rng, 2, 3, length, length)
        position[problem, :length] = np.arange(length)
    coords = {
        "problem": np.array([f"p{i}" for i in range(len(lengths))], dtype=np.dtypes.StringDType()),
        "layer": [3, 5],
        "head": [0, 1, 2],
        "query_position": (("problem", "query"), position),
        "key_position": (("problem", "key"), position),
        "token_id": (("problem", "key"), rng.integers(0, 4, position.shape).astype(np.int32)),
        "length": ("problem", np.array(lengths, np.int32)),
        "status": ("problem", np.where(np.array(lengths) > 0, 1, 2).astype(np.uint8)),
    }
    return xr.DataArray(p, dims=DIMS, coords=coords, name="pattern")


def arguments(name: str, p: xr.DataArray) -> tuple[list[Any], dict[str, Any]]:
    """What a plain array needs to be told and a store says by itself."""
    if name in FLOW:
        return [], {}
    at = {which: p[which].values for which in ("query_position", "key_position")}
    return ([p["token_id"].values] if name in TOKEN else []), at


@pytest.mark.parametrize("name", ALL)
def test_torch_numpy_xarray_and_dask_give_the_same_numbers_in_their_own_kind(name: str) -> None:
    p = store([7, 7, 7], n=7)
    args, at = arguments(name, p)
    from_numpy = ALL[name](p.values, *args, **at)
    from_torch = ALL[name](torch.tensor(p.values), *args, **at)
    labelled = ALL[name](p)
    lazy = ALL[name](p.chunk(problem=2, layer=1))
    assert isinstance(from_numpy, np.ndarray)
    assert isinstance(from_torch, torch.Tensor)
    assert isinstance(labelled, xr.DataArray)
    assert lazy.chunks is not None
    kept = ("key",) if name == "lift" else ()
    assert labelled.dims == lazy.dims == ("problem", "layer", "head", *kept)
    for other in (from_torch.numpy(), labelled.values, lazy.compute().values):
        np.testing.assert_allclose(other, from_numpy, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ALL)
def test_dims_may_come_in_any_order(name: str) -> None:
    p = store([5, 5], n=5)
    expected = ALL[name](p)
    for order in list(permutations(DIMS))[::13]:
        got = ALL[name](p.transpose(*order))
        assert [dim for dim in got.dims if dim != "key"] == [
            dim for dim in order if dim not in ("query", "key")
        ]
        xr.testing.assert_allclose(got.transpose(*expected.dims), expected)


@pytest.mark.parametrize("name", [name for name in ALL if name != "composite"])
def test_a_single_matrix_and_a_single_problem_are_fine(name: str) -> None:
    p = store([5, 4], n=5)
    expected = ALL[name](p)[0]
    xr.testing.assert_allclose(ALL[name](p[0]), expected)
    xr.testing.assert_allclose(ALL[name](p[0, 1, 2]), expected[1, 2])
    args, at = arguments(name, p[0])
    np.testing.assert_allclose(ALL[name](p.values[0, 1, 2], *args, **at), expected[1, 2])


@pytest.mark.parametrize("name", HEADS)
def test_padding_and_failed_problems_change_nothing(name: str) -> None:
    lengths = [4, 0, 9, 1]
    p = store(lengths, n=11)
    got = HEADS[name](p)
    args, at = arguments(name, p)
    np.testing.assert_allclose(HEADS[name](p.values, *args, **at), got)
    for problem, length in enumerate(lengths):
        if length == 0:
            assert np.isnan(got[problem]).all()
            continue
        own = slice(length)
        tokens = [p["token_id"].values[problem, own]] if name in TOKEN else []
        alone = HEADS[name](p.values[problem, :, :, own, own], *tokens)
        np.testing.assert_allclose(got[problem], alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ALL)
def test_what_a_problem_that_is_not_done_holds_is_not_measured(name: str) -> None:
    whole = store([5, 5, 5], n=5)
    written_but_not_done = whole.assign_coords(status=("problem", np.array([1, 0, 1], np.uint8)))
    for p in (written_but_not_done, written_but_not_done.chunk(problem=1)):
        got = ALL[name](p).compute()
        assert (got[1] == -1 if name == "hub_position" else np.isnan(got[1])).all()
        np.testing.assert_array_equal(got[[0, 2]], ALL[name](whole)[[0, 2]])


@pytest.mark.parametrize("name", HEADS)
def test_nan_in_an_existing_row_shows(name: str) -> None:
    p = store([5], n=5).assign_coords(token_id=(("problem", "key"), np.zeros((1, 5), np.int32)))
    p[0, 0, 0, 4, :] = np.nan
    assert np.isnan(HEADS[name](p)[0, 0, 0])


@pytest.mark.parametrize("name", ALL)
def test_blocks_of_any_size_equal_the_one_shot_result(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    p = store([6, 3, 0, 8, 3, 1, 7], n=9)
    whole = ALL[name](p)
    for bound in (1, 2000, 20_000):  # a matrix, some heads, some problems
        monkeypatch.setattr(_metric, "BLOCK_BYTES", bound)
        xr.testing.assert_allclose(ALL[name](p), whole, rtol=1e-12)


@pytest.mark.parametrize("shape", [(5, 3, 4), (7,), (0, 3), (2, 0), ()])
@pytest.mark.parametrize("limit", [0, 1, 4, 5, 12, 100])
def test_blocks_cover_every_matrix_once_within_the_limit(
    shape: tuple[int, ...], limit: int
) -> None:
    seen = np.zeros(shape, int)
    for block in _metric._blocks(shape, limit):
        assert seen[block].size <= max(1, limit)
        seen[block] += 1
    assert (seen == 1).all()


def test_a_store_is_never_loaded_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    p = store([200] * 40, n=200, dtype="float32")
    expected = heads.entropy(p)
    p.chunk(problem=1).to_zarr(tmp_path / "run.zarr", zarr_format=3, consolidated=False)
    opened = xr.open_zarr(tmp_path / "run.zarr", chunks=None, consolidated=False)["pattern"]
    size = opened.nbytes
    del p
    monkeypatch.setattr(_metric, "BLOCK_BYTES", size // 40)
    tracemalloc.start()
    got = heads.entropy(opened)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < size / 4
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_coords_of_what_remains_stay_and_the_metric_gives_the_name() -> None:
    got = heads.entropy(store([3, 2], n=3))
    assert set(got.coords) == {"problem", "layer", "head", "length", "status"}
    assert got.name == "entropy"
    assert got.sel(problem="p1", layer=5, head=2).ndim == 0
    assert set(flow.lift(store([3, 2], n=3)).coords) >= {"key_position", "token_id", "problem"}


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("lazy", [False, True])
def test_a_store_without_problems_gives_an_empty_answer(name: str, lazy: bool) -> None:
    p = store([5, 5], n=5)[:0]
    got = ALL[name](p.chunk() if lazy else p)
    assert got.shape == ((0, 2, 3, 5) if name == "lift" else (0, 2, 3))
    args, at = arguments(name, p)
    assert ALL[name](p.values, *args, **at).shape == got.shape


@pytest.mark.parametrize("name", ALL)
def test_matrices_without_rows_are_undefined(name: str) -> None:
    nothing = np.zeros((2, 3, 0, 0), np.float16)
    tokens = [np.zeros((2, 0), int)] if name in TOKEN else []
    for got in (
        ALL[name](nothing, *tokens),
        ALL[name](torch.tensor(nothing), *tokens).numpy(),
        ALL[name](
            xr.DataArray(nothing, dims=DIMS[1:]), *[xr.DataArray([], dims="key")] * len(tokens)
        ),
    ):
        assert got.shape == ((2, 3, 0) if name == "lift" else (2, 3))
        undefined = got == -1 if name == "hub_position" else np.isnan(got)
        assert undefined.all()


# Precision


@pytest.mark.parametrize("name", [name for name in ALL if name != "hub_position"])
def test_narrow_floats_are_summed_in_float32_and_float64_stays(name: str) -> None:
    p = store([7, 7], n=7)
    args, at = arguments(name, p)
    half = p.astype("float16")
    for given, expected in (
        (half, np.float32),
        (half.astype("float32"), np.float32),
        (p, np.float64),
    ):
        assert ALL[name](given).dtype == expected
        assert ALL[name](given.chunk(problem=1)).dtype == expected
        assert ALL[name](given.values, *args, **at).dtype == expected
    np.testing.assert_array_equal(ALL[name](half), ALL[name](half.astype("float32")))
    brain = torch.tensor(p.values).to(torch.bfloat16)
    got = ALL[name](brain, *args, **at)
    assert got.dtype == torch.float32
    wide = ALL[name](brain.to(torch.float32), *args, **at)
    torch.testing.assert_close(got, wide, rtol=0, atol=0, equal_nan=True)


def test_hub_position_is_int64_in_every_kind() -> None:
    p = store([5, 5], n=5, dtype="float16")
    assert flow.hub_position(p).dtype == flow.hub_position(p.chunk()).dtype == np.int64
    assert flow.hub_position(p.values).dtype == np.int64
    assert flow.hub_position(torch.tensor(p.values)).dtype == torch.int64


def test_a_long_column_of_float16_does_not_stall_where_its_own_sum_does() -> None:
    n = 7473
    p = np.zeros((n, 1), np.float16)
    p[:, 0] = 0.7
    stalled = float(np.cumsum(p[:, 0], dtype=np.float16)[-1]) / n
    assert stalled < 0.3  # adding 0.7 to 2048 gives 2048 again: what a bare half sum would do
    at: dict[str, Any] = {"query_position": np.arange(n), "key_position": [0]}
    assert float(heads.sink(p, **at)) == pytest.approx(float(np.float16(0.7)), rel=1e-5)


def test_gradients_flow_through_a_metric() -> None:
    p = torch.tensor(causal(np.random.default_rng(0), 5, 5), requires_grad=True)
    heads.entropy(p).backward()  # type: ignore[no-untyped-call]
    assert p.grad is not None
    assert bool(torch.isfinite(p.grad).all())


# Positions and tokens


def test_queries_are_the_last_of_the_keys_unless_told() -> None:
    p = causal(np.random.default_rng(1), 8, 8)
    last: dict[str, Any] = {"query_position": [5, 6, 7], "key_position": np.arange(8)}
    np.testing.assert_array_equal(heads.distance(p[-3:]), heads.distance(p[-3:], **last))
    shifted: dict[str, Any] = {"query_position": [15, 16, 17], "key_position": np.arange(10, 18)}
    np.testing.assert_array_equal(
        heads.distance(p[-3:], key_position=np.arange(10, 18)), heads.distance(p[-3:], **shifted)
    )
    labelled = xr.DataArray(p[-3:], dims=("query", "key"))
    np.testing.assert_array_equal(heads.distance(labelled), heads.distance(p[-3:]))
    np.testing.assert_array_equal(
        heads.distance(labelled, key_position=np.arange(10, 18)), heads.distance(p[-3:], **shifted)
    )


def test_arguments_go_before_the_coords_of_a_store() -> None:
    p = store([5, 5], n=5)
    key = p["key_position"] + 1
    bare = p.drop_vars(["query_position", "key_position"])
    got = heads.sink(p, 1, query_position=p["query_position"] + 1, key_position=key)
    xr.testing.assert_allclose(got, heads.sink(bare, 0))
    same = heads.sink(p, 1, query_position=p["query_position"].values + 1, key_position=key.values)
    xr.testing.assert_allclose(got, same)


def test_tokens_of_a_store_need_not_be_repeated() -> None:
    p = store([6, 4], n=6)
    for metric in TOKEN.values():
        xr.testing.assert_identical(metric(p), metric(p, p["token_id"]))
        bare = p.drop_vars("token_id")
        np.testing.assert_array_equal(metric(bare, p["token_id"].values), metric(p))


def test_one_row_of_tokens_serves_all_problems() -> None:
    p = store([6, 6], n=6).drop_vars("token_id")
    tokens = np.array([1, 2, 1, 2, 1, 2])
    for metric in TOKEN.values():
        expected = metric(p.values, np.stack([tokens, tokens]))
        np.testing.assert_allclose(metric(p.values, tokens), expected)
        np.testing.assert_allclose(metric(p, xr.DataArray(tokens, dims="key")), expected)


@pytest.mark.parametrize("name", HEADS)
def test_the_last_rows_of_a_store_equal_the_last_rows_of_its_matrices(name: str) -> None:
    p = store([9, 9], n=9)
    args, _ = arguments(name, p)
    np.testing.assert_allclose(
        HEADS[name](p.isel(query=slice(-6, None))), HEADS[name](p.values[..., -6:, :], *args)
    )


# Errors


@pytest.mark.parametrize("name", [name for name in ALL if name != "composite"])
def test_what_is_no_matrix_is_refused(name: str) -> None:
    tokens: list[Any] = [[1]] if name in TOKEN else []
    with pytest.raises(TypeError, match="takes a tensor, an array or a DataArray, got list"):
        ALL[name]([[1.0]], *tokens)
    with pytest.raises(ValueError, match=r"needs p as \(…, query, key\), got shape \(3,\)"):
        ALL[name](np.zeros(3), *tokens)
    with pytest.raises(ValueError, match=r"got \('query', 'source'\). Rename what stands for key"):
        ALL[name](xr.DataArray(np.eye(2), dims=("query", "source")), *tokens)


def test_more_queries_than_keys_must_say_where_they_are() -> None:
    message = "got 3 queries but only 2 keys, so the queries cannot be the last of the keys. Say"
    p = np.ones((3, 2))
    with pytest.raises(ValueError, match=message):
        heads.entropy(p)
    with pytest.raises(ValueError, match=message):
        heads.entropy(xr.DataArray(p, dims=("query", "key")))


def test_positions_of_another_shape_are_refused() -> None:
    p = np.ones((2, 3, 4, 4))
    with pytest.raises(
        ValueError, match=r"query_position must be \(4,\).* is \(2, 3, 4, 4\), q.* is \(3, 4\)"
    ):
        heads.entropy(p, query_position=np.zeros((3, 4)))
    with pytest.raises(
        ValueError, match=r"key_position must be \(4,\), or \(…, 4\) after p's first"
    ):
        heads.entropy(p, key_position=np.arange(5))


def test_labels_of_other_dims_or_other_problems_are_refused() -> None:
    p = store([5, 5], n=5)
    with pytest.raises(
        ValueError, match=r"token_id needs dims \('problem', 'key'\), got \('layer', 'key'\)"
    ):
        heads.induction(p, xr.DataArray(np.zeros((2, 5), int), dims=("layer", "key")))
    with pytest.raises(ValueError, match="problem"):
        heads.induction(p[:1], p["token_id"])
    with pytest.raises(ValueError, match="problem"):
        heads.induction(p, p["token_id"][::-1])


@pytest.mark.parametrize("name", ["entropy", "flow"])
def test_matrices_cut_into_chunks_are_refused(name: str) -> None:
    p = store([6, 6], n=6)
    message = rf"{name} needs whole matrices, but p is chunked along query. Use p.chunk"
    with pytest.raises(ValueError, match=message):
        ALL[name](p.chunk(query=3))
    with pytest.raises(ValueError, match="chunked along query and key"):
        ALL[name](p.chunk(query=3, key=2))


@pytest.mark.parametrize("lazy", [False, True])
def test_a_store_without_the_queries_own_keys_cannot_compare_tokens(lazy: bool) -> None:
    p = store([6, 6], n=6).isel(query=slice(4, None), key=slice(3))
    for metric in TOKEN.values():
        with pytest.raises(ValueError, match="no query position is among the key positions"):
            metric(p.chunk() if lazy else p)


def test_recipes_of_metrics_and_plots_import_neither_torch_nor_dask() -> None:
    code = (
        "import sys, numpy as np, recipes.heads, recipes.flow, recipes.plots; "
        "recipes.heads.entropy(np.eye(3)); print({'torch', 'dask'} & set(sys.modules))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "set()"
