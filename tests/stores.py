"""What the tests of stores share: problems, results that can be told apart, stores full of them."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import xarray as xr
from zarr.storage import LocalStore

from probe import schema, store
from probe.places import Folder
from probe.schema import DONE, Labels

CONFIG = {"model": "gpt2", "dtype": "float16", "queries": None}
LAYERS, HEADS, DIM = (1, 4), (0, 2, 3), 5

Array = npt.NDArray[Any]


def labels(i: int, length: int, queries: Sequence[int] | None = None) -> Labels:
    keys = tuple(range(length))
    return Labels(
        id=f"gsm8k/{i}",
        length=length,
        query_position=keys if queries is None else queries,
        key_position=keys,
        token=tuple(f" tök{k}" for k in keys),
        token_id=tuple(100 + k for k in keys),
        segment=tuple("bos" if k == 0 else "question" for k in keys),
    )


def result(name: str, one: Labels, seed: int) -> Array:
    """What a model might give: a causal matrix, float32, the same for the same problem."""
    noise = np.random.default_rng([seed, len(name)])
    rows, columns = np.array(one.query_position), np.array(one.key_position)
    if name == "z":
        return noise.normal(size=(len(LAYERS), len(rows), len(HEADS), DIM)).astype("float32")
    shape = (len(LAYERS), len(HEADS), len(rows), len(columns))
    seen = columns <= rows[:, None]
    score = np.where(seen, noise.normal(size=shape), -np.inf).astype("float32")
    if name == "scores":
        return score
    weight = np.exp(score)
    return np.asarray(weight / weight.sum(-1, keepdims=True), dtype="float32")


def create(path: Path, some: Sequence[Labels], **options: Any) -> store.Writer:
    defaults: dict[str, Any] = {
        "labels": some,
        "layers": LAYERS,
        "heads": HEADS,
        "config": CONFIG,
        "sizes": {"head_dim": DIM},
    }
    return store.create(path, **(defaults | options))


def put(writer: store.Writer, some: Sequence[Labels], indices: Sequence[int], *sites: str) -> None:
    arrays = {name: [result(name, some[i], i) for i in indices] for name in sites or ["pattern"]}
    writer.append(indices, arrays, loss=[i / 2 for i in indices])


def fill(path: Path, some: Sequence[Labels], *sites: str, **options: Any) -> None:
    with create(path, some, sites=sites or ("pattern",), **options) as writer:
        for indices in writer.pending():
            put(writer, some, indices, *sites)


def check(ds: xr.Dataset, some: Sequence[Labels]) -> None:
    """Every done problem of an opened store holds what `result` gave, bit for bit."""
    known = {one.id: i for i, one in enumerate(some)}
    sites = [name for name in schema.SITES if name in ds]
    for row, id_ in enumerate(ds["problem"].values):
        i, done = known[str(id_)], ds["status"].values[row] == DONE
        rows, columns = len(some[i].query_position), len(some[i].key_position)
        for name in sites:
            stored, fill_value = ds[name].values[row], schema.SITES[name][1]
            expected = np.full(stored.shape, fill_value, stored.dtype)
            if done:
                own = expected[:, :rows] if name == "z" else expected[:, :, :rows, :columns]
                own[...] = result(name, some[i], i)
            np.testing.assert_array_equal(stored, expected)
        assert ds["length"].values[row] == some[i].length
        if "loss" in ds:
            np.testing.assert_equal(ds["loss"].values[row], i / 2 if done else np.nan)


def files(path: Path) -> int:
    return sum(file.is_file() for file in (path / "pattern" / "c").rglob("*"))


def says(text: str) -> str:
    return f"^{re.escape(text)}$"


def disk_refuses(monkeypatch: pytest.MonkeyPatch, part: str, number: int) -> None:
    real = LocalStore.set

    async def refuse(self: LocalStore, key: str, value: Any, *rest: Any) -> None:
        if part in key:
            raise OSError(number, os.strerror(number))
        await real(self, key, value, *rest)

    incoming = Folder.incoming

    def refuse_data(self: Folder, key: str) -> Any:
        if part in key:
            raise OSError(number, os.strerror(number))
        return incoming(self, key)

    monkeypatch.setattr(LocalStore, "set", refuse)
    monkeypatch.setattr(Folder, "incoming", refuse_data)


TINY = [labels(i, length) for i, length in enumerate((6, 3, 6, 1, 5))]
FULL = [labels(i, length) for i, length in enumerate((70, 3, 300, 257, 16))]
