"""What all metrics share: kinds of input, blocks, dask, precision."""

import subprocess
import sys
import tracemalloc
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr

from recipes import _metric, flow, heads
from tests.matrices import ALL, DIMS, TOKEN, arguments, causal, store


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
    p = store([100] * 40, n=100, dtype="float32")
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


# --------------------------------------------------------------------------------- precision


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


def test_recipes_of_metrics_and_plots_import_neither_torch_nor_dask() -> None:
    code = (
        "import sys, numpy as np, recipes.heads, recipes.flow, recipes.plots; "
        "recipes.heads.entropy(np.eye(3)); print({'torch', 'dask'} & set(sys.modules))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "set()"
