"""Scores and patterns written into memory that is there, tile by tile, without temporaries."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from math import prod

import torch
from torch import Tensor

from probe.attention import AttentionCall, Site
from probe.indexing import Index, bounds, positions, slices, unbroken, wide
from probe.inplace import hide_triangle, on_cpu, within
from probe.matrices import Matrices, Readable
from probe.selection import neighbours

# (rows, bytes of float32 scores) of a tile: on a CPU it stays in a core's cache, on a GPU it keeps
# the launches few.
_TILES = {"cpu": (64, 1 << 21)}
_GPU_TILE = (1024, 1 << 26)
_MANY_KEYS = 1 << 19  # bytes of one item's keys whose copy takes longer than a tile's calls


def fill(
    seen: Readable,
    out: Tensor,
    site: Site = "pattern",
    *,
    queries: Index = None,
    keys: Index = None,
    heads: Index = None,
) -> Tensor:
    """Write a pattern or scores into `out`, without gradients.

    Keys that no row of a tile can see are never computed, and every element of `out` is written
    once, in its own dtype. Peak memory beyond `out` is a copy of queries and keys, and a tile of
    two megabytes; with a mask of its own for each head, some four of them.

    Args:
        seen: What is read: an `AttentionCall`, or `Matrices`.
        out: (batch, head, query, key), any float dtype, uninitialised or not.
        site: "pattern" or "scores".
        queries: Rows, default all.
        keys: Columns, default all.
        heads: Query heads, default all.

    Returns:
        `out`.

    Raises:
        ValueError: `out` has another shape than is asked for.
        IndexError: A list names a place that is not there.

    Example:
        >>> q = torch.zeros(1, 2, 3, 4)
        >>> fill(AttentionCall(q, q, q), torch.empty(1, 2, 3, 3, dtype=torch.float16))[0, 0, 1]
        tensor([0.5000, 0.5000, 0.0000], dtype=torch.float16)
    """
    with torch.no_grad():
        if isinstance(seen, AttentionCall):
            return _fill(seen, out, site, queries, keys, heads)
        if isinstance(seen, Matrices) and site not in seen.full:
            assert seen.call is not None
            return _fill(seen.call, out, site, queries, keys, heads)
        read = seen.scores if site == "scores" else seen.pattern
        found = read(queries=queries, keys=keys, heads=heads)
        _require(out, tuple(found.shape))
        return out.copy_(found)


def _fill(
    call: AttentionCall, out: Tensor, site: Site, queries: Index, keys: Index, heads: Index
) -> Tensor:
    chosen = None if unbroken(queries) else positions(queries, call.n_queries, out.device)
    columns = None if unbroken(keys) else positions(keys, call.n_keys, out.device)
    top, bottom = bounds(queries, call.n_queries)
    left, right = bounds(keys, call.n_keys)
    n_rows = bottom - top if chosen is None else len(chosen)
    n_columns = right - left if columns is None else len(columns)
    wanted = None if heads is None else call.head_list(heads)
    n_heads = call.n_heads if wanted is None else len(wanted)
    _require(out, (call.shape[0], n_heads, n_rows, n_columns))
    if wanted is not None:
        for i, h in enumerate(wanted):
            _fill(call.head(h), out[:, i : i + 1], site, queries, keys, None)
        return out
    empty = 0.0 if site == "pattern" else -torch.inf
    in_order = chosen is None and columns is None and left == 0 and bottom <= right
    if in_order and _quick(call, out):
        return _lower(call, out, site, empty, top)
    batches, groups, rows = _tiles(call, n_rows)
    exact = replace(call, query=wide(call.query), key=wide(call.key))
    if _one_by_one(exact.key):
        batches = slices(call.query.shape[0], 1)
    else:
        exact = replace(exact, key=exact.key.contiguous())
    # New memory for every tile would be taken from the system each time: a sixth of all the time.
    cells = call.share * (call.n_keys + call.query.shape[-1])
    room = exact.query.new_empty(_largest(batches, groups, rows) * cells)
    for items, group in product(batches, groups):
        part = exact.part(items, group)
        for some in rows:
            between = slice(top + some.start, top + some.stop)
            index = between if chosen is None else neighbours(chosen[some].tolist())
            low, high = _reach(part, index)
            s = part.scores(queries=index, keys=slice(low, high), room=room)
            if site == "pattern":
                s = part.normalise(s, quick=True)
            tile = out[items, call.head_slice(group), some]
            if columns is None:
                first, stop = (min(max(at, left), right) for at in (low, high))
                tile[..., : first - left] = empty
                tile[..., first - left : stop - left] = s[..., first - low : stop - low]
                tile[..., stop - left :] = empty
            else:
                inside = ((columns >= low) & (columns < high)).nonzero()[:, 0]
                tile.fill_(empty)
                tile[..., inside] = s[..., columns[inside] - low].to(out.dtype)
    return out


def hides_future(seen: Readable, site: Site) -> bool:
    """Whether nothing is known to lie beyond the diagonal; not where a model or a user says it."""
    call = seen.call if isinstance(seen, Matrices) and site not in seen.full else seen
    if not isinstance(call, AttentionCall) or (call.mask is not None and call.mask.ndim == 4):
        return False
    return call.causal and call.n_queries == call.n_keys


def laid(seen: Readable) -> Readable:
    """The same, of which `fill` need not convert or copy queries and keys again and again."""
    if not isinstance(seen, AttentionCall):
        return seen
    return replace(seen, query=wide(seen.query), key=wide(seen.key).contiguous())


def _require(out: Tensor, asked: tuple[int, ...]) -> None:
    if out.shape != asked:
        raise ValueError(f"out has shape {tuple(out.shape)}, and {asked} is asked for.")


def _quick(call: AttentionCall, out: Tensor) -> bool:
    """Whether `_lower` can fill neighbouring rows and all the keys that they see.

    Items and heads of `out` can be one dim, of real numbers.
    """
    if not (call.plain and on_cpu(call.query)) or torch.is_autocast_enabled("cpu"):
        return False
    return out.is_contiguous() or out.shape[1] == 1


def _lower(call: AttentionCall, out: Tensor, site: Site, empty: float, first: int) -> Tensor:
    """Rows of a plain call from the first on, as `scores` and `pattern` give them.

    To 5e-7 in float32. With less to decide for every tile, which takes a fifth of the time of short
    sequences.
    """
    n_rows, n = out.shape[2:]
    share, width = call.share, call.query.shape[-1]
    batches, groups, tiles = _tiles(call, n_rows)
    key = wide(call.key)
    keys = key if _one_by_one(key) else key.contiguous().flatten(0, 1)[None]
    q = wide(call.query[:, :, first : first + n_rows]) * call.factor
    q = q.reshape(*keys.shape[:2], share, n_rows, width)  # pairs of an item and a key head
    room = q.new_empty(_largest(batches, groups, tiles) * share * n)
    cut = slices(keys.shape[1], _largest(batches, groups))
    for k, asked, pairs in zip(keys, q, out.view(*q.shape[:4], n), strict=True):
        for some, rows in product(cut, tiles):
            high, count = first + rows.stop, rows.stop - rows.start
            left = asked[some, :, rows].reshape(-1, share * count, width)
            right = k[some, :high].transpose(1, 2)
            s = torch.bmm(left, right, out=within(room, *left.shape[:2], high))
            s = s.view(-1, share, count, high)
            hide_triangle(s[..., high - count + 1 :])
            if site == "pattern":
                s = call.normalise(s, quick=True)
            tile = pairs[some, :, rows]
            tile[..., :high] = s
            if high < n:
                tile[..., high:] = empty
    return out


def _one_by_one(key: Tensor) -> bool:
    """Whether items are read one by one, as their keys lie, since all of them take long to copy.

    A product with keys that do not lie in order copies them for every tile, but for one item's. On
    a GPU launches cost more.
    """
    if key.device.type != "cpu" or key.is_contiguous():
        return False
    return len(key) == 1 or key[:1].nbytes >= _MANY_KEYS


def _reach(call: AttentionCall, queries: Index) -> tuple[int, int]:
    """The columns [low, high) that hold every key that some of these rows attend to."""
    n_keys = call.n_keys
    if call.mask is not None and call.mask.ndim == 4:
        seen = call.keep(queries).flatten(0, 2).any(0).expand(n_keys).nonzero()
        return (int(seen[0]), int(seen[-1]) + 1) if len(seen) else (0, 0)
    if not call.causal and call.window is None:
        return 0, n_keys
    first, stop = bounds(queries, call.n_queries)
    first, stop = first + call.diagonal, stop + call.diagonal
    low = 0 if call.window is None else max(0, first - call.window + 1)
    ahead = 0 if call.causal or call.window is None else call.window - 1
    return min(low, n_keys), max(0, min(stop + ahead, n_keys))


def _tiles(call: AttentionCall, n_rows: int) -> Sequence[Sequence[slice]]:
    """Cache-sized tiles: batch items, key heads, rows."""
    n_batch = call.query.shape[0]
    rows, budget = _TILES.get(call.device.type, _GPU_TILE)
    rows = max(1, min(rows, n_rows))
    group_bytes = 4 * max(1, call.n_keys) * call.share * rows
    groups = max(1, min(call.n_kv_heads, budget // group_bytes))
    batch = max(1, min(n_batch, budget // (group_bytes * call.n_kv_heads)))
    return slices(n_batch, batch), slices(call.n_kv_heads, groups), slices(n_rows, rows)


def _largest(*cut: Sequence[slice]) -> int:
    """How many there are at most of what is cut together."""
    return prod(some[0].stop for some in cut if some)
