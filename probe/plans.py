"""What a capture computes and writes, as data: `Plan`, and the `Item`s in it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any, Literal

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


Reduce = Literal["moments"] | Mapping[str, Callable[..., Any]]


@dataclass(frozen=True, slots=True)
class Reduction:
    """A metric that is stored instead of the patterns.

    Attributes:
        function: What makes it of a pattern (problem, head, query, key).
        takes: Which of query_position, key_position and token_id it is told.
        array: How it is stored.
        square: Whether it needs the same rows and columns.
    """

    function: Callable[..., Any]
    takes: tuple[str, ...]
    array: schema.Array
    square: bool


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
        estimate: Gives `seconds`.
        reduce: What is stored instead of the patterns: metrics, or their moments.
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
    estimate: Callable[[], float] = field(repr=False)
    reduce: Literal["moments"] | Mapping[str, Reduction] | None = None

    @property
    def seconds(self) -> float:
        """Least time that the model's own arithmetic takes on this machine.

        From its number of operations, and the speed of a matrix product, measured when it is asked.
        """
        return self.estimate()

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
        """Bytes that are kept before compression, without padding."""
        each = len(self.layers) * len(self.heads)
        if self.reduce == "moments":  # mean and squared deviations, float32
            return 8 * each * prod(self.sizes.values())
        if self.reduce:
            sizes = {**self.sizes, "problem": len(self.items), "layer": 1, "head": each}
            kept = self.arrays.values()
            return sum(np.dtype(a.dtype).itemsize * prod(sizes[d] for d in a.dims) for a in kept)
        squares = sum(len(item.queries) * len(item.keys) for item in self.items)
        cells = squares * len(self.matrices)
        if "z" in self.sites:
            cells += sum(len(item.queries) for item in self.items) * self.z_width
        return cells * each * np.dtype(self.dtype).itemsize

    @property
    def arrays(self) -> Mapping[str, schema.Array]:
        """What is stored of each problem, by name."""
        if self.reduce == "moments":
            return {}
        if self.reduce:
            return {name: one.array for name, one in self.reduce.items()}
        return {site: schema.site(site, dtype=self.dtype) for site in self.sites}

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
        if self.reduce:
            return self.bytes
        tiny = all(len(item.queries) * len(item.keys) <= TINY_CELLS for item in self.items)
        share = 0.65 if tiny else 0.4
        factor = {"float32": 1.2, "uint16": 1.07, "uint8": 0.84}.get(self.dtype, 1.0)
        return int(self.bytes * min(1.0, factor * share))

    @property
    def layout(self) -> Layout:
        """How the store will be cut into files."""
        own = {"problem": len(self.items), "layer": len(self.layers), "head": len(self.heads)}
        return schema.layout(self.arrays, sizes=self.sizes | own | {"head_dim": self.z_width})

    def __str__(self) -> str:
        longest = max(item.length for item in self.items)
        return (
            f"{len(self.items)} problems, {self.tokens} tokens (longest {longest}), "
            f"{len(self.batches)} batches\n"
            f"{' + '.join(self.sites)}: {len(self.layers)} layers x {len(self.heads)} heads x "
            f"up to {self.sizes['query']} rows, {self.dtype}: {self.rows} rows, {self._kept}\n"
            f"at least {self.seconds:.1f} s of model time on this machine"
        )

    @property
    def _kept(self) -> str:
        if self.reduce == "moments":
            return f"of which mean and spread are kept: {readable(self.bytes)}, in memory too"
        if self.reduce:
            return f"of which {', '.join(self.arrays)} are kept: {readable(self.bytes)}"
        files = self.layout
        first, array = next(iter(self.arrays.items()))
        cuts = schema.cuts(array.dims, files.chunks[first], files.shards[first])
        return f"{readable(self.bytes)} ({readable(self.stored)} expected on disk)\nfiles of {cuts}"
