"""Where a store lies: a folder, or any zarr store object. Files appear whole or not at all."""

import asyncio
import contextlib
import errno
import os
import shutil
import socket
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from zarr.abc.store import Store
from zarr.buffer import cpu, default_buffer_prototype
from zarr.core.sync import sync

from probe.errors import InputError, StoreError

LOCKS = "status/locks/"  # zarr does not look into arrays
_SYNCHRONOUS = hasattr(os, "O_DIRECTORY")  # a folder can be opened, to be forced to the disk


class Incoming(Protocol):
    """A file that is being written; it is there once it is committed."""

    def write(self, pieces: Sequence[bytes]) -> None: ...
    def commit(self, *, durable: bool) -> None: ...
    def abandon(self) -> None: ...


class Place(Protocol):
    """A store's place: keys with `/` name its files."""

    @property
    def zarr(self) -> Any: ...
    def vacant(self) -> bool: ...
    def read(self, key: str) -> bytes | None: ...
    def read_all(self, keys: Sequence[str]) -> list[bytes | None]: ...
    def exists(self, key: str) -> bool: ...
    def holds(self, key: str) -> bool: ...
    def children(self, key: str) -> list[str]: ...
    def set(self, key: str, value: bytes) -> None: ...
    def remove(self, key: str) -> None: ...
    def incoming(self, key: str) -> Incoming: ...
    def force(self, keys: Iterable[str]) -> None: ...


def place(where: object) -> "Folder | Objects":
    """The place that a user names: a path, or a zarr store object.

    Raises:
        InputError: It is neither.
        StoreError: It is an object that cannot be opened.

    Example:
        >>> str(place("run.zarr"))
        'run.zarr'
    """
    if isinstance(where, Folder | Objects):
        return where
    if isinstance(where, Store):
        try:
            sync(where._ensure_open())
        except FileNotFoundError as error:
            raise StoreError(f"there is no store at {where}. Check the path.") from error
        return Objects(where)
    if isinstance(where, str | os.PathLike):
        return Folder(Path(where).expanduser())
    raise InputError(
        f"store={where!r:.60}. Give the folder of the store, as 'run.zarr'. "
        "A zarr store object serves as well."
    )


@dataclass(slots=True)
class Folder:
    """A folder. It may be renamed while files are on their way into it."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    @property
    def zarr(self) -> Path:
        return self.path

    def vacant(self) -> bool:
        """Whether nothing is here that a new store would replace: no path, or an empty folder."""
        return not self.path.exists() or (self.path.is_dir() and not any(self.path.iterdir()))

    def read(self, key: str) -> bytes | None:
        try:
            return (self.path / key).read_bytes()
        except FileNotFoundError:
            return None

    def read_all(self, keys: Sequence[str]) -> list[bytes | None]:
        """Several; None for what is no file."""
        return [self.read(key) if self.exists(key) else None for key in keys]

    def exists(self, key: str) -> bool:
        return (self.path / key).is_file()

    def holds(self, key: str) -> bool:
        """Whether a file is there, and not empty as a machine that died may leave it."""
        try:
            return (self.path / key).stat().st_size > 0
        except (FileNotFoundError, NotADirectoryError):
            return False

    def children(self, key: str) -> list[str]:
        try:
            return [item.name for item in (self.path / key).iterdir()]
        except (FileNotFoundError, NotADirectoryError):
            return []

    def set(self, key: str, value: bytes) -> None:
        file = self.incoming(key)
        file.write([value])
        file.commit(durable=False)

    def remove(self, key: str) -> None:
        item = self.path / key
        if item.is_dir():
            shutil.rmtree(item)
        else:
            item.unlink(missing_ok=True)

    def incoming(self, key: str) -> Incoming:
        return _File(self, key)

    def force(self, keys: Iterable[str]) -> None:
        """Have files, and the folders that name them, on the disk itself."""
        folders: dict[Path, None] = {}
        for key in keys:
            try:
                _force(self.path / key)
            except FileNotFoundError:  # zarr removes a chunk in which nothing is left
                continue
            parent = (self.path / key).parent
            while parent != self.path and parent not in folders:
                folders[parent] = None
                parent = parent.parent
        for folder in (*folders, self.path, self.path.absolute().parent):
            if _SYNCHRONOUS:
                _force(folder)


def _force(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class _File:
    """Written beside its name, and renamed."""

    def __init__(self, folder: Folder, key: str) -> None:
        self._folder, self._key, self._part = folder, key, f"{key}.{uuid.uuid4().hex}.partial"
        path = folder.path / self._part
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("wb", buffering=0)

    def write(self, pieces: Sequence[bytes]) -> None:
        for piece in pieces:
            view = memoryview(piece)
            while view:  # a disk that fills up takes part of it
                view = view[self._file.write(view) :]

    def commit(self, *, durable: bool) -> None:
        if durable:
            os.fsync(self._file.fileno())
        elif hasattr(os, "posix_fadvise"):  # let the disk begin, so that the last wait is short
            os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        self._file.close()
        (self._folder.path / self._part).replace(self._folder.path / self._key)
        if durable:
            self._folder.force([self._key])

    def abandon(self) -> None:
        self._file.close()
        with contextlib.suppress(OSError):  # the store may be gone; `sweep` finds what is left
            (self._folder.path / self._part).unlink(missing_ok=True)


@dataclass(slots=True)
class Objects:
    """A zarr store object: in memory, in a bucket, or a library's own."""

    store: Store

    def __str__(self) -> str:
        return str(self.store)

    @property
    def zarr(self) -> Store:
        return self.store

    def vacant(self) -> bool:
        return sync(self.store.is_empty(""))

    def keys(self) -> list[str]:
        async def listed() -> list[str]:
            return [key async for key in self.store.list()]

        return sync(listed())

    def copy_to(self, where: Place) -> None:
        """Have a small store at another place too; what says that there is a store comes last."""
        keys = sorted(self.keys(), key=lambda key: key == "zarr.json")
        for key, value in zip(keys, self.read_all(keys), strict=True):
            if value is not None:
                where.set(key, value)

    def read(self, key: str) -> bytes | None:
        return self.read_all([key])[0]

    def read_all(self, keys: Sequence[str]) -> list[bytes | None]:
        """Several at the same time: a bucket takes as long for one."""

        async def found() -> list[Any]:
            gets = (self.store.get(key, default_buffer_prototype()) for key in keys)
            return await asyncio.gather(*gets)

        return [None if one is None else one.to_bytes() for one in sync(found())]

    def exists(self, key: str) -> bool:
        return sync(self.store.exists(key))

    def holds(self, key: str) -> bool:
        """As `exists`: objects are set whole."""
        return self.exists(key)

    def children(self, key: str) -> list[str]:
        async def listed() -> list[str]:
            return [name.rstrip("/") async for name in self.store.list_dir(key)]

        return sync(listed())

    def remove(self, key: str) -> None:
        sync(self.store.delete_dir(key))
        sync(self.store.delete(key))

    def clear(self, but: str = " ") -> None:
        """Remove everything, but for keys that begin with this."""
        for key in self.keys():
            if not key.startswith(but):
                sync(self.store.delete(key))

    def lock(self, blocks: Iterable[int], *, alone: bool = False) -> Callable[[], None]:
        """Keep other writers out of blocks of problems until the returned function is called.

        A bucket knows no processes: what a killed one holds has to be let go by hand.

        Args:
            blocks: Of problems that are written.
            alone: Whether nobody may write any other block either.

        Raises:
            StoreError: Another writer has one of them.
        """
        store = self.store
        if store.read_only or not (store.supports_writes and store.supports_deletes):
            raise StoreError(
                f"{self} cannot be written: a {type(store).__name__} that is read-only, or from "
                "which nothing can be deleted. Write into a folder, and copy it."
            )
        mine = f"{socket.gethostname()} {os.getpid()} {uuid.uuid4().hex}".encode()
        keys: list[str] = []

        def release() -> None:
            for key in keys:
                sync(self.store.delete(key))

        others = [key for key in self.keys() if key.startswith(LOCKS)] if alone else []
        for key in (*others, *(f"{LOCKS}{block}" for block in blocks)):
            sync(self.store.set_if_not_exists(key, cpu.Buffer.from_bytes(mine)))
            holder = self.read(key) or b""
            if holder != mine:
                release()
                host, process, _ = holder.decode().split()
                raise StoreError(
                    f"{self} is being written by process {process} on {host}. Wait for it; if it "
                    f"is dead, delete {key!r} and the others there."
                )
            keys.append(key)
        return release

    def set(self, key: str, value: bytes) -> None:
        try:
            sync(self.store.set(key, cpu.Buffer.from_bytes(value)))
        except OSError:
            raise
        except Exception as error:  # each kind of store has kinds of its own
            raise OSError(errno.EIO, str(error)) from error

    def incoming(self, key: str) -> Incoming:
        return _Object(self, key)

    def force(self, keys: Iterable[str]) -> None:
        """Nothing: an object is kept once it is set."""


@dataclass(slots=True)
class _Object:
    """Gathered, and set at once."""

    objects: Objects
    key: str
    pieces: list[bytes] = field(default_factory=list)

    def write(self, pieces: Sequence[bytes]) -> None:
        self.pieces += pieces

    def commit(self, *, durable: bool) -> None:
        del durable  # it always is
        self.objects.set(self.key, b"".join(self.pieces))

    def abandon(self) -> None:
        self.pieces.clear()
