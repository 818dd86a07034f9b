"""Pieces of stores, and means and spreads over them, against NumPy."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

import probe
from probe import opening, schema, store
from probe.errors import InputError
from recipes import heads
from recipes.moments import Moments, moments, over
from tests.stores import CONFIG, FULL, TINY, create, fill, labels, put, says

MANY = [labels(i, 3 + i % 7) for i in range(23)]
STORES = {"tiny": MANY, "full": FULL}


@pytest.fixture(params=["tiny", "full"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(schema, "TINY_PROBLEMS", 5)
    return str(request.param)


@pytest.fixture
def ds(tmp_path: Path, kind: str) -> xr.Dataset:
    fill(tmp_path / "run.zarr", STORES[kind], "pattern", "z")
    return store.open(tmp_path / "run.zarr")


def test_a_problem_is_trimmed_to_its_own_rows_and_columns(ds: xr.Dataset, kind: str) -> None:
    for i, one in enumerate(STORES[kind]):
        n = one.length
        whole = probe.trimmed(ds, one.id)
        assert whole.pattern.shape == (2, 3, n, n)
        assert whole.z.shape == (2, n, 3, 5)
        assert whole.token.values.tolist() == list(one.token)
        np.testing.assert_array_equal(whole.pattern, ds.pattern.values[i, :, :, :n, :n])
        head = probe.trimmed(ds.pattern.sel(layer=4, head=2), i)
        np.testing.assert_array_equal(head, whole.pattern.sel(layer=4, head=2))
    last = probe.trimmed(ds, -1)
    assert str(last.problem.values) == STORES[kind][-1].id


def test_shards_are_pieces_that_make_the_whole(ds: xr.Dataset, kind: str) -> None:
    step = 5 if kind == "tiny" else 1
    parts = list(probe.shards(ds))
    assert [part.sizes["problem"] for part in parts][:2] == [step, step]
    assert [i for part in parts for i in part.problem.values] == ds.problem.values.tolist()
    for part in parts:
        assert part.sizes["key"] == int(part.length.max())
        own = {dim: slice(part.sizes[dim]) for dim in ("query", "key")}
        known = ds.pattern.sel(problem=part.problem).isel(own)
        np.testing.assert_array_equal(part.pattern, known)


def test_what_is_no_store_has_no_pieces(ds: xr.Dataset) -> None:
    with pytest.raises(InputError, match=r"^there is no problem 99: give 0 to \d+, or an id\.$"):
        probe.trimmed(ds, 99)
    with pytest.raises(InputError, match=r"^there is no problem 'x'\. The first ones: "):
        probe.trimmed(ds, "x")
    message = says(
        "this has no dim problem. Give what probe.open returns, or a selection of it that keeps "
        "its problems."
    )
    for call in (lambda x: probe.trimmed(x, 0), lambda x: list(probe.shards(x))):
        with pytest.raises(InputError, match=message):
            call(ds.isel(problem=0))


@pytest.mark.parametrize("threads", [1, 3])
def test_mean_and_spread_of_patterns_count_only_what_exists(
    ds: xr.Dataset, kind: str, threads: int
) -> None:
    found = over(ds, threads=threads)
    p = ds.pattern.values.astype("float64")
    valid = probe.valid(ds).values[:, None, None]
    count = np.broadcast_to(valid, p.shape).sum(0)
    with np.errstate(invalid="ignore"):
        mean = np.where(valid, p, 0).sum(0) / count
        variance = np.where(valid, (p - mean) ** 2, 0).sum(0) / count
    np.testing.assert_array_equal(found.count.pattern, count)
    np.testing.assert_allclose(found.mean.pattern, mean, rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(found.variance().pattern, variance, rtol=1e-9, atol=1e-15)
    assert found.mean.pattern.dims == ("layer", "head", "query", "key")


def test_any_measure_is_averaged_and_threads_change_nothing(ds: xr.Dataset) -> None:
    def measure(part: xr.Dataset) -> dict[str, Any]:
        return {"entropy": heads.entropy(part.pattern), "sink": heads.sink(part.pattern, 1)}

    one, three = over(ds, measure, threads=1), over(ds, measure, threads=3)
    xr.testing.assert_identical(one.mean, three.mean)
    xr.testing.assert_identical(one.squares, three.squares)
    for name, direct in measure(ds).items():
        np.testing.assert_allclose(one.mean[name], direct.mean("problem"), rtol=1e-6)
        np.testing.assert_allclose(one.std(1)[name], direct.std("problem", ddof=1), rtol=1e-5)
        np.testing.assert_array_equal(one.count[name], direct.notnull().sum("problem"))


def test_failed_problems_and_holes_are_left_out(tmp_path: Path, kind: str) -> None:
    some = STORES[kind]
    with create(tmp_path / "s", some) as writer:
        put(writer, some, [0, 2, 4])
        writer.fail(1, "too long")
    found = over(store.open(tmp_path / "s"), lambda part: {"loss": part.loss})
    assert (int(found.count.loss), float(found.mean.loss)) == (3, 1.0)
    with store.resume(tmp_path / "s", config=CONFIG) as writer:
        put(writer, some, [1])
    assert int(over(store.open(tmp_path / "s"), lambda part: part.loss).count.loss) == 4


def test_a_store_without_finished_problems_has_no_mean(tmp_path: Path) -> None:
    create(tmp_path / "s", TINY).close()
    message = says("the store has no finished problem. Wait, or resume its capture.")
    with pytest.raises(InputError, match=message):
        over(store.open(tmp_path / "s"))


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.one_of(st.floats(-1e3, 1e3), st.just(np.nan)), min_size=1, max_size=12),
    cut=st.integers(0, 12),
    offset=st.sampled_from([0.0, 1e6]),
)
def test_merged_moments_are_those_of_all_values(
    values: list[float], cut: int, offset: float
) -> None:
    x = np.array(values) + offset
    parts = [xr.Dataset({"x": ("problem", one)}) for one in (x[:cut], x[cut:]) if len(one)]
    found: Moments = moments(parts[0])
    for part in parts[1:]:
        found = found.merge(moments(part))
    known = x[~np.isnan(x)]
    assert int(found.count.x) == len(known)
    if len(known):
        np.testing.assert_allclose(found.mean.x, known.mean(), rtol=1e-12)
        np.testing.assert_allclose(found.variance().x, known.var(), rtol=1e-6, atol=1e-7)
    else:
        assert np.isnan(found.mean.x)
        assert np.isnan(found.variance().x)


def test_merged_labels_are_those_of_both() -> None:
    a, b = (
        xr.Dataset(
            {"x": (("problem", "layer"), [values]), "y": ("problem", [values[0]])},
            {"layer": [0, 1], "kind": ("layer", ["a", last]), "shard": shard, "same": 7},
        )
        for values, last, shard in (([1.0, np.nan], "b", 1), ([3.0, 4.0], "c", 2))
    )
    both = moments(a).merge(moments(b[["x"]]))
    assert set(both.mean.coords) == {"layer", "same"}
    assert set(both.mean.data_vars) == {"x"}
    assert both.mean.x.values.tolist() == [2.0, 4.0]
    assert both.count.x.values.tolist() == [2, 1]
    wide, narrow = moments(a[["x"]]), moments(b[["x"]].isel(layer=0, drop=True))
    merged = wide.merge(narrow)
    assert merged.mean.x.values.tolist() == [2.0, 3.0]
    assert merged.squares.x.values.tolist() == [2.0, 0.0]


@pytest.mark.parametrize("measured", [False, True])
def test_no_label_of_a_shard_is_read_twice_and_no_text(
    ds: xr.Dataset, measured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[str] = []
    real = opening.Label._read

    def read(self: opening.Label, key: Any) -> Any:
        reads.append(self._name)
        return real(self, key)

    def measure(part: xr.Dataset) -> dict[str, Any]:
        return {"pattern": part.pattern, "entropy": heads.entropy(part.pattern)}

    shards = len(list(probe.shards(ds)))
    monkeypatch.setattr(opening.Label, "_read", read)
    over(ds, measure if measured else None)
    needed = ["query_position", "key_position", "status", *(["length", "loss"] if measured else [])]
    assert Counter(reads) == dict.fromkeys(needed, shards)


@pytest.mark.parametrize(
    "where", [{"layer": 0}, {"head": 1}, {"query": -1}, {"key": 0}, {"query": 1, "key": 0}], ids=str
)
def test_what_is_selected_or_turned_keeps_its_dims(
    ds: xr.Dataset, where: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("recipes.moments.BLOCK_BYTES", 1)  # a layer at a time
    some = ds.isel(where).transpose("problem", "head", ..., missing_dims="ignore")
    found, whole = over(some), over(ds)
    assert found.mean.pattern.dims == some.pattern.dims[1:]
    for one, known in zip(
        (found.mean, found.squares, found.count),
        (whole.mean, whole.squares, whole.count),
        strict=True,
    ):
        known = known.pattern.isel(where).transpose(*one.pattern.dims)
        np.testing.assert_allclose(one.pattern, known, rtol=1e-12, atol=1e-15)


def test_a_measure_may_not_be_named_as_its_own_dim(ds: xr.Dataset) -> None:
    with pytest.raises(ValueError, match="same name as one of its coordinates"):
        over(ds, lambda part: part.loss.rename("problem"))


def test_matrices_lie_in_memory_in_the_order_of_their_dims(ds: xr.Dataset) -> None:
    """So sums of float16 over queries and keys are kept in float32 by NumPy."""
    for where in ({}, {"layer": 0}, {"problem": slice(0, 5), "head": 1}):
        assert ds.pattern.isel(where).values.flags.c_contiguous
