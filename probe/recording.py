"""One forward that keeps what its attention does, in memory."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from probe import selection
from probe.attention import Site as MatrixSite
from probe.cache import Cache, Columns
from probe.editing import INPUTS
from probe.envoys import AttentionEnvoy
from probe.errors import InputError
from probe.filling import fill
from probe.indexing import take
from probe.interventions import Site, lasting
from probe.matrices import Readable
from probe.schema import Labels
from probe.selection import Selector, Texts
from probe.tap import Tap, run
from probe.text import Text

# The segments of some tokens, and what gives their texts.
Words = tuple[Sequence[str], Texts | None]


@dataclass(frozen=True, slots=True)
class Recorded:
    """What `record` read.

    Attributes:
        output: What the model returned.
        tensors: By site and layer, as in `Cache`.
        positions: (batch, n) token position of each column of the padded batch, -1 for padding.
        queries: The rows that were chosen, as columns of the padded batch; None for all.
        keys: Likewise the columns.
    """

    output: Any
    tensors: dict[tuple[Site, int], Tensor]
    positions: Sequence[Sequence[int]]
    queries: Columns | None
    keys: Columns | None


def record(
    tap: Tap,
    inputs: Mapping[str, Any],
    places: Sequence[tuple[Site, int]],
    *,
    heads: Sequence[int] | None = None,
    queries: Selector = None,
    keys: Selector = None,
    text: Text | None = None,
) -> Recorded:
    """One traced forward that keeps activations; only what is asked is computed.

    Args:
        tap: Of the model.
        inputs: What the model's forward takes, by name.
        places: (site, absolute layer) to keep.
        heads: Absolute query heads, default all.
        queries: Rows by token position: see `probe.selection.positions`.
        keys: Columns, likewise.
        text: Says which segments there are to choose; without it there are none.
    """
    order = {site: n for n, site in enumerate(("q", "k", "v", "scores", "pattern", "z"))}
    by_layer: dict[int, list[Site]] = {}
    for site, layer in sorted(set(places), key=lambda place: (place[1], order[place[0]])):
        by_layer.setdefault(layer, []).append(site)
    tensors: dict[tuple[Site, int], Tensor] = {}
    found: list[tuple[Sequence[Sequence[int]], Columns | None, Columns | None]] = []

    def words(item: int, columns: Sequence[int]) -> Words:
        if text is None:
            return (), None
        ids = inputs["input_ids"][item, list(columns)].tolist()
        return text.segments(ids), partial(text.said, ids)

    def visit(layer: int, envoy: AttentionEnvoy) -> None:
        sites = by_layer[layer]
        call = envoy.call if {"q", "k", "v"} & set(sites) else None
        seen = envoy.seen
        if not found:
            where = _positions(tap, seen)
            rows = _chosen(queries, where, words, "queries")
            found.append((where, rows, _chosen(keys, where, words, "keys")))
        _, rows, columns = found[0]
        for site in sites:
            if site in ("scores", "pattern"):
                tensors[site, layer] = _matrix(seen, site, rows, columns, heads)
            elif site == "z":
                tensors[site, layer] = take(_pick(envoy.z, rows), heads, 2).clone()
            else:
                x = getattr(call, INPUTS[site]).transpose(1, 2)
                some = _pick(x, rows if site == "q" else columns)
                tensors[site, layer] = take(some, heads if site == "q" else None, 2).clone()

    output = run(tap, visit, inputs, layers=tuple(by_layer))
    return Recorded(output, tensors, *found[0])


def _positions(tap: Tap, seen: Readable) -> Sequence[Sequence[int]]:
    """Token positions of the batch's columns; where nobody knows them, the columns themselves."""
    batch, _, rows, keys = seen.shape
    place = tap.watch.ruler.place(rows, keys, torch.device("cpu"))
    columns = torch.arange(keys)[None] if place is None else place.key
    return cast("list[list[int]]", columns.expand(batch, -1).tolist())


def _real(positions: Sequence[int], item: int) -> list[int]:
    """The columns of a sequence that are tokens."""
    real = [column for column, position in enumerate(positions) if position >= 0]
    if not real:
        raise InputError(
            f"attention_mask hides every token of sequence {item}, so it has no rows to label. "
            "Leave that sequence out, or mask only its padding."
        )
    return real


def _chosen(
    selector: Selector,
    positions: Sequence[Sequence[int]],
    words: Callable[[int, Sequence[int]], Words],
    name: str,
) -> Columns | None:
    """The columns that a selection names in each sequence, as many in each."""
    if selector is None:
        return None
    selector = lasting(selector)
    found = []
    for item, each in enumerate(positions):
        real = _real(each, item)
        segments, said = words(item, real)
        some = selection.positions(
            selector, len(real), segments, name=name, problem=str(item), tokens=said
        )
        found.append([real[n] for n in some])
    if len({len(some) for some in found}) > 1:
        raise InputError(
            f"{name}={selector!r} selects {', '.join(str(len(some)) for some in found)} tokens of "
            "the sequences of this batch, which one tensor cannot hold. Select as many of each, "
            "run them one by one, or use probe.capture."
        )
    return found


def _pick(x: Tensor, columns: Columns | None) -> Tensor:
    """Rows (batch, n, ...) of each sequence."""
    if columns is None:
        return x
    return torch.stack([take(part, own, 0) for part, own in zip(x, columns, strict=True)])


def _matrix(
    seen: Readable,
    site: MatrixSite,
    rows: Columns | None,
    columns: Columns | None,
    heads: Sequence[int] | None,
) -> Tensor:
    """Scores or a pattern, (batch, head, query, key)."""
    batch, n_heads, n_rows, n_keys = seen.shape
    own = [
        (None if rows is None else rows[i], None if columns is None else columns[i])
        for i in range(batch)
    ]
    if any(pair != own[0] for pair in own):
        parts = [seen.cut(slice(i, i + 1), n_keys) for i in range(batch)]
        each = [
            _matrix(part, site, [r] if r else None, [c] if c else None, heads)
            for part, (r, c) in zip(parts, own, strict=True)
        ]
        return torch.cat(each)
    queries, keys = own[0]
    if torch.is_grad_enabled():
        read = seen.scores if site == "scores" else seen.pattern
        return read(queries=queries, keys=keys, heads=heads)
    shape = (batch, len(heads or range(n_heads)), len(queries or range(n_rows)))
    out = torch.empty(*shape, len(keys or range(n_keys)), dtype=seen.dtype, device=seen.device)
    return fill(seen, out, site, queries=queries, keys=keys, heads=heads)


def cached(
    found: Recorded,
    token_ids: Tensor,
    text: Text,
    *,
    layers: Sequence[int],
    heads: Sequence[int],
    causal: bool,
) -> Cache:
    """What was recorded, with its labels."""
    real = [_real(each, item) for item, each in enumerate(found.positions)]
    rows, columns = found.queries or real, found.keys or real
    labels = []
    for item, positions in enumerate(found.positions):
        ids = [int(token_ids[item, c]) for c in columns[item]]
        segments = text.segments([int(token_ids[item, c]) for c in real[item]])
        labels.append(
            Labels(
                id=str(item),
                length=len(real[item]),
                query_position=[positions[c] for c in rows[item]],
                key_position=[positions[c] for c in columns[item]],
                token=text.decode(ids),
                token_id=ids,
                segment=[segments[positions[c]] for c in columns[item]],
            )
        )
    chosen = found.queries, found.keys
    rows, columns = (
        side if some is None else [range(len(own)) for own in some]
        for side, some in zip((real, real), chosen, strict=True)
    )
    attrs = {"model": text.name, "causal": causal}
    return Cache(found.tensors, layers, heads, labels, rows, columns, attrs)
