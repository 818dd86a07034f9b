import errno
import multiprocessing
import random
import re
import shutil
import signal
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import xarray as xr
from zarr.storage import LocalStore

from probe import arrays, disk, schema, store
from probe.errors import StoreError
from probe.schema import Labels
from tests.stores import (
    CONFIG,
    FULL,
    TINY,
    check,
    create,
    disk_refuses,
    files,
    fill,
    labels,
    put,
    says,
)

resource = pytest.importorskip("resource", reason="Windows has no kill -9, limits or locks")

# One interpreter that has everything imported, and forks at once; it never writes itself.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["pytest", "xarray", "zarr", "probe.store"])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run.zarr"


MANY = {
    "tiny": [labels(i, 40 + i % 24) for i in range(48)],
    "full": [labels(i, 65 + i) for i in range(24)],
}


def run(
    target: Callable[..., None], *args: object, kill_after: float | None = None
) -> tuple[int | None, str]:
    """Run a function in its own process: how it ended, and the one thing that it sent."""
    here, there = SERVER.Pipe(duplex=False)
    process = SERVER.Process(target=target, args=(there, *args))
    process.start()
    there.close()  # so that a process that dies silently is an EOFError here
    heard = here.recv()
    if kill_after is not None:
        time.sleep(kill_after)
        process.kill()
    process.join()
    return process.exitcode, heard


def slow_down() -> None:
    """Let every file take a while, so that a kill falls anywhere."""
    real = LocalStore.set

    async def slow(self: LocalStore, key: str, value: Any, *rest: Any) -> None:
        time.sleep(0.002)
        await real(self, key, value, *rest)
        time.sleep(0.002)

    pytest.MonkeyPatch().setattr(LocalStore, "set", slow)


def write_on(parent: Connection, path: Path, kind: str) -> None:
    """Create the store or resume it, and write all that it lacks."""
    slow_down()
    pytest.MonkeyPatch().setattr(schema, "TINY_PROBLEMS", 4)
    some, sites = MANY[kind], ("pattern", "scores")
    new = store.vacant(path)
    writer = create(path, some, sites=sites) if new else store.resume(path, config=CONFIG)
    parent.send("ready")
    with writer:
        for indices in writer.pending():
            for i in reversed(indices):
                put(writer, some, [i], *sites)


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


@pytest.mark.parametrize("kind", ["tiny", "full"])
def test_a_writer_killed_at_any_moment_loses_nothing_that_was_done(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schema, "TINY_PROBLEMS", 4)
    path, some = tmp_path / "run.zarr", MANY[kind]
    chance, done, kills = random.Random(1), set[str](), 0
    while kills < 12:
        code, _ = run(write_on, path, kind, kill_after=chance.uniform(0, 0.15))
        kills += code == -signal.SIGKILL
        ds = store.open(path)
        check(ds, some)
        assert done <= set(ds["problem"].values.tolist())
        done = set(ds["problem"].values.tolist())
        if len(done) == len(some):
            shutil.rmtree(path)
            done.clear()
    assert run(write_on, path, kind) == (0, "ready")
    fill(tmp_path / "whole.zarr", some, "pattern", "scores")
    killed, whole = store.open(path).load(), store.open(tmp_path / "whole.zarr").load()
    xr.testing.assert_equal(killed, whole)
    assert not list(tmp_path.rglob("*.partial"))
    assert not list(tmp_path.glob("*.creating"))


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
    with pytest.raises(StoreError, match=says(message)):
        put(writer, FULL, [0])
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
    with pytest.raises(StoreError, match="Input/output error"):
        put(writer, some, range(5))
    monkeypatch.undo()
    assert files(path)
    writer.close()
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
    with pytest.raises(StoreError, match=r"^cannot write to .*run.zarr \(Directory not empty\)\."):
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
