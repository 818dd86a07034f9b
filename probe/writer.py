"""Filling a store, shard by shard; `probe.store` makes the writers.

Results are encoded by threads while the next are computed. A shard is committed as data, then
labels, loss and errors, then `status`. Each file is replaced in one step, so a process may die at
any moment; what `status` calls done stays done.
"""

import os
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from probe import disk
from probe.arrivals import Arrivals
from probe.errors import InputError
from probe.gathering import Piles
from probe.ledger import SHARE, Ledger, Part
from probe.line import Line
from probe.places import Folder, Place
from probe.schema import DONE, FAILED, Labels
from probe.streaming import Streams

ENCODERS = min(4, os.cpu_count() or 1)
DEPTH = 16  # jobs, of about 2 MB each, that wait to be encoded and written
SECONDS = 10.0  # of work that a killed run may lose, about

Array = npt.NDArray[Any]


class Writer:
    """Fills one store, shard by shard; made by `create` or `resume`, let go by `with`.

    Problems arrive in any order. A shard is committed when all its missing problems have arrived;
    closing also commits those that are not complete, and so does time: every ten seconds. What is
    done is never replaced. An error of the disk is raised by whatever is called after it.
    """

    def __init__(
        self,
        place: Place,
        release: Callable[[], None],
        *,
        part: tuple[int, int] = (1, 1),
        fsync: bool = False,
        publish: Callable[[], None] | None = None,
        discard: Callable[[], None] | None = None,
    ) -> None:
        try:
            self._ledger = ledger = Ledger(place, part, durable=fsync)
            ledger.discard()
        except BaseException:
            release()
            raise
        self._place = place
        self._publish, self._drop_store = publish, discard
        self._arrivals = Arrivals(ledger)
        self._saved, self._took = time.monotonic(), 0.0
        self._line = Line(ENCODERS, DEPTH, ledger.tend)
        self._streams = Streams(ledger, self._line)
        self._piles = Piles(ledger, self._arrivals.taken, partial(_settle, self._line, ledger))
        self._release = weakref.finalize(self, _let_go, self._line, release)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self.close()

    @property
    def place(self) -> Place:
        """Where the store is."""
        return self._place

    @property
    def published(self) -> bool:
        """Whether the store has its name."""
        return self._publish is None

    @property
    def status(self) -> npt.NDArray[np.uint8]:
        """Status of every problem on disk: 0 empty, 1 done, 2 failed. A copy, uint8."""
        self.wait()
        return self._ledger.status.copy()

    def pending(self) -> list[tuple[int, ...]]:
        """Indices of the problems that are not done (failed ones too), one tuple for each shard."""
        self.wait()
        return self._ledger.pending()

    def append(
        self,
        indices: Sequence[int],
        arrays: Mapping[str, Sequence[Array]],
        *,
        loss: Sequence[float] | None = None,
        labels: Sequence[Labels] | None = None,
    ) -> None:
        """Take all results of some problems.

        Args:
            indices: Their places in the store, from 0.
            arrays: For every array of the store, one array per problem, with the dims of the
                stored one less `problem`, and only the rows and columns that the problem has. They
                must not change afterwards.
            loss: One per problem, nats per token.
            labels: One per problem where they were not known before, as for generated tokens;
                with no more rows and columns than the store has.

        Raises:
            InputError: Something does not fit the store.
            StoreError: The disk is full, or cannot be written. The store stays as it was.

        Example: see `probe.store.create`.
        """
        if set(arrays) != set(self._ledger.data):
            raise InputError(
                f"{self._place} holds {_names(self._ledger.data)}, and {_names(arrays)} came. "
                "Give every array of the store, and no other."
            )
        for n, index in enumerate(indices):
            self.begin(index, None if labels is None else labels[n])
            for name, values in arrays.items():
                self.put([index], name, np.asarray(values[n])[None])
            self.done(index, float(loss[n]) if loss is not None else np.nan)

    def begin(self, index: int, labels: Labels | None = None) -> None:
        """Forget what was put of a problem before, and say which tokens its rows and columns are.

        Args:
            index: Its place in the store, from 0.
            labels: Where they were not known before, as for generated tokens.

        Raises:
            InputError: There is no such problem, it is done, or it is too long for the store.
            StoreError: The disk is full, or cannot be written.
        """
        part = self._part(index)
        came = part.came.pop(index, {})
        self._arrivals.unlabel(part, index)
        if self._ledger.step > 1:
            for name in came:
                self._piles.forget(part, index, name)
        else:
            part.piles.clear()
            self._streams.abandon(part)
        if labels is not None:
            self._arrivals.relabel(part, index, labels)

    def tall(self, name: str) -> int:
        """How many rows of a matrix `put` takes at once, where it is not put whole."""
        return self._streams.rows(name) or self._ledger.sizes["query"]

    def put(
        self,
        indices: Sequence[int],
        name: str,
        values: Array,
        layer: int | None = None,
        row: int | None = None,
    ) -> None:
        """Take one array of some problems with the same rows and columns, or one layer of it.

        Args:
            indices: Their places in the store.
            name: Of the array.
            values: Its dims, `problem` first, with only the rows and columns that they have, and
                without `layer` if one is given. They must not change afterwards.
            layer: Which one, counted from 0 among those of the store.
            row: The first, where values are some rows of a layer's matrices and as many of their
                keys as may hold something: the others stay empty. Rows come in order, as many at
                once as `tall` says.

        Raises:
            InputError: Something does not fit the store.
            StoreError: The disk is full, or cannot be written.
        """
        if name not in self._ledger.data:
            raise InputError(
                f"{self._place} holds {_names(self._ledger.data)}, and {name} came. "
                "Give every array of the store, and no other."
            )
        if len(values) != len(indices):
            raise InputError(
                f"{name} of {len(values)} problems came for {len(indices)}. Give one for each."
            )
        axes = self._ledger.axes[name]
        if layer is not None:
            values = np.expand_dims(values, axes.index("layer"))
        first = {"layer": layer or 0, "query": row or 0}
        for _, some in groupby(enumerate(indices), lambda pair: pair[1] // self._ledger.step):
            where, which = zip(*some, strict=True)
            own = values[where[0] : where[-1] + 1]
            for index in which:
                part = self._part(index)  # of all of them
                if row is not None:
                    self._arrivals.require_next(part, index, name, layer, row, self.tall(name))
            self._arrivals.require_fit(which, name, own, layer, row)
            corner = [first.get(dim, 0) for dim in axes[1:]]
            if self._streams.takes(name):
                self._streams.send(part, name, [part.start, *corner], own)
            else:
                self._piles.add(part, name, which, corner, own)
            stop = None if row is None else row + own.shape[axes.index("query")]
            for index in which:
                self._arrivals.note(part, index, name, layer, stop)

    def done(self, index: int, loss: float = np.nan) -> None:
        """Say that all of a problem has been put.

        Args:
            index: Its place in the store, from 0.
            loss: Nats per token.

        Raises:
            InputError: Something has not.
            StoreError: The disk is full, or cannot be written.
        """
        part = self._part(index)
        layers = self._ledger.sizes["layer"]
        for name in self._ledger.data:
            came = self._arrivals.layers(part, index, name)
            if came != layers:
                raise InputError(
                    f"{name} of problem {self._ledger.ids[index]!r} has {came} of {layers} layers. "
                    "Put each before it is done."
                )
        part.arrived[index] = (DONE, loss, "")
        self._arrivals.taken[index] = True
        self._commit_if_due(part)

    def fail(self, index: int, reason: str) -> None:
        """Record that a problem could not be computed; `resume` offers it again.

        Args:
            index: Its place in the store, from 0.
            reason: For the reader, in the coordinate `error`.

        Raises:
            InputError: There is no such problem, or it is done.
            StoreError: The disk is full, or cannot be written.
        """
        self.begin(index)
        part = self._part(index)
        if self._ledger.step > 1:  # what an earlier run put of it must not be taken for a result
            for name in self._ledger.data:
                self._piles.begin(part, name)
        part.arrived[index] = (FAILED, np.nan, reason)
        self._commit_if_due(part)

    def beside(self, keys: Sequence[str]) -> None:
        """Take files that were written beside as its own: on the disk itself when those are.

        Raises:
            StoreError: The disk is full, or cannot be written.
        """
        self._line.do(partial(self._ledger.wrote, keys))

    def wait(self) -> None:
        """Until all that is complete is on the disk.

        Raises:
            StoreError: The disk is full, or cannot be written.
        """
        if self._release.alive:
            _settle(self._line, self._ledger)

    def save(self) -> None:
        """Have all on the disk that is done, also of shards that are not complete yet.

        Raises:
            StoreError: The disk is full, or cannot be written.
        """
        start = time.monotonic()
        for part in self._arrivals.parts.values():
            if part.arrived:
                self._commit(part)
        self.wait()
        self._saved, self._took = time.monotonic(), time.monotonic() - start

    def publish(self) -> None:
        """Give a store that was created `hidden` its name. Calling it again does nothing."""
        if self._publish is not None:
            self.wait()
            self._publish()
            self._publish = None
            self._ledger.bind()

    def close(self) -> None:
        """Commit the problems in hand and let go of the store. Calling it again does nothing."""
        if not self._release.alive:
            return
        try:
            if self._publish is None:
                self.save()
                self._ledger.force()
        finally:
            self._line.close()
            self._streams.close()
            if self._publish is not None and self._drop_store is not None:
                self._drop_store()
            self._release()
        if isinstance(self._place, Folder) and self._ledger.all_done():
            disk.tidy(self._place.path)

    def _part(self, index: int) -> Part:
        if not self._release.alive:
            raise InputError(f"the writer of {self._place} is closed. Open another with resume.")
        return self._arrivals.part(index)

    def _commit_if_due(self, part: Part) -> None:
        """Commit a part that is complete; and from time to time all that is in hand."""
        if len(part.arrived) == part.missing:
            self._commit(self._arrivals.parts.pop(part.start))
        elif time.monotonic() - self._saved > max(SECONDS, SHARE * self._took):
            self.save()

    def _commit(self, part: Part) -> None:
        """Have what has come of a part kept, after all that is on its way."""
        whole: dict[str, Array] = {}  # what zarr writes by itself
        spare: dict[str, Array] = {}
        for name, block, lay in self._piles.blocks(part):
            if self._streams.grids[name] is None:
                lay()
                whole[name] = block
            elif block.size:
                ready = self._line.early(lay)
                corner = [part.start, *[0] * (block.ndim - 1)]
                self._streams.send(part, name, corner, block, ready)
                spare[name] = block
        self._streams.finish(part)
        state: Any = {"labels": {**part.labels}, "arrived": {**part.arrived}}
        now = replace(part, piles={}, blocks=whole, **state)  # what is laid is not kept
        part.shards = {}
        self._line.do(partial(self._keep, now))
        if self._ledger.step > 1:
            self._line.do(partial(self._piles.spare.update, spare))

    def _keep(self, part: Part) -> None:
        self._ledger.commit(part)
        self._streams.settle(part)


def _settle(line: Line, ledger: Ledger) -> None:
    line.do(ledger.save)
    line.wait()


def _let_go(line: Line, release: Callable[[], None]) -> None:
    """Also of a writer that is dropped: nothing may write when another has the store."""
    line.close()
    release()


def _names(names: Iterable[str]) -> str:
    return ", ".join(names) or "nothing"
