"""Writers in processes of their own, which may be killed: what the tests of crashes share."""

import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from zarr.storage import LocalStore

from probe import ledger, places, schema, store
from tests.stores import CONFIG, create, labels, put

# The server has everything imported, and forks at once; it never writes itself.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["pytest", "xarray", "zarr", "probe.store"])

MANY = {
    "tiny": [labels(i, 40 + i % 24) for i in range(48)],
    "full": [labels(i, 65 + i) for i in range(24)],
}
SITES = ("pattern", "scores")


def run(
    target: Callable[..., None], *args: object, kill_after: float | None = None
) -> tuple[int | None, Any]:
    """Run a function in its own process: how it ended, and the one thing that it sent."""
    return ended(begin(target, *args), kill_after)


def begin(target: Callable[..., None], *args: object) -> tuple[Any, Any]:
    """Start a function in its own process."""
    here, there = SERVER.Pipe(duplex=False)
    process = SERVER.Process(target=target, args=(there, *args))
    process.start()
    there.close()  # so that a process that dies silently is an EOFError here
    return process, here


def ended(started: tuple[Any, Any], kill_after: float | None = None) -> tuple[int | None, Any]:
    """Wait for a process, or kill it so long after it has sent something."""
    process, here = started
    heard = here.recv()
    if kill_after is not None:
        time.sleep(kill_after)
        process.kill()
    process.join()
    return process.exitcode, heard


def slow_down() -> None:
    """Let files take a while, and shards be saved at once, so that a kill falls anywhere."""
    patch = pytest.MonkeyPatch()
    real, write, commit = LocalStore.set, places._File.write, places._File.commit

    async def slow(self: LocalStore, key: str, value: Any, *rest: Any) -> None:
        time.sleep(0.002)
        await real(self, key, value, *rest)
        time.sleep(0.002)

    def slowly(self: Any, pieces: Any) -> None:
        write(self, pieces)
        time.sleep(0.002)

    def late(self: Any, *, durable: bool) -> None:
        time.sleep(0.002)
        commit(self, durable=durable)
        time.sleep(0.002)

    patch.setattr(LocalStore, "set", slow)
    patch.setattr(places._File, "write", slowly)
    patch.setattr(places._File, "commit", late)
    patch.setattr(ledger, "SECONDS", 0.01)
    patch.setattr(ledger, "SHARE", 0)


def write_on(parent: Any, path: Path, kind: str, part: tuple[int, int] = (1, 1)) -> None:
    """Create the store or resume it, and write all that it lacks."""
    slow_down()
    pytest.MonkeyPatch().setattr(schema, "TINY_PROBLEMS", 4)
    some = MANY[kind]
    if store.vacant(path):
        writer = create(path, some, sites=SITES, part=part)
    else:
        writer = store.resume(path, config=CONFIG, part=part)
    parent.send("ready")
    with writer:
        for indices in writer.pending():
            for i in reversed(indices):
                put(writer, some, [i], *SITES)
