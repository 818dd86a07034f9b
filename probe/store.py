"""Stores on disk: open, create, resume. `probe.schema` says what is in them.

A store is whole from its first moment (arrays and labels appear by one rename) and is filled by a
`Writer`, shard by shard.
"""

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import numpy as np
import xarray as xr
import zarr

from probe import disk, schema
from probe.arrays import add_coordinate, lengths, make_arrays, write_labels
from probe.errors import InputError, StoreError
from probe.schema import EMPTY, Labels
from probe.writer import Writer

__all__ = ["Writer", "create", "open", "own_attributes", "resume", "vacant"]


def open(path: str | Path) -> xr.Dataset:
    """Open a store for reading; nothing is loaded but labels.

    Args:
        path: Folder of the store.

    Returns:
        The captured arrays, lazy, with their labels as coordinates (names, dims and dtypes: see
        `probe.schema`). Problems that have not run are left out, so a store that is still being
        written shows only what is finished; failed ones have status 2, their reason in `error`,
        and matrices as empty as if nothing were attended.

    Raises:
        StoreError: There is no store, it is not ours, it is of a newer version, or it is damaged.

    Example:
        >>> ds = probe.open("run.zarr")
        >>> ds.pattern.sel(problem="0", layer=1, head=3).shape
        (10, 10)
    """
    path = Path(path).expanduser()
    attrs = _attributes(path)
    _require_arrays(path, attrs)
    ds: xr.Dataset = xr.open_zarr(path, consolidated=False, chunks=None)
    run = np.flatnonzero(ds["status"].values != EMPTY)
    if len(run) == ds.sizes["problem"]:
        return ds
    if len(run) and run[-1] == len(run) - 1:  # the first ones: a slice reads faster than a list
        return ds.isel(problem=slice(len(run)))
    return ds.isel(problem=run)


def vacant(path: str | Path) -> bool:
    """Whether nothing is here that a new store would replace: no such path, or an empty folder.

    Example:
        >>> vacant("run.zarr"), vacant("nowhere.zarr")
        (False, True)
    """
    path = Path(path).expanduser()
    return not path.exists() or (path.is_dir() and not any(path.iterdir()))


def create(
    path: str | Path,
    *,
    labels: Sequence[Labels],
    layers: Sequence[int],
    heads: Sequence[int],
    config: Mapping[str, object],
    sites: Sequence[str] = ("pattern",),
    reduced: Mapping[str, Sequence[str] | schema.Array] | None = None,
    together: int | None = None,
    sizes: Mapping[str, int] | None = None,
    coords: Mapping[str, Sequence[float] | Sequence[str]] | None = None,
    dtype: str = "float16",
    loss: bool = True,
    attrs: Mapping[str, object] | None = None,
    overwrite: bool = False,
) -> Writer:
    """Make a new store with all its labels and no results yet.

    It is built beside `path` and renamed into place: the store is whole or it is not there.

    Args:
        path: Folder to make; its parents are made too.
        labels: One per problem, in the order of the store. The rows and columns of the store are
            as many as the longest problem has.
        layers: Layers that will be written, absolute, from 0.
        heads: Heads that will be written, absolute, from 0.
        config: Everything that shapes the numbers, as JSON data; `resume` compares it.
        sites: Any of "pattern", "scores", "z".
        reduced: Further arrays by name: the dims of one, "problem" first (float32, empty is NaN),
            or a `schema.Array`.
        together: See `schema.layout`.
        sizes: Lengths of dims other than problem, layer and head, as `head_dim` for z. query and
            key may be longer than any problem is now, for tokens that are generated later.
        coords: Labels of dims that `sizes` has, by dim: numbers (float64) or texts.
        dtype: Of the sites, "float16" or "float32".
        loss: Whether to keep a loss per problem.
        attrs: More to record. `versions` is merged with those of numpy, xarray and zarr;
            `causal: False` says that rows also look at later columns.
        overwrite: Replace a store that is there. Anything else is never replaced.

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
    path = Path(path).expanduser()
    arrays = {name: schema.site(name, dtype=dtype) for name in sites}
    for name, one in (reduced or {}).items():
        if not isinstance(one, schema.Array):
            one = schema.Array(tuple(one), "float32", np.nan)
        arrays[name] = one
    extent = lengths(labels, layers, heads, sizes or {}, arrays)
    layout = schema.layout(arrays, sizes=extent, together=together)
    story = _story(config, attrs or {}, arrays, layout, loss)
    target = disk.beside(path, "creating")
    claim = _claimed(path, overwrite)
    with claim as replace, disk.explained(path), contextlib.ExitStack() as undo:
        undo.callback(shutil.rmtree, target, ignore_errors=True)
        target.mkdir(parents=True)
        release = disk.lock(target, path)  # it goes with the folder when that is renamed
        undo.callback(release)
        group = zarr.create_group(target, zarr_format=3, attributes=story)
        make_arrays(group, arrays, layout, extent, loss=loss)
        write_labels(group, labels, layers, heads, block=layout.block)
        for dim, values in (coords or {}).items():
            add_coordinate(group, dim, values)
        disk.move_into_place(target, path, replace=replace)
        undo.pop_all()
    disk.sweep(path)
    return Writer(path, release)


def resume(path: str | Path, *, config: Mapping[str, object]) -> Writer:
    """Open a store to write what it still lacks.

    What a killed process left behind (half-written files, unfinished folders beside) is removed.

    Args:
        path: Folder of the store.
        config: Must equal, as JSON, what the store was created with.

    Returns:
        A writer that holds the store until it is closed.

    Raises:
        StoreError: It cannot be opened (as `open`), it was made with another config, or another
            process is writing it.

    Example:
        >>> with resume("run.zarr", config=probe.open("run.zarr").attrs["config"]) as writer:
        ...     writer.pending()
        []
    """
    path = Path(path).expanduser()
    attrs = _attributes(path)
    different = _differences(attrs.get("config"), _plain(config, "config"))
    if different:
        raise StoreError(
            f"cannot resume {path}, it was made with other settings: {'; '.join(different)}. "
            "Use the old settings, another store, or overwrite=True."
        )
    _require_arrays(path, attrs)
    release = disk.lock(path, path)
    with disk.explained(path):
        disk.sweep(path)
    return Writer(path, release)


def _attributes(path: Path) -> dict[str, Any]:
    """The attributes of a store that this version can read."""
    attrs = own_attributes(path)
    found = attrs["schema"]
    if found != schema.SCHEMA:
        raise StoreError(
            f"{path} has schema {found!r}, and this version reads {schema.SCHEMA!r}. "
            "Upgrade with: pip install --upgrade attn-probe"
        )
    return attrs


def own_attributes(path: Path) -> dict[str, Any]:
    """The attributes of a store of any schema; an error for whatever is not ours."""
    if not path.exists():
        raise StoreError(
            f"there is no store at {path}. Check the path, or make one with probe.capture."
        )
    if not path.is_dir():
        raise StoreError(f"{path} is a file, not a store. Use another path.")
    try:
        root = json.loads((path / "zarr.json").read_text(encoding="utf-8"))
        attrs = dict(root.get("attributes", {}))
    except FileNotFoundError:
        raise StoreError(
            f"{path} is a folder that holds no store (no zarr.json). Use another path."
        ) from None
    except (ValueError, TypeError, AttributeError) as error:
        raise StoreError(
            f"{path} is damaged: its zarr.json cannot be read ({error}). "
            "Restore it from a copy, or use another path."
        ) from error
    if not str(attrs.get("schema")).startswith("probe/"):
        raise StoreError(
            f"{path} is Zarr data of another kind (schema {attrs.get('schema')!r}), not a store. "
            "Read it with xarray.open_zarr, or use another path."
        )
    return attrs


def _require_arrays(path: Path, attrs: Mapping[str, Any]) -> None:
    columns = (name for name in schema.COLUMNS if name != "loss")
    names = dict.fromkeys((*schema.INDEXES, *columns, *attrs.get("arrays", ())))
    missing = [name for name in names if not (path / name / "zarr.json").is_file()]
    if missing:
        raise StoreError(
            f"{path} is damaged: it lacks {', '.join(missing)}. "
            "Restore it from a copy, or make it anew with overwrite=True."
        )


def _story(
    config: Mapping[str, object],
    attrs: Mapping[str, object],
    arrays: Mapping[str, schema.Array],
    layout: schema.Layout,
    loss: bool,
) -> dict[str, Any]:
    """The attributes of a new store: what it is, how it was made, with what."""
    made, more = _plain(config, "config"), _plain(attrs, "attrs")
    versions = {module.__name__: module.__version__ for module in (np, xr, zarr)}
    return more | {
        "schema": schema.SCHEMA,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions | more.get("versions", {}),
        "config": made,
        "config_sha256": hashlib.sha256(_canonical(made).encode()).hexdigest(),
        "arrays": [*arrays, "loss"] if loss else list(arrays),
        "layout": [layout.problems, layout.block],
        # plain xarray.open_zarr reads from this which arrays are coordinates
        "coordinates": " ".join(schema.COORDINATES),
    }


@contextlib.contextmanager
def _claimed(path: Path, overwrite: bool) -> Iterator[bool]:
    """Hold the store that is to be replaced, if there is one; refuse to replace anything else."""
    if vacant(path):
        yield False
        return
    own_attributes(path)
    if not overwrite:
        raise StoreError(
            f"{path} already holds a store. "
            "Resume it, use another path, or replace it with overwrite=True."
        )
    release = disk.lock(path, path)
    try:
        yield True
    finally:
        release()


def _differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    """What differs between two JSON values, as "name old, now new"."""
    if isinstance(old, dict) and isinstance(new, dict):
        names = [*old, *(name for name in new if name not in old)]
        dot = f"{prefix}." if prefix else ""
        return [
            line
            for name in names
            for line in _differences(old.get(name, ...), new.get(name, ...), dot + name)
        ]
    lists = isinstance(old, list) and isinstance(new, list) and len(old) == len(new)
    if lists and any(isinstance(value, dict) for value in old):
        pairs = enumerate(zip(old, new, strict=True))
        return [line for n, two in pairs for line in _differences(*two, f"{prefix}[{n}]")]
    if old is not ... and new is not ... and _canonical(old) == _canonical(new):
        return []
    return [f"{prefix or 'config'} {_brief(old)}, now {_brief(new)}"]


def _brief(value: Any) -> str:
    if value is ...:
        return "absent"
    text = value if isinstance(value, str) and value.isalnum() else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _plain(value: Mapping[str, object], name: str) -> dict[str, Any]:
    """The value as JSON gives it back: tuples become lists."""
    try:
        return cast("dict[str, Any]", json.loads(json.dumps(dict(value))))
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{name} cannot be recorded as JSON ({error}). Give strings, numbers, lists and dicts."
        ) from error


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))
