"""What a store holds, and whether it is whole: `probe info`."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

import probe
from probe import schema
from probe.errors import StoreError
from probe.store import verify as find_damage
from recipes._cli import echo_failures, progress, table


def info(
    store: Annotated[Path, typer.Argument(help="Folder of a store.")],
    as_json: Annotated[bool, typer.Option("--json", help="For scripts.")] = False,
    verify: Annotated[bool, typer.Option(help="Read all of it, and check every shard.")] = False,
    repair: Annotated[
        bool, typer.Option(help="With --verify: give up damaged problems, to run them again.")
    ] = False,
) -> None:
    """Say what a store holds, how it was made, how full it is, and whether it is whole."""
    if repair and not verify:
        raise typer.BadParameter("--repair needs --verify.")
    damaged = find_damage(store, repair=repair) if verify else []
    facts = told(store)
    if verify:
        facts["damaged"] = [f"{one.key}: {one.reason}" for one in damaged]
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
    else:
        table(("", str(store)), [(name, _plain(value)) for name, value in facts.items()])
    echo_failures(probe.open(store))
    if damaged:
        lost = sorted({name for one in damaged for name in one.problems})
        what = "were given up. Run" if repair else "are damaged. Give them up with --repair and run"
        raise StoreError(
            f"{len(lost)} problems of {store} {what} the same capture again, which computes only "
            f"them: {', '.join(lost[:8])}{', ...' if len(lost) > 8 else ''}"
        )


def told(store: Path) -> dict[str, Any]:
    """What there is to say about a store, as JSON data."""
    ds = probe.open(store)
    sizes = [size for size in map(_size, store.expanduser().rglob("*")) if size is not None]
    hidden = ("config", "coordinates", "layout", "whole_labels", "whole_shards")
    facts = {
        "done": progress(ds),
        "dims": {str(k): v for k, v in ds.sizes.items()},
        "tokens": int(ds.length.sum()),
        "bytes": sum(sizes),
        "files": len(sizes),
        "shards": {
            name: schema.cuts(ds[name].dims, ds[name].encoding["chunks"], shards)
            for name in ds.attrs["arrays"]
            if (shards := ds[name].encoding.get("shards"))
        },
        **{k: v for k, v in ds.attrs.items() if k not in hidden},
    }
    if "loss" in ds:
        facts["mean loss (nats per token)"] = round(float(ds.loss.mean()), 4)
    if "correct" in ds and bool(ds.correct.notnull().any()):
        facts["accuracy"] = round(float(ds.correct.mean()), 4)
    return facts


def _size(file: Path) -> int | None:
    """Bytes of a file; None for a folder, and for what a running capture has just renamed."""
    try:
        return file.stat().st_size if file.is_file() else None
    except FileNotFoundError:
        return None


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {_plain(v)}" for k, v in value.items())
    if isinstance(value, list):
        return ", ".join(map(_plain, value)) or "none"
    return "-" if value is None else str(value)
