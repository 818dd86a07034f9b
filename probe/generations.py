"""Moments on their place: `moments/<part>/<number>`, each number a whole generation of a part.

The newest whole one counts. Its last array says which problems are in it; older ones are removed.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from math import ceil
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
from zarr.codecs import ZstdCodec

from probe.arrays import WHOLE, chunks_of, every
from probe.errors import StoreError
from probe.places import Place
from probe.schema import DONE, HEADS, TILE

FOLDER = "moments"
_MEND = (
    "Restore them from a copy; or give up their problems with `probe info --verify --repair` and "
    "run the same capture again, which computes only them."
)
_TRIES = 8  # to read what a writer replaces meanwhile

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Generation:
    """Sums over some problems, in the order in which they are written.

    Attributes:
        count: (query, key) int32, how many problems have a cell.
        mean: (layer, head, query, key) float32.
        squares: Squared deviations from it, likewise.
        loss: (problem) nats per token; NaN for those that are not in it.
        members: (problem) bool, which are.
    """

    count: Array
    mean: Array
    squares: Array
    loss: Array
    members: Array


NAMES = [one.name for one in fields(Generation)]


def parts(place: Place) -> list[str]:
    """Names of the parts that have begun."""
    return sorted(place.children(FOLDER))


def numbers(place: Place, part: str) -> list[int]:
    """Numbers of a part's whole generations."""
    found = sorted(int(name) for name in place.children(f"{FOLDER}/{part}") if name.isdigit())
    return [n for n in found if place.holds(f"{FOLDER}/{part}/{n}/{NAMES[-1]}/c/0")]


def latest(place: Place, part: str) -> Generation | None:
    """The newest generation of a part; None if it has none.

    Raises:
        StoreError: It is damaged.
    """
    for _ in range(_TRIES):
        found = numbers(place, part)
        if not found:
            return None
        try:
            generation = _read(place, f"{FOLDER}/{part}/{found[-1]}")
        except StoreError:
            if found[-1:] == numbers(place, part)[-1:]:
                raise
        else:
            if found[-1] in numbers(place, part):  # not removed while it was read
                return generation
    raise StoreError(f"{place} is written faster than its moments can be read. Try again later.")


def every_latest(place: Place) -> list[Generation]:
    """The newest generation of each part that has one.

    Raises:
        StoreError: One is damaged, or problems that are done are in none.
    """
    done = np.array(every(place)["status"][...]) == DONE  # first: it grows
    found = [one for one in (latest(place, part) for part in parts(place)) if one is not None]
    lost = lacking(done, found)
    if len(lost):
        raise StoreError(
            f"{place} is damaged: {len(lost)} problems are done, and no moments hold them. {_MEND}"
        )
    return found


def lacking(done: Array, found: Sequence[Generation]) -> Array:
    """Indices of problems that are done and in none of these."""
    held = np.zeros(len(done), bool)
    for one in found:
        held |= one.members
    return np.flatnonzero(done & ~held)


def write(place: Place, part: str, number: int, generation: Generation) -> list[str]:
    """Write a generation, and say which files it has."""
    path = f"{FOLDER}/{part}/{number}"
    for folder in (FOLDER, f"{FOLDER}/{part}", path):
        if not place.exists(f"{folder}/zarr.json"):
            zarr.create_group(place.zarr, path=folder)
    group = zarr.open_group(place.zarr, path=path, mode="r+", zarr_format=3)
    keys = [f"{path}/zarr.json"]
    for name in NAMES:
        array = _create(group, name, getattr(generation, name))
        keys += [f"{path}/{name}/zarr.json", *(f"{path}/{name}/{c}" for c in chunks_of(array))]
    return keys


def _create(group: zarr.Group, name: str, values: Array) -> "zarr.Array[Any]":
    if values.ndim < 4:
        chunk, shard = values.shape, None
    else:
        sizes = zip(values.shape, (1, HEADS, TILE, TILE), strict=True)
        chunk = tuple(min(size, most) for size, most in sizes)
        whole = (ceil(n / c) * c for n, c in zip(values.shape[1:], chunk[1:], strict=True))
        shard = (1, *whole)
    array = group.create_array(
        name,
        shape=values.shape,
        dtype=values.dtype,
        chunks=chunk,
        shards=shard,
        compressors=ZstdCodec(level=1, checksum=True),
        overwrite=True,
        config=WHOLE,
    )
    array[...] = values
    return array


def _read(place: Place, path: str) -> Generation:
    try:
        arrays = every(place, path)
        for name in NAMES:
            for chunk in chunks_of(arrays[name]):
                if not place.holds(f"{path}/{name}/{chunk}"):
                    raise StoreError(f"{path}/{name}/{chunk} is missing or empty")
        return Generation(*(np.array(arrays[name][...]) for name in NAMES))
    except Exception as error:  # zarr and each codec have kinds of their own
        why = error.__cause__ or error  # it may have said already that the store is damaged
        raise StoreError(
            f"{place} is damaged: the moments in {path} cannot be read ({why!s:.200}). {_MEND}"
        ) from error
