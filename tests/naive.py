"""Attention one number at a time in float64: what the tests of the attention maths share."""

import math
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

import torch
from hypothesis import strategies as st
from torch import Tensor

from probe.attention import AttentionCall
from probe.indexing import Index

Site = Literal["pattern", "scores"]
INF = math.inf
SITES: tuple[Site, ...] = ("pattern", "scores")


def elements(mask: Tensor, call: AttentionCall) -> Any:
    """A mask of four dimensions as nested lists, its ones repeated."""
    return mask.expand(*call.query.shape[:3], call.key.shape[2]).tolist()


def attends(call: AttentionCall) -> Tensor:
    """Whether a query may see a key, straight from the words of the documentation."""
    mask = call.mask
    batch, heads, n, _ = call.query.shape
    k = call.key.shape[2]
    values: Any = None
    if mask is not None:
        values = elements(mask, call) if mask.ndim == 4 else mask.tolist()

    def sees(b: int, h: int, i: int, j: int) -> bool:
        if mask is not None and mask.ndim == 4:
            value = values[b][h][i][j]
            return bool(value if mask.dtype == torch.bool else value > low)
        if mask is not None and not values[b][j]:
            return False
        # a missing mask is aligned at the top left, but a single row sees everything
        own = i if mask is None and n > 1 else i + k - n
        if call.causal and j > own:
            return False
        return call.window is None or abs(own - j) < call.window

    low = torch.finfo(mask.dtype).min / 2 if mask is not None and mask.is_floating_point() else 0
    where = product(range(batch), range(heads), range(n), range(k))
    return torch.tensor([sees(*at) for at in where]).view(batch, heads, n, k)


def naive(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """(scores, pattern) in float64, one number at a time."""
    batch, n_heads, n, width = call.query.shape
    kv_heads, k = call.key.shape[1:3]
    query, key = call.query.tolist(), call.key.tolist()
    sinks = None if call.sinks is None else call.sinks.tolist()
    added = call.mask is not None and call.mask.ndim == 4 and call.mask.dtype != torch.bool
    bias = elements(call.mask, call) if added and call.mask is not None else None
    keep = attends(call).tolist()
    scores = torch.full((batch, n_heads, n, k), -INF, dtype=torch.float64)
    pattern = torch.zeros_like(scores)
    scaling = 1 / math.sqrt(width) if call.scaling is None else call.scaling
    for b, h, i in product(range(batch), range(n_heads), range(n)):
        row: dict[int, float] = {}
        read = h * kv_heads // n_heads
        for j in range(k):
            if not keep[b][h][i][j]:
                continue
            s = sum(x * y for x, y in zip(query[b][h][i], key[b][read][j], strict=True))
            s *= scaling
            if call.softcap is not None:
                s = call.softcap * math.tanh(s / call.softcap)
            row[j] = s if bias is None else s + bias[b][h][i][j]
            scores[b, h, i, j] = row[j]
        if not row:
            continue
        sink = [] if sinks is None else [sinks[h]]
        top = max([*row.values(), *sink])
        total = sum(math.exp(s - top) for s in [*row.values(), *sink])
        for j, s in row.items():
            pattern[b, h, i, j] = math.exp(s - top) / total
    return scores, pattern


def read(call: AttentionCall, site: Site, **selection: Any) -> Tensor:
    return call.pattern(**selection) if site == "pattern" else call.scores(**selection)


def pick(whole: Tensor, heads: Index, queries: Index, keys: Index) -> Tensor:
    for dim, index in ((1, heads), (2, queries), (3, keys)):
        every = list(range(whole.shape[dim]))
        chosen = every if index is None else every[index] if isinstance(index, slice) else index
        whole = whole[(slice(None),) * dim + (torch.tensor(chosen, dtype=torch.long),)]
    return whole


def close(got: Tensor, wanted: Tensor, tolerance: float = 1e-6) -> None:
    """Equal in what is -inf and what is 0, close in all else."""
    assert got.shape == wanted.shape
    torch.testing.assert_close(got.double(), wanted.double(), atol=tolerance, rtol=tolerance)
    assert torch.equal(got == -INF, wanted == -INF)


@dataclass(frozen=True)
class Case:
    call: AttentionCall
    heads: Index
    queries: Index
    keys: Index


def masks(draw: st.DrawFn, kind: str, batch: int, heads: int, n: int, k: int) -> Tensor | None:
    if kind == "none":
        return None
    random = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    if kind == "2d":
        mask = torch.ones(batch, k, dtype=draw(st.sampled_from([torch.bool, torch.int64])))
        for b in range(batch):
            left, right = draw(st.integers(0, k)), draw(st.integers(0, k))
            mask[b, :left] = 0
            mask[b, right:] = 0
        return mask
    shape = (
        draw(st.sampled_from([1, batch])),
        draw(st.sampled_from([1, heads])),
        draw(st.sampled_from([1, n])),
        k,
    )
    keep = torch.rand(shape, generator=random) < draw(st.sampled_from([0.0, 0.3, 0.7, 1.0]))
    if kind == "bool":
        return keep
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]))
    block = -INF if draw(st.booleans()) else torch.finfo(dtype).min
    return torch.randn(shape, generator=random).to(dtype).masked_fill(~keep, block)


@st.composite
def selections(draw: st.DrawFn, size: int) -> Index:
    kind = draw(st.sampled_from(["all", "list", "slice"]))
    if kind == "all":
        return None
    if kind == "list":
        return draw(st.lists(st.integers(0, size - 1), max_size=size + 1))
    end = st.none() | st.integers(-size - 1, size + 1)
    return slice(draw(end), draw(end), draw(st.none() | st.integers(1, 3)))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    batch, kv, share = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    n, width = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    kind = draw(st.sampled_from(["none", "2d", "bool", "float"]))
    k = n + draw(st.integers(0, 4))
    random = torch.Generator().manual_seed(draw(st.integers(0, 999)))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    heads = kv * share
    call = AttentionCall(
        2 * normal(batch, heads, n, width),
        2 * normal(batch, kv, k, width),
        normal(batch, kv, k, 2),
        masks(draw, kind, batch, heads, n, k),
        scaling=draw(st.sampled_from([None, 0.3])),
        softcap=draw(st.sampled_from([None, 1.5])),
        sinks=normal(heads) if draw(st.booleans()) else None,
        window=draw(st.none() | st.integers(1, k + 1)),
        causal=draw(st.booleans()),
    )
    return Case(call, draw(selections(heads)), draw(selections(n)), draw(selections(k)))


def call_of(n: int, k: int, mask: Tensor | None = None, **kwargs: Any) -> AttentionCall:
    torch.manual_seed(n * 100 + k)
    return AttentionCall(
        torch.randn(2, 4, n, 3), torch.randn(2, 2, k, 3), torch.randn(2, 2, k, 5), mask, **kwargs
    )
