"""Memory of shards that several problems share: what it holds, and how long."""

import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from zarr.storage import MemoryStore

from probe import gathering, schema, store
from probe.errors import InputError
from probe.schema import DONE, FAILED
from tests.stores import CONFIG, TINY, check, create, labels, put, result


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run.zarr"


@pytest.mark.parametrize("sites", [("pattern",), ("pattern", "scores", "z")])
def test_memory_that_is_used_again_holds_nothing_of_the_shard_before(
    sites: tuple[str, ...], path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schema, "TINY_PROBLEMS", 2)
    some = [labels(i, n) for i, n in enumerate((6, 6, 2, 3, 1))]
    with create(path, some, sites=sites) as writer:
        put(writer, some, (1, 0), *sites)
        writer.wait()
        spare = writer._piles.spare["pattern"]
        put(writer, some, [2], *sites)
        writer.begin(3)
        for name in sites:
            writer.put([3], name, result(name, some[3], 9)[None])
        writer.fail(3, "CUDA out of memory")
        writer.wait()
        assert np.shares_memory(writer._piles.spare["pattern"], spare)
        put(writer, some, [4], *sites)
    check(store.open(path), some)


@settings(max_examples=25, deadline=None)
@given(
    order=st.permutations(range(5)),
    acts=st.lists(st.sampled_from(["whole", "layers", "half", "fail", "again"]), min_size=5),
    saves=st.sets(st.integers(0, 4)),
)
def test_what_never_came_holds_nothing_whatever_was_in_its_memory(
    order: list[int], acts: list[str], saves: set[int]
) -> None:
    fake: Any = SimpleNamespace(**vars(np))
    fake.empty = lambda shape, dtype: np.full(shape, 7, dtype)
    kept: Any = MemoryStore()
    with pytest.MonkeyPatch.context() as patch, create(kept, TINY) as writer:
        patch.setattr(gathering, "np", fake)
        for i in order:
            values = result("pattern", TINY[i], i)[None]
            if acts[i] == "again":
                writer.begin(i)
                writer.put([i], "pattern", values)
            if i in saves:
                writer.save()
            writer.begin(i)
            for layer in {"layers": range(2), "half": [1]}.get(acts[i], []):
                writer.put([i], "pattern", values[:, layer], layer)
            if acts[i] == "fail":
                writer.fail(i, "CUDA out of memory")
            elif acts[i] != "half":
                if acts[i] != "layers":
                    writer.put([i], "pattern", values)
                writer.done(i, i / 2)
    ds = store.open(kept)
    assert len(ds["problem"]) == sum(act != "half" for act in acts[:5])
    check(ds, TINY)
    raw: Any = zarr.open_group(kept, mode="r")["pattern"]
    assert not any(raw[i].any() for i in range(5) if acts[i] == "fail")


def test_a_failed_problem_that_is_half_put_again_still_holds_nothing(path: Path) -> None:
    with create(path, TINY) as writer:
        writer.fail(0, "CUDA out of memory")
    with store.resume(path, config=CONFIG) as writer:
        writer.begin(0)
        writer.put([0], "pattern", result("pattern", TINY[0], 0)[None][:, 0], 0)
        put(writer, TINY, [1])
    ds = store.open(path)
    assert ds["status"].values.tolist() == [FAILED, DONE]
    check(ds, TINY)


def test_what_is_written_stays_in_nobodys_memory(path: Path) -> None:
    with create(path, TINY) as writer:
        values = [np.array([result("pattern", one, i)], "float16") for i, one in enumerate(TINY)]
        known = [weakref.ref(one) for one in values]
        writer._ledger._pause = 1e9  # until labels and status are saved
        for i in range(len(TINY)):
            writer.put([i], "pattern", values.pop(0))
            writer.done(i, i / 2)
        writer._line.wait()
        assert not any(one() is not None for one in known)
    check(store.open(path), TINY)


def test_a_put_that_fails_may_be_repeated(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with create(path, TINY) as writer:
        put(writer, TINY, [0])
    values = result("pattern", TINY[1], 1)[None]
    with store.resume(path, config=CONFIG) as writer:
        with monkeypatch.context() as patch:
            # what is there already cannot be read
            patch.setattr(writer._piles, "_wait", lambda: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                writer.put([1], "pattern", values)
        with pytest.raises(InputError, match="has 0 of 2 layers"):
            writer.done(1)
        writer.put([1], "pattern", values)
        writer.done(1, 0.5)
    check(store.open(path), TINY)


@pytest.mark.filterwarnings("ignore:Consolidated metadata:zarr.errors.ZarrUserWarning")
def test_memory_that_zarr_was_given_is_not_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schema, "TINY_PROBLEMS", 2)
    where: Any = MemoryStore()  # keeps a view of what is neither compressed nor in shards
    create(where, TINY).close()
    group = zarr.open_group(where, mode="r+")
    own: Any = group["pattern"]
    group.create_array(
        "pattern",
        shape=own.shape,
        dtype=own.dtype,
        chunks=(2, *own.shape[1:]),
        fill_value=0,
        compressors=None,
        dimension_names=own.metadata.dimension_names,
        attributes=dict(own.attrs),
        overwrite=True,
        config={"write_empty_chunks": True},
    )
    zarr.consolidate_metadata(where)
    with store.resume(where, config=CONFIG) as writer:
        for i in range(len(TINY)):
            put(writer, TINY, [i])
            writer.wait()
    check(store.open(where), TINY)
