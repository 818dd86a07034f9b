"""Whether a store is whole: every shard there, every checksum right."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import zarr

from probe import disk, generations
from probe.arrays import chunks_of, data_arrays
from probe.errors import StoreError
from probe.places import Folder, Objects, Place, place
from probe.schema import COLUMNS, DONE, EMPTY, INDEXES
from probe.sharding import ABSENT, decode, expected, grid, index
from probe.stories import described, own_attributes

THREADS = min(4, os.cpu_count() or 1)


@dataclass(frozen=True, slots=True)
class Damage:
    """A file of a store that cannot be read.

    Attributes:
        key: The file, inside the store.
        reason: What is wrong with it.
        problems: Ids of the problems that it holds.
    """

    key: str
    reason: str
    problems: tuple[str, ...]


def damage(where: Place, key: str, array: "zarr.Array[Any]") -> str:
    """What is wrong with a shard; "" for nothing. Its index and all its tiles are checked.

    Tiles of stores that were written before tiles had checksums are only decoded.
    """
    own = grid(key.split("/")[0], array)
    try:
        data = where.read(key)
    except OSError as error:  # a bad sector, a folder in its place
        return f"it cannot be read ({error.strerror or error})"
    if data is None:
        return "it is missing"
    if own is None:
        return ""
    try:
        tiles = index(own, data)
    except ValueError as error:
        return str(error)
    for offset, length in tiles.tolist():
        try:
            if offset != ABSENT:
                decode(own, data[offset : offset + length])
        except ValueError as error:
            return f"a tile at byte {offset} was changed ({error})"
    return ""


def verify(path: object, *, repair: bool = False) -> list[Damage]:
    """Read every shard of the problems that are done, and check it.

    Args:
        path: Folder of a store, or a zarr store object.
        repair: Give up the problems of damaged shards: their status becomes empty, so that the
            same capture computes them again, and the damaged files are removed.

    Returns:
        What is damaged; an empty list if nothing is.

    Raises:
        StoreError: It is no store, its labels are damaged, or (for `repair`) it is being written.

    Example:
        >>> verify("run.zarr")
        []
    """
    where = place(path)
    release = _hold(where) if repair else (lambda: None)
    try:
        attrs, arrays = described(where, mode="r+" if repair else "r")
        _require_labels(where, attrs, arrays)
        status = np.asarray(arrays["status"][...])
        if attrs.get("reduce") == "moments":
            bad = _damaged_moments(where, status)
        else:
            bad = _damaged_shards(where, attrs, arrays, status)
        if repair and bad:
            for _, _, which in bad:
                status[which] = EMPTY
            arrays["status"][...] = status
            for key, *_ in bad:
                if key != generations.FOLDER:  # what else is in it is whole
                    where.remove(key)
        ids = [str(name) for name in np.asarray(arrays["problem"][...])]
        return [Damage(key, why, tuple(ids[i] for i in which)) for key, why, which in bad]
    finally:
        release()


Bad = tuple[str, str, Any]  # a file, what is wrong with it, and problems that it holds


def _damaged_shards(
    where: Place, attrs: Any, arrays: dict[str, "zarr.Array[Any]"], status: Any
) -> list[Bad]:
    rows = (np.asarray(arrays["query_position"][...]) >= 0).sum(1)
    whole = attrs.get("whole_shards")
    tasks = [
        (key, arrays[name], which)
        for name in data_arrays(attrs)
        for key, which in expected(name, arrays[name], np.flatnonzero(status == DONE), rows)
        if where.exists(key) or (whole and grid(name, arrays[name]))
    ]
    with ThreadPoolExecutor(THREADS) as pool:
        reasons = list(pool.map(lambda task: damage(where, task[0], task[1]), tasks))
    return [(key, why, who) for (key, _, who), why in zip(tasks, reasons, strict=True) if why]


def _damaged_moments(where: Place, status: Any) -> list[Bad]:
    """Parts that cannot be read, with the problems that are in no other; those in none at all."""
    whole, bad = [], []
    for part in generations.parts(where):
        try:
            whole.append(generations.latest(where, part))
        except StoreError as error:
            bad.append((f"{generations.FOLDER}/{part}", str(error.__cause__)))
    lost = generations.lacking(status == DONE, [one for one in whole if one])
    if len(lost) and not bad:
        bad = [(generations.FOLDER, "no moments hold these problems")]
    return [(key, why, lost) for key, why in bad]


def _require_labels(where: Place, attrs: Any, arrays: dict[str, "zarr.Array[Any]"]) -> None:
    for name, array in arrays.items():
        if name in data_arrays(attrs):
            continue
        if attrs.get("whole_labels"):
            require_held(where, name, array)
        try:
            array[...]
        except Exception as error:  # each codec has kinds of its own
            raise labels_damaged(where, name, error) from error


def labels_damaged(where: Place, name: str, error: Exception) -> StoreError:
    """What to say of labels that cannot be read."""
    return StoreError(
        f"{where} is damaged: its labels {name!r} cannot be read ({error}). Restore the files "
        f"under {name}/ from a copy."
    )


def require_held(where: Place, name: str, array: "zarr.Array[Any]") -> None:
    """Refuse a store that has lost a file of our labels: zarr takes it for one of empty ones.

    Raises:
        StoreError: One is missing or empty.
    """
    for chunk in chunks_of(array) if name in (*INDEXES, *COLUMNS) else ():
        if not where.holds(f"{name}/{chunk}"):
            raise StoreError(
                f"{where} is damaged: {name}/{chunk}, of its labels, is missing or empty. "
                "Restore it from a copy."
            )


def _hold(where: Folder | Objects) -> Callable[[], None]:
    """Keep writers out of a store."""
    own_attributes(where)
    if isinstance(where, Folder):
        return disk.lock(where.path, where.path)
    return where.lock((), alone=True)
