"""What one forward did, in memory: a `Cache`, and `record`, which fills one."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
import xarray as xr
from torch import Tensor

from probe import schema
from probe.arrays import label_columns
from probe.errors import InputError
from probe.hooks import Name, full_name, resolve
from probe.indexing import take
from probe.interventions import Site
from probe.schema import Labels
from probe.tap import require_alike

Columns = Sequence[Sequence[int]]  # for each sequence of a batch, columns of the padded batch

_AXES: Mapping[Site, tuple[str, ...]] = {
    "q": ("query", "head", "head_dim"),
    "k": ("key", "kv_head", "head_dim"),
    "v": ("key", "kv_head", "head_dim"),
    "scores": ("head", "query", "key"),
    "pattern": ("head", "query", "key"),
    "z": ("query", "head", "head_dim"),
}


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
