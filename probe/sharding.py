"""Zarr v3 shards, each written once and in its final form: tiles are encoded by threads.

A shard is its encoded tiles one after the other, an index of 16 bytes for each tile (offset and
bytes, little endian, all ones where the tile is empty), and the crc32c of that index (the
`sharding_indexed` codec of Zarr's specification). zarr-python would encode it as well, but reads
and rewrites a shard for every part of it. A tile is a frame of zstd and its crc32c, which takes a
thirtieth of encoding; zstd's own checksum, which earlier stores have, takes a quarter. In tiles
that problems share these come last (see `probe.schema.problem_last`).
"""

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import product
from math import ceil, prod
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt
import zarr
import zstandard
from numcodecs.zstd import Zstd

from probe.arrays import dims
from probe.places import Incoming, Place
from probe.schema import coded, problem_last

ABSENT = 2**64 - 1
JOB = 2 * 2**20  # raw bytes that a thread encodes at once
APART = 48  # cells between problems that are turned: at powers of 2 they share few lines of a cache
HASHES = 9  # log2 of zstd's table at negative levels: a fifth faster, 2 % more bytes than with 13

Array = npt.NDArray[Any]
_local = threading.local()
_KEYS = {"name": "default", "configuration": {"separator": "/"}}


@dataclass(frozen=True, slots=True)
class Grid:
    """How an array is cut into shards and tiles, and how a tile is encoded."""

    name: str
    shard: tuple[int, ...]
    tile: tuple[int, ...]
    dtype: np.dtype[Any]
    fill: Any
    problem_last: bool
    level: int
    checksum: bool
    crc: bool

    @property
    def tiles(self) -> tuple[int, ...]:
        """How many tiles a shard has along each dim."""
        return tuple(s // t for s, t in zip(self.shard, self.tile, strict=True))

    @property
    def index_bytes(self) -> int:
        """Of the index at the end of a shard, and its checksum."""
        return 16 * prod(self.tiles) + 4

    def key(self, place: Sequence[int]) -> str:
        return "/".join([self.name, "c", *map(str, place)])


def grid(name: str, array: "zarr.Array[Any]") -> Grid | None:
    """The grid of an array as we write it; None where zarr-python has to read and write it."""
    told: Any = array.metadata.to_dict()
    codecs, keys = told.get("codecs", ()), told.get("chunk_key_encoding")
    if _names(codecs) != ["sharding_indexed"] or keys != _KEYS or array.dtype.kind not in "fiu":
        return None
    how = codecs[0]["configuration"]
    turn = {"name": "transpose", "configuration": {"order": problem_last(array.ndim)}}
    turned = how["codecs"][0] == turn
    inner = how["codecs"][turned:]
    names = _names(inner)
    known = how["index_location"] == "end" and _names(how["index_codecs"]) == ["bytes", "crc32c"]
    if not known or names not in (["bytes", "zstd"], ["bytes", "zstd", "crc32c"]):
        return None
    zstd = inner[1]["configuration"]
    fill = array.dtype.type(array.fill_value)
    options = turned, zstd["level"], zstd["checksum"], "crc32c" in names
    return Grid(name, array.shards or (), array.chunks, array.dtype, fill, *options)


def _names(codecs: Sequence[Any]) -> list[str]:
    ends = [codec.get("configuration", {}).get("endian", "little") for codec in codecs]
    return [
        codec["name"] if end == "little" else f"{codec['name']} {end}"
        for codec, end in zip(codecs, ends, strict=True)
    ]


Cut = tuple[tuple[int, ...], int, Array]


def cut(grid: Grid, start: Sequence[int], block: Array) -> Iterator[Cut]:
    """A block's tiles: the shard of each, its number in the shard, and a view of its cells.

    Args:
        grid: Of the array.
        start: Where the block begins in the array: at the corner of a tile.
        block: Its cells; the last tile of each dim may be cut short.
    """
    first = [s // t for s, t in zip(start, grid.tile, strict=True)]
    counts = [ceil(n / t) for n, t in zip(block.shape, grid.tile, strict=True)]
    tiles = grid.tiles
    for offset in product(*map(range, counts)):
        at = [f + o for f, o in zip(first, offset, strict=True)]
        shard = tuple(a // n for a, n in zip(at, tiles, strict=True))
        number = 0
        for a, n in zip(at, tiles, strict=True):
            number = number * n + a % n
        cells = tuple(slice(o * t, (o + 1) * t) for o, t in zip(offset, grid.tile, strict=True))
        yield shard, number, block[cells]


def expected(
    name: str, array: "zarr.Array[Any]", problems: npt.ArrayLike, rows: Array | None = None
) -> Iterator[tuple[str, Array]]:
    """Keys of the shards that these problems must have, and which of them each holds.

    Args:
        name: Of the array.
        array: How it is cut.
        problems: In order.
        rows: How many each problem of the store has: what a shard split by rows needs to know.
            Without it only the first rows are looked for.
    """
    shard, axes = array.shards or array.chunks, dims(array)
    sizes = dict(zip(axes, zip(array.shape, shard, strict=True), strict=True))
    those = np.asarray(problems, int)
    starts = np.flatnonzero(np.diff(those // shard[0], prepend=-1))
    for which in np.split(those, starts)[1:]:
        first = which[0] // shard[0]
        counts = {dim: ceil(n / cut) for dim, (n, cut) in sizes.items() if dim == "layer"}
        if rows is not None and "query" in sizes:
            counts["query"] = max(1, ceil(int(rows[which].max()) / sizes["query"][1]))
        for rest in product(*(range(counts.get(dim, 1)) for dim in axes[1:])):
            yield "/".join([name, "c", str(first), *map(str, rest)]), which


def cast(values: Array, dtype: np.dtype[Any]) -> Array:
    """Values in the dtype that is stored: cast, or coded."""
    if dtype.kind == "u":
        return coded(values, dtype)
    with np.errstate(over="ignore"):
        return values.astype(dtype)


Encoded = list[tuple[int, list[bytes]]]


def encode(grid: Grid, tiles: Sequence[tuple[int, Array]]) -> Encoded:
    """Tiles as they lie in a shard, in the stored dtype; those that hold only the fill are none."""
    (room, flat), compressor = _rooms(grid), _compressor(grid)
    out: Encoded = []
    for number, view in tiles:
        here = view
        if view.dtype != grid.dtype:
            here = cast(view, grid.dtype)
        if _is_empty(grid, here):
            continue
        if here.shape != grid.tile:
            room.fill(grid.fill)
        room[tuple(map(slice, here.shape))] = here
        if grid.problem_last:
            flat[...] = np.moveaxis(room, 0, -1)
        frame = compressor.compress(flat.data)
        out.append((number, [frame, _crc(frame)] if grid.crc else [frame]))
    return out


def index(grid: Grid, end: bytes) -> Array:
    """Where the tiles of a shard lie: (tile, [offset, bytes]), `ABSENT` where there is none.

    Raises:
        ValueError: The shard, of which this is the end, is damaged.
    """
    size = grid.index_bytes
    if len(end) < size:
        raise ValueError(f"it is cut short ({len(end)} bytes, and its index alone has {size})")
    raw, crc = end[-size:-4], end[-4:]
    if _crc(raw) != crc:
        raise ValueError("its index has another checksum (it is cut short, or bytes were changed)")
    return np.frombuffer(raw, "<u8").reshape(-1, 2)


def decode(grid: Grid, tile: bytes) -> Array:
    """The cells of a tile: memory of this thread, in which it decodes and encodes the next.

    Raises:
        ValueError: The tile is damaged.
    """
    frame, (room, flat) = tile, _rooms(grid)
    if grid.crc:
        frame, crc = tile[:-4], tile[-4:]
        if _crc(frame) != crc:
            raise ValueError("it has another checksum")
    try:
        # asked first: a changed byte may ask for any amount of memory
        told = zstandard.frame_content_size(frame)
        if told == -1:  # not said, as other writers may
            raw = zstandard.ZstdDecompressor().decompress(frame, flat.nbytes)
            flat[...] = np.frombuffer(raw, flat.dtype).reshape(flat.shape)
        elif told != flat.nbytes:
            raise ValueError("it has another size")
        else:
            Zstd().decode(frame, flat)
    except (zstandard.ZstdError, RuntimeError) as error:
        raise ValueError(str(error)) from error
    return np.moveaxis(flat, -1, 0) if grid.problem_last else room


def _crc(data: bytes) -> bytes:
    return int(google_crc32c.value(data)).to_bytes(4, "little")


def _is_empty(grid: Grid, cells: Array) -> bool:
    """Whether all cells hold the fill, bit for bit; the first problem's last row tells of most."""
    bits = f"u{grid.dtype.itemsize}"
    cells, fill = cells.view(bits), np.array(grid.fill, grid.dtype).view(bits)
    last = cells[:1, ..., -1, :] if cells.ndim > 2 else cells
    return not (last != fill).any() and not (cells != fill).any()


def _rooms(grid: Grid) -> tuple[Array, Array]:
    """A tile of this thread, and its cells in the order of a frame; used again and again."""
    key = (grid.tile, grid.dtype, grid.problem_last)
    if getattr(_local, "room_key", None) != key:
        room = flat = np.empty(grid.tile, grid.dtype)
        if grid.problem_last:
            n, *rest = grid.tile
            room = np.empty((n, prod(rest) + APART), grid.dtype)[:, : prod(rest)].reshape(grid.tile)
            flat = np.empty((*rest, n), grid.dtype)
        _local.room_key, _local.rooms = key, (room, flat)
    rooms: tuple[Array, Array] = _local.rooms
    return rooms


def _compressor(grid: Grid) -> zstandard.ZstdCompressor:
    """A compressor of this thread, used again and again as well."""
    size = prod(grid.tile) * grid.dtype.itemsize
    key = (size, grid.level, grid.checksum)
    if getattr(_local, "compressor_key", None) != key:
        how: dict[str, Any] = {} if grid.level > 0 else {"hash_log": HASHES}
        parameters = zstandard.ZstdCompressionParameters.from_level(
            grid.level, source_size=size, write_checksum=grid.checksum, **how
        )
        _local.compressor_key = key
        _local.compressor = zstandard.ZstdCompressor(compression_params=parameters)
    compressor: zstandard.ZstdCompressor = _local.compressor
    return compressor


class Shard:
    """A shard on its way. `put` is called by who has the data, the rest by one other thread."""

    def __init__(self, place: Place, grid: Grid, at: Sequence[int]) -> None:
        self.key = grid.key(at)
        self._place, self.grid = place, grid
        self.ready: Future[Any] | None = None  # when the cells that were put are there
        self._waiting: list[tuple[int, Array]] = []
        self._bytes = 0
        self._index = np.full((prod(grid.tiles), 2), ABSENT, "<u8")
        self._end = 0
        self._file: Incoming | None = None

    def put(self, number: int, view: Array) -> list[tuple[int, Array]] | None:
        """Take a tile; gives back a job for `encode` when enough have come."""
        self._waiting.append((number, view))
        self._bytes += view.nbytes
        return self.rest() if self._bytes >= JOB else None

    def rest(self) -> list[tuple[int, Array]]:
        """What has been put and was not given back yet."""
        waiting, self._waiting, self._bytes = self._waiting, [], 0
        return waiting

    def write(self, encoded: Encoded) -> None:
        """Append tiles to the file."""
        if self._file is None:
            self._file = self._place.incoming(self.key)
        for number, pieces in encoded:
            self._file.write(pieces)
            size = sum(map(len, pieces))
            self._index[number] = self._end, size
            self._end += size

    def commit(self, *, durable: bool) -> None:
        """Write the index, and give the file its name."""
        index = self._index.tobytes()
        self.write([])
        assert self._file is not None
        self._file.write([index, _crc(index)])
        self._file.commit(durable=durable)

    def abandon(self) -> None:
        """Leave nothing."""
        if self._file is not None:
            self._file.abandon()
