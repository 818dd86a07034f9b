"""Mean and spread over the problems of a store of any size: one shard after the other, merged.

Each shard gives a count, a mean and a sum of squared deviations; two of these are merged exactly
(Chan, Golub and LeVeque 1979). So threads, processes or machines may each take some shards.
"""

import os
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import xarray as xr

import probe
from probe.errors import InputError
from probe.generations import every_latest
from probe.places import place
from probe.schema import DONE

THREADS = min(4, os.cpu_count() or 1)
BLOCK_BYTES = 32 * 2**20  # of patterns in float64 that a thread holds, but at least a layer

Measure: TypeAlias = Callable[[xr.Dataset], "xr.Dataset | xr.DataArray | Mapping[str, Any]"]


@dataclass(frozen=True, slots=True)
class Moments:
    """How many values there were, their mean, and their summed squared deviations from it.

    Attributes:
        count: Values that were not NaN, for each cell.
        mean: float64; NaN where there were none.
        squares: float64, likewise.

    Example:
        >>> x = xr.Dataset({"x": ("problem", [1.0, 2.0, 6.0])})
        >>> both = moments(x.isel(problem=[0])).merge(moments(x.isel(problem=[1, 2])))
        >>> float(both.mean.x), float(both.variance().x), int(both.count.x)
        (3.0, 4.666666666666667, 3)
    """

    count: xr.Dataset
    mean: xr.Dataset
    squares: xr.Dataset

    def merge(self, other: "Moments") -> "Moments":
        """Those of all values of both."""
        fields = (one for side in (self, other) for one in (side.count, side.mean, side.squares))
        return Moments(
            *xr.apply_ufunc(
                _both,
                *fields,
                output_core_dims=[[], [], []],
                join="outer",
                dataset_join="inner",
                keep_attrs=True,
                dask="parallelized",
                output_dtypes=["int64", "float64", "float64"],
            )
        )

    def variance(self, ddof: int = 0) -> xr.Dataset:
        """Variance; NaN where there are not more than `ddof` values."""
        left = self.count - ddof
        return self.squares / left.where(left > 0)

    def std(self, ddof: int = 0) -> xr.Dataset:
        """Its root."""
        return self.variance(ddof) ** 0.5


def _both(*fields: Any) -> tuple[Any, Any, Any]:
    """Count, mean and squares of some values and of some more; NaN where there are none."""
    one, mean, squares, two, other, others = (np.where(np.isnan(x), 0.0, x) for x in fields)
    with np.errstate(all="ignore"):
        count, step = one + two, other - mean
        share = two / np.where(count > 0, count, np.nan)
        spread = np.where(count > 0, squares + others + step**2 * one * share, np.nan)
        return count.astype("int64"), mean + step * share, spread


def moments(values: xr.Dataset, dim: str = "problem") -> Moments:
    """Those of some values, summed in float64; NaN is left out.

    Args:
        values: Numbers with this dim.
        dim: Over which.
    """
    found = {name: _of_array(x, dim) for name, x in values.data_vars.items()}
    count, mean, squares = (xr.Dataset({n: one[k] for n, one in found.items()}) for k in range(3))
    return Moments(count, mean, squares)


def _of_array(x: xr.DataArray, dim: str, exists: Any = None) -> tuple[xr.DataArray, ...]:
    """Count, mean and squares; of what exists, if that is told, which broadcasts to `x`."""
    axis = x.get_axis_num(dim)
    wide = x.values.astype("float64")  # a copy, which is worked on in place
    if exists is not None:
        np.copyto(wide, 0.0, where=~exists)
    total = wide.sum(axis)
    if np.isnan(total).any():
        exists = ~np.isnan(wide) & (True if exists is None else exists)
        np.copyto(wide, 0.0, where=~exists)
        total = wide.sum(axis)
    count = np.asarray(wide.shape[axis] if exists is None else exists.sum(axis), "int64")
    mean = np.where(count > 0, total / np.maximum(count, 1), np.nan)
    wide -= np.expand_dims(mean, axis)
    if exists is not None:
        np.copyto(wide, 0.0, where=~exists)
    squares = np.where(count > 0, np.square(wide, out=wide).sum(axis), np.nan)
    shape = xr.zeros_like(x.isel({dim: 0}, drop=True), "float64")
    counts = np.broadcast_to(count, mean.shape)
    return shape.copy(data=counts), shape.copy(data=mean), shape.copy(data=squares)


def over(ds: xr.Dataset, measure: Measure | None = None, *, threads: int = THREADS) -> Moments:
    """Mean and spread over the finished problems of a store, of its patterns or of any measure.

    Args:
        ds: An opened store.
        measure: What is averaged, of a shard whose data is in memory: named arrays with the dim
            `problem`; NaN for what does not exist. Default: `pattern`, NaN where there is no cell.
        threads: Shards that are read and measured at once.

    Returns:
        Counts, means and squared deviations, float64. They do not depend on `threads`.

    Raises:
        InputError: There is no finished problem.

    Example:
        >>> from recipes import heads
        >>> ds = probe.open("run.zarr")
        >>> found = over(ds, lambda part: {"sink": heads.sink(part.pattern)})
        >>> found.mean.sink.dims, int(found.count.sink[0, 0])
        (('layer', 'head'), 2)
    """
    if measure is None and "pattern" not in ds:
        raise InputError("the store holds no pattern. Give a measure; or see moments.stored.")
    total: Moments | None = None
    waiting: deque[Future[Moments]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for part in probe.shards(ds):
            done = part.variables["status"].load().values == DONE  # kept: it is asked again
            if not done.any():
                continue
            finished = part if done.all() else part.isel(problem=done)
            waiting.append(pool.submit(_of, finished, measure))
            if len(waiting) > threads:  # no more in memory than are worked on
                total = _merged(total, waiting.popleft().result())
        for future in waiting:
            total = _merged(total, future.result())
    if total is None:
        raise InputError("the store has no finished problem. Wait, or resume its capture.")
    return total


def stored(where: object) -> Moments:
    """Moments of `pattern` that a capture with `reduce="moments"` has kept.

    Args:
        where: Folder of its store, or a zarr store object.

    Returns:
        (layer, head, query, key), of the problems that are done; float64, from sums in float32.

    Raises:
        StoreError: It is no store.
        InputError: The store has no moments, or not yet.

    Example:
        >>> model = probe.load("demo-llama")
        >>> run = probe.capture(model, ["abc", "abd"], "m.zarr", reduce="moments", progress=False)
        >>> stored("m.zarr").mean.pattern.dims
        ('layer', 'head', 'query', 'key')
    """
    ds = probe.open(where)
    if ds.attrs.get("reduce") != "moments":
        raise InputError(
            "this store has no moments. Make one with probe.capture(..., reduce='moments'), or "
            "measure stored matrices with recipes.moments.over."
        )
    axes = ("layer", "head", "query", "key")
    coords = {name: ds[name].values for name in axes}
    total: Moments | None = None
    for one in every_latest(place(where)):
        shape, seen = one.mean.shape, one.count > 0
        fields = (
            np.broadcast_to(one.count, shape).astype("int64"),
            np.where(seen, one.mean.astype("float64"), np.nan),
            np.where(seen, one.squares.astype("float64"), np.nan),
        )
        data = (xr.Dataset({"pattern": (axes, field)}, coords) for field in fields)
        total = _merged(total, Moments(*data))
    if total is None:
        raise InputError("the store has no moments yet. Wait, or resume its capture.")
    return total


def _of(part: xr.Dataset, measure: Measure | None) -> Moments:
    if measure is None:
        return _patterns(part.pattern.reset_coords(drop=True), probe.valid(part))
    for name in part.data_vars:  # labels are read by who asks for them
        part.variables[name].load()
    found: Any = measure(part)
    if isinstance(found, xr.DataArray):
        found = found.to_dataset(name=found.name or "value")
    if not isinstance(found, xr.Dataset):  # made without labels: it would read them to compare
        bare = {
            n: x.reset_coords(drop=True) if isinstance(x, xr.DataArray) else x
            for n, x in found.items()
        }
        found = xr.Dataset(bare)
    return moments(found.reset_coords(drop=True))


def _patterns(p: xr.DataArray, cells: xr.DataArray) -> Moments:
    """Some layers at a time, which is all that is in memory."""
    exists = cells.transpose(*(dim for dim in p.dims if dim in cells.dims)).values
    exists = np.expand_dims(exists, [n for n, dim in enumerate(p.dims) if dim not in cells.dims])
    blocks = [p]
    if "layer" in p.dims:
        step = max(1, BLOCK_BYTES // max(1, p.isel(layer=0).size * 8))
        blocks = [p.isel(layer=slice(n, n + step)) for n in range(0, p.sizes["layer"], step)]
    fields = zip(*(_of_array(some, "problem", exists) for some in blocks), strict=True)
    whole = (xr.concat(some, "layer") if len(some) > 1 else some[0] for some in fields)
    return Moments(*(one.to_dataset(name="pattern") for one in whole))


def _merged(total: Moments | None, one: Moments) -> Moments:
    return one if total is None else total.merge(one)
