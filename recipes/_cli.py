"""What the commands share: how arguments are typed, and how results are told."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text as Plain

from probe.errors import InputError

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.figure import Figure

ModelName = Annotated[str, typer.Argument(help="Hub name, local folder or demo-llama, ...")]
Text = Annotated[str | None, typer.Option(help="Field of a jsonl file.")]
Number = Annotated[int | None, typer.Option("-n", help="Problems to take.")]
Seed = Annotated[int | None, typer.Option(help="Draw them with this seed.")]
Selector = Annotated[str | None, typer.Option(help="3, -1, 0,2,5, 2:8; rows and keys: last:6.")]
MaxLength = Annotated[int | None, typer.Option(help="Cut problems to so many tokens.")]
Part = Annotated[str, typer.Option(help="2/4: do the second of four parts, at once with others.")]
Overwrite = Annotated[bool, typer.Option(help="Replace a store that is there.")]


def selector(text: str | None) -> Any:
    """A selection as typed: 3, -1, 0,2,5, 2:8, or a name such as last:6.

    Example:
        >>> selector("0,2"), selector("2:"), selector("last:6")
        ([0, 2], slice(2, None, None), 'last:6')
    """
    if text is None:
        return None
    try:
        if "," in text:
            return [int(part) for part in text.split(",")]
        if ":" in text:
            return slice(*(int(part) if part else None for part in text.split(":")))
        return int(text)
    except (ValueError, TypeError):
        return text


def parted(text: str) -> tuple[int, int]:
    """A part of a run, as "2/4".

    Raises:
        InputError: It is none.
    """
    try:
        which, writers = map(int, text.split("/"))
    except ValueError:
        raise InputError(f"--part {text}. Give i/n, from 1/n to n/n, as 2/4.") from None
    return which, writers


def progress(ds: "xr.Dataset") -> str:
    done, known = int((ds.status == 1).sum()), ds.attrs.get("problems", {})
    failed = ds.sizes["problem"] - done
    return f"{done} problems done, {failed} failed" + (f" of {known['n']}" if "n" in known else "")


def echo_failures(ds: "xr.Dataset") -> None:
    failed = ds.isel(problem=(ds.status == 2).values)
    for name, reason in zip(failed.problem.values, failed.error.values, strict=True):
        typer.echo(f"failed: {name}: {reason}", err=True)


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table on stdout."""
    grid = Table(box=None, pad_edge=False)
    # As texts: what a token or a path says is neither markup nor an :emoji:.
    for column in columns:
        grid.add_column(Plain(column), overflow="fold")
    for row in rows:
        grid.add_row(*map(Plain, row))
    Console(width=None if sys.stdout.isatty() else 200).print(grid)


def quiet() -> None:
    """Keep transformers' own progress bars out of the way of ours."""
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]


def require_picture(out: Path | None) -> None:
    """Refuse a picture that could not be written, before long work is done for it.

    Raises:
        InputError: Its folder is not there, or no picture has such a suffix.
    """
    if out is None:
        return
    from matplotlib.backend_bases import FigureCanvasBase

    known = FigureCanvasBase.get_supported_filetypes()
    if out.suffix and out.suffix[1:].lower() not in known:
        raise InputError(
            f"{out} cannot be written: no picture is a {out.suffix}. Use .png or .svg."
        )
    if not out.absolute().parent.is_dir():
        raise InputError(f"{out} cannot be written: there is no folder {out.parent}. Make it.")


def save(figure: "Figure | None", out: Path) -> None:
    """Write a picture, and say where.

    Raises:
        InputError: It cannot be written there, or not in this format.
    """
    assert figure is not None
    out = out if out.suffix else out.with_suffix(".png")
    try:
        figure.savefig(out, dpi=160)
    except (OSError, ValueError) as error:
        raise InputError(f"{out} cannot be written: {error}.") from error
    typer.echo(out)
