"""What is done of a store: labels, loss, errors and status, and the order of keeping them."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from probe import disk
from probe.arrays import data_arrays, dims, label_columns
from probe.errors import InputError, StoreError
from probe.places import Place
from probe.schema import DONE, Labels
from probe.sharding import Shard
from probe.stories import described

SECONDS = 1.0  # between two writings of the small arrays, at least
SHARE = 30  # and so many times as long as one takes

Array = npt.NDArray[Any]


@dataclass(slots=True)
class Part:
    """Problems `start` to `stop`: all that has come of them since they were last committed."""

    start: int
    stop: int
    piles: dict[str, list[tuple[Any, Any]]] = field(default_factory=dict)  # cells, what they hold
    blocks: dict[str, Array] = field(default_factory=dict)  # what zarr writes by itself
    shards: dict[tuple[str, tuple[int, ...]], Shard] = field(default_factory=dict)  # on their way
    came: dict[int, dict[str, dict[int, int]]] = field(default_factory=dict)  # rows of each layer
    labels: dict[int, Labels] = field(default_factory=dict)
    arrived: dict[int, tuple[int, float, str]] = field(default_factory=dict)  # status, loss, error
    missing: int = 0  # how many were not done when this was begun


class Ledger:
    """The small arrays of a store, and its shape. Only the thread that writes changes them."""

    def __init__(self, place: Place, part: tuple[int, int], *, durable: bool) -> None:
        self.place = place
        self.bind()
        self.data = data_arrays(self.attrs)
        self.step, self.block = cast("list[int]", self.attrs["layout"])
        arrays = self.arrays.values()
        self.axes = {name: dims(array) for name, array in self.arrays.items()}
        self.sizes = {d: n for a in arrays for d, n in zip(dims(a), a.shape, strict=True)}
        self.durable = durable
        try:
            self._read_all(part)
        except (ValueError, RuntimeError) as error:
            raise StoreError(
                f"{place} is damaged: its labels cannot be read ({error}). Restore it from a copy."
            ) from error

    def _read_all(self, part: tuple[int, int]) -> None:
        self.ids = [str(name) for name in self._read("problem")]
        self._several = part[1] > 1
        blocks = owned(len(self.ids), self.block, part)
        self.own = range(blocks.start * self.block, blocks.stop * self.block)
        self.rows = (self._read("query_position") >= 0).sum(axis=1)
        self.columns = (self._read("key_position") >= 0).sum(axis=1)
        self.written: dict[str, None] = {}
        self._unsaved: list[Part] = []
        self._saved, self._pause = 0.0, SECONDS
        self._state = {
            name: self._read(name) for name in ("loss", "error", "status") if name in self.arrays
        }

    def bind(self) -> None:
        """Open the arrays where the store is now."""
        attrs, named = described(self.place, mode="r+")
        self.attrs: Mapping[str, Any] = attrs
        # somebody may have added one without dims
        self.arrays = {name: one for name, one in named.items() if len(dims(one)) == one.ndim}

    @property
    def status(self) -> npt.NDArray[np.uint8]:
        """As it is on the disk."""
        return cast("npt.NDArray[np.uint8]", self._state["status"])

    def pending(self) -> list[tuple[int, ...]]:
        """Problems of ours that are not done, one tuple for each shard."""
        todo = [i for i in np.flatnonzero(self.status != DONE).tolist() if i in self.own]
        return [tuple(shard) for _, shard in groupby(todo, lambda i: i // self.step)]

    def discard(self) -> None:
        """Delete data of shards of ours in which nothing is done: a dead process left it there."""
        for name in self.data:
            for item in self.place.children(f"{name}/c"):
                start = int(item) * self.step if item.isdigit() else -1
                done = (self.status[start : start + self.step] == DONE).any()
                if start in self.own and not done:
                    self.place.remove(f"{name}/c/{item}")

    def all_done(self) -> bool:
        """Whether nothing is left to do for any writer of several."""
        return self._several and bool((self._read("status") == DONE).all())

    def shape(self, name: str, index: int) -> tuple[int, ...]:
        """Of one problem's own cells in an array, without the dim problem."""
        sizes, own = self.sizes, {"query": int(self.rows[index]), "key": int(self.columns[index])}
        return tuple(own[dim] if dim in own else sizes[dim] for dim in self.axes[name][1:])

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Say what an error of the disk means here, after saving what can be saved."""

        def intact() -> str:
            with suppress(OSError):
                self.save()
            done = int((self.status == DONE).sum())
            return f"; the problems already done ({done} of {len(self.ids)}) are intact"

        with disk.explained(self.place, need=self._raw_bytes, intact=intact):
            yield

    def commit(self, part: Part) -> None:
        """Keep the data of a part. What is known about it follows with `save`."""
        with self.explained():
            self.require_there()
            for shard in part.shards.values():
                shard.commit(durable=self.durable)
                self.written[shard.key] = None
            for name, block in part.blocks.items():
                extent = (slice(n) for n in block.shape[1:])
                self.arrays[name][(slice(part.start, part.stop), *extent)] = block
                self._wrote(name, part.start)
        self._unsaved.append(part)

    def tend(self) -> float | None:
        """Save if it is time, so that many parts are saved at once; and how long there still is."""
        if not self._unsaved:
            return None
        left = self._saved + self._pause - time.monotonic()
        if left > 0:
            return left
        self.save()
        return None

    def save(self) -> None:
        """Write labels, loss and errors, and status last, of all parts whose data is kept.

        This order is the promise: whoever sees a status sees all that it vouches for.
        """
        some, self._unsaved = self._unsaved, []
        if not some:
            return
        start = time.monotonic()
        with self.explained():
            self.require_there()
            for chunk in sorted({part.start // self.block for part in some}):
                here = [part for part in some if part.start // self.block == chunk]
                self._write_labels(chunk, {i: one for p in here for i, one in p.labels.items()})
                self._write_state(chunk, {i: one for p in here for i, one in p.arrived.items()})
        self._saved = time.monotonic()
        self._pause = max(SECONDS, SHARE * (self._saved - start))

    def force(self) -> None:
        """Have all that was written on the disk itself."""
        with self.explained():
            self.require_there()
            self.place.force(self.written)

    def require_there(self) -> None:
        """Refuse to make anew what somebody deleted."""
        if not self.place.exists("zarr.json"):
            raise StoreError(
                f"{self.place} was deleted or moved while it was being written. "
                "Put it back, or run the same call again to begin anew."
            )

    def _write_labels(self, chunk: int, labels: Mapping[int, Labels]) -> None:
        if not labels:
            return
        here = self._problems(chunk)
        rows = [index - here.start for index in labels]
        some = list(labels.values())
        for name, new in label_columns(some, self.sizes["query"], self.sizes["key"]).items():
            values = np.array(self.arrays[name][here])
            values[rows] = new
            self.arrays[name][here] = values
            self._wrote(name, here.start)

    def _write_state(self, chunk: int, arrived: Mapping[int, tuple[int, float, str]]) -> None:
        """Write loss, errors and status as whole chunks; remember them once they are on disk."""
        here = self._problems(chunk)
        new = {name: values.copy() for name, values in self._state.items()}
        for index, (status, loss, error) in arrived.items():
            new["status"][index], new["error"][index] = status, error
            if "loss" in new:
                new["loss"][index] = loss
        for name, values in new.items():  # status is the last of them
            if name == "status" or not np.array_equal(
                values, self._state[name], equal_nan=name == "loss"
            ):
                self.arrays[name][here] = values[here]
                self._wrote(name, here.start)
        self._state = new

    def _wrote(self, name: str, start: int) -> None:
        """Remember, and force if that is wanted, the chunks of an array that hold a problem."""
        array = self.arrays[name]
        first = start // (array.shards or array.chunks)[0]
        folder = f"{name}/c/{first}"
        self.wrote([folder] if self.place.exists(folder) else _below(self.place, folder))

    def wrote(self, keys: Sequence[str]) -> None:
        """Remember files, and force them if that is wanted."""
        self.written.update(dict.fromkeys(keys))
        if self.durable:
            self.place.force(keys)

    def _problems(self, chunk: int) -> slice:
        """The problems of a chunk of the label arrays."""
        return slice(chunk * self.block, min((chunk + 1) * self.block, len(self.ids)))

    def _read(self, name: str) -> Array:
        return np.array(self.arrays[name][...])

    def _raw_bytes(self) -> int:
        """What is still to be written, before compression."""
        todo = [i for indices in self.pending() for i in indices]
        size = {name: self.arrays[name].dtype.itemsize for name in self.data}
        return sum(int(np.prod(self.shape(n, i))) * size[n] for n in self.data for i in todo)


def _below(place: Place, folder: str) -> list[str]:
    """Files under a folder."""
    keys = []
    for name in place.children(folder):
        key = f"{folder}/{name}"
        keys += [key] if place.exists(key) else _below(place, key)
    return keys


def owned(count: int, block: int, part: Sequence[int]) -> range:
    """The blocks of problems that writer i of n fills: neighbours, as many as others have.

    Raises:
        InputError: There is no such part.

    Example:
        >>> owned(10, 2, (1, 2)), owned(10, 2, (2, 2))
        (range(0, 2), range(2, 5))
    """
    which, writers = part
    if not 1 <= which <= writers:
        most = max(1, writers)
        raise InputError(f"part={which}/{writers}. Give 1/{most} to {most}/{most}.")
    blocks = -(-count // block)
    return range((which - 1) * blocks // writers, which * blocks // writers)
