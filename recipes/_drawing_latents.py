"""What the pictures of latents share: blocks, stacked parts, spreads, intervals and legends."""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure, SubFigure
from matplotlib.image import AxesImage

from recipes._drawing import (
    INK,
    MISSING,
    MUTED,
    em_width,
    finish_bar,
    ink_on,
    number,
    number_format,
    show,
    ticks,
)
from recipes._latent_tables import latent_names

SMALL = 7.0  # points: nothing is written smaller
MOST_NUMBERED = 12  # latents up to which blocks show their numbers
# Okabe and Ito's colours (2008), which colour-blind readers tell apart.
BLUE, RED, GREEN, ORANGE, SKY, PINK = MODELS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#e69f00",
    "#56b4e9",
    "#cc79a7",
)
PALE = "#b8c0c8"
PARTS = {
    "bos": PALE,
    "question": SKY,
    "bot": ORANGE,
    "latent": BLUE,
    "self": RED,
    "eot": PINK,
    "answer": GREEN,
}
SAID = {"bos": "first token", "latent": "other latents"}  # where a part's name says too little


def said(part: str) -> str:
    """The name of a part, in words."""
    return SAID.get(part, part)


def form_of(values: Any, n: int) -> str | None:
    """How to write the numbers of blocks of n latents; None where there are too many."""
    return short_form(values) if n <= MOST_NUMBERED else None


def short_form(values: Any) -> str:
    """The format that gives the largest number two digits, and others no more."""
    return number_format(np.nanmax(values, initial=0.0).reshape(1))


def block_size(n: int, form: str | None) -> float:
    """Inches that a block needs, so that its numbers or names fit."""
    cell = SMALL / 72 * (em_width(f"{0.5:{form}}") + 0.6) if form else 0.16
    return max(1.7 if form else 1.2, n * cell)


def even_mark(ax: Axes, x: Any, y: Any, label: str | None = None) -> None:
    """What even rows would give: a short level line across."""
    style: dict[str, Any] = {"color": INK, "markersize": 15, "markeredgewidth": 1.6, "zorder": 4}
    ax.plot(x, y, linestyle="none", marker="_", label=label, **style)


def block(
    ax: Axes,
    values: Any,
    most: float,
    *,
    form: str | None = None,
    across: bool = True,
    down: bool = True,
) -> AxesImage:
    """A block of latents, from white at 0 to dark blue at `most`; later latents are grey.

    Args:
        ax: Where to draw.
        values: (query, key).
        most: The value of the darkest colour.
        form: Of the numbers in the cells; None for none.
        across: Whether to name the columns.
        down: Whether to name the rows.
    """
    n = len(values)
    shown = np.where(np.tri(n, dtype=bool), values, np.nan)
    image = show(ax, shown, "Blues", Normalize(0, most or 1.0))
    names = latent_names(n)
    ticks(ax, names if across else [], names if down else [], size=8)
    if form:
        numbers(ax, image, shown, form)
    return image


def numbers(ax: Axes, image: AxesImage, values: Any, form: str) -> None:
    """Small numbers into the cells that have one."""
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            style: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": SMALL}
            ax.text(column, row, number(value, form), color=ink_on(image, value), **style)


def axes_of_blocks(figure: Figure | SubFigure) -> None:
    """What rows and columns of blocks are."""
    figure.supxlabel("Latent attended to", color=MUTED, fontsize=9)
    figure.supylabel("Latent attending", color=MUTED, fontsize=9)


def scale(figure: Figure | SubFigure, image: AxesImage, axes: Sequence[Axes], label: str) -> None:
    """One colour bar for several axes."""
    finish_bar(figure.colorbar(image, ax=list(axes), fraction=0.03, pad=0.01, aspect=25), label)


def stacked(ax: Axes, at: Any, mass: xr.DataArray, *, width: float, across: bool = False) -> None:
    """Bars of the parts that have any attention, one upon the other.

    Args:
        ax: Where to draw.
        at: Places of the bars.
        mass: (bar, part); sums to 1 over parts.
        width: Of a bar.
        across: Whether bars lie.
    """
    below = np.zeros(len(mass))
    for part in map(str, mass["part"].values):
        share = np.nan_to_num(mass.sel(part=part).values)
        style: dict[str, Any] = {"color": PARTS.get(part, MISSING), "label": said(part)}
        style |= {"edgecolor": "white", "linewidth": 0.4}
        if share.any() and across:
            ax.barh(at, share, width, left=below, **style)
        elif share.any():
            ax.bar(at, share, width, bottom=below, **style)
        below = below + share


def spread(ax: Axes, x: float, values: Any, colour: str, *, label: str | None = None) -> None:
    """How numbers of heads lie: 5 to 95 % thin, the middle half thick, the median a dot.

    Args:
        ax: Where to draw, upright at x.
        x: Where.
        values: Any shape; NaN is left out, and nothing is drawn where nothing is left.
        colour: Of all of it.
        label: For the legend.
    """
    known = np.asarray(values)[np.isfinite(values)]
    if known.size:
        ends = np.quantile(known, (0.05, 0.25, 0.5, 0.75, 0.95))
        ax.vlines(x, ends[0], ends[4], color=colour, linewidth=1.2)
        ax.vlines(x, ends[1], ends[3], color=colour, linewidth=5, label=label or "")
        ax.plot(x, ends[2], "o", color="white", markeredgecolor=colour, markersize=4.5, zorder=3)


def plain(ax: Axes, *, grid: Literal["x", "y", ""] = "") -> None:
    """Axes of two sides, in the colours of all pictures."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(MUTED)
    ax.tick_params(color=MUTED, labelcolor=INK, labelsize=8)
    if grid in ("x", "y"):
        ax.grid(visible=True, axis=grid, color=MISSING)
    ax.set_axisbelow(True)


def legend(ax: Axes, **style: Any) -> None:
    """Of what has a label, without a frame; a user's names stay as they are."""
    if ax.get_legend_handles_labels()[0]:
        drawn = ax.legend(**{"frameon": False, "fontsize": 8, "labelcolor": INK, **style})
        for text in drawn.get_texts():
            text.set_parse_math(False)


def headline(figure: Figure, *texts: str) -> None:
    """The title of a figure, from what is not empty."""
    lines = "\n".join(text for text in texts if text)
    figure.suptitle(lines, color=INK, fontsize=11, parse_math=False)


def caption(figure: Figure, text: str) -> None:
    """A line below everything."""
    figure.supxlabel(text, color=MUTED, fontsize=8, parse_math=False)


def level_line(ax: Axes, at: float, text: str, *, across: bool = True) -> None:
    """A dashed line at a level, and what it is, at its far end."""
    style: dict[str, Any] = {"color": MUTED, "fontsize": SMALL, "annotation_clip": False}
    if across:
        ax.axhline(at, color=MUTED, linestyle="--", linewidth=1.0, zorder=1)
        where: Any = ax.get_yaxis_transform()
        ax.annotate(text, (1, at), (3, 0), where, "offset points", va="center", **style)
    else:
        ax.axvline(at, color=MUTED, linestyle="--", linewidth=1.0, zorder=1)
        where = ax.get_xaxis_transform()
        ax.annotate(text, (at, 1), (0, 2), where, "offset points", ha="center", **style)
