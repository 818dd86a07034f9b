"""Folders on a disk that may fill up, be shared, or lose its writer at any moment."""

import contextlib
import errno
import os
import re
import shutil
import sys
import uuid
from collections.abc import Callable, Iterator, Sequence
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


def sweep(path: Path, mine: Callable[[str, int], bool] | None = None) -> None:
    """Remove what dead processes left: half-written files here, unfinished folders beside.

    Args:
        path: Of the store.
        mine: Where others write as well, whether the file of an array that begins with this number
            is ours; all are, if it is not given.
    """
    for file in _half_written(path):
        name, *_, chunk = [*file.relative_to(path).parts[:3], ""][:3]
        number = chunk.split(".")[0]
        if mine is None or (number.isdigit() and mine(name, int(number))):
            file.unlink(missing_ok=True)
    path = path.absolute()
    pattern = re.compile(re.escape(path.name) + r"\.[0-9a-f]{32}\.(creating|replaced)")
    for folder in path.parent.iterdir():
        if pattern.fullmatch(folder.name):
            with contextlib.suppress(OSError):  # somebody is still at it
                release = lock(folder, path)
                shutil.rmtree(folder, ignore_errors=True)
                release()


def _half_written(path: Path) -> Iterator[Path]:
    """Files that were not committed; other writers may remove folders of theirs meanwhile."""

    def refuse(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            raise error

    for folder, _, names in os.walk(path, onerror=refuse):
        yield from (Path(folder, name) for name in names if name.endswith(".partial"))


def lock(folder: Path, path: Path, blocks: Sequence[int] | None = None) -> Callable[[], None]:
    """Keep other writers out until the returned function is called, or this process dies.

    Args:
        folder: What is locked.
        path: What to call it.
        blocks: Of the problems that are written, where others may write the rest.

    Raises:
        StoreError: Another writer has it, or one of these blocks.
    """
    if sys.platform == "win32":
        return lambda: None
    stack = contextlib.ExitStack()
    try:
        _flock(folder, stack, fcntl.LOCK_EX if blocks is None else fcntl.LOCK_SH)
        if blocks is not None:
            for block in blocks:
                file = folder / "status" / "locks" / str(block)
                file.parent.mkdir(exist_ok=True)
                file.touch()
                _flock(file, stack, fcntl.LOCK_EX)
    except BlockingIOError:
        stack.close()
        raise StoreError(
            f"{path} is being written by another process. Wait for it, or use another path."
            if blocks is None
            else f"{path} is being written by another process that fills some of these problems. "
            "Wait for it, or give each process a part of its own: 1/4, 2/4, 3/4, 4/4."
        ) from None
    return stack.close


def tidy(folder: Path) -> None:
    """Remove the locks of parts, once all of them are done, unless somebody is still here."""
    with contextlib.suppress(StoreError):
        release = lock(folder, folder)
        shutil.rmtree(folder / "status" / "locks", ignore_errors=True)
        release()


def _flock(file: Path, stack: contextlib.ExitStack, kind: int) -> None:
    handle = os.open(file, os.O_RDONLY)
    stack.callback(os.close, handle)
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:  # a file system without locks
        pass


@contextlib.contextmanager
def explained(
    what: object, *, need: Callable[[], int] | None = None, intact: Callable[[], str] = str
) -> Iterator[None]:
    """Turn what the disk says into a StoreError that says what to do.

    Args:
        what: What was written to: a path, or what is called otherwise.
        need: Counts the bytes that are still to be written.
        intact: Says what the failure left unharmed.
    """
    try:
        yield
    except StoreError:
        raise
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise StoreError(
                f"cannot write to {what} ({error.strerror or error}){intact()}. "
                "Remove the cause and run the same call again."
            ) from error
        facts = [f"needs up to {size(need())}"] if need else []
        parent = next((f for f in Path(str(what)).absolute().parents if f.exists()), Path())
        facts.append(f"{size(shutil.disk_usage(parent).free)} free")
        raise StoreError(
            f"no room left on the disk for {what} ({', '.join(facts)}){intact()}. "
            "Free space and run the same call again."
        ) from error
