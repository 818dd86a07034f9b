"""Stores on disk: create, write, resume, open. `probe.schema` says what is in them.

A store is whole from its first moment (arrays and labels appear by one rename) and is filled shard
by shard: data, then labels, loss and errors, then `status`. Each file is replaced in one step, so a
process may die at any moment; what `status` calls done stays done.
"""

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import shutil
import sys
import uuid
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

import numpy as np
import numpy.typing as npt
import xarray as xr
import zarr
from zarr.codecs import ZstdCodec

from probe import schema
from probe.errors import InputError, StoreError
from probe.schema import DONE, EMPTY, FAILED, Labels

if sys.platform != "win32":
    import fcntl

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def open(path: str | Path) -> xr.Dataset:
    """Open a store for reading; nothing is loaded but labels.

    Args:
        path: Folder of the store.

    Returns:
        The captured arrays, lazy, with their labels as coordinates (names, dims and dtypes: see
        `probe.schema`). Problems that have not run are left out, so a store that is still being
        written shows only what is finished; failed ones have status 2, their reason in `error`,
        and matrices as empty as if nothing were attended.

    Raises:
        StoreError: There is no store, it is not ours, it is of a newer version, or it is damaged.

    Example:
        >>> ds = probe.open("run.zarr")
        >>> ds.pattern.sel(problem="0", layer=3, head=1).values
    """
    path = Path(path)
    attrs = _attributes(path)
    _require_arrays(path, attrs)
    ds: xr.Dataset = xr.open_zarr(path, consolidated=False, chunks=None)
    run = np.flatnonzero(ds["status"].values != EMPTY)
    if len(run) == ds.sizes["problem"]:
        return ds
    if len(run) and run[-1] == len(run) - 1:  # the first ones: a slice reads faster than a list
        return ds.isel(problem=slice(len(run)))
    return ds.isel(problem=run)


def vacant(path: str | Path) -> bool:
    """Whether nothing is here that a new store would replace: no such path, or an empty folder.

    Example:
        >>> writer = create(path, ...) if vacant(path) else resume(path, config=config)
    """
    path = Path(path)
    return not path.exists() or (path.is_dir() and not any(path.iterdir()))


def create(
    path: str | Path,
    *,
    labels: Sequence[Labels],
    layers: Sequence[int],
    heads: Sequence[int],
    config: Mapping[str, object],
    sites: Sequence[str] = ("pattern",),
    reduced: Mapping[str, Sequence[str]] | None = None,
    sizes: Mapping[str, int] | None = None,
    dtype: str = "float16",
    loss: bool = True,
    attrs: Mapping[str, object] | None = None,
    overwrite: bool = False,
) -> "Writer":
    """Make a new store with all its labels and no results yet.

    It is built beside `path` and renamed into place: the store is whole or it is not there.

    Args:
        path: Folder to make; its parents are made too.
        labels: One per problem, in the order of the store. The rows and columns of the store are
            as many as the longest problem has.
        layers: Layers that will be written, absolute, from 0.
        heads: Heads that will be written, absolute, from 0.
        config: Everything that shapes the numbers, as JSON data; `resume` compares it.
        sites: Any of "pattern", "scores", "z".
        reduced: Further float32 arrays by name, each with its dims, "problem" first; empty is NaN.
        sizes: Lengths of dims other than problem, layer, head, query and key, as `head_dim` for z.
        dtype: Of the sites, "float16" or "float32".
        loss: Whether to keep a loss per problem.
        attrs: More to record. `versions` is merged with those of numpy, xarray and zarr;
            `causal: False` says that rows also look at later columns.
        overwrite: Replace a store that is there. Anything else is never replaced.

    Returns:
        A writer that holds the store until it is closed.

    Raises:
        InputError: The labels, sites, dims or config cannot be used.
        StoreError: The path is taken, or cannot be written.

    Example:
        >>> with create("run.zarr", labels=labels, layers=range(12), heads=range(12),
        ...             config={"model": "gpt2"}) as writer:
        ...     writer.append([0], {"pattern": [pattern]}, loss=[3.1])
    """
    path = Path(path)
    arrays = {name: schema.site(name, dtype=dtype) for name in sites}
    for name, dims in (reduced or {}).items():
        arrays[name] = schema.Array(tuple(dims), "float32", np.nan)
    lengths = _sizes(labels, layers, heads, sizes or {}, arrays)
    layout = schema.layout(arrays, sizes=lengths)
    story = _story(config, attrs or {}, arrays, layout, loss)
    target = _beside(path, "creating")
    with _claimed(path, overwrite), _explained(path), contextlib.ExitStack() as undo:
        undo.callback(shutil.rmtree, target, ignore_errors=True)
        target.mkdir(parents=True)
        release = _lock(target, path)  # it goes with the folder when that is renamed
        undo.callback(release)
        group = zarr.create_group(target, zarr_format=3, attributes=story)
        _make_arrays(group, arrays, layout, lengths, loss)
        _write_labels(group, labels, layout.block, layers, heads)
        _move_into_place(target, path)
        undo.pop_all()
    _sweep(path)
    return Writer(path, release)


def resume(path: str | Path, *, config: Mapping[str, object]) -> "Writer":
    """Open a store to write what it still lacks.

    What a killed process left behind (half-written files, unfinished folders beside) is removed.

    Args:
        path: Folder of the store.
        config: Must equal, as JSON, what the store was created with.

    Returns:
        A writer that holds the store until it is closed.

    Raises:
        StoreError: It cannot be opened (as `open`), it was made with another config, or another
            process is writing it.

    Example:
        >>> with resume("run.zarr", config={"model": "gpt2"}) as writer:
        ...     todo = writer.pending()
    """
    path = Path(path)
    attrs = _attributes(path)
    different = _differences(attrs.get("config"), _plain(config, "config"))
    if different:
        raise StoreError(
            f"cannot resume {path}, it was made with other settings: {'; '.join(different)}. "
            "Use the old settings, another store, or overwrite=True."
        )
    _require_arrays(path, attrs)
    release = _lock(path, path)
    with _explained(path):
        _sweep(path)
    return Writer(path, release)


class Writer:
    """Fills one store, shard by shard; made by `create` or `resume`, let go by `with`.

    Problems arrive in any order. A shard is written, whole, when all its missing problems have
    arrived; closing also writes shards that are not complete yet. What is done is never replaced.
    """

    def __init__(self, path: Path, release: Callable[[], None]) -> None:
        self._release = weakref.finalize(self, release)
        group = zarr.open_group(path, mode="r+", zarr_format=3, use_consolidated=False)
        self._arrays = {str(name): _array(group, str(name)) for name, _ in group.arrays()}
        names = cast("list[str]", group.attrs["arrays"])
        self._data = tuple(name for name in names if name != "loss")
        self._step, self._block = cast("list[int]", group.attrs["layout"])
        self._path = path
        self._sizes = {d: n for a in self._arrays.values() for d, n in _extents(a).items()}
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
        status = self._state["status"]
        shards = (range(n, min(n + self._step, len(status))) for n in self._starts())
        todo = (tuple(i for i in shard if status[i] != DONE) for shard in shards)
        return [indices for indices in todo if indices]

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

        Example:
            >>> writer.append([0], {"pattern": [pattern]}, loss=[3.1])  # (layer, head, query, key)
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
            for name, array in ((name, self._arrays[name]) for name in self._data):
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

    def _shard(self, index: int) -> "_Shard":
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

    def _relabel(self, shard: "_Shard", index: int, labels: Labels) -> None:
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

    def _place(self, shard: "_Shard", index: int, name: str, values: npt.NDArray[Any]) -> None:
        """Copy one problem's array into its shard, in the stored dtype."""
        expected = self._shape(name, index)
        if values.shape != expected:
            raise InputError(
                f"{name} of problem {self._ids[index]!r} has shape {values.shape}. "
                f"Give ({', '.join(_dims(self._arrays[name])[1:])}) = {expected}."
            )
        block = self._block_of(shard, name, expected)
        cell: Any = (index - shard.start, *(slice(n) for n in expected))
        with np.errstate(over="ignore"):
            block[cell] = values
        if name == "scores" and values.dtype != block.dtype and np.isposinf(block[cell]).any():
            raise InputError(
                f"scores of problem {self._ids[index]!r} reach {values.max():.3g}, past what "
                f"{block.dtype} holds ({np.finfo(block.dtype).max:.0f}). Use dtype='float32'."
            )

    def _block_of(self, shard: "_Shard", name: str, expected: tuple[int, ...]) -> npt.NDArray[Any]:
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
        return tuple(own[dim] for dim in _dims(self._arrays[name])[1:])

    def _write_if_complete(self, shard: "_Shard") -> None:
        status = self._state["status"]
        if all(i in shard.arrived or status[i] == DONE for i in range(shard.start, shard.stop)):
            self._write(self._shards.pop(shard.start))

    def _write(self, shard: "_Shard") -> None:
        """Commit a shard: data, labels, loss and errors, and status last."""
        done = int((self._state["status"] == DONE).sum())
        intact = f"; the problems already done ({done} of {len(self._ids)}) are intact"
        with _explained(self._path, need=self._raw_bytes, intact=intact):
            # this order is the promise: whoever sees a status sees all that it vouches for
            for name, block in shard.data.items():
                self._keep_done(shard, name, block)
                if block.size:
                    extent = (slice(n) for n in block.shape[1:])
                    self._arrays[name][(slice(shard.start, shard.stop), *extent)] = block
            self._write_labels(shard)
            self._write_state(shard)

    def _keep_done(self, shard: "_Shard", name: str, block: npt.NDArray[Any]) -> None:
        """Carry over what earlier runs finished in this shard: it is rewritten whole."""
        here = slice(shard.start, shard.stop)
        done = self._state["status"][here] == DONE
        if done.any():
            block[done] = cast("npt.NDArray[Any]", self._arrays[name][here])[done]

    def _write_labels(self, shard: "_Shard") -> None:
        if not shard.labels:
            return
        chunk = self._chunk(shard)
        names = ("length", "query_position", "key_position", "token", "token_id", "segment")
        rows = {name: np.array(self._arrays[name][chunk]) for name in names}
        for index, labels in shard.labels.items():
            new = _columns([labels], self._sizes["query"], self._sizes["key"])
            for name in names:
                rows[name][index - chunk.start] = new[name][0]
        for name in names:
            self._arrays[name][chunk] = rows[name]

    def _write_state(self, shard: "_Shard") -> None:
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

    def _chunk(self, shard: "_Shard") -> slice:
        """The chunk of the label arrays that a shard lies in."""
        start = shard.start - shard.start % self._block
        return slice(start, min(start + self._block, len(self._ids)))

    def _starts(self) -> range:
        return range(0, len(self._ids), self._step)

    def _read(self, name: str) -> npt.NDArray[Any]:
        return np.array(self._arrays[name][...])

    def _raw_bytes(self) -> int:
        """What is still to be written, before compression."""
        todo = [i for indices in self.pending() for i in indices]
        size = {name: self._arrays[name].dtype.itemsize for name in self._data}
        return sum(math.prod(self._shape(n, i)) * size[n] for n in self._data for i in todo)


@dataclass(slots=True)
class _Shard:
    """Problems `start` to `stop`, gathered until they can be written as one."""

    start: int
    stop: int
    data: dict[str, npt.NDArray[Any]] = field(default_factory=dict)
    labels: dict[int, Labels] = field(default_factory=dict)
    arrived: dict[int, tuple[int, float, str]] = field(default_factory=dict)  # status, loss, error


def _attributes(path: Path) -> dict[str, Any]:
    """The attributes of a store that this version can read."""
    attrs = _own_attributes(path)
    found = attrs["schema"]
    if found != schema.SCHEMA:
        raise StoreError(
            f"{path} has schema {found!r}, and this version reads {schema.SCHEMA!r}. "
            "Upgrade with: pip install --upgrade attn-probe"
        )
    return attrs


def _own_attributes(path: Path) -> dict[str, Any]:
    """The attributes of a store of any schema; an error for whatever is not ours."""
    if not path.exists():
        raise StoreError(
            f"there is no store at {path}. Check the path, or make one with probe.capture."
        )
    if not path.is_dir():
        raise StoreError(f"{path} is a file, not a store. Use another path.")
    try:
        root = json.loads((path / "zarr.json").read_text(encoding="utf-8"))
        attrs = dict(root.get("attributes", {}))
    except FileNotFoundError:
        raise StoreError(
            f"{path} is a folder that holds no store (no zarr.json). Use another path."
        ) from None
    except (ValueError, TypeError, AttributeError) as error:
        raise StoreError(
            f"{path} is damaged: its zarr.json cannot be read ({error}). "
            "Restore it from a copy, or use another path."
        ) from error
    if not str(attrs.get("schema")).startswith("probe/"):
        raise StoreError(
            f"{path} is Zarr data of another kind (schema {attrs.get('schema')!r}), not a store. "
            "Read it with xarray.open_zarr, or use another path."
        )
    return attrs


def _require_arrays(path: Path, attrs: Mapping[str, Any]) -> None:
    columns = (name for name in schema.COLUMNS if name != "loss")
    names = dict.fromkeys((*schema.INDEXES, *columns, *attrs.get("arrays", ())))
    missing = [name for name in names if not (path / name / "zarr.json").is_file()]
    if missing:
        raise StoreError(
            f"{path} is damaged: it lacks {', '.join(missing)}. "
            "Restore it from a copy, or make it anew with overwrite=True."
        )


def _sizes(
    labels: Sequence[Labels],
    layers: Sequence[int],
    heads: Sequence[int],
    more: Mapping[str, int],
    arrays: Mapping[str, schema.Array],
) -> dict[str, int]:
    """Length of every dim, after checking that a store can have them."""
    if not labels:
        raise InputError("a store needs at least one problem, and labels is empty. Give one.")
    ids = [one.id for one in labels]
    if len(set(ids)) < len(ids):
        twice = next(name for n, name in enumerate(ids) if name in ids[:n])
        raise InputError(f"two problems have the id {twice!r}. Give each its own.")
    sizes = dict(more) | {
        "problem": len(labels),
        "layer": len(layers),
        "head": len(heads),
        "query": max(1, *(len(one.query_position) for one in labels)),
        "key": max(1, *(len(one.key_position) for one in labels)),
    }
    for name, array in arrays.items():
        if array.dims[:1] != ("problem",) or name in schema.COLUMNS or name in schema.INDEXES:
            raise InputError(
                f"an array {name!r} over {array.dims} cannot be stored. "
                'Its first dim must be "problem", and its name must not be one that stores use.'
            )
        unknown = [dim for dim in array.dims if sizes.get(dim, 0) < 1]
        if unknown:
            raise InputError(
                f"{name} has dim {unknown[0]!r} of unknown length. "
                f"Give sizes={{{unknown[0]!r}: ...}}."
            )
    return sizes


def _story(
    config: Mapping[str, object],
    attrs: Mapping[str, object],
    arrays: Mapping[str, schema.Array],
    layout: schema.Layout,
    loss: bool,
) -> dict[str, Any]:
    """The attributes of a new store: what it is, how it was made, with what."""
    made, more = _plain(config, "config"), _plain(attrs, "attrs")
    versions = {module.__name__: module.__version__ for module in (np, xr, zarr)}
    return more | {
        "schema": schema.SCHEMA,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions | more.get("versions", {}),
        "config": made,
        "config_sha256": hashlib.sha256(_canonical(made).encode()).hexdigest(),
        "arrays": [*arrays, "loss"] if loss else list(arrays),
        "layout": [layout.problems, layout.block],
        # plain xarray.open_zarr reads from this which arrays are coordinates
        "coordinates": " ".join(schema.COORDINATES),
    }


def _make_arrays(
    group: zarr.Group,
    arrays: Mapping[str, schema.Array],
    layout: schema.Layout,
    sizes: Mapping[str, int],
    loss: bool,
) -> None:
    """Make every array of the schema, all empty."""

    def make(
        name: str, spec: schema.Array, chunk: Sequence[int], shard: Sequence[int] | None
    ) -> None:
        group.create_array(
            name,
            shape=tuple(sizes[dim] for dim in spec.dims),
            dtype=str if spec.dtype == "string" else spec.dtype,
            chunks=tuple(chunk),
            shards=tuple(shard) if shard else None,
            fill_value=spec.fill,
            compressors=ZstdCodec(level=1),
            dimension_names=spec.dims,
        )

    for name, spec in arrays.items():
        make(name, spec, layout.chunks[name], layout.shards[name])
    for name, spec in schema.COLUMNS.items():
        if name == "problem":  # read at every opening, never rewritten: one chunk
            make(name, spec, [sizes["problem"]], None)
        elif name != "loss" or loss:
            make(name, spec, [layout.block, *(sizes[dim] for dim in spec.dims[1:])], None)
    for name in schema.INDEXES[1:]:
        make(name, schema.Array((name,), "int64", 0), [sizes[name]], None)


def _write_labels(
    group: zarr.Group,
    labels: Sequence[Labels],
    block: int,
    layers: Sequence[int],
    heads: Sequence[int],
) -> None:
    """Write all that is known before the run, whole chunks at a time."""
    _array(group, "problem")[:] = np.array([one.id for one in labels], dtype=object)
    _array(group, "layer")[:] = np.array(layers, dtype=np.int64)
    _array(group, "head")[:] = np.array(heads, dtype=np.int64)
    counts = {dim: _array(group, dim).shape[0] for dim in ("query", "key")}
    for dim, count in counts.items():
        _array(group, dim)[:] = np.arange(count, dtype=np.int64)
    for start in range(0, len(labels), block):
        some = labels[start : start + block]
        for name, values in _columns(some, counts["query"], counts["key"]).items():
            _array(group, name)[start : start + len(some)] = values


def _columns(labels: Sequence[Labels], rows: int, columns: int) -> dict[str, npt.NDArray[Any]]:
    """The label arrays of some problems, padded with each array's fill value."""
    n = len(labels)
    out: dict[str, npt.NDArray[Any]] = {
        "length": np.array([one.length for one in labels], dtype=np.int32),
        "query_position": np.full((n, rows), -1, dtype=np.int32),
        "key_position": np.full((n, columns), -1, dtype=np.int32),
        "token": np.full((n, columns), "", dtype=object),
        "token_id": np.full((n, columns), -1, dtype=np.int32),
        "segment": np.full((n, columns), "", dtype=object),
    }
    for i, one in enumerate(labels):
        for name in ("query_position", "key_position", "token", "token_id", "segment"):
            values = getattr(one, name)
            out[name][i, : len(values)] = values
    return out


@contextlib.contextmanager
def _claimed(path: Path, overwrite: bool) -> Iterator[None]:
    """Hold the store that is to be replaced, if there is one; refuse to replace anything else."""
    if vacant(path):
        yield
        return
    _own_attributes(path)
    if not overwrite:
        raise StoreError(
            f"{path} already holds a store. "
            "Resume it, use another path, or replace it with overwrite=True."
        )
    release = _lock(path, path)
    try:
        yield
    finally:
        release()


def _move_into_place(target: Path, path: Path) -> None:
    if vacant(path):
        target.rename(path)  # also over an empty folder
        return
    aside = _beside(path, "replaced")
    path.rename(aside)
    try:
        target.rename(path)
    except OSError:
        aside.rename(path)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _beside(path: Path, suffix: str) -> Path:
    path = path.absolute()
    return path.with_name(f"{path.name}.{uuid.uuid4().hex}.{suffix}")


def _sweep(path: Path) -> None:
    """Remove what dead processes left: half-written files here, unfinished folders beside."""
    for file in path.rglob("*.partial"):
        file.unlink(missing_ok=True)
    path = path.absolute()
    pattern = re.compile(re.escape(path.name) + r"\.[0-9a-f]{32}\.(creating|replaced)")
    for folder in path.parent.iterdir():
        if pattern.fullmatch(folder.name):
            with contextlib.suppress(OSError):  # somebody is still at it
                release = _lock(folder, path)
                shutil.rmtree(folder, ignore_errors=True)
                release()


def _lock(folder: Path, path: Path) -> Callable[[], None]:
    """Keep other writers out until the returned function is called, or this process dies."""
    if sys.platform == "win32":
        return lambda: None
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise StoreError(
            f"{path} is being written by another process. Wait for it, or use another path."
        ) from None
    except OSError:  # a file system without locks
        pass
    return partial(os.close, handle)


@contextlib.contextmanager
def _explained(
    path: Path, *, need: Callable[[], int] | None = None, intact: str = ""
) -> Iterator[None]:
    """Turn what the disk says into a StoreError that says what to do."""
    try:
        yield
    except StoreError:
        raise
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise StoreError(
                f"cannot write to {path} ({error.strerror}){intact}. "
                "Remove the cause and run the same call again."
            ) from error
        more = f"needs up to {_size(need())}, " if need else ""
        parent = next(folder for folder in path.absolute().parents if folder.exists())
        free = _size(shutil.disk_usage(parent).free)
        raise StoreError(
            f"no room left on the disk for {path} ({more}{free} free){intact}. "
            "Free space and run the same call again."
        ) from error


def _differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    """What differs between two JSON values, as "name old, now new"."""
    if isinstance(old, dict) and isinstance(new, dict):
        names = [*old, *(name for name in new if name not in old)]
        dot = f"{prefix}." if prefix else ""
        return [
            line
            for name in names
            for line in _differences(old.get(name, ...), new.get(name, ...), dot + name)
        ]
    if old is not ... and new is not ... and _canonical(old) == _canonical(new):
        return []
    return [f"{prefix or 'config'} {_brief(old)}, now {_brief(new)}"]


def _brief(value: Any) -> str:
    if value is ...:
        return "absent"
    text = value if isinstance(value, str) and value.isalnum() else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _plain(value: Mapping[str, object], name: str) -> dict[str, Any]:
    """The value as JSON gives it back: tuples become lists."""
    try:
        return cast("dict[str, Any]", json.loads(json.dumps(dict(value))))
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{name} cannot be recorded as JSON ({error}). Give strings, numbers, lists and dicts."
        ) from error


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def _size(count: int) -> str:
    """Bytes for people, SI: 1.2 GB."""
    value, unit = float(count), "bytes"
    for bigger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, bigger
    return f"{value:.0f} {unit}" if unit == "bytes" else f"{value:.1f} {unit}"


def _names(names: Iterable[str]) -> str:
    return ", ".join(names) or "nothing"


def _array(group: zarr.Group, name: str) -> zarr.Array[Any]:
    return cast("zarr.Array[Any]", group[name])


def _dims(array: zarr.Array[Any]) -> tuple[str, ...]:
    names = array.metadata.dimension_names if array.metadata.zarr_format == 3 else None
    return tuple(str(name) for name in names or ())


def _extents(array: zarr.Array[Any]) -> dict[str, int]:
    return dict(zip(_dims(array), array.shape, strict=True))
