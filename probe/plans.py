"""What a capture computes and writes, as data: `Plan`, and the `Item`s in it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from probe import schema
from probe.attention import Site as MatrixSite
from probe.disk import size as readable
from probe.interventions import Intervention
from probe.model import Model
from probe.problems import Problem
from probe.schema import TINY_CELLS, Labels, Layout, Site
from probe.selection import Selector


@dataclass(frozen=True, slots=True)
class Item:
    """A problem made ready: its tokens, and which of them are stored as rows and columns.

    While tokens are still to be generated, rows and columns count them as if all were.
    """

    problem: Problem
    token_ids: tuple[int, ...]
    segments: tuple[str, ...]
    queries: tuple[int, ...]
    keys: tuple[int, ...]

    @property
    def length(self) -> int:
        """Tokens."""
        return len(self.token_ids)

    def labels(self, model: Model) -> Labels:
        """What the store says about its rows and columns."""
        # Before they are generated, tokens have no labels.
        keys = [k for k in self.keys if k < self.length]
        ids = [self.token_ids[k] for k in keys]
        return Labels(
            id=self.problem.id,
            length=self.length,
            query_position=[q for q in self.queries if q < self.length],
            key_position=keys,
            token=model.text.decode(ids),
            token_id=ids,
            segment=[self.segments[k] for k in keys],
        )


@dataclass(frozen=True, slots=True)
class Plan:
    """What a capture computes and writes. Printing it gives a summary.

    Attributes:
        items: The problems, in the order of the store.
        sites: "pattern", "scores", "z".
        layers: Absolute layers.
        heads: Absolute query heads.
        dtype: Of the stored numbers.
        interventions: What is changed.
        max_new_tokens: How many the model generates at most.
        queries: Rows, as they were selected.
        keys: Columns, likewise.
        z_width: Numbers of a head's output.
        config: All that shapes the numbers, as JSON data; a store resumes only under the same.
        attrs: What else the store records.
        batches: Indices of the problems that run together, the same whenever a run is resumed.
        seconds: Least time that the model's own arithmetic takes on this machine, from its
            number of operations and the speed of one matrix product measured now.
    """

    items: tuple[Item, ...]
    sites: tuple[Site, ...]
    layers: tuple[int, ...]
    heads: tuple[int, ...]
    dtype: str
    interventions: tuple[Intervention, ...]
    max_new_tokens: int
    queries: Selector
    keys: Selector
    z_width: int
    config: Mapping[str, Any] = field(repr=False)
    attrs: Mapping[str, Any] = field(repr=False)
    batches: tuple[tuple[int, ...], ...] = field(repr=False)
    seconds: float

    def some_heads(self, n_heads: int) -> tuple[int, ...] | None:
        """Its heads; None where they are all that there are, which are read at once."""
        return None if self.heads == tuple(range(n_heads)) else self.heads

    @property
    def tokens(self) -> int:
        """Tokens that the model reads, padding not counted."""
        return sum(item.length for item in self.items)

    @property
    def rows(self) -> int:
        """Query rows that are stored, over all problems, layers and heads."""
        rows = sum(len(item.queries) for item in self.items)
        return rows * len(self.layers) * len(self.heads) * len(self.sites)

    @property
    def bytes(self) -> int:
        """Bytes of the stored matrices before compression, without padding."""
        squares = sum(len(item.queries) * len(item.keys) for item in self.items)
        cells = squares * len(self.matrices)
        if "z" in self.sites:
            cells += sum(len(item.queries) for item in self.items) * self.z_width
        width = np.dtype(self.dtype).itemsize
        return cells * len(self.layers) * len(self.heads) * width

    @property
    def matrices(self) -> tuple[MatrixSite, ...]:
        """The sites that are matrices."""
        return tuple(site for site in self.sites if site != "z")

    @property
    def sizes(self) -> dict[str, int]:
        """Rows and columns of the largest problem, with all that it may generate."""
        return {
            "query": max(len(item.queries) for item in self.items),
            "key": max(len(item.keys) for item in self.items),
        }

    @property
    def stored(self) -> int:
        """Bytes expected on disk: measured ratios of trained models, 0.4 (0.65 when tiny)."""
        tiny = all(len(item.queries) * len(item.keys) <= TINY_CELLS for item in self.items)
        share = 0.65 if tiny else 0.4
        factor = {"float32": 1.2, "uint16": 1.07, "uint8": 0.84}.get(self.dtype, 1.0)
        return int(self.bytes * min(1.0, factor * share))

    @property
    def layout(self) -> Layout:
        """How the store will be cut into files."""
        own = {"problem": len(self.items), "layer": len(self.layers), "head": len(self.heads)}
        sites: Mapping[str, schema.Array] = {
            site: schema.site(site, dtype=self.dtype) for site in self.sites
        }
        return schema.layout(sites, sizes=self.sizes | own | {"head_dim": self.z_width})

    def __str__(self) -> str:
        layout, first = self.layout, self.sites[0]
        dims = schema.SITES[first][0]
        widest = max(len(item.queries) for item in self.items)
        longest = max(item.length for item in self.items)
        return (
            f"{len(self.items)} problems, {self.tokens} tokens (longest {longest}), "
            f"{len(self.batches)} batches\n"
            f"{' + '.join(self.sites)}: {len(self.layers)} layers x {len(self.heads)} heads x "
            f"up to {widest} rows, {self.dtype}: {self.rows} rows, {readable(self.bytes)} "
            f"({readable(self.stored)} expected on disk)\n"
            f"files of {schema.cuts(dims, layout.chunks[first], layout.shards[first])}\n"
            f"at least {self.seconds:.1f} s of model time on this machine"
        )
