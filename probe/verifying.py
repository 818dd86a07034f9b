"""Whether a store is whole: every shard there, every checksum right."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

import google_crc32c
import numpy as np
import zarr
import zstandard

from probe import disk
from probe.arrays import data_arrays, every, opened
from probe.errors import StoreError
from probe.places import Folder, Objects, Place, place
from probe.schema import DONE, EMPTY
from probe.sharding import ABSENT, expected, grid
from probe.stories import attributes

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
    data = where.read(key)
    if data is None:
        return "it is missing"
    if own is None:
        return ""
    size = 16 * prod(own.tiles) + 4
    if len(data) < size:
        return f"it is cut short ({len(data)} bytes, and its index alone has {size})"
    raw, crc = data[-size:-4], int.from_bytes(data[-4:], "little")
    if google_crc32c.value(raw) != crc:
        return "its index has another checksum (it is cut short, or bytes were changed)"
    decompressor = zstandard.ZstdDecompressor()
    whole = prod(own.tile) * own.dtype.itemsize
    for offset, length in np.frombuffer(raw, "<u8").reshape(-1, 2).tolist():
        if offset == ABSENT:
            continue
        tile = data[offset : offset + length]
        try:
            # asked first: a changed byte may ask for any amount of memory
            told = zstandard.frame_content_size(tile)
            if told not in (whole, -1) or len(decompressor.decompress(tile, whole)) != whole:
                return f"a tile at byte {offset} was changed (it has another size)"
        except zstandard.ZstdError as error:
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
    attrs = attributes(where)
    release = _hold(where) if repair else (lambda: None)
    try:
        mode: Literal["r", "r+"] = "r+" if repair else "r"
        arrays = every(opened(where.zarr, mode))
        data = data_arrays(attrs)
        for name, array in arrays.items():
            if name not in data:
                _require_readable(where, name, array)
        status = np.asarray(arrays["status"][...])
        done = np.flatnonzero(status == DONE).tolist()
        rows = (np.asarray(arrays["query_position"][...]) >= 0).sum(1)
        whole = attrs.get("whole_shards")
        ids = [str(name) for name in np.asarray(arrays["problem"][...])]
        tasks = [
            (key, arrays[name], which)
            for name in data
            for key, which in expected(name, arrays[name], done, rows)
            if where.exists(key) or (whole and grid(name, arrays[name]))
        ]
        with ThreadPoolExecutor(THREADS) as pool:
            reasons = list(pool.map(lambda task: damage(where, task[0], task[1]), tasks))
        bad = [(*task, why) for task, why in zip(tasks, reasons, strict=True) if why]
        if repair:
            for _, _, which, _ in bad:
                status[which] = EMPTY
            if bad:
                arrays["status"][...] = status
            for key, *_ in bad:
                where.remove(key)
        return [Damage(key, why, tuple(ids[i] for i in which)) for key, _, which, why in bad]
    finally:
        release()


def _require_readable(where: Place, name: str, array: "zarr.Array[Any]") -> None:
    try:
        array[...]
    except Exception as error:  # each codec has kinds of its own
        raise StoreError(
            f"{where} is damaged: its labels {name!r} cannot be read ({error}). Restore the files "
            f"under {name}/ from a copy."
        ) from error


def _hold(where: Folder | Objects) -> Callable[[], None]:
    """Keep writers out."""
    if isinstance(where, Folder):
        return disk.lock(where.path, where.path)
    return where.lock((), alone=True)
