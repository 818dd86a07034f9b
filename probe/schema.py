"""The contract of a store, schema `probe/1`: names, dims, dtypes, status codes and chunk shapes.

Everything here is data or a small function of it. Nothing here touches the disk.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, prod
from typing import Any, Final, Literal, get_args

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from probe.errors import InputError

SCHEMA: Final = "probe/1"
CODED: Final = "probe/1+codes"  # the same with patterns as codes, which readers must know
SCHEMAS: Final = (SCHEMA, CODED)  # those that are read

EMPTY: Final = 0
DONE: Final = 1
FAILED: Final = 2

Site = Literal["pattern", "scores", "z"]
DType = Literal["float16", "float32", "uint16", "uint8"]

TINY_CELLS: Final = 4096  # a matrix (query x key) of at most so many numbers is tiny
TINY_PROBLEMS: Final = 512  # tiny problems in a shard, at most
TINY_BYTES: Final = 64 * 2**20  # and at most so many raw bytes
SHARD_BYTES: Final = 2 * 2**30  # raw bytes of any shard, at most
TILE: Final = 256  # rows and columns of an inner chunk of a full matrix
LEVEL: Final = -7  # 28 % more bytes than level 1, and written three times as fast
HEADS: Final = 8  # heads in an inner chunk, at most
BLOCKS: Final = 64  # chunks of a label array, about: few enough to open in milliseconds
LABELS: Final = 2**16  # and labels in one of them, about: few enough to write again and again


@dataclass(frozen=True, slots=True)
class Array:
    """One array of a store: its dims, its dtype ("string" for text), what an empty cell holds."""

    dims: tuple[str, ...]
    dtype: str
    fill: float | str


MATRIX: Final = ("problem", "layer", "head", "query", "key")
SITES: Final[Mapping[str, tuple[tuple[str, ...], float]]] = {
    "pattern": (MATRIX, 0.0),
    "scores": (MATRIX, -np.inf),
    "z": (("problem", "layer", "query", "head", "head_dim"), 0.0),
}
INDEXES: Final = ("problem", "layer", "head", "query", "key")
COLUMNS: Final[Mapping[str, Array]] = {
    "problem": Array(("problem",), "string", ""),
    "length": Array(("problem",), "int32", 0),
    "query_position": Array(("problem", "query"), "int32", -1),
    "key_position": Array(("problem", "key"), "int32", -1),
    "token": Array(("problem", "key"), "string", ""),
    "token_id": Array(("problem", "key"), "int32", -1),
    "segment": Array(("problem", "key"), "string", ""),
    "status": Array(("problem",), "uint8", EMPTY),
    "error": Array(("problem",), "string", ""),
    "loss": Array(("problem",), "float64", np.nan),
}
COORDINATES: Final = (
    "query_position",
    "key_position",
    "token",
    "token_id",
    "segment",
    "status",
    "error",
)


# What a row's `mass` of a latent store is summed over. "latent" is the other latents: a row's own
# place is "self".
PARTS: Final = ("bos", "question", "bot", "latent", "self", "eot", "answer")


@dataclass(frozen=True, slots=True, kw_only=True)
class Labels:
    """What is known about one problem before it runs: which tokens its rows and columns are.

    Attributes:
        id: Name of the problem, unique in the store.
        length: Tokens in the problem.
        query_position: Token position of each stored row, counted from 0.
        key_position: Token position of each stored column, counted from 0.
        token: Decoded token of each stored column.
        token_id: Vocabulary id of each stored column.
        segment: What each stored column is: bos, question, bot, latent, eot, answer, text or
            generated.

    Raises:
        InputError: The columns are not labelled one by one.

    Example:
        >>> Labels(id="0", length=2, query_position=(0, 1), key_position=(0, 1),
        ...        token=("The", " keys"), token_id=(464, 8251), segment=("text", "text")).length
        2
    """

    id: str
    length: int
    query_position: Sequence[int]
    key_position: Sequence[int]
    token: Sequence[str]
    token_id: Sequence[int]
    segment: Sequence[str]

    def __post_init__(self) -> None:
        expected = len(self.key_position)
        for name in ("token", "token_id", "segment"):
            found = len(getattr(self, name))
            if found != expected:
                raise InputError(
                    f"problem {self.id!r} has {found} {name} labels for {expected} columns. "
                    "Give one for each key_position."
                )


@dataclass(frozen=True, slots=True)
class Layout:
    """How arrays are cut into files.

    Attributes:
        problems: Problems in a shard, the unit of writing and of resuming.
        block: Problems in a chunk of every label array; a multiple of `problems`.
        chunks: Shape of the inner chunks of each array: what a read decodes.
        shards: Shape of the shards of each array: one file each.
    """

    problems: int
    block: int
    chunks: Mapping[str, tuple[int, ...]]
    shards: Mapping[str, tuple[int, ...]]


def site(name: str, *, dtype: str) -> Array:
    """The array of a site.

    Args:
        name: "pattern", "scores" or "z".
        dtype: "float16" or "float32"; "uint16" or "uint8" for codes of `pattern`: see `coded`.

    Raises:
        InputError: Another name or dtype.

    Example:
        >>> site("scores", dtype="float16").fill
        -inf
    """
    if name not in SITES:
        raise InputError(f"there is no site {name!r}. Choose from {', '.join(SITES)}.")
    if dtype not in get_args(DType) or (dtype.startswith("uint") and name != "pattern"):
        raise InputError(f"dtype={dtype!r} cannot be stored. Choose float16 or float32.")
    dims, fill = SITES[name]
    return Array(dims, dtype, fill)


def coded(p: NDArray[Any], dtype: Any) -> NDArray[Any]:
    """Probabilities as whole numbers: the root of each, in 65,535ths (uint16) or 255ths (uint8).

    The root keeps small ones apart. Rows of 512 keys then sum to 1 within 3.3e-5 for uint16 (4e-4
    for float16) and .009 for uint8, which is for previews; measured on a trained model.

    Args:
        p: In [0, 1].
        dtype: Of the codes.

    Example:
        >>> coded(np.array([0.0, 0.25, 1.0]), "uint8").tolist()
        [0, 128, 255]
    """
    scale = np.float32(np.iinfo(dtype).max)
    root = np.sqrt(p, dtype="float32")
    root *= scale
    np.rint(np.minimum(root, scale, out=root), out=root)  # float32 rounds some to just above 1
    codes: NDArray[Any] = root.astype(dtype)
    return codes


def decoded(codes: NDArray[Any]) -> NDArray[np.float32]:
    """Probabilities of codes, float32: see `coded`.

    Example:
        >>> decoded(np.array([0, 255], "uint8")).tolist()
        [0.0, 1.0]
    """
    scale = np.float32(np.iinfo(codes.dtype).max)
    root = codes.astype("float32")
    root /= scale
    root *= root
    return root


def layout(arrays: Mapping[str, Array], *, sizes: Mapping[str, int], parts: int = 1) -> Layout:
    """Chunk and shard shapes for arrays over these dims.

    Tiny matrices (query x key of at most 4096 numbers) share a shard, up to 512 problems or 64 MiB,
    and their numbers lie problem last (`problem_last`);
    otherwise a shard is one problem, cut into tiles of 8 heads x 256 x 256. Shards stay below
    2 GiB raw: first the layers are split, then the rows.

    Args:
        arrays: The arrays that a run writes, by name; the first dim of each is "problem".
        sizes: Length of each dim.
        parts: How many processes write it: each gets shards and chunks of its own.

    Returns:
        Shapes that zarr accepts: each shard a multiple of its chunk, perhaps past the array's end.

    Example:
        >>> full = {"pattern": site("pattern", dtype="float16")}
        >>> sizes = {"problem": 9, "layer": 12, "head": 12, "query": 300, "key": 300}
        >>> layout(full, sizes=sizes).chunks["pattern"]
        (1, 1, 6, 256, 256)
    """
    n = sizes["problem"]
    tiny = all(
        sizes["query"] * sizes["key"] <= TINY_CELLS
        for array in arrays.values()
        if {"query", "key"} <= set(array.dims)
    )
    each = sum(prod(sizes[d] for d in a.dims[1:]) * _itemsize(a) for a in arrays.values())
    most = min(TINY_PROBLEMS, ceil(n / parts), max(1, TINY_BYTES // max(1, each)))
    problems = most if tiny else 1
    chunks = {name: _chunk(array, sizes, problems, tiny) for name, array in arrays.items()}
    shards = {name: _shard(array, sizes, chunks[name]) for name, array in arrays.items()}
    block = min(n, max(BLOCKS, n / BLOCKS, LABELS // sizes["key"]))
    block = problems * ceil((block if parts == 1 else min(block, n / parts)) / problems)
    return Layout(problems, block, chunks, shards)


def problem_last(ndim: int) -> tuple[int, ...]:
    """Order of the dims in a tile that several problems share, as the codec `transpose` is told.

    What no row may look at is then one run of zeros, which zstd's fastest levels leave out.

    Example:
        >>> problem_last(5)
        (1, 2, 3, 4, 0)
    """
    return (*range(1, ndim), 0)


def cuts(dims: Sequence[object], chunk: Sequence[int], shard: Sequence[int]) -> str:
    """How an array is cut, in words.

    Example:
        >>> cuts(("problem", "head", "key"), (1, 8, 256), (1, 32, 512))
        '1 problem x 32 head x 512 key, in tiles of 8 head x 256 key'
    """
    whole = " x ".join(f"{n} {dim}" for n, dim in zip(shard, dims, strict=True))
    tile = " x ".join(f"{n} {dim}" for n, dim in zip(chunk, dims, strict=True) if n > 1)
    return f"{whole}, in tiles of {tile or '1 number'}"


def valid(ds: xr.Dataset) -> xr.DataArray:
    """Which cells of the stored matrices exist.

    A cell exists where its problem is done, its row and its column are tokens of the problem, and
    the row may look at the column: not later than itself, unless the attribute `causal` is False.

    Args:
        ds: An opened store, or a selection of it along any dims.

    Returns:
        Boolean, dims (problem, query, key).

    Example:
        >>> mean = ds.pattern.where(probe.valid(ds)).mean(("query", "key"), dtype="float32")
    """
    query, key = ds["query_position"], ds["key_position"]
    cells = (ds["status"] == DONE) & (query >= 0) & (key >= 0)
    if ds.attrs.get("causal", True):
        cells = cells & (key <= query)
    order = [dim for dim in ("problem", "query", "key") if dim in cells.dims]
    return cells.transpose(*order).rename("valid")


def _itemsize(array: Array) -> int:
    return 64 if array.dtype == "string" else np.dtype(array.dtype).itemsize


def _chunk(array: Array, sizes: Mapping[str, int], problems: int, tiny: bool) -> tuple[int, ...]:
    """Shape of an inner chunk: whole matrices when tiny, tiles otherwise."""
    shape = dict(sizes) | {"problem": problems}
    if {"query", "key"} & set(array.dims):
        shape["layer"] = 1
    # equal groups of at most 8 heads: 12 heads are 6 + 6, so that no chunk is half empty
    shape["head"] = ceil(sizes["head"] / ceil(sizes["head"] / HEADS))
    if not tiny:
        for dim in ("query", "key"):
            shape[dim] = min(TILE, 16 * ceil(sizes[dim] / 16))
    return tuple(shape[dim] for dim in array.dims)


def _shard(array: Array, sizes: Mapping[str, int], chunk: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of a shard: all that a problem has, padded to whole chunks, below `SHARD_BYTES`."""
    inner = dict(zip(array.dims, chunk, strict=True))
    shape = {dim: inner[dim] * ceil(sizes[dim] / inner[dim]) for dim in array.dims}
    shape["problem"] = inner["problem"]
    for dim in ("layer", "query"):
        if dim not in shape:
            continue
        slab = prod(shape.values()) // shape[dim] * inner[dim] * _itemsize(array)
        fits = max(1, SHARD_BYTES // slab)
        shape[dim] = min(shape[dim], inner[dim] * fits)
    return tuple(shape[dim] for dim in array.dims)
