"""One definition of a metric for NumPy arrays, torch tensors and labelled arrays.

A metric is a small function of `Matrices`, written to the array-API standard. `measure` brings
every kind of input to that form and the answer back to the kind that came in. It also holds what
all metrics share: where rows and columns sit, what is padding, and how a store is read in blocks.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
import xarray as xr
from array_api_compat import array_namespace, device

T = TypeVar("T")

PROBLEM = "problem"
CORE = ("query", "key")
BLOCK_BYTES = 64 * 2**20  # of matrices in the accumulation dtype; a core keeps a few such copies


@dataclass(frozen=True, slots=True)
class Matrices:
    """What the core of a metric sees: matrices, and where their rows and columns sit.

    Every array broadcasts against `p`; position -1 marks a row or column that does not exist.
    """

    xp: Any  # array-API namespace of the arrays below
    p: Any  # (…, query, key) probabilities, float32 or wider
    query: Any  # (…, query, 1) token positions
    key: Any  # (…, 1, key) token positions
    token: Any = None  # (…, 1, key) token ids, for the metrics that compare tokens

    @property
    def rows(self) -> Any:
        """(…, query): rows that exist and hold any attention. NaN counts as some, so it shows."""
        return (self.query[..., 0] >= 0) & self.xp.any(self.p != 0, axis=-1)

    @property
    def visible(self) -> Any:
        """(…, query, key): stored keys that causality lets the query see."""
        return (self.key >= 0) & (self.key <= self.query)

    @property
    def lag(self) -> Any:
        """(…, query, key): how many tokens the key lies before the query."""
        return self.xp.astype(self.query - self.key, self.p.dtype)

    def sum(self, values: Any, where: Any) -> Any:
        """Sum over the last axis where `where` holds; 0 where it never does."""
        return self.xp.sum(self.xp.where(where, values, 0.0), axis=-1)

    def count(self, where: Any) -> Any:
        """How often `where` holds along the last axis, in the accumulation dtype."""
        return self.xp.sum(self.xp.astype(where, self.p.dtype), axis=-1)

    def ratio(self, above: Any, below: Any) -> Any:
        """`above / below`, NaN where `below` is 0, without ever dividing by it."""
        safe = self.xp.where(below == 0, 1.0, below)
        return self.xp.where(below == 0, math.nan, above / safe)

    def mean(self, values: Any, where: Any) -> Any:
        """Mean over the last axis where `where` holds; NaN where it never does."""
        return self.ratio(self.sum(values, where), self.count(where))


@dataclass(frozen=True, slots=True)
class Metric:
    """A core, and what `measure` has to know about it."""

    name: str
    core: Callable[[Matrices], Any]
    square: bool = False  # measured over each problem's own square block
    out: tuple[str, ...] = ()  # core dims that the answer keeps
    undefined: float | int = math.nan  # where nothing can be measured; an int answers in positions


def measure(
    metric: Metric,
    p: T,
    *,
    query_position: Any = None,
    key_position: Any = None,
    token_id: Any = None,
) -> T:
    """`metric` of `p`, in the kind of `p`.

    Args:
        metric: What to compute.
        p: (…, query, key) array, or a DataArray with these dims in any order.
        query_position: Token position of each row, -1 where there is none: (query,), or with
            leading dims equal to p's first. Default: the coord `query_position`, else the last
            of the key positions.
        key_position: The same for columns. Default: the coord `key_position`, else 0, 1, 2, ...
        token_id: Token of each column, (key,) or with p's first dims; None where not needed.

    Returns:
        p's leading dims, then `metric.out`, as wide as float32 or wider: narrower input is cast
        first. A DataArray is read in blocks of about `BLOCK_BYTES`; with dask it stays lazy.

    Raises:
        TypeError: `p` is no array.
        ValueError: `p`, a position or `token_id` does not have the dims or keys that it needs.
    """
    given = query_position, key_position, token_id
    if isinstance(p, xr.DataArray):
        return _measure_labelled(metric, p, *given)  # type: ignore[return-value]
    return _measure_array(metric, p, *given)  # type: ignore[no-any-return]


def _measure_array(metric: Metric, p: Any, query: Any, key: Any, token: Any) -> Any:
    try:
        xp = array_namespace(p)
    except TypeError:
        got = type(p).__name__
        raise TypeError(
            f"{metric.name} takes a tensor, an array or a DataArray, got {got}"
        ) from None
    if p.ndim < 2:
        raise ValueError(f"{metric.name} needs p as (…, query, key), got shape {tuple(p.shape)}")
    *lead, n_query, n_key = p.shape
    _require_shape(metric, n_query, n_key, placed=query is not None)
    if 0 in (n_query, n_key):
        dtype = xp.int64 if isinstance(metric.undefined, int) else _accumulation(xp, p)
        shape = (*lead, *(n_key for _ in metric.out))
        return xp.full(shape, metric.undefined, dtype=dtype, device=device(p))
    key = _aligned(xp, p, np.arange(n_key) if key is None else key, "key_position", n_key)
    if query is None:
        query = key[..., n_key - n_query :]
    else:
        query = _aligned(xp, p, query, "query_position", n_query)
    if token is None:
        return _on_arrays(metric.core, p, query, key)
    token = _aligned(xp, p, token, "token_id", n_key)
    own = (query >= 0)[..., :, None] & (query[..., :, None] == key[..., None, :])
    _require_own_tokens(metric, bool(xp.any(query >= 0)), bool(xp.any(own)))
    return _on_arrays(metric.core, p, query, key, token)


def _aligned(xp: Any, p: Any, value: Any, name: str, size: int) -> Any:
    """`value`, which leads with p's first dims, reshaped to broadcast against p's rows."""
    value = xp.asarray(value, device=device(p))
    lead = tuple(p.shape[: max(value.ndim - 1, 0)])
    if value.ndim >= p.ndim or tuple(value.shape) != (*lead, size):
        raise ValueError(
            f"{name} must be ({size},), or (…, {size}) after p's first dims; "
            f"p is {tuple(p.shape)}, {name} is {tuple(value.shape)}"
        )
    return xp.reshape(value, (*lead, *(1,) * (p.ndim - 1 - value.ndim), size))


def _accumulation(xp: Any, p: Any) -> Any:
    return xp.result_type(p.dtype, xp.float32)


def _on_arrays(core: Callable[[Matrices], Any], p: Any, query: Any, key: Any, *token: Any) -> Any:
    xp = array_namespace(p)
    wide = xp.astype(p, _accumulation(xp, p), copy=False)
    return core(Matrices(xp, wide, query[..., None], *(at[..., None, :] for at in (key, *token))))


def _require_shape(metric: Metric, n_query: int, n_key: int, *, placed: bool) -> None:
    if metric.square and n_query != n_key:
        raise ValueError(
            f"{metric.name} needs a square block, got {n_query} queries x {n_key} keys. "
            "Select the same positions for both"
        )
    if n_query > n_key and not placed:
        raise ValueError(
            f"{metric.name} got {n_query} queries but only {n_key} keys, so the queries cannot be "
            "the last of the keys. Say where they are with query_position= and key_position="
        )


def _require_own_tokens(metric: Metric, any_query: bool, any_own: bool) -> None:
    if any_query and not any_own:
        raise ValueError(
            f"{metric.name} compares each query's token with earlier ones, but no query position "
            "is among the key positions: token-based metrics need the keys of the query positions"
        )


def _measure_labelled(metric: Metric, p: xr.DataArray, *given: Any) -> xr.DataArray:
    if missing := [dim for dim in CORE if dim not in p.dims]:
        raise ValueError(
            f"{metric.name} needs dims query and key, got {tuple(p.dims)}. "
            f"Rename what stands for {' and '.join(missing)}: p.rename(...)"
        )
    tracks = _tracks(metric, p, *given)
    lead = tuple(dim for dim in p.dims if dim not in CORE)
    if p.chunks is None or 0 in (p.sizes["query"], p.sizes["key"]):
        result = _in_blocks(metric, p.variable, tracks)
    else:
        result = _with_dask(metric, p.variable, tracks)
    result = result.transpose(*lead, *metric.out)
    coords = {name: c for name, c in p.coords.items() if set(c.dims) <= set(result.dims)}
    return xr.DataArray(result, coords=coords, name=metric.name)


def _tracks(metric: Metric, p: xr.DataArray, query: Any, key: Any, token: Any) -> list[xr.Variable]:
    """Positions of rows and of columns, and tokens if any: in memory, by problem where p is."""
    n_query, n_key = p.sizes["query"], p.sizes["key"]
    query = p.coords.get("query_position") if query is None else query
    key = p.coords.get("key_position") if key is None else key
    _require_shape(metric, n_query, n_key, placed=query is not None)
    keys = _track(p, "key", np.arange(n_key) if key is None else key, "key_position")
    if query is None:
        queries = xr.Variable((*keys.dims[:-1], "query"), keys.values[..., n_key - n_query :])
    else:
        queries = _track(p, "query", query, "query_position")
    if "status" in p.coords:  # what is not done holds nothing to measure, whatever is stored
        done = p.coords["status"].values[..., None] == 1
        queries, keys = (at.copy(data=np.where(done, at.values, -1)) for at in (queries, keys))
    if token is None:
        return [queries, keys]
    rows = zip(np.atleast_2d(queries.values), np.atleast_2d(keys.values), strict=True)
    any_own = any(np.isin(q[q >= 0], k).any() for q, k in rows)
    _require_own_tokens(metric, bool((queries.values >= 0).any()), any_own)
    return [queries, keys, _track(p, "key", token, "token_id")]


def _track(p: xr.DataArray, dim: str, given: Any, name: str) -> xr.Variable:
    """`given` as (problem, dim), or (dim,) where p has no problems."""
    dims = (PROBLEM, dim) if PROBLEM in p.dims else (dim,)
    if not isinstance(given, xr.DataArray):
        values = np.asarray(given)
        given = xr.DataArray(values, dims=dims[-1:] if values.ndim == 1 else dims)
    if dim not in given.dims or not set(given.dims) <= set(dims):
        raise ValueError(f"{name} needs dims {dims}, got {tuple(given.dims)}")
    xr.align(p, given, join="exact", copy=False)  # refuses other problems, or another order
    values = given.transpose(*dims, missing_dims="ignore").values
    return xr.Variable(dims, np.broadcast_to(values, [p.sizes[each] for each in dims]))


def _extent(track: xr.Variable) -> Any:
    """(problem,): how many rows or columns to read, up to the last one that exists."""
    exists = np.atleast_2d(track.values) >= 0
    return np.max(exists * np.arange(1, exists.shape[1] + 1), axis=1, initial=0)


def _dtype(metric: Metric, p: xr.Variable) -> Any:
    return np.int64 if isinstance(metric.undefined, int) else np.result_type(p.dtype, np.float32)


def _in_blocks(metric: Metric, p: xr.Variable, tracks: list[xr.Variable]) -> xr.Variable:
    """Read and measure a block at a time, each trimmed to what its problems hold."""
    rows, columns = _extent(tracks[0]), _extent(tracks[1])
    sizes = {dim: p.sizes[dim] for dim in p.dims if dim not in (PROBLEM, *CORE)}
    shape = (len(rows), *sizes.values(), *(p.sizes[dim] for dim in metric.out))
    out = np.full(shape, metric.undefined, _dtype(metric, p))
    for group in _groups(metric, tracks, rows):
        cells = rows[group].max(initial=0) * columns[group].max(initial=0)
        limit = BLOCK_BYTES // (max(cells, 1) * np.result_type(p.dtype, np.float32).itemsize)
        for problems, *others in _blocks((len(group), *sizes.values()), limit):
            here = group[problems]
            n_query, n_key = rows[here].max(), columns[here].max()
            if 0 in (n_query, n_key):
                continue
            consecutive = slice(here[0], here[-1] + 1)  # far cheaper to read than indices
            picked = consecutive if len(here) == here[-1] + 1 - here[0] else here
            where = {PROBLEM: picked, **dict(zip(sizes, others, strict=True))}
            where |= {"query": slice(n_query), "key": slice(n_key)}
            part = _apply(
                metric, *(each.isel(where, missing_dims="ignore") for each in (p, *tracks))
            )
            part = part.transpose(PROBLEM, *sizes, *metric.out, missing_dims="ignore")
            out[(picked, *others, *(slice(n_key) for _ in metric.out))] = part.values
    result = xr.Variable((PROBLEM, *sizes, *metric.out), out)
    return result if PROBLEM in p.dims else result.isel({PROBLEM: 0})


def _groups(metric: Metric, tracks: list[xr.Variable], rows: Any) -> list[Any]:
    """Problems that may share a block: all of them, or those of one size for square blocks."""
    if not metric.square:
        return [np.arange(len(rows))]
    queries, keys = (np.atleast_2d(track.values) for track in tracks[:2])
    if not np.array_equal(queries, keys) or not np.array_equal((queries >= 0).sum(axis=1), rows):
        raise ValueError(
            f"{metric.name} needs blocks whose rows and columns are the same positions, padded at "
            "the end; query_position and key_position differ. Select the same positions for both"
        )
    return [np.flatnonzero(rows == size) for size in np.unique(rows)]


def _blocks(shape: tuple[int, ...], limit: int) -> Iterator[tuple[slice, ...]]:
    """Cut leading axes into blocks of at most `limit` matrices (or one), the first axis first."""
    if not shape:
        yield ()
        return
    step = max(1, limit // max(1, math.prod(shape[1:])))
    for start in range(0, shape[0], step):
        for others in _blocks(shape[1:], max(1, limit // step)):
            yield (slice(start, start + step), *others)


def _with_dask(metric: Metric, p: xr.Variable, tracks: list[xr.Variable]) -> xr.Variable:
    if cut := [dim for dim in CORE if len(p.chunksizes[dim]) > 1]:
        raise ValueError(
            f"{metric.name} needs whole matrices, but p is chunked along {' and '.join(cut)}. "
            "Use p.chunk(query=-1, key=-1) first"
        )
    n_key, by_problem = p.sizes["key"], PROBLEM in p.dims
    if by_problem:
        tracks = [track.chunk({PROBLEM: p.chunksizes[PROBLEM]}) for track in tracks]
    if not metric.square:
        return _apply(metric, p, *tracks)
    rows = _extent(tracks[0])
    sizes = {int(rows[group[0]]) for group in _groups(metric, tracks, rows)} - {0}
    if len(sizes) > 1:
        raise ValueError(
            f"{metric.name} cannot measure blocks of several sizes {sorted(sizes)} with dask. "
            "Open the store without dask (chunks=None), or select problems of one size"
        )
    own = slice(max(sizes, default=n_key))
    inner = (each.isel(query=own, key=own, missing_dims="ignore") for each in (p, *tracks))
    result = _apply(metric, *inner)
    if left := n_key - result.sizes.get("key", n_key):
        result = result.pad(key=(0, left), constant_values=math.nan)
    done = xr.Variable((PROBLEM,), rows > 0) if by_problem else xr.Variable((), rows[0] > 0)
    masked: xr.Variable = xr.where(done, result, metric.undefined)  # type: ignore[no-untyped-call]
    return masked


def _apply(metric: Metric, p: xr.Variable, *tracks: xr.Variable) -> xr.Variable:
    result: xr.Variable = xr.apply_ufunc(
        partial(_on_arrays, metric.core),
        p,
        *tracks,
        input_core_dims=[CORE, ("query",), ("key",), ("key",)][: 1 + len(tracks)],
        output_core_dims=[metric.out],
        dask="parallelized",
        output_dtypes=[_dtype(metric, p)],
    )
    return result
