"""Mean and spread over problems, kept while they run: for matrices that nobody can store.

Problems are added in float32 by Welford's method (1962): after 300,000 of them means of rare cells
and small spreads were off by 2e-4 of themselves. From time to time all is written as a new
generation (see `probe.generations`). Only then are its problems done: a run that dies goes on from
its last whole generation.
"""

import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from probe import disk, generations
from probe.arrays import every
from probe.generations import Generation
from probe.line import Line
from probe.schema import Labels
from probe.stories import own_attributes
from probe.writer import Writer

Array = npt.NDArray[Any]
Mask = npt.NDArray[np.bool_]

SECONDS, SHARE = 60.0, 30  # between two generations, and so many times as long as one takes


class Sums:
    """Counts (query, key) int32; means and squared deviations (layer, head, query, key) float32."""

    def __init__(self, count: Array, mean: Array, squares: Array) -> None:
        self.count, self.mean, self.squares = count, mean, squares

    def add(self, layers: Mapping[int, Array], cells: Mask) -> None:
        """Add one problem: (head, query, key) of each layer, of which some cells exist."""
        rows, columns = cells.shape
        count = self.count[:rows, :columns]
        count += cells
        share = np.where(cells, 1 / np.maximum(count, 1), 0).astype("float32")
        rest = np.where(cells, 1 - share, 0).astype("float32")
        step, part = np.empty((2, rows, columns), "float32")
        for layer, heads in layers.items():
            for head, values in enumerate(heads):  # one matrix at a time stays in the cache
                mean = self.mean[layer, head, :rows, :columns]
                np.subtract(values, mean, out=step)
                mean += np.multiply(step, share, out=part)
                np.multiply(step, step, out=step)
                self.squares[layer, head, :rows, :columns] += np.multiply(step, rest, out=step)


class SummaryWriter:
    """Takes what a `Writer` takes of `pattern`, and keeps its moments over problems."""

    def __init__(self, writer: Writer, part: tuple[int, int]) -> None:
        self._writer, self._place = writer, writer.place
        arrays = every(self._place)
        names = ("query_position", "key_position")
        self._positions = [np.array(arrays[name][...]) for name in names]
        self._causal = bool(own_attributes(self._place).get("causal", True))
        sizes = [arrays[dim].shape[0] for dim in ("layer", "head", "query", "key")]
        self._part = f"{part[0]}-of-{part[1]}"
        self._loss = np.full(len(self._positions[0]), np.nan)
        self._members = np.zeros(len(self._loss), bool)
        self._sums = Sums(
            np.zeros(sizes[2:], "int32"), np.zeros(sizes, "float32"), np.zeros(sizes, "float32")
        )
        self._layers: dict[int, dict[int, Array]] = {}
        self._cells: dict[int, Mask] = {}
        self._waiting: list[tuple[int, float]] = []
        self._saved, self._pause, self._number = time.monotonic(), SECONDS, 0
        self._load()
        self._line = Line(1, 2, lambda: None)

    def pending(self) -> list[tuple[int, ...]]:
        """As `Writer.pending`."""
        return self._writer.pending()

    def publish(self) -> None:
        """As `Writer.publish`."""
        self._writer.publish()

    def begin(self, index: int, labels: Labels | None = None) -> None:
        """As `Writer.begin`."""
        self._writer.begin(index, labels)
        own = (positions[index] for positions in self._positions)
        query, key = (positions[positions >= 0] for positions in own)
        seen = key <= query[:, None] if self._causal else np.ones((len(query), len(key)), bool)
        self._layers[index], self._cells[index] = {}, seen

    def put(
        self, indices: Sequence[int], name: str, values: Array, layer: int, row: None = None
    ) -> None:
        """As `Writer.put`, but for whole layers; they are held until the problem is done."""
        del name, row
        for index, one in zip(indices, values, strict=True):
            self._layers[index][layer] = one

    def done(self, index: int, loss: float = np.nan) -> None:
        """As `Writer.done`."""
        layers, cells = self._layers.pop(index), self._cells.pop(index)
        self._line.do(partial(self._sums.add, layers, cells))
        self._waiting.append((index, loss))
        if time.monotonic() - self._saved > self._pause:
            self._save()

    def fail(self, index: int, reason: str) -> None:
        """As `Writer.fail`."""
        self._layers.pop(index, None)
        self._cells.pop(index, None)
        self._writer.fail(index, reason)

    def close(self) -> None:
        """Write what is in hand and let go of the store."""
        try:
            if self._writer.published:
                self._save()
        finally:
            self._line.close()
            self._writer.close()

    def _save(self) -> None:
        """Write a generation; what is in it is done."""
        self._line.wait()
        if not self._waiting:
            return
        start = time.monotonic()
        with disk.explained(self._place):
            for index, loss in self._waiting:
                self._members[index], self._loss[index] = True, loss
            sums = self._sums
            now = Generation(sums.count, sums.mean, sums.squares, self._loss, self._members)
            self._number += 1
            keys = generations.write(self._place, self._part, self._number, now)
            self._writer.beside(keys)
            self._settle()
            for number in generations.numbers(self._place, self._part):
                if number != self._number:
                    self._place.remove(f"{generations.FOLDER}/{self._part}/{number}")
        self._saved = time.monotonic()
        self._pause = max(SECONDS, SHARE * (self._saved - start))

    def _settle(self) -> None:
        """Call done what is in the generation."""
        for index, loss in self._waiting:
            self._writer.done(index, loss)
        self._waiting.clear()
        self._writer.save()

    def _load(self) -> None:
        """Go on from the last generation, also if what is in it is not yet called done.

        What a part of another partition had in hand when it died is in its own sums.
        """
        pending = {i for shard in self._writer.pending() for i in shard}
        for part in generations.parts(self._place):
            found = generations.latest(self._place, part)
            if found is None:
                continue
            if part == self._part:
                self._number = generations.numbers(self._place, part)[-1]
                self._sums = Sums(found.count, found.mean, found.squares)
                self._members, self._loss = found.members, found.loss
            here = pending.intersection(np.flatnonzero(found.members).tolist())
            self._waiting += [(i, float(found.loss[i])) for i in sorted(here)]
        for index, _ in self._waiting:
            self._writer.begin(index)
        self._settle()
