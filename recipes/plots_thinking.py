"""Where latents look, which of them the answer reads, and what each is worth."""

from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from recipes import stats
from recipes._drawing import (
    MOST_NUMBERS,
    MUTED,
    colour_bar,
    new_figure,
    show,
    ticks,
    titles,
)
from recipes._drawing_latents import (
    BLUE,
    ORANGE,
    headline,
    legend,
    level_line,
    numbers,
    plain,
    said,
    scale,
    short_form,
)
from recipes._latent_tables import require

LOOSE = ("problem", "layer", "head")
KNOCKOUT = ("delta_loss", "correct", "control_delta_loss", "control_correct", "base_correct")


def latent_masses(mass: xr.DataArray) -> Figure:
    """Where latents, what closes and the answer look: rows by parts of all that they see.

    Args:
        mass: (…, row, part): shares of attention that sum to 1 over parts; NaN is left out of the
            means over `problem`, `layer` and `head`, where there are any. Rows are named by their
            coord, numbers as z0, z1, ...

    Returns:
        A figure of one map, with numbers.

    Raises:
        ValueError: Other dims.

    Example:
        >>> mass = xr.DataArray([[0.5, 0.5]], {"row": ["z0"], "part": ["bos", "self"]})
        >>> [label.get_text() for label in latent_masses(mass).axes[0].get_xticklabels()]
        ['first token', 'self']
    """
    shown = _mean("latent_masses", mass, LOOSE, ("row", "part"))
    rows, parts = shown.shape
    figure = new_figure(0.6 * parts + 2.2, 0.36 * rows + 1.6)
    ax = figure.subplots()
    image = show(ax, shown.values, "Blues", Normalize(0, 1))
    ticks(
        ax,
        [said(str(part)) for part in shown["part"].values],
        [_named(row) for row in shown["row"].values.tolist()],
        size=9,
    )
    numbers(ax, image, shown.values, "z.2f")
    titles(ax, "Where each row looks\n" + _over(mass, LOOSE), "Part of what it sees", "Row")
    colour_bar(image, ax, "share of attention")
    return figure


def latent_readout(readout: xr.DataArray) -> Figure:
    """Which latent is read, layer by layer, by what closes and by the answer.

    Args:
        readout: (…, layer, row, key): attention of each row to each latent, from
            `recipes.latent.readout`; NaN is left out of the means over `problem` and `head`.

    Returns:
        A figure; its first axes are the rows, layers (down) by latents, one scale for all.

    Raises:
        ValueError: Other dims.

    Example:
        >>> x = xr.DataArray(np.eye(3)[:, None], dims=("layer", "row", "key"))
        >>> figure = latent_readout(x.assign_coords(row=["answer"]))
        >>> figure.axes[0].get_title(), figure.axes[0].texts[0].get_text()
        ('answer', '1.00')
    """
    loose = ("problem", "head")
    shown = _mean("latent_readout", readout, loose, ("row", "layer", "key"))
    rows, layers, n = shown.shape
    side = min(0.5, 9 / max(layers, n))
    figure = new_figure(max(5.5, (n * side + 0.3) * rows + 1.4), max(2.0, layers * side) + 1.4)
    panels = list(figure.subplots(1, rows, squeeze=False).ravel())
    form = short_form(shown.values)
    for ax, row in zip(panels, shown, strict=True):
        image = show(ax, row.values, "Blues", Normalize(0, float(shown.max()) or 1.0))
        down = [str(layer) for layer in row.get_index("layer")] if ax is panels[0] else []
        ticks(ax, [f"z{key}" for key in row.get_index("key")], down, size=8)
        if row.size <= MOST_NUMBERS:
            numbers(ax, image, row.values, form)
        titles(ax, _named(row["row"].item()), "", "Layer" if down else "", size=10)
    figure.supxlabel("Latent attended to", color=MUTED, fontsize=9)
    headline(figure, "Which latent is read", _over(readout, loose))
    scale(figure, image, panels, "attention, one scale for all")
    return figure


def _mean(name: str, x: Any, loose: tuple[str, ...], dims: tuple[str, ...]) -> xr.DataArray:
    """The mean over what there is of the loose dims, with these dims in this order."""
    if not isinstance(x, xr.DataArray) or set(x.dims) - set(loose) != set(dims):
        got = tuple(map(str, x.dims)) if isinstance(x, xr.DataArray) else type(x).__name__
        raise ValueError(
            f"{name} draws a DataArray with dims {', '.join(dims)}, and means over "
            f"{', '.join(loose)} where it has them. Got {got}"
        )
    over = [dim for dim in loose if dim in x.dims]
    return x.astype("float64").mean(over).transpose(*dims)


def _over(x: xr.DataArray, loose: tuple[str, ...]) -> str:
    """What the means are over, for a title."""
    over = [f"{x.sizes[dim]} {dim}s" for dim in loose if dim in x.dims]
    return f"mean over {', '.join(over)}" if over else ""


def _named(row: Any) -> str:
    """A row's name: z0 for the number 0."""
    return f"z{row}" if isinstance(row, int) else str(row)


def latent_knockout(ds: xr.Dataset, *, level: float = 0.95, seed: int = 0) -> Figure:
    r"""What becomes of the answer with each latent hidden, and with other tokens hidden instead.

    Args:
        ds: From `recipes.latent.knockout`: over (problem, hidden) `delta_loss` in nats per token,
            `correct`, and the same of the control; `base_correct` (problem).
        level: Of the bootstrap intervals over problems.
        seed: Of the bootstrap.

    Returns:
        A figure of two axes: what hiding adds to the loss of the expected answer; the accuracy,
        with a dashed line where nothing is hidden. The control is hollow.

    Raises:
        ValueError: Another dataset, or no answer is expected.
        InputError: Fewer than two problems.

    Example:
        >>> cells = (("problem", "hidden"), np.ones((3, 2)))
        >>> names = ("delta_loss", "correct", "control_delta_loss", "control_correct")
        >>> ds = xr.Dataset({**dict.fromkeys(names, cells), "base_correct": ("problem", [1, 1, 0])})
        >>> [text.get_text() for text in latent_knockout(ds).axes[1].texts]
        ['nothing\nhidden:\n0.67']
    """
    require("latent_knockout", ds, "recipes.latent.knockout", *KNOCKOUT)
    if not ds["delta_loss"].notnull().any():
        raise ValueError(
            "latent_knockout has no number: no problem has an expected answer. Give problems the "
            "field `answer`"
        )
    hidden = [str(name) for name in ds.get_index("hidden")]
    figure = new_figure(max(9.0, 1.1 * len(hidden) + 2.0), 4.0)
    left, right = figure.subplots(1, 2)
    for ax, name in ((left, "delta_loss"), (right, "correct")):
        for prefix, apart in (("", -0.14), ("control_", 0.14)):
            found = stats.bootstrap(ds[prefix + name], level=level, seed=seed)
            _estimates(ax, found, apart, control=bool(prefix))
        ax.set_xticks(range(len(hidden)), hidden, parse_math=False)
        ax.set_xlim(-0.6, len(hidden) - 0.4)
        plain(ax, grid="y")
    level_line(left, 0.0, "no change")
    base = float(ds["base_correct"].mean())
    right.set_ylim(-0.03, 1.03)
    if np.isfinite(base):
        level_line(right, base, f"nothing\nhidden:\n{base:.2f}")
    titles(left, "Loss of the expected answer", "Hidden", "Δ loss (nats per token)", size=10)
    titles(right, "Accuracy", "Hidden", "Share of answers that are right", size=10)
    legend(left, loc="best")
    title = f"Each latent hidden from all after it: {ds.sizes['problem']} problems"
    parts = [str(ds.attrs.get("model", "")), f"intervals of {100 * level:g} % over problems"]
    headline(figure, title, ", ".join(part for part in parts if part))
    return figure


def _estimates(ax: Axes, found: xr.Dataset, apart: float, *, control: bool) -> None:
    """Means with intervals, beside each other: latents filled, the control hollow."""
    colour = ORANGE if control else BLUE
    x = np.arange(found.sizes["hidden"]) + apart
    ax.vlines(x, found["low"], found["high"], color=colour, linewidth=1.6)
    label = "as many tokens of the question" if control else "the latent"
    face = "white" if control else colour
    ax.plot(x, found["mean"], "o", color=face, markeredgecolor=colour, markersize=6, label=label)
