"""Folders on a disk that may fill up, be shared, or lose its writer at any moment."""

import contextlib
import errno
import os
import re
import shutil
import sys
import uuid
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from probe.errors import StoreError

if sys.platform != "win32":
    import fcntl

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def size(count: float) -> str:
    """Bytes for people, SI: 1.2 GB."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 999.5:  # what rounds to 1000 belongs to the next unit
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} PB"


def beside(path: Path, suffix: str) -> Path:
    """A new name beside a folder; `sweep` knows it."""
    path = path.absolute()
    return path.with_name(f"{path.name}.{uuid.uuid4().hex}.{suffix}")


def move_into_place(folder: Path, path: Path, *, replace: bool) -> None:
    """Rename a finished folder to `path`, also over an empty folder; or replace what is there."""
    if not replace:
        folder.rename(path)
        return
    aside = beside(path, "replaced")
    path.rename(aside)
    try:
        folder.rename(path)
    except OSError:
        aside.rename(path)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def sweep(path: Path) -> None:
    """Remove what dead processes left: half-written files here, unfinished folders beside."""
    for file in path.rglob("*.partial"):
        file.unlink(missing_ok=True)
    path = path.absolute()
    pattern = re.compile(re.escape(path.name) + r"\.[0-9a-f]{32}\.(creating|replaced)")
    for folder in path.parent.iterdir():
        if pattern.fullmatch(folder.name):
            with contextlib.suppress(OSError):  # somebody is still at it
                release = lock(folder, path)
                shutil.rmtree(folder, ignore_errors=True)
                release()


def lock(folder: Path, path: Path) -> Callable[[], None]:
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
def explained(
    path: Path, *, need: Callable[[], int] | None = None, intact: str = ""
) -> Iterator[None]:
    """Turn what the disk says into a StoreError that says what to do.

    Args:
        path: What was written to.
        need: Counts the bytes that are still to be written.
        intact: What the failure left unharmed.
    """
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
        more = f"needs up to {size(need())}, " if need else ""
        parent = next(folder for folder in path.absolute().parents if folder.exists())
        free = size(shutil.disk_usage(parent).free)
        raise StoreError(
            f"no room left on the disk for {path} ({more}{free} free){intact}. "
            "Free space and run the same call again."
        ) from error
