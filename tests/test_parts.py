"""Several writers of one store, each with its part; and stores that are not folders."""

import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import xarray as xr
from zarr.storage import LocalStore, MemoryStore

import probe
from probe import demos, store
from probe.errors import InputError, StoreError
from probe.schema import DONE
from tests.processes import MANY, SITES, begin, ended, write_on
from tests.stores import CONFIG, TINY, check, create, fill, labels, put, says

pytest.importorskip("resource", reason="Windows has no kill -9 or locks")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run.zarr"


@pytest.mark.parametrize("kind", ["tiny", "full"])
@pytest.mark.parametrize("writers", [2, 4])
def test_several_writers_equal_one(path: Path, kind: str, writers: int) -> None:
    some, whole = MANY[kind], path.with_name("whole.zarr")
    create(path, some, sites=SITES, part=(1, writers)).close()
    started = [begin(write_on, path, kind, (i + 1, writers)) for i in range(writers)]
    assert [ended(one) for one in started] == [(0, "ready")] * writers
    fill(whole, some, *SITES)
    xr.testing.assert_equal(store.open(path).load(), store.open(whole).load())
    assert not list(path.rglob("*.partial"))
    assert not (path / "status" / "locks").exists()  # the last one tidies up


def test_writers_that_are_killed_go_on_beside_the_others(path: Path) -> None:
    create(path, MANY["full"], sites=SITES, part=(1, 3)).close()
    chance, killed = random.Random(5), 0
    for _ in range(4):
        started = [begin(write_on, path, "full", (i, 3)) for i in (1, 2, 3)]
        codes = [ended(one, chance.uniform(0, 0.1))[0] for one in started]
        killed += codes.count(-signal.SIGKILL)
        check(store.open(path), MANY["full"])
    assert killed
    for i in (1, 2, 3):
        assert ended(begin(write_on, path, "full", (i, 3))) == (0, "ready")
    assert store.open(path).sizes["problem"] == len(MANY["full"])
    check(store.open(path), MANY["full"])


def test_parts_share_out_whole_blocks_once(path: Path) -> None:
    for count, writers in ((48, 4), (5, 4), (3, 4), (1, 2)):
        some = [labels(i, 70) for i in range(count)]
        create(path, some, part=(1, writers), overwrite=True).close()
        mine: list[int] = []
        for i in range(writers):
            with store.resume(path, config=CONFIG, part=(i + 1, writers)) as writer:
                mine += [i for shard in writer.pending() for i in shard]
        assert mine == list(range(count))


def test_a_writer_leaves_what_is_not_its_own(path: Path) -> None:
    with create(path, MANY["full"], part=(2, 2)) as writer:
        message = (
            f"problem 'gsm8k/0' of {path} is written by another part. "
            "Write only what pending() lists."
        )
        with pytest.raises(InputError, match=says(message)):
            put(writer, MANY["full"], [0])
        leftover = path / "pattern/c/0/0/0/0/0.0123456789abcdef0123456789abcdef.partial"
        leftover.parent.mkdir(parents=True)
        leftover.write_text("another writer is at it")
        with store.resume(path, config=CONFIG, part=(1, 2)):
            assert not leftover.exists()  # its own, and it had died
        leftover.parent.mkdir(parents=True, exist_ok=True)
        leftover.write_text("another writer is at it")
    store.resume(path, config=CONFIG, part=(2, 2)).close()
    assert leftover.exists()


def test_a_writer_may_remove_a_folder_while_another_looks_for_leftovers(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with create(path, MANY["full"], part=(1, 2)):
        gone, left = path / "pattern/c/0/0", path / "pattern/c/15/0.0123.partial"
        for folder in (gone, left.parent):
            folder.mkdir(parents=True, exist_ok=True)
        left.write_text("of a dead writer of part 2")
        scandir = os.scandir

        def late(folder: Any) -> Any:
            if str(folder) == str(gone):  # it was there when its parent was listed
                gone.rmdir()
            return scandir(folder)

        monkeypatch.setattr(os, "scandir", late)
        store.resume(path, config=CONFIG, part=(2, 2)).close()
        assert not gone.exists()
        assert not left.exists()


def test_writers_that_would_overlap_are_refused(path: Path) -> None:
    some = MANY["full"]
    busy = says(
        f"{path} is being written by another process that fills some of these problems. "
        "Wait for it, or give each process a part of its own: 1/4, 2/4, 3/4, 4/4."
    )
    alone = says(f"{path} is being written by another process. Wait for it, or use another path.")
    with create(path, some, part=(1, 2)):
        with store.resume(path, config=CONFIG, part=(2, 2)):
            pass
        for part in ((1, 2), (2, 4)):
            with pytest.raises(StoreError, match=busy):
                store.resume(path, config=CONFIG, part=part)
        with pytest.raises(StoreError, match=alone):
            store.resume(path, config=CONFIG)
        with pytest.raises(StoreError, match=alone):
            create(path, some, overwrite=True)
    with store.resume(path, config=CONFIG), pytest.raises(StoreError, match=busy):
        store.resume(path, config=CONFIG, part=(1, 2))


@pytest.mark.parametrize("part", [(0, 2), (3, 2), (1, 0), 2, (1.0, 2), "1/2"])
def test_a_part_that_is_none_is_refused(tmp_path: Path, part: Any) -> None:
    with probe.load("demo-llama", device="cpu") as model, pytest.raises(InputError) as caught:
        probe.capture(model, "abc", tmp_path / "s", part=part, progress=False)
    assert str(caught.value) == f"part={part!r}. Give (i, n), from (1, n) to (n, n)."


def test_captures_in_parts_equal_one_capture(tmp_path: Path) -> None:
    problems = [ids[:n] for n in (70, 75, 5, 80) for ids in demos.repeated(45, 2, seed=n)]
    with probe.load("demo-llama", device="cpu") as model:
        whole = probe.capture(model, problems, tmp_path / "whole", progress=False).load()
        for i in (2, 1, 3):
            found = probe.capture(model, problems, tmp_path / "s", part=(i, 3), progress=False)
    assert found.sizes["problem"] == len(problems)
    xr.testing.assert_equal(found.load(), whole)


def stores(folder: Path) -> Iterator[Any]:
    yield MemoryStore()
    yield LocalStore(folder / "local")


def test_stores_need_no_folder(tmp_path: Path) -> None:
    problems = [ids[:n] for n in (70, 5) for ids in demos.repeated(40, 2, seed=n)]
    with probe.load("demo-llama", device="cpu") as model:
        whole = probe.capture(model, problems, tmp_path / "whole", progress=False).load()
        for where in stores(tmp_path):
            found = probe.capture(model, problems, where, progress=False)
            xr.testing.assert_equal(found.load(), whole)
            assert store.verify(where) == []
            again = probe.capture(model, problems, where, progress=False)  # nothing is left
            assert again.status.values.tolist() == [DONE] * 4


def test_a_store_object_is_written_on_as_a_folder_is() -> None:
    where = MemoryStore()
    with create(where, TINY) as writer:  # type: ignore[arg-type]
        put(writer, TINY, [1, 3])
        with pytest.raises(StoreError, match=r"is being written by process \d+ on .*if it is dead"):
            store.resume(where, config=CONFIG)
    assert store.open(where).problem.values.tolist() == ["gsm8k/1", "gsm8k/3"]
    with pytest.raises(StoreError, match="already holds a store"):
        create(where, TINY)  # type: ignore[arg-type]
    with store.resume(where, config=CONFIG) as writer:
        put(writer, TINY, [0, 2, 4])
    check(store.open(where), TINY)
    create(where, TINY[:2], overwrite=True).close()  # type: ignore[arg-type]
    assert store.open(where).sizes["problem"] == 0
