"""Filling a store, shard by shard; `probe.store` makes the writers.

A shard is written as data, then labels, loss and errors, then `status`. Each file is replaced in
one step, so a process may die at any moment; what `status` calls done stays done.
"""

import math
import shutil
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

import numpy as np
import numpy.typing as npt
import zarr

from probe import disk
from probe.arrays import dims, label_columns, named
from probe.errors import InputError, StoreError
from probe.schema import DONE, FAILED, Labels


@dataclass(slots=True)
class _Shard:
    """Problems `start` to `stop`, gathered until they can be written as one."""

    start: int
    stop: int
    data: dict[str, npt.NDArray[Any]] = field(default_factory=dict)
    labels: dict[int, Labels] = field(default_factory=dict)
    arrived: dict[int, tuple[int, float, str]] = field(default_factory=dict)  # status, loss, error


class Writer:
    """Fills one store, shard by shard; made by `create` or `resume`, let go by `with`.

    Problems arrive in any order. A shard is written, whole, when all its missing problems have
    arrived; closing also writes shards that are not complete yet. What is done is never replaced.
    """

    def __init__(self, path: Path, release: Callable[[], None]) -> None:
        self._release = weakref.finalize(self, release)
        group = zarr.open_group(path, mode="r+", zarr_format=3, use_consolidated=False)
        self._arrays = {str(name): named(group, str(name)) for name, _ in group.arrays()}
        names = cast("list[str]", group.attrs["arrays"])
        self._data = tuple(name for name in names if name != "loss")
        self._step, self._block = cast("list[int]", group.attrs["layout"])
        self._path = path
        arrays = self._arrays.values()
        self._sizes = {d: n for a in arrays for d, n in zip(dims(a), a.shape, strict=True)}
        self._ids = [str(name) for name in self._read("problem")]
        self._rows = (self._read("query_position") >= 0).sum(axis=1)
        self._columns = (self._read("key_position") >= 0).sum(axis=1)
        self._state = {
            name: self._read(name) for name in ("loss", "error", "status") if name in self._arrays
        }
        self._shards: dict[int, _Shard] = {}
        self._discard()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if isinstance(error, StoreError):  # the disk refused once: do not try the rest
            self._shards.clear()
        self.close()

    @property
    def status(self) -> npt.NDArray[np.uint8]:
        """Status of every problem on disk: 0 empty, 1 done, 2 failed. A copy, uint8."""
        return self._state["status"].copy()

    def pending(self) -> list[tuple[int, ...]]:
        """Indices of the problems that are not done (failed ones too), one tuple for each shard."""
        todo = np.flatnonzero(self._state["status"] != DONE).tolist()
        return [tuple(shard) for _, shard in groupby(todo, lambda i: i // self._step)]

    def append(
        self,
        indices: Sequence[int],
        arrays: Mapping[str, Sequence[npt.NDArray[Any]]],
        *,
        loss: Sequence[float] | None = None,
        labels: Sequence[Labels] | None = None,
    ) -> None:
        """Take results of some problems.

        Args:
            indices: Their places in the store, from 0.
            arrays: For every array of the store, one array per problem, with the dims of the
                stored one less `problem`, and only the rows and columns that the problem has.
            loss: One per problem, nats per token.
            labels: One per problem where they were not known before, as for generated tokens;
                with no more rows and columns than the store has.

        Raises:
            InputError: Something does not fit the store.
            StoreError: The disk is full, or cannot be written. The store stays as it was.

        Example: see `probe.store.create`.
        """
        if set(arrays) != set(self._data):
            raise InputError(
                f"{self._path} holds {_names(self._data)}, and {_names(arrays)} came. "
                "Give every array of the store, and no other."
            )
        for n, index in enumerate(indices):
            shard = self._shard(index)
            if labels is not None:
                self._relabel(shard, index, labels[n])
            for name in self._data:
                self._place(shard, index, name, np.asarray(arrays[name][n]))
            shard.arrived[index] = (DONE, float(loss[n]) if loss is not None else np.nan, "")
            self._write_if_complete(shard)

    def fail(self, index: int, reason: str) -> None:
        """Record that a problem could not be computed; `resume` offers it again.

        Args:
            index: Its place in the store, from 0.
            reason: For the reader, in the coordinate `error`.

        Raises:
            InputError: There is no such problem, or it is done.
            StoreError: The disk is full, or cannot be written.
        """
        shard = self._shard(index)
        if self._step == 1:
            shard.data.clear()
        else:  # what a dead process may have left in this shard must not be taken for a result
            for name in self._data:
                array = self._arrays[name]
                block = self._block_of(shard, name, array.shape[1:])
                block[index - shard.start] = array.fill_value
        shard.arrived[index] = (FAILED, np.nan, reason)
        self._write_if_complete(shard)

    def close(self) -> None:
        """Write the problems in hand and let go of the store. Calling it again does nothing."""
        try:
            for start in list(self._shards):
                shard = self._shards.pop(start)
                if shard.arrived:
                    self._write(shard)
        finally:
            self._release()

    def _discard(self) -> None:
        """Delete data of shards in which nothing is done: a dead process left it there."""
        status = self._state["status"]
        for name in self._data:
            for item in (self._path / name / "c").glob("[0-9]*"):
                start = int(item.name) * self._step
                if not (status[start : start + self._step] == DONE).any():
                    shutil.rmtree(item) if item.is_dir() else item.unlink()

    def _shard(self, index: int) -> _Shard:
        """The shard in hand that takes this problem, with empty arrays if it is new."""
        if not self._release.alive:
            raise InputError(f"the writer of {self._path} is closed. Open another with resume.")
        count = len(self._ids)
        if not 0 <= index < count:
            raise InputError(
                f"there is no problem {index} in {self._path}: it has {count}, 0 to {count - 1}."
            )
        start = index - index % self._step
        shard = self._shards.get(start)
        if self._state["status"][index] == DONE or (shard and index in shard.arrived):
            raise InputError(
                f"problem {self._ids[index]!r} of {self._path} is there already. "
                "Write only what pending() lists."
            )
        if shard is None:
            shard = _Shard(start, min(start + self._step, count))
            self._shards[start] = shard
        return shard

    def _relabel(self, shard: _Shard, index: int, labels: Labels) -> None:
        """Remember new labels; they are written with the shard."""
        rows, columns = len(labels.query_position), len(labels.key_position)
        if rows > self._sizes["query"] or columns > self._sizes["key"]:
            raise InputError(
                f"problem {labels.id!r} has {rows} rows and {columns} columns now, and "
                f"{self._path} was made for {self._sizes['query']} and {self._sizes['key']}. "
                "Create it with as many as the longest may get."
            )
        self._rows[index], self._columns[index] = rows, columns
        shard.labels[index] = labels
        if self._step == 1:  # cells made for the old rows and columns
            shard.data.clear()

    def _place(self, shard: _Shard, index: int, name: str, values: npt.NDArray[Any]) -> None:
        """Take one problem's array into its shard, in the stored dtype."""
        expected = self._shape(name, index)
        if values.shape != expected:
            raise InputError(
                f"{name} of problem {self._ids[index]!r} has shape {values.shape}. "
                f"Give ({', '.join(dims(self._arrays[name])[1:])}) = {expected}."
            )
        if self._step == 1 and values.dtype == self._arrays[name].dtype:
            shard.data[name] = block = values[None]  # alone in its shard: no copy
        else:
            block = self._block_of(shard, name, expected)
            cell: Any = (index - shard.start, *(slice(n) for n in expected))
            with np.errstate(over="ignore"):
                block[cell] = values
        if name == "scores" and np.isposinf(block[index - shard.start]).any():
            raise InputError(
                f"scores of problem {self._ids[index]!r} pass what {block.dtype} holds "
                f"({np.finfo(block.dtype).max:.0f}). Use dtype='float32'."
            )

    def _block_of(self, shard: _Shard, name: str, expected: tuple[int, ...]) -> npt.NDArray[Any]:
        """All of a shard's cells in one array, empty at first."""
        if name not in shard.data:
            array = self._arrays[name]
            # one problem needs only its own rows and columns; several share whole matrices
            shape = expected if self._step == 1 else array.shape[1:]
            block = np.full((shard.stop - shard.start, *shape), array.fill_value, array.dtype)
            shard.data[name] = block
        return shard.data[name]

    def _shape(self, name: str, index: int) -> tuple[int, ...]:
        own = {**self._sizes, "query": int(self._rows[index]), "key": int(self._columns[index])}
        return tuple(own[dim] for dim in dims(self._arrays[name])[1:])

    def _write_if_complete(self, shard: _Shard) -> None:
        status = self._state["status"]
        if all(i in shard.arrived or status[i] == DONE for i in range(shard.start, shard.stop)):
            self._write(self._shards.pop(shard.start))

    def _write(self, shard: _Shard) -> None:
        """Commit a shard: data, labels, loss and errors, and status last."""
        done = int((self._state["status"] == DONE).sum())
        intact = f"; the problems already done ({done} of {len(self._ids)}) are intact"
        if not (self._path / "zarr.json").is_file():
            raise StoreError(
                f"{self._path} was deleted or moved while it was being written. "
                "Put it back, or run the same call again to begin anew."
            )
        with disk.explained(self._path, need=self._raw_bytes, intact=intact):
            # this order is the promise: whoever sees a status sees all that it vouches for
            for name, block in shard.data.items():
                self._keep_done(shard, name, block)
                if block.size:
                    extent = (slice(n) for n in block.shape[1:])
                    self._arrays[name][(slice(shard.start, shard.stop), *extent)] = block
            self._write_labels(shard)
            self._write_state(shard)

    def _keep_done(self, shard: _Shard, name: str, block: npt.NDArray[Any]) -> None:
        """Carry over what earlier runs finished in this shard: it is rewritten whole."""
        here = slice(shard.start, shard.stop)
        done = self._state["status"][here] == DONE
        if done.any():
            block[done] = cast("npt.NDArray[Any]", self._arrays[name][here])[done]

    def _write_labels(self, shard: _Shard) -> None:
        if not shard.labels:
            return
        chunk = self._chunk(shard)
        rows = [index - chunk.start for index in shard.labels]
        some = list(shard.labels.values())
        for name, new in label_columns(some, self._sizes["query"], self._sizes["key"]).items():
            values = np.array(self._arrays[name][chunk])
            values[rows] = new
            self._arrays[name][chunk] = values

    def _write_state(self, shard: _Shard) -> None:
        """Write loss, errors and status as whole chunks; remember them once they are on disk."""
        chunk = self._chunk(shard)
        new = {name: values.copy() for name, values in self._state.items()}
        for index, (status, loss, error) in shard.arrived.items():
            new["status"][index], new["error"][index] = status, error
            if "loss" in new:
                new["loss"][index] = loss
        for name, values in new.items():  # status is the last of them
            if name == "status" or not np.array_equal(
                values, self._state[name], equal_nan=name == "loss"
            ):
                self._arrays[name][chunk] = values[chunk]
        self._state = new

    def _chunk(self, shard: _Shard) -> slice:
        """The chunk of the label arrays that a shard lies in."""
        start = shard.start - shard.start % self._block
        return slice(start, min(start + self._block, len(self._ids)))

    def _read(self, name: str) -> npt.NDArray[Any]:
        return np.array(self._arrays[name][...])

    def _raw_bytes(self) -> int:
        """What is still to be written, before compression."""
        todo = [i for indices in self.pending() for i in indices]
        size = {name: self._arrays[name].dtype.itemsize for name in self._data}
        return sum(math.prod(self._shape(n, i)) * size[n] for n in self._data for i in todo)


def _names(names: Iterable[str]) -> str:
    return ", ".join(names) or "nothing"
