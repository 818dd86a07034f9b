"""Pieces of a store that fit in memory: one problem, or one shard after the other."""

from collections.abc import Iterator
from typing import TypeVar

import numpy as np
import xarray as xr

from probe.errors import InputError
from probe.selection import neighbours

_Data = TypeVar("_Data", xr.Dataset, xr.DataArray)


def trimmed(ds: _Data, problem: str | int) -> _Data:
    """One problem with its own rows and columns only, without the padding to the longest.

    Args:
        ds: An opened store, an array of it, or a selection (as `ds.pattern.sel(layer=1, head=3)`).
        problem: Its id, or its place in `ds`, from 0.

    Returns:
        The same without the dim `problem`, still lazy: only what is looked at is read.

    Raises:
        InputError: There is no such problem, or `ds` has lost its labels.

    Example:
        >>> probe.trimmed(probe.open("run.zarr"), "0").pattern.shape
        (2, 4, 7, 7)
    """
    ids = _labelled(ds)["problem"].values
    if isinstance(problem, str):
        found = np.flatnonzero(ids == problem)
        if not len(found):
            raise InputError(f"there is no problem {problem!r}. The first ones: {list(ids[:4])}.")
        problem = int(found[0])
    if not len(ids):
        raise InputError("there is no problem: none has run. Wait, or resume the capture.")
    if not -len(ids) <= problem < len(ids):
        raise InputError(f"there is no problem {problem}: give 0 to {len(ids) - 1}, or an id.")
    return _cut(ds.isel(problem=problem))


def shards(ds: _Data) -> Iterator[_Data]:
    """A store piece by piece: each is one shard, which is how it is read fastest.

    Args:
        ds: An opened store, an array of it, or a selection.

    Yields:
        Neighbouring problems, lazy, with the rows and columns of the longest of them.

    Raises:
        InputError: `ds` has lost its labels.

    Example:
        >>> sum(int(probe.valid(part).sum()) for part in probe.shards(probe.open("run.zarr")))
        83
    """
    count = len(_labelled(ds)["problem"])
    arrays = [ds] if isinstance(ds, xr.DataArray) else list(ds.data_vars.values())
    steps = [a.encoding["shards"][0] for a in arrays if a.encoding.get("shards")]
    step = max(steps, default=1)
    for start in range(0, count, step):
        yield _cut(ds.isel(problem=slice(start, start + step)))


def _cut(ds: _Data) -> _Data:
    own = {}
    for dim in ("query", "key"):
        if dim in ds.dims:
            there = ds[f"{dim}_position"].variable.load() >= 0  # kept: they are asked again
            found = np.flatnonzero(there.any([other for other in there.dims if other != dim]))
            own[dim] = neighbours(found)
    return ds.isel(own)


def _labelled(ds: _Data) -> _Data:
    needed = ["problem", *(f"{dim}_position" for dim in ("query", "key") if dim in ds.dims)]
    missing = [name for name in needed if name not in ds.coords]
    if missing or "problem" not in ds.dims:
        raise InputError(
            f"this has no {', '.join(missing) or 'dim problem'}. Give what probe.open returns, or "
            "a selection of it that keeps its problems."
        )
    return ds
