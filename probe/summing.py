"""Mean and spread over problems, kept while they run: for matrices that nobody can store.

Problems are added in float32 by Welford's method (1962). From time to time all is written as a new
generation, `moments/<part>/<number>` in the store, whose last array says which problems are in it.
Only then are they done: a run that dies goes on from its last whole generation.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
from zarr.codecs import ZstdCodec

from probe import disk
from probe.arrays import named, opened
from probe.line import Line
from probe.places import Place
from probe.schema import DONE, HEADS, TILE, Labels
from probe.writer import Writer

Array = npt.NDArray[Any]
Mask = npt.NDArray[np.bool_]

SECONDS, SHARE = 60.0, 30  # between two generations, and so many times as long as one takes
FIELDS = ("count", "mean", "squares")


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
        group = opened(self._place.zarr)
        names = ("query_position", "key_position")
        self._positions = [np.array(named(group, name)[...]) for name in names]
        self._causal = bool(group.attrs.get("causal", True))
        sizes = [named(group, dim).shape[0] for dim in ("layer", "head", "query", "key")]
        self._folder = f"moments/{part[0]}-of-{part[1]}"
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

    def put(self, indices: Sequence[int], name: str, values: Array, layer: int) -> None:
        """As `Writer.put`; layers are held until the problem is done."""
        del name
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
            self._write(self._number + 1)
            self._settle()
            self._number += 1
            for number in _generations(self._place, self._folder):
                if number != self._number:
                    self._place.remove(f"{self._folder}/{number}")
        self._saved = time.monotonic()
        self._pause = max(SECONDS, SHARE * (self._saved - start))

    def _settle(self) -> None:
        """Call done what is in the generation."""
        for index, loss in self._waiting:
            self._writer.done(index, loss)
        self._waiting.clear()
        self._writer.save()

    def _write(self, number: int) -> None:
        store, path = self._place.zarr, f"{self._folder}/{number}"
        for folder in ("moments", self._folder, path):
            if not self._place.exists(f"{folder}/zarr.json"):
                zarr.create_group(store, path=folder)
        group = opened(store, "r+", path)
        for name in FIELDS:
            _create(group, name, getattr(self._sums, name))
        _create(group, "loss", self._loss)
        _create(group, "members", self._members)  # the last: a generation that has them is whole

    def _load(self) -> None:
        """Go on from the last whole generation, also if what is in it is not yet called done."""
        numbers = _generations(self._place, self._folder)
        if not numbers:
            return
        self._number = numbers[-1]
        group = opened(self._place.zarr, path=f"{self._folder}/{self._number}")
        self._sums = Sums(*(np.array(named(group, name)[...]) for name in FIELDS))
        self._members = np.array(named(group, "members")[...])
        self._loss = np.array(named(group, "loss")[...])
        here = np.flatnonzero(self._members & (self._writer.status != DONE)).tolist()
        self._waiting = [(i, float(self._loss[i])) for i in here]
        for index, _ in self._waiting:
            self._writer.begin(index)
        self._settle()


def _create(group: zarr.Group, name: str, values: Array) -> None:
    if values.ndim < 4:
        chunk, shard = values.shape, None
    else:
        sizes = zip(values.shape, (1, HEADS, TILE, TILE), strict=True)
        chunk = tuple(min(size, most) for size, most in sizes)
        shard = tuple(-(-n // c) * c for n, c in zip(values.shape[1:], chunk[1:], strict=True))
        shard = (1, *shard)
    array = group.create_array(
        name,
        shape=values.shape,
        dtype=values.dtype,
        chunks=chunk,
        shards=shard,
        compressors=ZstdCodec(level=1, checksum=True),
        overwrite=True,
        config={"write_empty_chunks": True},
    )
    array[...] = values


def _generations(place: Place, folder: str) -> list[int]:
    """Numbers of the generations that are whole."""
    numbers = sorted(int(name) for name in place.children(folder) if name.isdigit())
    return [n for n in numbers if place.exists(f"{folder}/{n}/members/c/0")]


def kept(place: Place) -> Iterator[Sums]:
    """The sums of each part of a store."""
    for part in sorted(place.children("moments")):
        numbers = _generations(place, f"moments/{part}")
        if numbers:
            path = f"moments/{part}/{numbers[-1]}"
            group = opened(place.zarr, path=path)
            yield Sums(*(np.array(named(group, name)[...]) for name in FIELDS))
