"""What one forward did, in memory: a `Cache`, and `record`, which fills one."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
import xarray as xr
from torch import Tensor

from probe import schema, selection
from probe.arrays import label_columns
from probe.attention import Site as MatrixSite
from probe.envoys import AttentionEnvoy
from probe.errors import InputError
from probe.hooks import Name, full_name, resolve
from probe.indexing import take
from probe.interventions import Site
from probe.matrices import Readable
from probe.schema import Labels
from probe.selection import Selector
from probe.tap import Tap, require_alike, run

Columns = Sequence[Sequence[int]]  # for each sequence of a batch, columns of the padded batch

_AXES: Mapping[Site, tuple[str, ...]] = {
    "q": ("query", "head", "head_dim"),
    "k": ("key", "kv_head", "head_dim"),
    "v": ("key", "kv_head", "head_dim"),
    "scores": ("head", "query", "key"),
    "pattern": ("head", "query", "key"),
    "z": ("query", "head", "head_dim"),
}
# What `AttentionCall` calls them.
_INPUTS: Mapping[Site, str] = {"q": "query", "k": "key", "v": "value"}


@dataclass(eq=False)
class Cache(Mapping[str, Tensor]):
    """Activations by name, as tensors that carry gradients if the forward had them.

    `cache["pattern", 3]`, `cache["pattern", -1]` and `cache["blocks.3.attn.hook_pattern"]` are
    tensors; iteration gives the full names. Rows and columns are those of the padded batch, unless
    some were chosen, which goes by the token positions of each sequence.

    Attributes:
        tensors: By site and absolute layer. pattern and scores (batch, head, query, key) float32,
            0 and -inf where nothing is attended; q and z (batch, query, head, head_dim) and k and
            v (batch, key, kv_head, head_dim) in the model's dtype.
        layers: Layers of the model that have attention.
        heads: Absolute query heads that are kept; of k and v all key heads are.
        labels: What the rows and columns of each sequence are, padding left out.
        rows: Where in the tensors the rows of each sequence are, in the order of `labels`.
        columns: Likewise its columns.
        attrs: What a dataset says of its origin.
    """

    tensors: dict[tuple[Site, int], Tensor]
    layers: Sequence[int]
    heads: Sequence[int]
    labels: Sequence[Labels]
    rows: Columns
    columns: Columns
    attrs: Mapping[str, Any] = field(default_factory=dict)

    def __getitem__(self, name: Name) -> Tensor:
        found = resolve(name, self.layers)
        if len(found) > 1:
            raise InputError(f"{name!r} names {len(found)} activations. Name one.")
        if found[0] not in self.tensors:
            sites = ", ".join(dict.fromkeys(site for site, _ in self.tensors))
            layers = ", ".join(map(str, sorted({layer for _, layer in self.tensors})))
            raise KeyError(f"{name!r} was not kept. This cache has {sites} of layers {layers}.")
        return self.tensors[found[0]]

    def __contains__(self, name: object) -> bool:
        try:
            return self[cast("Name", name)] is not None
        except (InputError, KeyError):
            return False

    def __iter__(self) -> Iterator[str]:
        return (full_name(*place) for place in self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def __repr__(self) -> str:
        return f"<Cache: {', '.join(self)}>"

    def to_xarray(self) -> xr.Dataset:
        """The cache as a dataset with the labels of a store, on the CPU, without padding.

        Returns:
            Each site over (problem, layer, ...), float32, with the coordinates and attributes
            that an opened store has (`probe.schema`), so that every recipe reads it. A site must
            have been kept in the same layers as the others.

        Example:
            >>> _, cache = model.run_with_cache(["abc", "abcabc"], sites="pattern")
            >>> dict(cache.to_xarray().sizes)
            {'problem': 2, 'layer': 2, 'head': 4, 'query': 7, 'key': 7}
        """
        layers = sorted({layer for _, layer in self.tensors})
        arrays: dict[str, Any] = {}
        for site in dict.fromkeys(site for site, _ in self.tensors):
            missing = [layer for layer in layers if (site, layer) not in self.tensors]
            if missing:
                raise InputError(
                    f"{site} was kept in other layers than the rest (not in {missing}), which one "
                    "dataset cannot hold. Keep the same layers of each site."
                )
            axis = 1 + next(i for i, axis in enumerate(_AXES[site]) if "head" in axis)
            require_alike({n: self.tensors[site, n].shape[axis] for n in layers})
            parts = [self._packed(site, self.tensors[site, layer]) for layer in layers]
            arrays[site] = (("problem", "layer", *_AXES[site]), np.stack(parts, axis=1))
        rows, keys = (max(map(len, some)) for some in (self.rows, self.columns))
        columns = {
            name: (schema.COLUMNS[name].dims, values)
            for name, values in label_columns(self.labels, rows, keys).items()
        }
        n = len(self.labels)
        columns |= {
            "status": (("problem",), np.full(n, schema.DONE, np.uint8)),
            "error": (("problem",), np.full(n, "", object)),
        }
        indexes = {
            "problem": np.array([one.id for one in self.labels], dtype=object),
            "layer": layers,
            "head": list(self.heads),
            "query": np.arange(rows),
            "key": np.arange(keys),
        }
        coords = {name: columns.pop(name) for name in schema.COORDINATES}
        dims = {dim for dims, _ in arrays.values() for dim in dims}
        kept = {name: index for name, index in indexes.items() if name in dims}
        coords = {name: c for name, c in coords.items() if set(c[0]) <= dims}
        return xr.Dataset(arrays | columns, coords=kept | coords, attrs=dict(self.attrs))

    def _packed(self, site: Site, x: Tensor) -> npt.NDArray[np.float32]:
        """(problem, ...): the rows and columns of each sequence moved to the front."""
        values, axes = x.detach().float().cpu(), _AXES[site]
        own = {"query": self.rows, "key": self.columns}
        sizes = {axis: max(map(len, some)) for axis, some in own.items()}
        shape = [sizes.get(axis, n) for axis, n in zip(axes, values.shape[1:], strict=True)]
        fill = -np.inf if site == "scores" else 0.0
        out = torch.full((len(values), *shape), fill)
        for item, part in enumerate(values):
            cell: list[slice] = [slice(None)] * len(axes)
            for dim, axis in enumerate(axes):
                if axis in own:
                    part = take(part, own[axis][item], dim)
                    cell[dim] = slice(part.shape[dim])
            out[item][tuple(cell)] = part
        return cast("npt.NDArray[np.float32]", out.numpy())


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
) -> Recorded:
    """One traced forward that keeps activations; only what is asked is computed.

    Args:
        tap: Of the model.
        inputs: What the model's forward takes, by name.
        places: (site, absolute layer) to keep.
        heads: Absolute query heads, default all.
        queries: Rows by token position: see `probe.selection.positions`.
        keys: Columns, likewise.
    """
    order = {site: n for n, site in enumerate(("q", "k", "v", "scores", "pattern", "z"))}
    by_layer: dict[int, list[Site]] = {}
    for site, layer in sorted(set(places), key=lambda place: (place[1], order[place[0]])):
        by_layer.setdefault(layer, []).append(site)
    tensors: dict[tuple[Site, int], Tensor] = {}
    found: list[tuple[Sequence[Sequence[int]], Columns | None, Columns | None]] = []

    def visit(layer: int, envoy: AttentionEnvoy) -> None:
        sites = by_layer[layer]
        call = envoy.call if {"q", "k", "v"} & set(sites) else None
        seen = envoy.seen
        if not found:
            where = _positions(tap, seen)
            rows = _chosen(queries, where, "queries")
            found.append((where, rows, _chosen(keys, where, "keys")))
        _, rows, columns = found[0]
        for site in sites:
            if site in ("scores", "pattern"):
                tensors[site, layer] = _matrix(seen, site, rows, columns, heads)
            elif site == "z":
                tensors[site, layer] = take(_pick(envoy.z, rows), heads, 2).clone()
            else:
                x = getattr(call, _INPUTS[site]).transpose(1, 2)
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


def _chosen(selector: Selector, positions: Sequence[Sequence[int]], name: str) -> Columns | None:
    """The columns that a selection names in each sequence, as many in each."""
    if selector is None:
        return None
    found = []
    for item, each in enumerate(positions):
        real = [column for column, position in enumerate(each) if position >= 0]
        some = selection.positions(selector, len(real), name=name, problem=str(item))
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
    return seen.fill(out, site, queries=queries, keys=keys, heads=heads)
