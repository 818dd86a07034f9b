"""The zarr arrays of a store: how long they are, made empty, labelled."""

import asyncio
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import product
from math import ceil
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import zarr
from zarr.abc.store import Store
from zarr.codecs import Crc32cCodec, TransposeCodec, ZstdCodec
from zarr.core.sync import sync
from zarr.storage import LocalStore, StorePath

from probe import schema
from probe.errors import InputError, StoreError
from probe.places import Place
from probe.schema import Labels

WHOLE: Any = {"write_empty_chunks": True}  # a file that is missing was lost
_CODE = "probability = (value / {}) ** 2"


def lengths(
    labels: Sequence[Labels],
    layers: Sequence[int],
    heads: Sequence[int],
    more: Mapping[str, int],
    arrays: Mapping[str, schema.Array],
) -> dict[str, int]:
    """Length of every dim, after checking that a store can have these problems and arrays."""
    if not labels:
        raise InputError("a store needs at least one problem, and labels is empty. Give one.")
    ids = [one.id for one in labels]
    for name in ids:
        if any("\ud800" <= letter <= "\udfff" for letter in name):
            raise InputError(f"the id {name!r} is no valid text. Give one that UTF-8 can hold.")
    if len(set(ids)) < len(ids):
        twice = next(name for n, name in enumerate(ids) if name in ids[:n])
        raise InputError(f"two problems have the id {twice!r}. Give each its own.")
    sizes = dict(more) | {
        "problem": len(labels),
        "layer": len(layers),
        "head": len(heads),
        "query": max(more.get("query", 1), *(len(one.query_position) for one in labels)),
        "key": max(more.get("key", 1), *(len(one.key_position) for one in labels)),
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


def make_arrays(
    group: zarr.Group,
    arrays: Mapping[str, schema.Array],
    layout: schema.Layout,
    sizes: Mapping[str, int],
    *,
    loss: bool,
) -> None:
    """Make every array of the schema, all empty."""

    def make(
        name: str,
        spec: schema.Array,
        chunk: Sequence[int],
        shard: tuple[int, ...] | None = None,
    ) -> None:
        text = spec.dtype == "string"
        turn = shard is not None and chunk[0] > 1 and len(chunk) > 1
        turn = turn and not text  # zarr 3.1 mixes up texts that are turned
        coded = shard is not None and spec.dtype.startswith("uint")
        level = 1 if shard is None else schema.LEVEL
        group.create_array(
            name,
            shape=tuple(sizes[dim] for dim in spec.dims),
            dtype=str if text else spec.dtype,
            chunks=tuple(chunk),
            shards=shard,
            fill_value=spec.fill,
            filters=[TransposeCodec(order=schema.problem_last(len(chunk)))] if turn else (),
            compressors=[ZstdCodec(level=level, checksum=False), Crc32cCodec()],
            dimension_names=spec.dims,
            attributes={"code": _CODE.format(np.iinfo(spec.dtype).max)} if coded else {},
            config=WHOLE,
        )

    for name, spec in arrays.items():
        make(name, spec, layout.chunks[name], layout.shards[name])
    for name, spec in schema.COLUMNS.items():
        if name == "problem":  # read at every opening, never rewritten: one chunk
            make(name, spec, [sizes["problem"]])
        elif name != "loss" or loss:
            make(name, spec, [layout.block, *(sizes[dim] for dim in spec.dims[1:])])
    for name in schema.INDEXES[1:]:
        make(name, schema.Array((name,), "int64", 0), [sizes[name]])


def write_labels(
    where: Place,
    labels: Sequence[Labels],
    layers: Sequence[int],
    heads: Sequence[int],
    *,
    block: int,
) -> None:
    """Write all that is known before the run, whole chunks of `block` problems at a time."""
    arrays = every(where, mode="r+")
    rows, keys = arrays["query"].shape[0], arrays["key"].shape[0]
    indexes = {
        "problem": np.array([one.id for one in labels], dtype=object),
        "layer": np.array(layers, dtype=np.int64),
        "head": np.array(heads, dtype=np.int64),
        "query": np.arange(rows, dtype=np.int64),
        "key": np.arange(keys, dtype=np.int64),
    }
    for name, values in indexes.items():
        arrays[name][:] = values
    for name in ("status", "error", "loss"):  # empty as they are: a file that is missing was lost
        if name in arrays:
            arrays[name][:] = arrays[name].fill_value
    for start in range(0, len(labels), block):
        some = labels[start : start + block]
        for name, values in label_columns(some, rows, keys).items():
            arrays[name][start : start + len(some)] = values


def add_coordinate(group: zarr.Group, dim: str, values: Sequence[float] | Sequence[str]) -> None:
    """Label a dim with numbers or texts."""
    texts = isinstance(values[0], str)
    size = (len(values),)
    array = group.create_array(
        dim,
        shape=size,
        chunks=size,
        dtype=str if texts else "float64",
        dimension_names=[dim],
        config=WHOLE,
    )
    array[:] = np.array(values, object if texts else "float64")


def label_columns(labels: Sequence[Labels], rows: int, keys: int) -> dict[str, npt.NDArray[Any]]:
    """The label arrays of some problems, padded with each array's fill value."""
    sizes = {"problem": len(labels), "query": rows, "key": keys}
    out = {"length": np.array([one.length for one in labels], dtype=np.int32)}
    for name in ("query_position", "key_position", "token", "token_id", "segment"):
        spec = schema.COLUMNS[name]
        dtype = object if spec.dtype == "string" else spec.dtype
        out[name] = np.full([sizes[dim] for dim in spec.dims], spec.fill, dtype)
        for i, one in enumerate(labels):
            values = getattr(one, name)
            out[name][i, : len(values)] = values
    return out


def data_arrays(attrs: Mapping[str, Any]) -> list[str]:
    """The arrays that lie in shards, of a store with these attributes."""
    return [name for name in attrs["arrays"] if name != "loss"]


def every(
    where: Place, path: str = "", *, mode: Literal["r", "r+"] = "r"
) -> dict[str, zarr.Array[Any]]:
    """All arrays of a store, or of a group in it, as they are now, by name.

    What describes them is read here: `zarr.Group.arrays` takes twice as long.

    Args:
        where: The store.
        path: Of a group in it.
        mode: "r+" to write into them.

    Raises:
        StoreError: What describes one is damaged.
    """
    base = f"{path}/" if path else ""
    names = sorted({*where.children(path)} - {"zarr.json"})
    keys = [f"{base}zarr.json", *(f"{base}{name}/zarr.json" for name in names)]
    try:
        texts = where.read_all(keys)
    except Exception as error:  # each kind of store has kinds of its own
        raise StoreError(
            f"what describes the arrays of {where} cannot be read ({error!s:.200}). Allow it, or "
            "restore that file from a copy."
        ) from error
    store = where.zarr
    if not isinstance(store, Store):
        store = LocalStore(store.absolute(), read_only=mode == "r")
    found = {}
    with _explained(where, keys[0]):
        own = json.loads(texts[0] or "")
        kind, version = own["node_type"], own["zarr_format"]
        if (kind, version) != ("group", 3):
            raise ValueError(f"a {kind!r} of zarr format {version!r}, not a 'group' of 3")
    for name, key, text in zip(names, keys[1:], texts[1:], strict=True):
        if text is None:
            continue
        with _explained(where, key):
            told = json.loads(text)
            kind, _ = told["node_type"], told["zarr_format"]  # both must be said
            if kind == "array":
                # not by zarr's own settings: other threads have the same, and change them back
                one = zarr.AsyncArray(told, StorePath(store, f"{base}{name}"), WHOLE)
                found[name] = zarr.Array(one)
    return found


@contextmanager
def _explained(where: Place, key: str) -> Iterator[None]:
    """Say which description is damaged."""
    try:
        yield
    except Exception as error:  # zarr has many kinds
        raise StoreError(
            f"{where} is damaged: {key} cannot be read ({error!s:.200}). "
            "Restore that file from a copy."
        ) from error


def together(arrays: Iterable[zarr.Array[Any]]) -> list[npt.NDArray[Any] | Exception]:
    """All cells of some arrays, read at the same time; or why they cannot be read."""

    async def read() -> list[Any]:
        cells = (array.async_array.getitem(...) for array in arrays)
        return await asyncio.gather(*cells, return_exceptions=True)

    return [one if isinstance(one, Exception) else np.asarray(one) for one in sync(read())]


def chunks_of(array: "zarr.Array[Any]") -> Iterator[str]:
    """Keys, below the array's own, of all files that it has when nothing is left out."""
    cut = array.shards or array.chunks
    for place in product(*(range(ceil(n / c)) for n, c in zip(array.shape, cut, strict=True))):
        yield "/".join(["c", *map(str, place)])


def dims(array: zarr.Array[Any]) -> tuple[str, ...]:
    """Names of an array's dims."""
    names = array.metadata.dimension_names if array.metadata.zarr_format == 3 else None
    return tuple(str(name) for name in names or ())
