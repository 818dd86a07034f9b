"""Scores and patterns that exist as whole tensors, read like an `AttentionCall`."""

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from probe.attention import AttentionCall, Site
from probe.indexing import Index, take


class Readable(Protocol):
    """What rows, columns and heads are read from: an `AttentionCall`, or `Matrices`."""

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def shape(self) -> tuple[int, int, int, int]: ...

    def scores(
        self, *, queries: Index = None, keys: Index = None, heads: Index = None
    ) -> Tensor: ...

    def pattern(
        self, *, queries: Index = None, keys: Index = None, heads: Index = None
    ) -> Tensor: ...

    def cut(self, batch: slice, length: int) -> "Readable": ...


@dataclass(frozen=True, slots=True, eq=False)
class Matrices:
    """The scores and the pattern that a layer really used: edited ones, or of a model's own code.

    Attributes:
        full: "pattern", and "scores" if they exist, (batch, head, query, key).
        call: Where scores are read that nobody edited.
    """

    full: dict[Site, Tensor]
    call: AttentionCall | None = None

    @property
    def device(self) -> torch.device:
        """Where the numbers are."""
        return self.full["pattern"].device

    @property
    def dtype(self) -> torch.dtype:
        """Of the numbers."""
        return self.full["pattern"].dtype

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(batch, head, query, key)."""
        batch, heads, rows, keys = self.full["pattern"].shape
        return batch, heads, rows, keys

    def scores(self, *, queries: Index = None, keys: Index = None, heads: Index = None) -> Tensor:
        """As `AttentionCall.scores`."""
        if "scores" in self.full:
            return self._select("scores", queries, keys, heads)
        assert self.call is not None
        return self.call.scores(queries=queries, keys=keys, heads=heads)

    def pattern(self, *, queries: Index = None, keys: Index = None, heads: Index = None) -> Tensor:
        """As `AttentionCall.pattern`."""
        return self._select("pattern", queries, keys, heads)

    def cut(self, batch: slice, length: int) -> "Matrices":
        """As `AttentionCall.cut`."""
        full = {site: x[batch, :, :length, :length] for site, x in self.full.items()}
        return replace(
            self, full=full, call=None if self.call is None else self.call.cut(batch, length)
        )

    def _select(self, site: Site, queries: Index, keys: Index, heads: Index) -> Tensor:
        return take(take(take(self.full[site], heads, 1), queries, 2), keys, 3)
