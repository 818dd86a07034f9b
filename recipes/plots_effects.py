"""Pictures of what interventions do; call them as `plots.effect_map` and so on.

Every number may come with an interval: `low` and `high`, arrays of the shape of `mean`; or `mean`
is a Dataset with the variables mean, low and high, as `recipes.stats.bootstrap` returns. Where and
how they draw: see `recipes.plots`. Colours diverge around 0; where the largest number is more than
20 times the median they are logarithmic, and the colour bar's label says so.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle

from recipes._drawing import (
    HALO,
    INK,
    MOST_NUMBERS,
    MUTED,
    beside,
    cell_of,
    colour_bar,
    colours,
    diverging,
    em_width,
    estimates,
    finish_bar,
    fonts,
    ink_on,
    keys_of,
    names_of,
    new_axes,
    number,
    number_format,
    show,
    ticks,
    titles,
    values_of,
)

CAPTION = "outlined: the {level:g} % interval over problems excludes 0"
EM = 9 / 72  # inches: tokens are written in 9 points where there is room
ROW, BAR = 2.9, 4.2  # em: a line of tokens, and a colour bar with its label


def effect_map(
    mean: Any,
    low: Any = None,
    high: Any = None,
    *,
    ax: Axes | None = None,
    title: str | None = None,
    label: str = "Δ loss (nats)",
    numbers: bool = True,
) -> Axes:
    """What an intervention on each head changes, as an image of layers (down) by heads (across).

    Heads whose interval excludes 0 are outlined, and a caption below says so, with the attribute
    `level` of a Dataset (0.95 without one).

    Args:
        mean: (layer, head) tensor, array or DataArray (in either order), in the unit of `label`;
            or a Dataset (see the module). NaN is grey.
        low: Lower ends of the intervals, as `mean`. A head with NaN is never outlined.
        high: Upper ends.
        ax: Where to draw; a new figure by default.
        title: Above the map.
        label: Beside the colour bar: the quantity and its unit.
        numbers: Write means, and intervals below them, as long as there are at most 192 cells.

    Returns:
        The axes, with the colour bar beside them.

    Raises:
        ValueError: Dims other than layer and head; one end of the intervals without the other,
            of another shape, or swapped; a Dataset without the variables mean, low and high.

    Example:
        >>> import numpy as np
        >>> ax = effect_map(np.array([[0.5, -0.1]]), [[0.3, -0.3]], [[0.7, 0.1]])
        >>> [text.get_text() for text in ax.texts][:4], len(ax.patches)
        (['0.50', '-0.10', '[0.30, 0.70]', '[-0.30, 0.10]'], 1)
    """
    values, ends = estimates(
        mean, low, high, "effect_map", lambda x: values_of(x, "effect_map", ("layer", "head"))
    )
    rows, columns = values.shape
    write = numbers and values.size <= MOST_NUMBERS
    ax = ax or new_axes(values.shape, cell=0.8 if write and ends else 0.46)
    norm, scale = diverging(values)
    image = show(ax, values, "RdBu_r", norm)
    ticks(ax, names_of(mean, "head", columns), names_of(mean, "layer", rows), size=9)
    titles(ax, title, "Head", "Layer")
    colour_bar(image, ax, label + scale)
    if write:
        _write_effects(ax, image, values, ends)
    if ends:
        level = getattr(mean, "attrs", {}).get("level", 0.95)
        _outline(ax, ((ends[0] > 0) | (ends[1] < 0)) & ~np.isnan(values), level)
    return ax


def token_strip(
    values: Any,
    tokens: Sequence[str] | None = None,
    *,
    ax: Axes | None = None,
    title: str | None = None,
    label: str = "relevance (nats)",
    width: int = 16,
) -> Axes:
    """One number per token: coloured boxes with the token's text and, smaller below it, the number.

    Args:
        values: (key,) tensor, array or DataArray, in the unit of `label`. NaN is grey, without a
            number. Keys of a DataArray that do not exist (position -1) are not drawn.
        tokens: One text per key; the coord `token` by default, else positions.
        ax: Where to draw, in smaller letters if they have to be; a new figure by default.
        title: Above the strip.
        label: Below the colour bar: the quantity and its unit.
        width: Tokens in a line.

    Returns:
        The axes; tokens are shown as they are, `$` included. Those in Chinese, Japanese or Korean
        need a font for them: common ones are used where they are installed.

    Raises:
        ValueError: `values` has other dims than key, there is not one token per key, or `width`
            is below 1.

    Example:
        >>> import numpy as np
        >>> ax = token_strip(np.array([0.5, -0.25]), ["costs", " $5"])
        >>> [text.get_text() for text in ax.texts]
        ['costs', '0.50', ' $5', '-0.25']
    """
    if width < 1:
        raise ValueError(f"token_strip needs a width of 1 token or more, got {width}")
    shown = values_of(values, "token_strip", ("key",))
    key, texts = keys_of(values, tokens, "token_strip", len(shown))
    shown = shown[key >= 0]
    form = number_format(shown)
    written = ["" if math.isnan(value) else number(value, form) for value in shown]
    pairs = list(zip(texts, written, strict=True))
    places = _places([max(em_width(text), 0.7 * em_width(n)) + 0.9 for text, n in pairs], width)
    boxes = PatchCollection(places, cmap=colours("RdBu_r"), edgecolor="white", linewidth=1.5)
    boxes.set_array(np.ma.masked_where(np.isnan(shown), shown))
    norm, scale = diverging(shown)
    boxes.set_norm(norm)
    # Wide enough for the texts above and below, which no layout would shorten.
    least = max(19.0, 1.5 + 1.2 * em_width(label + scale), 1.3 * em_width(title or ""))
    ax, size = _strip(ax, places, least)
    ax.add_collection(boxes)
    for box, (text, n), value in zip(places, pairs, shown, strict=True):
        style: dict[str, Any] = {"ha": "center", "color": ink_on(boxes, value), "parse_math": False}
        x, y = box.get_center()
        ax.text(x, y, text, fontsize=size, family=fonts(), va="bottom", **style)
        ax.text(x, y - 0.3, n, fontsize=0.7 * size, va="top", **style)
    titles(ax, title, "", "")
    _bar_below(ax, boxes, min((box.get_y() for box in places), default=0.0), label + scale, form)
    return ax


def _write_effects(ax: Axes, image: AxesImage, values: Any, ends: list[Any]) -> None:
    """Means into the cells, and intervals below them, in letters that fit."""
    form = number_format(values)
    means = {at: number(x, form) for at, x in np.ndenumerate(values) if not math.isnan(x)}
    intervals = {
        at: f"[{number(ends[0][at], form)}, {number(ends[1][at], form)}]"
        for at in means
        if ends and np.isfinite([ends[0][at], ends[1][at]]).all()
    }
    cell = cell_of(ax)
    for texts, down, most in ((means, -0.13, 8.0), (intervals, 0.22, 6.5)):
        size = min([most, *(0.9 * cell * 72 / em_width(text) for text in texts.values())])
        style: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": size}
        for at, text in texts.items():
            y = at[0] + (down if at in intervals else 0.0)
            ax.text(at[1], y, text, color=ink_on(image, values[at]), **style)


def _outline(ax: Axes, cells: Any, level: float) -> None:
    """A dark frame just inside each of these cells, and what it means, below the axes."""
    for row, column in np.argwhere(cells):
        frame = Rectangle((column - 0.45, row - 0.45), 0.9, 0.9, fill=False, edgecolor=INK)
        frame.set(linewidth=1.0, path_effects=[HALO])
        ax.add_patch(frame)
    style: dict[str, Any] = {"color": MUTED, "ha": "center", "va": "top"}
    beside(ax, CAPTION.format(level=100 * level), 0.5, 0, (0, -4), xycoords=ax.xaxis.label, **style)


def _places(widths: list[float], line: int) -> list[Rectangle]:
    """Boxes of these widths, `line` of them in a line, from the top down; in em."""
    lefts = [sum(widths[i - i % line : i]) for i in range(len(widths))]
    return [
        Rectangle((left, -ROW * (i // line + 1)), width, ROW)
        for i, (left, width) in enumerate(zip(lefts, widths, strict=True))
    ]


def _strip(ax: Axes | None, places: list[Rectangle], least: float) -> tuple[Axes, float]:
    """Axes in em with room for the boxes and a colour bar below, and the size of their letters."""
    width = max([least, *(box.get_x() + box.get_width() for box in places)])
    height = BAR - min((box.get_y() for box in places), default=0.0)
    if ax is None:
        # Not laid out later: letters are sized for exactly these inches.
        wide, high = width * EM + 0.4, height * EM + 0.5
        sides = (0.2 / wide, 0.1 / high, width * EM / wide, height * EM / high)
        ax = Figure(figsize=(wide, high)).add_axes(sides)
    box, em = ax.get_window_extent(), EM * ax.figure.dpi
    scale = min(1.0, box.width / em / width, box.height / em / height)
    ax.set(xlim=(0, box.width / em / scale), ylim=(-box.height / em / scale, 0))
    ax.set_axis_off()
    return ax, 72 * EM * scale


def _bar_below(ax: Axes, boxes: PatchCollection, top: float, label: str, form: str) -> None:
    """A lying colour bar below the boxes, with its two ends and 0."""
    inset = ax.inset_axes((1.5, top - 1.5, 16, 0.8), transform=ax.transData)
    bar = ax.figure.colorbar(boxes, cax=inset, orientation="horizontal")
    finish_bar(bar, label, loc="left")
    low, high = inset.get_xlim()
    bar.set_ticks([low, 0, high], labels=[number(end, form) for end in (low, 0, high)])
    bar.minorticks_off()
