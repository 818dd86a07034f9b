"""Cells of an array in a folder: of its shards only the tiles that are asked, decoded by threads.

Each tile is checked before its cells are believed. (zarr-python checks too, at a third of the
speed; zarrs does not check a tile that it reads a part of.)
"""

import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain, groupby, product
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from probe.sharding import ABSENT, JOB, Grid, decode, index

THREADS = min(4, os.cpu_count() or 1)

Array = npt.NDArray[Any]
Cells = slice | Array
_local = threading.local()


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
    asked = [np.atleast_1d(np.arange(n)[one]) for n, one in zip(shape, key, strict=True)]
    out = np.zeros([len(one) for one in asked], grid.dtype)
    if grid.fill != 0:  # else pages are taken where something is written, by the threads
        out[...] = grid.fill
    by_shard = [_pieces(*dim) for dim in zip(asked, grid.tile, grid.tiles, strict=True)]
    with ThreadPoolExecutor(THREADS) as pool:
        found = pool.map(partial(_locate, folder, grid), product(*by_shard))
        for _ in pool.map(partial(_read, grid, out), chain.from_iterable(found)):
            pass
    single = tuple(n for n, one in enumerate(key) if isinstance(one, int | np.integer))
    return out.squeeze(single)


def _pieces(places: Array, size: int, count: int) -> list[tuple[int, list[_Piece]]]:
    """What is asked along one dim: by shards of so many tiles, and by tiles of this size."""
    tiles = places // size
    order = np.argsort(tiles, kind="stable")
    ends = np.flatnonzero(np.diff(tiles[order], prepend=-1))
    found = []
    for where in np.split(order, ends)[1:]:
        tile = int(tiles[where[0]])
        found.append(_Piece(tile, _run(places[where] - tile * size), _run(where)))
    return [(at, list(some)) for at, some in groupby(found, lambda piece: piece.tile // count)]


def _run(places: Array) -> Cells:
    """Neighbours as a slice, which is copied many times as fast."""
    if (np.diff(places) == 1).all():
        return slice(int(places[0]), int(places[-1]) + 1)
    return places


def _locate(folder: Path, grid: Grid, shard: Any) -> list[tuple[Path, list[_Tile]]]:
    """The tiles that are asked of one shard, in pieces of work for one thread each."""
    file = folder / grid.key([at for at, _ in shard])
    size = 16 * prod(grid.tiles) + 4
    try:
        with file.open("rb", buffering=0) as opened:
            opened.seek(max(0, opened.seek(0, os.SEEK_END) - size))
            tiles = index(grid, opened.read(size))
    except FileNotFoundError:
        return []
    dims = [pieces for _, pieces in shard]
    numbers = np.zeros((), int)
    for pieces, n in zip(dims, grid.tiles, strict=True):
        numbers = np.add.outer(numbers * n, [piece.tile % n for piece in pieces])
    offsets, lengths = np.moveaxis(tiles[numbers], -1, 0)
    found = []
    for which in np.argwhere(offsets != ABSENT):
        pieces = [some[n] for some, n in zip(dims, which, strict=True)]
        inside, out = _cells([p.inside for p in pieces]), _cells([p.out for p in pieces])
        at = tuple(which)
        found.append(_Tile(int(offsets[at]), int(lengths[at]), inside, out))
    found.sort(key=lambda tile: tile.offset)
    step = max(1, JOB // (prod(grid.tile) * grid.dtype.itemsize))
    return [(file, found[start : start + step]) for start in range(0, len(found), step)]


def _cells(dims: Sequence[Cells]) -> tuple[Any, ...]:
    """An index of every combination."""
    if sum(not isinstance(one, slice) for one in dims) < 2:
        return tuple(dims)
    return np.ix_(*(np.arange(d.start, d.stop) if isinstance(d, slice) else d for d in dims))


def _read(grid: Grid, out: Array, job: tuple[Path, list[_Tile]]) -> None:
    """Decode some tiles of a file, and keep the cells that are asked."""
    file, tiles = job
    key = (grid.tile, grid.dtype)
    if getattr(_local, "key", None) != key:
        _local.key, _local.room = key, np.empty(grid.tile, grid.dtype)
    with file.open("rb", buffering=0) as opened:
        for tile in tiles:
            opened.seek(tile.offset)
            decode(grid, opened.read(tile.bytes), _local.room)
            out[tile.out] = _local.room[tile.inside]
