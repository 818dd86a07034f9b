import errno
import random
import re
import shutil
import signal
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import xarray as xr

from probe import arrays, disk, schema, store
from probe.errors import StoreError
from probe.schema import Labels
from tests.processes import MANY, SITES, run, slow_down, write_on
from tests.stores import (
    CONFIG,
    FULL,
    TINY,
    check,
    create,
    disk_refuses,
    files,
    fill,
    put,
    says,
)

resource = pytest.importorskip("resource", reason="Windows has no kill -9, limits or locks")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run.zarr"


def create_anew(parent: Connection, path: Path) -> None:
    slow_down()
    parent.send("ready")
    create(path, MANY["tiny"], overwrite=True).close()


def write_limited(parent: Connection, path: Path) -> None:
    try:
        with create(path, FULL) as writer:
            resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
            for i in range(5):
                put(writer, FULL, [i])
    except StoreError as error:
        parent.send(str(error))


def killed_again_and_again(folder: Path, kind: str, kills: int, seed: int) -> None:
    """Kill writers until it is enough; nothing that was done may be lost or wrong."""
    path, some = folder / "run.zarr", MANY[kind]
    chance, done, killed = random.Random(seed), set[str](), 0
    while killed < kills:
        code, _ = run(write_on, path, kind, kill_after=chance.uniform(0, 0.25))
        killed += code == -signal.SIGKILL
        ds = store.open(path)
        check(ds, some)
        assert not store.verify(path)
        assert done <= set(ds["problem"].values.tolist())
        done = set(ds["problem"].values.tolist())
        if len(done) == len(some):
            shutil.rmtree(path)
            done.clear()
    assert run(write_on, path, kind) == (0, "ready")
    fill(folder / "whole.zarr", some, *SITES)
    killed_store, whole = store.open(path).load(), store.open(folder / "whole.zarr").load()
    xr.testing.assert_equal(killed_store, whole)
    assert not list(folder.rglob("*.partial"))
    assert not list(folder.glob("*.creating"))


@pytest.mark.parametrize("kind", ["tiny", "full"])
def test_a_writer_killed_at_any_moment_loses_nothing_that_was_done(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schema, "TINY_PROBLEMS", 4)
    killed_again_and_again(tmp_path, kind, kills=8, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tiny", "full"])
def test_a_hundred_kills_lose_nothing(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schema, "TINY_PROBLEMS", 4)
    killed_again_and_again(tmp_path, kind, kills=100, seed=2)


def test_a_creation_killed_at_any_moment_leaves_a_whole_store_or_none(tmp_path: Path) -> None:
    path, chance, absent = tmp_path / "run.zarr", random.Random(2), 0
    for _ in range(12):
        run(create_anew, path, kill_after=chance.uniform(0, 0.3))
        if store.vacant(path):
            absent += 1
        else:
            ds = store.open(path)
            assert ds.sizes["problem"] == 0
            store.resume(path, config=CONFIG).close()
            shutil.rmtree(path)
    assert absent
    create(path, TINY).close()
    assert [item.name for item in tmp_path.iterdir()] == ["run.zarr"]


def test_a_failed_creation_leaves_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # a file that zarr writes alone: its metadata is written beside others, which may come later
    disk_refuses(monkeypatch, "token/c", errno.ENOSPC)
    with pytest.raises(StoreError, match=r"no room left on the disk for .*run.zarr \(.* free\)\. "):
        create(path, TINY)
    assert list(path.parent.iterdir()) == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
@pytest.mark.parametrize("part", ["pattern/c", "loss/c", "status/c"])
def test_a_full_disk_keeps_what_is_done(
    path: Path, number: int, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(writer: store.Writer) -> None:
        with writer:
            put(writer, FULL, [1])
            writer.wait()
            disk_refuses(monkeypatch, part, number)
            put(writer, FULL, [2])

    with pytest.raises(StoreError) as caught:
        write(create(path, FULL))
    need = disk.size(2 * 6 * sum(one.length**2 for i, one in enumerate(FULL) if i != 1))
    assert re.fullmatch(
        rf"no room left on the disk for {re.escape(str(path))} \(needs up to {need}, "
        r"[0-9.]+ [kMGT]?B free\); the problems already done \(1 of 5\) are intact\. "
        r"Free space and run the same call again\.",
        str(caught.value),
    )
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno == number
    assert store.open(path)["problem"].values.tolist() == ["gsm8k/1"]
    monkeypatch.undo()
    with store.resume(path, config=CONFIG) as writer:
        for indices in writer.pending():
            put(writer, FULL, indices)
    check(store.open(path), FULL)


def test_a_disk_that_forbids_writing_is_named(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = create(path, FULL)
    disk_refuses(monkeypatch, "pattern/c", errno.EACCES)
    message = (
        f"cannot write to {path} (Permission denied); the problems already done (0 of 5) are "
        "intact. Remove the cause and run the same call again."
    )
    put(writer, FULL, [0])
    with pytest.raises(StoreError, match=says(message)):
        writer.wait()
    with pytest.raises(StoreError, match=says(message)):
        put(writer, FULL, [1])
    with pytest.raises(StoreError, match=says(message)):
        writer.close()


def test_a_real_limit_on_file_size_is_told_as_a_full_disk(path: Path) -> None:
    code, message = run(write_limited, path)
    assert code == 0
    assert message.startswith("no room left on the disk")
    assert "the problems already done (2 of 5) are intact." in message
    assert not list(path.rglob("*.partial"))
    check(store.open(path), FULL)
    assert store.open(path).sizes["problem"] == 2


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (512, "512 B"),
        (999.6, "1 kB"),
        (999_600, "1 MB"),
        (1_926_000, "1.93 MB"),
        (82.1e9, "82.1 GB"),
        (3.2e15, "3.2 PB"),
    ],
)
def test_bytes_are_told_in_three_digits(count: float, text: str) -> None:
    assert disk.size(count) == text


@pytest.mark.parametrize("some", [TINY, FULL], ids=["tiny", "full"])
def test_data_that_no_status_vouches_for_is_never_shown(
    path: Path, some: list[Labels], monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = create(path, some)
    disk_refuses(monkeypatch, "status/c", errno.EIO)
    put(writer, some, range(5))
    with pytest.raises(StoreError, match="Input/output error"):
        writer.close()
    monkeypatch.undo()
    assert files(path)
    with store.resume(path, config=CONFIG) as again:
        for i in range(5):
            again.fail(i, "too long")
    assert not store.open(path)["pattern"].values.any()


def test_a_store_that_appears_while_another_is_made_is_not_replaced(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def quicker(*args: Any, **options: Any) -> None:  # another process is done in between
        monkeypatch.undo()
        fill(path, TINY)
        arrays.make_arrays(*args, **options)

    monkeypatch.setattr(store, "make_arrays", quicker)
    with pytest.raises(StoreError, match=r"^.*run.zarr already holds a store\. Resume it"):
        create(path, FULL)
    check(store.open(path), TINY)
    assert [item.name for item in path.parent.iterdir()] == ["run.zarr"]


def test_what_dead_processes_left_is_removed(path: Path) -> None:
    fill(path, TINY)
    (path / "pattern/c/0.0123456789abcdef0123456789abcdef.partial").write_text("torn")
    for suffix in ("creating", "replaced"):
        (path.parent / f"run.zarr.{'0' * 32}.{suffix}").mkdir()
    (path.parent / "run.zarr.mine.creating").mkdir()
    store.resume(path, config=CONFIG).close()
    assert not list(path.rglob("*.partial"))
    assert {item.name for item in path.parent.iterdir()} == {"run.zarr", "run.zarr.mine.creating"}


def test_one_store_has_one_writer(path: Path) -> None:
    message = says(f"{path} is being written by another process. Wait for it, or use another path.")
    with create(path, TINY):
        with pytest.raises(StoreError, match=message):
            store.resume(path, config=CONFIG)
        with pytest.raises(StoreError, match=message):
            create(path, TINY, overwrite=True)
    store.resume(path, config=CONFIG).close()
