"""Cells read tile by tile equal NumPy's, whatever is asked; and other readers read the same."""

from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt
import pytest
import xarray as xr
import zarr
from hypothesis import given
from hypothesis import strategies as st
from zarr.codecs import (
    BytesCodec,
    Crc32cCodec,
    GzipCodec,
    TransposeCodec,
    ZstdCodec,
)

from probe import opening, store
from probe.fetching import FEW, fetch
from probe.schema import problem_last
from probe.sharding import Grid, grid, index
from tests.stores import FULL, TINY, fill

SHAPE, SHARD, TILE = (5, 7, 11), (2, 8, 6), (1, 4, 3)
CODECS: dict[str, Any] = {
    "crc": {"compressors": [ZstdCodec(level=-3), Crc32cCodec()]},
    "zstd": {"compressors": [ZstdCodec(level=1, checksum=True)]},
    "problem last": {
        "chunks": (2, 4, 3),
        "filters": [TransposeCodec(order=problem_last(3))],
        "compressors": [ZstdCodec(level=-7), Crc32cCodec()],
    },
}

Array = npt.NDArray[Any]


@pytest.fixture(scope="module", params=list(CODECS))
def made(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Grid, Array]:
    """An array of which some tiles and one shard hold nothing, and what it holds."""
    folder = tmp_path_factory.mktemp("fetching")
    values = np.random.default_rng(0).normal(size=SHAPE).astype("float16")
    values[0, :4], values[2:4, :, 6:], values[4, 4:, 3:6] = -np.inf, -np.inf, -np.inf
    array = zarr.create_array(
        folder,
        name="x",
        shape=SHAPE,
        shards=SHARD,
        dtype="float16",
        fill_value=-np.inf,
        **{"chunks": TILE} | CODECS[request.param],
    )
    array[...] = values
    own = grid("x", array)
    assert own is not None
    assert not (folder / own.key((1, 0, 1))).exists()
    return folder, own, values


def keys(n: int) -> st.SearchStrategy[Any]:
    places = st.integers(-n, n - 1)
    return st.one_of(places, st.slices(n), st.lists(places, max_size=9).map(np.array))


@pytest.mark.parametrize("few", [0, FEW])  # by threads, and by who asks
@given(key=st.tuples(*map(keys, SHAPE)))
def test_any_cells(made: tuple[Path, Grid, Array], few: int, key: Any) -> None:
    folder, own, values = made
    key = tuple(k.astype(int) if isinstance(k, np.ndarray) else k for k in key)
    whole = np.ix_(*(np.atleast_1d(np.arange(n)[k]) for n, k in zip(SHAPE, key, strict=True)))
    single = tuple(axis for axis, k in enumerate(key) if isinstance(k, int))
    with mock.patch("probe.fetching.FEW", few):
        found = fetch(folder, own, SHAPE, key)
    assert found.dtype == values.dtype
    np.testing.assert_array_equal(found, values[whole].squeeze(single))


def test_a_place_that_is_not_there(made: tuple[Path, Grid, Array]) -> None:
    folder, own, _ = made
    with pytest.raises(IndexError, match="5 is out of bounds"):
        fetch(folder, own, SHAPE, (5, 0, slice(None)))


@pytest.mark.parametrize("sites", [("pattern",), ("scores", "z")])
@pytest.mark.parametrize("labels", [TINY, FULL])
def test_stores_read_as_zarr_python_reads_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, labels: Any, sites: tuple[str, ...]
) -> None:
    fill(tmp_path / "s", labels, *sites)
    ours = store.open(tmp_path / "s").load()
    monkeypatch.setattr(opening, "grid", lambda name, array: None)
    xr.testing.assert_identical(ours, store.open(tmp_path / "s").load())


OTHERWISE: list[dict[str, Any]] = [
    {"filters": [TransposeCodec(order=(0, 1, 2, 4, 3))]},
    {"serializer": BytesCodec(endian="big")},
    {"chunk_key_encoding": {"name": "default", "separator": "."}},
    {"shards": {"shape": (1, 2, 4, 6, 6), "index_location": "start"}},
    {"compressors": [GzipCodec()]},
]


@pytest.mark.parametrize("how", OTHERWISE)
def test_what_somebody_wrote_otherwise_is_left_to_zarr_python(how: dict[str, Any]) -> None:
    options: Any = {"shards": (1, 2, 4, 6, 6), "compressors": CODECS["crc"]["compressors"]} | how
    array = zarr.create_array(
        {}, shape=(3, 2, 4, 6, 6), chunks=(1, 1, 2, 6, 6), dtype="float16", **options
    )
    assert grid("x", array) is None


def test_a_shard_replaced_while_it_is_read_gives_one_or_the_other(
    made: tuple[Path, Grid, Array], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, own, values = made
    file = folder / own.key((0, 0, 0))
    kept = file.read_bytes()

    def replaced(grid: Grid, end: bytes) -> Array:
        file.with_suffix(".new").write_bytes(b"of another writer")
        file.with_suffix(".new").replace(file)
        return index(grid, end)

    monkeypatch.setattr("probe.fetching.index", replaced)
    found = fetch(folder, own, SHAPE, (1, slice(None), slice(6)))
    file.write_bytes(kept)
    np.testing.assert_array_equal(found, values[1, :, :6])


@pytest.mark.parametrize("labels", [TINY, FULL])
def test_other_readers_read_the_same(tmp_path: Path, labels: Any) -> None:
    tensorstore = pytest.importorskip("tensorstore")
    pytest.importorskip("zarrs")
    fill(tmp_path / "s", labels)
    ours = store.open(tmp_path / "s").pattern.values
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{tmp_path}/s/pattern/"}}
    np.testing.assert_array_equal(tensorstore.open(spec).result().read().result(), ours)
    with zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}):
        np.testing.assert_array_equal(zarr.open_array(f"{tmp_path}/s/pattern")[...], ours)
