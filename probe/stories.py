"""The attributes of a store: how it was made. Written, read and compared."""

import hashlib
import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Literal, cast

import numpy as np
import xarray as xr
import zarr

from probe import schema
from probe.arrays import every
from probe.errors import InputError, StoreError
from probe.places import Folder, Place


def described(
    where: Place, *, mode: Literal["r", "r+"] = "r"
) -> tuple[dict[str, Any], dict[str, "zarr.Array[Any]"]]:
    """The attributes of a store that this version can read, and its arrays, of which none lacks.

    Args:
        where: The store.
        mode: "r+" to write into the arrays.

    Raises:
        StoreError: There is no store, it is not ours, it is of a newer version, or it is damaged.
    """
    attrs = own_attributes(where)
    if attrs["schema"] not in schema.SCHEMAS:
        raise StoreError(
            f"{where} has schema {attrs['schema']!r}, and this version reads {schema.SCHEMA!r}. "
            "Upgrade with: pip install --upgrade attn-probe"
        )
    arrays, layout = attrs.get("arrays"), attrs.get("layout")
    if not isinstance(arrays, list) or not isinstance(layout, list) or len(layout) != 2:
        raise StoreError(
            f"{where} is damaged: the attributes in its zarr.json lack arrays or "
            "layout. Restore that file from a copy."
        )
    found = every(where, mode=mode)
    columns = (name for name in schema.COLUMNS if name != "loss")
    needed = dict.fromkeys((*schema.INDEXES, *columns, *arrays))
    if missing := [name for name in needed if name not in found]:
        raise StoreError(
            f"{where} is damaged: it lacks {', '.join(missing)}. "
            "Restore it from a copy, or make it anew with overwrite=True."
        )
    return attrs, found


def own_attributes(where: Place) -> dict[str, Any]:
    """The attributes of a store of any schema; an error for whatever is not ours."""
    if isinstance(where, Folder) and where.path.exists() and not where.path.is_dir():
        raise StoreError(f"{where} is a file, not a store. Use another path.")
    if where.vacant() and not (isinstance(where, Folder) and where.path.exists()):
        raise StoreError(
            f"there is no store at {where}. Check the path, or make one with probe.capture."
        )
    text = where.read("zarr.json")
    if text is None:
        raise StoreError(
            f"{where} is a folder that holds no store (no zarr.json). Use another path."
        )
    try:
        root = json.loads(text)
        attrs = dict(root.get("attributes", {}))
    except (ValueError, TypeError, AttributeError) as error:
        raise StoreError(
            f"{where} is damaged: its zarr.json cannot be read ({error}). "
            "Restore it from a copy, or use another path."
        ) from error
    if not str(attrs.get("schema")).startswith("probe/"):
        raise StoreError(
            f"{where} is Zarr data of another kind (schema {attrs.get('schema')!r}), not a store. "
            "Read it with xarray.open_zarr, or use another path."
        )
    return attrs


def story(
    config: Mapping[str, object],
    attrs: Mapping[str, object],
    arrays: Mapping[str, schema.Array],
    layout: schema.Layout,
    loss: bool,
) -> dict[str, Any]:
    """The attributes of a new store: what it is, how it was made, with what."""
    coded = any(one.dtype.startswith("uint") for one in arrays.values())
    made, more = plain(config, "config"), plain(attrs, "attrs")
    versions = {module.__name__: module.__version__ for module in (np, xr, zarr)}
    return more | {
        "schema": schema.CODED if coded else schema.SCHEMA,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions | more.get("versions", {}),
        "config": made,
        "config_sha256": hashlib.sha256(_canonical(made).encode()).hexdigest(),
        "arrays": [*arrays, "loss"] if loss else list(arrays),
        "layout": [layout.problems, layout.block],
        "whole_labels": True,  # and so is each chunk of a label
        "whole_shards": True,  # each shard of a done problem is a file, even if it holds nothing
        # plain xarray.open_zarr reads from this which arrays are coordinates
        "coordinates": " ".join(schema.COORDINATES),
    }


def differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    """What differs between two JSON values, as "name old, now new"."""
    if isinstance(old, dict) and isinstance(new, dict):
        names = [*old, *(name for name in new if name not in old)]
        dot = f"{prefix}." if prefix else ""
        return [
            line
            for name in names
            for line in differences(old.get(name, ...), new.get(name, ...), dot + name)
        ]
    lists = isinstance(old, list) and isinstance(new, list) and len(old) == len(new)
    if lists and any(isinstance(value, dict) for value in old):
        pairs = enumerate(zip(old, new, strict=True))
        return [line for n, two in pairs for line in differences(*two, f"{prefix}[{n}]")]
    if old is not ... and new is not ... and _canonical(old) == _canonical(new):
        return []
    return [f"{prefix or 'config'} {_brief(old)}, now {_brief(new)}"]


def _brief(value: Any) -> str:
    if value is ...:
        return "absent"
    text = value if isinstance(value, str) and value.isalnum() else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def plain(value: Mapping[str, object], name: str) -> dict[str, Any]:
    """The value as JSON gives it back: tuples become lists."""
    try:
        return cast("dict[str, Any]", json.loads(json.dumps(dict(value))))
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{name} cannot be recorded as JSON ({error}). Give strings, numbers, lists and dicts."
        ) from error


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))
