"""Opening a store: everything lazy but labels, and what is damaged an error that says where."""

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt
import xarray as xr
import zarr
from xarray.backends import BackendArray
from xarray.core import indexing

from probe.arrays import data_arrays, dims, together
from probe.errors import InputError, StoreError
from probe.fetching import fetch
from probe.places import Folder, Place, place
from probe.schema import DONE, EMPTY, decoded
from probe.sharding import expected, grid
from probe.stories import described
from probe.verifying import damage, labels_damaged, require_held


def open(path: object, *, chunks: Literal["shards"] | None = None) -> xr.Dataset:
    """Open a store for reading; nothing is loaded but labels.

    Args:
        path: Folder of the store, or a zarr store object.
        chunks: "shards" for dask arrays of which each chunk is one shard, the piece that is written
            and read best; None for no dask. (Plain `xarray.open_zarr(chunks={})` takes the inner
            chunks: thousands of tasks for each shard.)

    Returns:
        The captured arrays, lazy, with their labels as coordinates (names, dims and dtypes: see
        `probe.schema`). Problems that have not run are left out, so a store that is still being
        written shows only what is finished; failed ones have status 2, their reason in `error`,
        and matrices as empty as if nothing were attended.

    Raises:
        StoreError: There is no store, it is not ours, it is of a newer version, or it is damaged.
            A shard that is missing or damaged is found when it is read.
        InputError: chunks is something else, or dask is missing.

    Example:
        >>> ds = probe.open("run.zarr")
        >>> ds.pattern.sel(problem="0", layer=1, head=3).shape
        (10, 10)
    """
    if chunks not in (None, "shards"):
        raise InputError(f"chunks={chunks!r}. Choose 'shards', or None for no dask.")
    if chunks and importlib.util.find_spec("dask") is None:
        raise InputError("chunks='shards' needs dask. Install it: pip install attn-probe[dask]")
    where = place(path)
    attrs, arrays = described(where)
    if isinstance(where, Folder):
        where = Folder(where.path.absolute())  # what is read later is where it was
    try:
        stored = [name for name in data_arrays(attrs) if _in_shards(arrays[name])]
        labels = {name: one for name, one in arrays.items() if name not in stored}
        if attrs.get("whole_labels") and isinstance(where, Folder):  # elsewhere it would take long
            for name, one in labels.items():
                require_held(where, name, one)
        indexes = [name for name, one in labels.items() if dims(one) == (name,)]
        first = _read(where, labels, [*indexes, "status"])
        status = first.pop("status")  # read anew later: it changes while the store is written
        found = {name: _label(where, name, one, first.get(name)) for name, one in labels.items()}
        for name in stored:
            found[name] = _data(where, name, arrays, status, attrs, chunks=chunks == "shards")
        coords = {*attrs.pop("coordinates", "").split(), *indexes}
        outer = {name: one for name, one in found.items() if name in coords}
        inner = {name: found[name] for name in (*stored, *labels) if name not in outer}
        ds = xr.Dataset(inner, outer, attrs)
    except (ValueError, RuntimeError, KeyError, TypeError) as error:
        raise StoreError(
            f"{where} is damaged: its labels cannot be read ({error}). Restore it from a copy."
        ) from error
    run = np.flatnonzero(status != EMPTY)
    if len(run) == len(status):
        return ds
    if len(run) and run[-1] == len(run) - 1:  # the first ones: a slice reads faster than a list
        return ds.isel(problem=slice(len(run)))
    return ds.isel(problem=run)


def _in_shards(array: "zarr.Array[Any]") -> bool:
    return array.dtype.kind in "fiu" and array.shards is not None


def _read(
    where: Place, arrays: Mapping[str, "zarr.Array[Any]"], names: Sequence[str]
) -> dict[str, npt.NDArray[Any]]:
    """All of some label arrays."""
    found = dict(zip(names, together([arrays[name] for name in names]), strict=True))
    for name, values in found.items():
        if isinstance(values, Exception):
            raise labels_damaged(where, name, values) from values
    return cast("dict[str, npt.NDArray[Any]]", found)


def _label(
    where: Place, name: str, array: "zarr.Array[Any]", values: npt.NDArray[Any] | None
) -> xr.Variable:
    """A label array; lazy, if it has not been read."""
    axes = dims(array) or [f"{name}_{n}" for n in range(array.ndim)]  # somebody else's
    data: Any = values
    if values is None:
        data = indexing.LazilyIndexedArray(Label(where, name, array))
    return xr.Variable(axes, data, array.attrs.asdict(), {"chunks": array.chunks})


def _data(
    where: Place,
    name: str,
    arrays: Mapping[str, "zarr.Array[Any]"],
    status: npt.NDArray[Any],
    attrs: Mapping[str, Any],
    *,
    chunks: bool,
) -> xr.Variable:
    """An array of data, lazy; perhaps with dask chunks that are its shards."""
    array = arrays[name]
    shards = array.shards or ()
    # stores of earlier versions have no file for shards that hold nothing
    stored = Stored(where, name, array, status, bool(attrs.get("whole_shards")))
    cut = dict(zip(dims(array), zip(array.shape, shards, strict=True), strict=True))
    if "query" in cut and cut["query"][0] > cut["query"][1]:  # problems split by rows
        stored.count_rows(_read(where, arrays, ["query_position"])["query_position"])
    how = {"chunks": array.chunks, "shards": array.shards}
    told = {} if array.dtype.kind == "u" else array.attrs.asdict()  # how to read its codes
    found = xr.Variable(dims(array), indexing.LazilyIndexedArray(stored), told, how)
    if not chunks:
        return found
    return found.chunk({dim: min(n, whole) for dim, (whole, n) in cut.items()})


class _Placed(BackendArray):
    """An array on its place; xarray indexes it."""

    def __init__(self, where: Place, name: str, array: "zarr.Array[Any]") -> None:
        self.shape, self.dtype = array.shape, array.dtype
        self._where, self._name, self._array = where, name, array

    def __getitem__(self, key: indexing.ExplicitIndexer) -> Any:
        outer = indexing.IndexingSupport.OUTER
        return indexing.explicit_indexing_adapter(key, self.shape, outer, self._read)

    def _read(self, key: tuple[Any, ...]) -> Any:
        raise NotImplementedError


class Label(_Placed):
    """An array of labels, as zarr-python reads it."""

    def _read(self, key: tuple[Any, ...]) -> Any:
        try:
            return np.asarray(self._array.oindex[key])
        except Exception as error:  # each codec has kinds of its own
            raise labels_damaged(self._where, self._name, error) from error


class Stored(_Placed):
    """An array of data, read shard by shard."""

    def __init__(
        self,
        where: Place,
        name: str,
        array: "zarr.Array[Any]",
        status: npt.NDArray[Any],
        whole: bool,
    ) -> None:
        super().__init__(where, name, array)
        self._grid = grid(name, array)
        self._coded = array.dtype.kind == "u"
        if self._coded:
            self.dtype = np.dtype("float32")
        self._status, self._whole = status, whole
        self._rows: npt.NDArray[Any] | None = None

    def count_rows(self, query_position: npt.NDArray[Any]) -> None:
        """Know how many rows each problem has, to look for all their shards."""
        self._rows = (query_position >= 0).sum(1)

    def _read(self, key: tuple[Any, ...]) -> Any:
        if self._whole:
            for shard in self._touched(key):
                if not self._where.exists(shard):
                    self._explain(key, "it is missing")
        try:
            if isinstance(self._where, Folder) and self._grid:
                found = fetch(self._where.path, self._grid, self.shape, key)
            else:
                found = np.asarray(self._array.oindex[key])
            return decoded(found) if self._coded else found
        except MemoryError:
            raise
        except Exception as error:  # each place and codec has kinds of its own
            self._explain(key, str(error))
            raise

    def _touched(self, key: tuple[Any, ...]) -> Iterator[str]:
        """The shards of done problems that are read."""
        problems = np.atleast_1d(np.arange(self.shape[0])[key[0]])
        done = np.sort(problems[self._status[problems] == DONE])
        return (shard for shard, _ in expected(self._name, self._array, done, self._rows))

    def _explain(self, key: tuple[Any, ...], why: str) -> None:
        """Say which shard is damaged."""
        for shard in self._touched(key):
            if reason := damage(self._where, shard, self._array):
                raise StoreError(
                    f"{self._where} is damaged: {shard} cannot be read, {reason}. Restore that "
                    "file from a copy; or give up its problems with `probe info --verify --repair` "
                    "and run the same capture again, which computes only them."
                )
        raise StoreError(
            f"{self._name} of {self._where} cannot be read ({why}), though its shards are whole. "
            "Read it on a machine where it can, or make it anew."
        )
