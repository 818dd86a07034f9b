"""Cells of an array in a folder: of its shards only the tiles that are asked, decoded by threads.

Each tile is checked before its cells are believed. (zarr-python checks too, and is slower; zarrs
does not check a tile that it reads a part of.)
"""

import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from itertools import chain, groupby, product
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from probe.selection import neighbours
from probe.sharding import ABSENT, JOB, Grid, decode, index

THREADS = min(4, os.cpu_count() or 1)
OPEN = 64  # shards at once
FEW = 16 * 2**20  # raw bytes that one thread has sooner than several

Array = npt.NDArray[Any]
Cells = slice | Array


class _Piece(NamedTuple):
    """What one row of tiles holds of what is asked along one dim."""

    tile: int
    inside: Cells
    out: Cells


class _Tile(NamedTuple):
    """A tile in its file, and what is asked of it."""

    offset: int
    bytes: int
    inside: tuple[Any, ...]
    out: tuple[Any, ...]


class _File:
    """A shard, open once: another may take its name while it is read."""

    def __init__(self, path: Path) -> None:
        self._file, self._lock = path.open("rb"), threading.Lock()
        self.size = self._file.seek(0, os.SEEK_END)

    def read(self, size: int, offset: int) -> bytes:
        """So many bytes, less at the end."""
        with self._lock:
            self._file.seek(offset)
            return self._file.read(size)

    def close(self) -> None:
        self._file.close()


def fetch(
    folder: Path, grid: Grid, shape: Sequence[int], key: Sequence[int | slice | Array]
) -> Array:
    """Some cells of an array; those of shards and tiles that are not there hold the fill.

    Args:
        folder: Of the store.
        grid: How the array is cut.
        shape: Of the array.
        key: For each dim a place, a slice, or places; every combination is read.

    Returns:
        The dims of the array, without those of which one place is asked.

    Raises:
        ValueError: A shard is damaged.
        IndexError: There is no such place.
    """
    asked = [_places(n, one) for n, one in zip(shape, key, strict=True)]
    out = np.zeros([len(one) for one in asked], grid.dtype)
    if grid.fill != 0:  # else pages are taken where something is written, by the threads
        out[...] = grid.fill
    shards = list(
        product(*(_pieces(*dim) for dim in zip(asked, grid.tile, grid.tiles, strict=True)))
    )
    for start in range(0, len(shards), OPEN):
        some = shards[start : start + OPEN]
        tiles = sum(prod(map(len, (pieces for _, pieces in shard))) for shard in some)
        with ExitStack() as files:
            locate = partial(_locate, folder, grid, out, files)
            each: Any = map
            if tiles * prod(grid.tile) * grid.dtype.itemsize > FEW:
                each = files.enter_context(ThreadPoolExecutor(THREADS)).map
            for _ in each(partial(_read, grid, out), chain.from_iterable(each(locate, some))):
                pass
    single = tuple(n for n, one in enumerate(key) if isinstance(one, int | np.integer))
    return out.squeeze(single)


def _places(n: int, one: int | slice | Array) -> range | Array:
    """What is asked along a dim of this length: neighbours as a range, which is cut at once."""
    if isinstance(one, slice) and one.step in (None, 1):
        return range(n)[one]
    found: Array = np.arange(n)[one]
    return range(int(found), int(found) + 1) if found.ndim == 0 else found


def _pieces(places: range | Array, size: int, count: int) -> list[tuple[int, list[_Piece]]]:
    """What is asked along one dim: by shards of so many tiles, and by tiles of this size."""
    found = []
    if isinstance(places, range):
        at = places.start
        while at < places.stop:
            corner = at // size * size
            end = min(corner + size, places.stop)
            out = slice(at - places.start, end - places.start)
            found.append(_Piece(at // size, slice(at - corner, end - corner), out))
            at = end
    else:
        tiles = places // size
        order = np.argsort(tiles, kind="stable")
        ends = np.flatnonzero(np.diff(tiles[order], prepend=-1))
        for where in np.split(order, ends)[1:]:
            tile = int(tiles[where[0]])
            found.append(_Piece(tile, neighbours(places[where] - tile * size), neighbours(where)))
    return [(at, list(some)) for at, some in groupby(found, lambda piece: piece.tile // count)]


def _locate(
    folder: Path, grid: Grid, out: Array, files: ExitStack, shard: Any
) -> list[tuple[_File, list[_Tile]]]:
    """The tiles that are asked of one shard, in pieces of work; a single one is done at once."""
    try:
        file = _File(folder / grid.key([at for at, _ in shard]))
    except FileNotFoundError:
        return []
    files.callback(file.close)
    size = min(file.size, grid.index_bytes)
    tiles = index(grid, file.read(size, file.size - size))
    dims = [pieces for _, pieces in shard]
    numbers = np.zeros((), int)
    for pieces, n in zip(dims, grid.tiles, strict=True):
        numbers = np.add.outer(numbers * n, [piece.tile % n for piece in pieces])
    offsets, lengths = np.moveaxis(tiles[numbers], -1, 0)
    there = offsets != ABSENT
    if (np.maximum(offsets, lengths)[there] > file.size).any():
        raise ValueError("its index points past its end")
    found = []
    for which in np.argwhere(there):
        pieces = [some[n] for some, n in zip(dims, which, strict=True)]
        where = _cells([p.inside for p in pieces]), _cells([p.out for p in pieces])
        at = tuple(which)
        found.append(_Tile(int(offsets[at]), int(lengths[at]), *where))
    found.sort(key=lambda tile: tile.offset)
    step = max(1, JOB // (prod(grid.tile) * grid.dtype.itemsize))
    jobs = [(file, found[start : start + step]) for start in range(0, len(found), step)]
    if len(jobs) == 1:
        _read(grid, out, jobs.pop())
    return jobs


def _cells(dims: Sequence[Cells]) -> tuple[Any, ...]:
    """An index of every combination."""
    if sum(not isinstance(one, slice) for one in dims) < 2:
        return tuple(dims)
    return np.ix_(*(np.arange(d.start, d.stop) if isinstance(d, slice) else d for d in dims))


def _read(grid: Grid, out: Array, job: tuple[_File, list[_Tile]]) -> None:
    """Decode some tiles of a file, and keep the cells that are asked."""
    file, tiles = job
    for tile in tiles:
        out[tile.out] = decode(grid, file.read(tile.bytes, tile.offset))[tile.inside]
