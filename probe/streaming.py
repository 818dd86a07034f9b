"""Shards on their way: cut into tiles, encoded by threads, and appended to their files in order."""

from collections.abc import Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any

import numpy.typing as npt

from probe.ledger import Ledger, Part
from probe.line import Line
from probe.schema import DONE
from probe.sharding import Encoded, Grid, Shard, cut, encode, expected, grid

_STREAMED = ("problem", "layer")

Array = npt.NDArray[Any]


class Streams:
    """The shards of one writer that are not kept yet.

    Attributes:
        grids: How each array is cut; None where zarr-python has to write it.
    """

    def __init__(self, ledger: Ledger, line: Line) -> None:
        self.grids = {name: grid(name, ledger.arrays[name]) for name in ledger.data}
        self._ledger, self._line = ledger, line
        self._open: set[Shard] = set()

    def rows(self, name: str) -> int | None:
        """Rows of a tile of matrices that go to their shards as they come."""
        grid, axes = self.grids[name], self._ledger.axes[name]
        if grid is None or not self.takes(name) or "query" not in axes:
            return None
        return grid.tile[axes.index("query")]

    def takes(self, name: str) -> bool:
        """Whether an array goes to its shard as it comes: its tiles hold one problem, one layer."""
        grid, axes = self.grids[name], self._ledger.axes[name]
        if grid is None or self._ledger.step > 1:
            return False
        return all(n == 1 for n, dim in zip(grid.tile, axes, strict=True) if dim in _STREAMED)

    def send(
        self,
        part: Part,
        name: str,
        corner: Sequence[int],
        block: Array,
        ready: Future[Any] | None = None,
    ) -> None:
        """Have a block's tiles encoded and written, once it is ready."""
        own = self.grids[name]
        assert own is not None
        for at, number, view in cut(own, corner, block):
            shard = part.shards.get((name, at)) or self._shard(part, own, at)
            shard.ready = ready
            if job := shard.put(number, view):
                self._line.after(partial(self._write, shard), _encode, shard, job)

    def _shard(self, part: Part, own: Grid, at: tuple[int, ...]) -> Shard:
        shard = part.shards[own.name, at] = Shard(self._ledger.place, own, at)
        self._open.add(shard)
        return shard

    def _write(self, shard: Shard, encoded: Encoded) -> None:
        with self._ledger.explained():
            self._ledger.require_there()
            shard.write(encoded)

    def finish(self, part: Part) -> None:
        """Have all of a part's shards encoded; one that holds nothing is a file as well."""
        self._complete(part)
        for shard in part.shards.values():
            if job := shard.rest():
                self._line.after(partial(self._write, shard), _encode, shard, job)

    def settle(self, part: Part) -> None:
        """Let go of shards that are kept."""
        self._open.difference_update(part.shards.values())

    def abandon(self, part: Part) -> None:
        """Leave nothing of a part's shards."""
        for shard in part.shards.values():
            self._line.do(partial(self._abandon, shard))
        part.shards.clear()

    def close(self) -> None:
        """Leave nothing of what was not kept, after the line has ended."""
        for shard in self._open:
            shard.abandon()

    def _complete(self, part: Part) -> None:
        """Make a file also of shards that hold nothing, where a done problem has no row."""
        done = [i for i, (status, *_) in part.arrived.items() if status == DONE]
        for name, own in self.grids.items():
            if own is None or not done:
                continue
            for key, _ in expected(name, self._ledger.arrays[name], done[:1]):
                at = tuple(map(int, key.split("/")[2:]))
                if (name, at) not in part.shards:
                    self._shard(part, own, at)

    def _abandon(self, shard: Shard) -> None:
        shard.abandon()
        self._open.discard(shard)


def _encode(shard: Shard, job: Sequence[tuple[int, Array]]) -> Encoded:
    if shard.ready is not None:
        shard.ready.result()
    return encode(shard.grid, job)
