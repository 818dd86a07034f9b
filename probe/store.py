"""Stores: open, create, resume. `probe.schema` says what is in them.

A store is whole from its first moment (in a folder, arrays and labels appear by one rename) and is
filled by a `Writer`, shard by shard.
"""

import contextlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import zarr
from zarr.storage import MemoryStore

from probe import disk, schema
from probe.arrays import add_coordinate, lengths, make_arrays, write_labels
from probe.errors import StoreError
from probe.ledger import owned
from probe.opening import open
from probe.places import LOCKS, Folder, Objects, Place, place
from probe.schema import Labels
from probe.stories import described, differences, own_attributes, plain, story
from probe.verifying import verify
from probe.writer import Writer

__all__ = ["Writer", "create", "open", "own_attributes", "resume", "vacant", "verify"]


def vacant(path: object) -> bool:
    """Whether nothing is here that a new store would replace: no such path, or an empty folder.

    Example:
        >>> vacant("run.zarr"), vacant("nowhere.zarr")
        (False, True)
    """
    return place(path).vacant()


def create(
    path: object,
    *,
    labels: Sequence[Labels],
    layers: Sequence[int],
    heads: Sequence[int],
    config: Mapping[str, object],
    sites: Sequence[str] = ("pattern",),
    reduced: Mapping[str, Sequence[str] | schema.Array] | None = None,
    sizes: Mapping[str, int] | None = None,
    coords: Mapping[str, Sequence[float] | Sequence[str]] | None = None,
    dtype: str = "float16",
    loss: bool = True,
    attrs: Mapping[str, object] | None = None,
    overwrite: bool = False,
    fsync: bool = False,
    part: tuple[int, int] = (1, 1),
    hidden: bool = False,
) -> Writer:
    """Make a new store with all its labels and no results yet.

    It is built beside `path` and renamed into place: the store is whole or it is not there.

    Args:
        path: Folder to make; its parents are made too. Or a zarr store object that is empty.
        labels: One per problem, in the order of the store. The rows and columns of the store are
            as many as the longest problem has.
        layers: Layers that will be written, absolute, from 0.
        heads: Heads that will be written, absolute, from 0.
        config: Everything that shapes the numbers, as JSON data; `resume` compares it.
        sites: Any of "pattern", "scores", "z".
        reduced: Further arrays by name: the dims of one, "problem" first (float32, empty is NaN),
            or a `schema.Array`.
        sizes: Lengths of dims other than problem, layer and head, as `head_dim` for z. query and
            key may be longer than any problem is now, for tokens that are generated later.
        coords: Labels of dims that `sizes` has, by dim: numbers (float64) or texts.
        dtype: Of the sites, "float16" or "float32".
        loss: Whether to keep a loss per problem.
        attrs: More to record. `versions` is merged with those of numpy, xarray and zarr;
            `causal: False` says that rows also look at later columns.
        overwrite: Replace a store that is there. Anything else is never replaced.
        fsync: Force each shard to the disk before its status; otherwise all is when the writer is
            closed. A process may die at any moment without it, a machine may not.
        part: (i, n): fill the i-th of n parts (from 1); n processes write the others.
        hidden: Have the store where it belongs only when the writer's `publish` is called; closed
            before, it leaves nothing, and what was there.

    Returns:
        A writer that holds the store until it is closed.

    Raises:
        InputError: The labels, sites, dims or config cannot be used.
        StoreError: The path is taken, or cannot be written.

    Example:
        >>> one = Labels(id="a", length=1, query_position=[0], key_position=[0],
        ...              token=["The"], token_id=[464], segment=["text"])
        >>> with create("new.zarr", labels=[one], layers=[0], heads=[0], config={}) as writer:
        ...     writer.append([0], {"pattern": [np.ones((1, 1, 1, 1))]}, loss=[3.1])
        >>> float(probe.open("new.zarr").pattern.sum())
        1.0
    """
    where = place(path)
    owned(1, 1, part)
    arrays = {name: schema.site(name, dtype=dtype) for name in sites}
    for name, one in (reduced or {}).items():
        if not isinstance(one, schema.Array):
            one = schema.Array(tuple(one), "float32", np.nan)
        arrays[name] = one
    extent = lengths(labels, layers, heads, sizes or {}, arrays)
    layout = schema.layout(arrays, sizes=extent, parts=part[1])
    about = story(config, attrs or {}, arrays, layout, loss)

    def build() -> Objects:
        made = Objects(MemoryStore())  # a third faster than in a folder
        group = zarr.create_group(made.store, zarr_format=3, attributes=about)
        make_arrays(group, arrays, layout, extent, loss=loss)
        write_labels(made, labels, layers, heads, block=layout.block)
        for dim, values in (coords or {}).items():
            add_coordinate(group, dim, values)
        return made

    blocks = owned(len(labels), layout.block, part)
    options: dict[str, Any] = {"part": part, "fsync": fsync}
    if isinstance(where, Objects):
        return _create_objects(where, build, blocks, options, overwrite=overwrite, hidden=hidden)
    some = None if part[1] == 1 else blocks
    return _create_folder(where, build, some, options, overwrite=overwrite, hidden=hidden)


def _create_folder(
    where: Folder,
    build: Callable[[], Objects],
    blocks: range | None,
    options: Mapping[str, Any],
    *,
    overwrite: bool,
    hidden: bool,
) -> Writer:
    """Build beside the path; the writer renames it into place, or this does."""
    path, target = where.path, Folder(disk.beside(where.path, "creating"))
    _require_free(where, overwrite)
    with disk.explained(path), contextlib.ExitStack() as undo:
        undo.callback(shutil.rmtree, target.path, ignore_errors=True)
        target.path.mkdir(parents=True)
        # locks go with the folder when that is renamed
        release = disk.lock(target.path, path, None if blocks is None else ())
        undo.callback(release)
        build().copy_to(target)
        if blocks is not None:
            release()
            release = disk.lock(target.path, path, blocks)
        undo.callback(release)

        def publish() -> None:
            with disk.explained(path), _claimed(where, overwrite) as replace:
                disk.move_into_place(target.path, path, replace=replace)
            target.path = path
            disk.sweep(path, lambda name, n: False)  # what is half-written here is the writer's

        discard = partial(shutil.rmtree, target.path, ignore_errors=True)
        writer = Writer(target, release, publish=publish, discard=discard, **options)
        undo.pop_all()
    return writer if hidden else _published(writer)


def _create_objects(
    where: Objects,
    build: Callable[[], Objects],
    blocks: range,
    options: Mapping[str, Any],
    *,
    overwrite: bool,
    hidden: bool,
) -> Writer:
    """Build in memory, and copy: what is there is replaced when the writer publishes."""
    _require_free(where, overwrite)
    target = build()
    release = where.lock(blocks, alone=True)

    def publish() -> None:
        with disk.explained(where), contextlib.ExitStack() as undo:
            undo.callback(where.clear, but=LOCKS)
            where.clear(but=LOCKS)
            target.copy_to(where)
            undo.pop_all()
        target.store = where.store

    writer = Writer(target, release, publish=publish, **options)
    return writer if hidden else _published(writer)


def _published(writer: Writer) -> Writer:
    try:
        writer.publish()
    except BaseException:
        writer.close()
        raise
    return writer


def resume(
    path: object,
    *,
    config: Mapping[str, object],
    fsync: bool = False,
    part: tuple[int, int] = (1, 1),
) -> Writer:
    """Open a store to write what it still lacks.

    What a killed process left behind (half-written files, unfinished folders beside) is removed.

    Args:
        path: Folder of the store, or a zarr store object.
        config: Must equal, as JSON, what the store was created with.
        fsync: See `create`.
        part: (i, n): fill the i-th of n parts (from 1); n processes write the others.

    Returns:
        A writer that holds the store, or its part of it, until it is closed.

    Raises:
        StoreError: It cannot be opened (as `open`), it was made with another config, or another
            process is writing it.
        InputError: There is no such part.

    Example:
        >>> with resume("run.zarr", config=probe.open("run.zarr").attrs["config"]) as writer:
        ...     writer.pending()
        []
    """
    where = place(path)
    attrs, arrays = described(where)
    different = differences(attrs.get("config"), plain(config, "config"))
    if different:
        raise StoreError(
            f"cannot resume {where}, it was made with other settings: {'; '.join(different)}. "
            "Use the old settings, another store, or overwrite=True."
        )
    step, block = attrs["layout"]
    blocks = owned(arrays["problem"].shape[0], block, part)
    if isinstance(where, Objects):
        release = where.lock(blocks)
    else:
        alone = part[1] == 1
        release = disk.lock(where.path, where.path, None if alone else blocks)
        steps = dict.fromkeys(attrs["arrays"], step) | dict.fromkeys(schema.COLUMNS, block)
        try:
            with disk.explained(where):
                disk.sweep(where.path, None if alone else partial(_is_ours, steps, block, blocks))
        except BaseException:
            release()
            raise
    return Writer(where, release, fsync=fsync, part=part)


def _is_ours(steps: Mapping[str, int], block: int, blocks: range, name: str, n: int) -> bool:
    """Whether a file of an array that begins with chunk n along problems is in our blocks."""
    return name in steps and n * steps[name] // block in blocks


def _require_free(where: Place, overwrite: bool) -> None:
    """Refuse to replace anything but a store, and that only if it is asked."""
    if where.vacant():
        return
    own_attributes(where)
    if not overwrite:
        raise StoreError(
            f"{where} already holds a store. "
            "Resume it, use another path, or replace it with overwrite=True."
        )


@contextlib.contextmanager
def _claimed(where: Folder, overwrite: bool) -> Iterator[bool]:
    """Hold the store that is to be replaced, if there is one."""
    _require_free(where, overwrite)
    if where.vacant():
        yield False
        return
    release = disk.lock(where.path, where.path)
    try:
        yield True
    finally:
        release()
