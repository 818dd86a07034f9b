"""The demonstration: a shipped model reads random tokens twice, and its heads are found."""

from dataclasses import dataclass
from pathlib import Path

import xarray as xr
from matplotlib.figure import Figure

import probe
from probe import demos
from probe.errors import InputError, StoreError
from recipes import heads, plots

THRESHOLD = 0.5  # a head is named after what takes more than half of its attention


@dataclass(frozen=True, slots=True)
class Demo:
    """What `run` found.

    Attributes:
        store: Folder of the captured store.
        figure: The picture, a PNG file.
        induction: (layer, head) induction scores, means over the sequences, in [0, 1].
        previous: (layer, head) previous-token scores, likewise.
    """

    store: Path
    figure: Path
    induction: xr.DataArray
    previous: xr.DataArray


def run(name: str = "demo-llama", out: str | Path = "demo", *, progress: bool = True) -> Demo:
    """Capture a demonstration model on repeated random tokens and draw its heads.

    Each of 64 sequences is the beginning-of-text token and 20 distinct random tokens, twice
    (Olsson et al. 2022). The store is made once; the same call again reads it.

    Args:
        name: One of `probe.demos.NAMES`.
        out: Folder for the store and the picture.
        progress: Show a progress bar on stderr.

    Raises:
        InputError: No such demonstration model.
        StoreError: The folder cannot be written.

    Example:
        >>> found = run(out="demo", progress=False)
        >>> heads.rank(found.induction, top=1)[0].label
        'L1H0'
    """
    if name not in demos.NAMES:  # demo-instruct neither: it was not made for repeated tokens
        raise InputError(
            f"the demonstration finds induction heads, and {name!r} is no model made for that. "
            f"Use one of {', '.join(demos.NAMES)}."
        )
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(f"{folder} cannot be made ({error.strerror}). Use another.") from error
    store, figure = folder / f"{name}.zarr", folder / f"{name}.png"
    with probe.load(name) as model:
        ds = probe.capture(model, demos.repeated(), store, progress=progress)
    induction = heads.induction(ds.pattern).mean("problem")
    previous = heads.previous_token(ds.pattern).mean("problem")
    draw(ds, induction, previous).savefig(figure, dpi=160)
    return Demo(store, figure, induction, previous)


def draw(ds: xr.Dataset, induction: xr.DataArray, previous: xr.DataArray) -> Figure:
    """Two head maps, and the first problem's pattern in the best induction head."""
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=(1, 1, 1.25))
    plots.head_map(induction, ax=left, title="induction heads", vmin=0, vmax=1)
    plots.head_map(previous, ax=middle, title="previous-token heads", vmin=0, vmax=1)
    best = heads.rank(induction, top=1)[0]
    first = ds.isel(problem=0)
    pattern = first.pattern.sel(layer=best.layer, head=best.head)
    plots.pattern(pattern, ax=right, title=f"{best.label} on the first sequence")
    return figure
