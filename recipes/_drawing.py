"""What the pictures share: figures outside pyplot, arrays, labels, colours and numbers.

A user's texts never become mathematics: every one is drawn with `parse_math=False`.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
import numpy as np
import xarray as xr
from array_api_compat import is_torch_array
from matplotlib.axes import Axes
from matplotlib.axis import Axis, XAxis
from matplotlib.cm import ScalarMappable
from matplotlib.colorbar import Colorbar
from matplotlib.colors import Colormap, Normalize, SymLogNorm
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, get_font_names
from matplotlib.image import AxesImage
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patheffects import withStroke
from matplotlib.textpath import text_to_path

MOST_LABELS = 40  # beyond this many, token labels are thinned
MOST_NUMBERS = 12 * 16  # beyond this many cells, a map shows no numbers
LONGEST_TOKEN = 14  # characters
CJK = ("Noto Sans CJK JP", "Hiragino Sans", "Yu Gothic", "Microsoft YaHei", "WenQuanYi Zen Hei")
SKEWED = 20  # times the median: a number this large gets a log scale
LINE = "#2166ac"  # the blue of RdBu
INK, MUTED, MISSING = "#1f2933", "#52606d", "#e4e7eb"
HALO = withStroke(linewidth=2, foreground="white")


def new_figure(width: float, height: float) -> Figure:
    """A figure outside pyplot, in inches, that makes room for its labels."""
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12)
    return Figure(figsize=(width, height), layout=layout)


def new_axes(shape: tuple[int, int], *, cell: float) -> Axes:
    """Axes with room for (rows, columns) square cells, in inches, and for what is around them."""
    rows, columns = shape
    cell = min(cell, 10 / max(rows, columns, 1))
    bar = 0.04 * cell * max(rows, columns)  # what the colour bar grows by, see `colour_bar`
    wide, high = max(cell * columns, 1.5) + 2.0 + bar, max(cell * rows, 1.2) + 1.4
    return new_figure(wide, high).subplots()


def floats(x: Any) -> Any:
    """A tensor, array, list or DataArray as a NumPy array of float64."""
    if isinstance(x, xr.DataArray):
        x = x.values
    elif is_torch_array(x):
        x = x.detach().cpu().double().numpy()
    return np.asarray(x, dtype=np.float64)


def values_of(x: Any, name: str, dims: tuple[str, ...]) -> Any:
    """`x` as a NumPy array with these dims in this order."""
    if isinstance(x, xr.DataArray):
        if set(x.dims) != set(dims):
            raise ValueError(
                f"{name} draws dims {dims}, got {tuple(x.dims)}. Select or average the others "
                "first, and rename what has another name"
            )
        x = x.transpose(*dims)
    x = floats(x)
    if x.ndim != len(dims):
        raise ValueError(f"{name} draws dims {dims}, got an array of shape {x.shape}")
    return x


def one_each(x: Any, size: int, name: str, each: str) -> Any:
    """`x` as a NumPy array of this size: one number for each of something."""
    x = floats(x)
    if x.shape != (size,):
        raise ValueError(
            f"{name} draws one number per {each}: {size} of them, got an array of shape {x.shape}"
        )
    return x


def estimates(
    mean: Any, low: Any, high: Any, name: str, read: Callable[[Any], Any]
) -> tuple[Any, list[Any]]:
    """The means, and the two ends of their intervals, or none."""
    wanted = ["mean", "low", "high"]
    if isinstance(mean, xr.Dataset):
        if low is not None or high is not None or set(wanted) - set(mean):
            raise ValueError(
                f"{name} draws a Dataset with the variables mean, low and high, and nothing "
                f"besides; this one has {list(mean)}"
            )
        mean, low, high = (mean[each] for each in wanted)
    if (low is None) != (high is None):
        missing = "low" if low is None else "high"
        raise ValueError(f"{name} needs both ends of the intervals: {missing} is missing")
    values, *ends = (read(each) for each in (mean, low, high) if each is not None)
    for each, end in zip(("low", "high"), ends, strict=False):
        if end.shape != values.shape:
            raise ValueError(f"{name} got means of shape {values.shape}, {each} of {end.shape}")
    if ends and (ends[0] > ends[1]).any():
        raise ValueError(f"{name} got intervals whose low is above high. Are they swapped?")
    return values, ends


def names_of(x: Any, dim: str, size: int) -> list[str]:
    """The labels along a dim: its coord, else 0, 1, 2, ..."""
    labelled = isinstance(x, xr.DataArray | xr.Dataset) and dim in x.coords
    return [str(each) for each in (x[dim].values if labelled else range(size))]


def keys_of(x: Any, tokens: Sequence[str] | None, name: str, size: int) -> tuple[Any, list[str]]:
    """The position of every key (-1 is padding), and the labels of those that exist."""
    coords = x.coords if isinstance(x, xr.DataArray) else {}
    key = np.asarray(coords.get("key_position", np.arange(size)))
    texts = coords["token"].values if tokens is None and "token" in coords else tokens
    if texts is not None and len(texts) not in (size, (key >= 0).sum()):
        raise ValueError(f"{name} needs one token per key: {size} keys, {len(texts)} tokens")
    if texts is not None and len(texts) == size:
        texts = [text for text, position in zip(texts, key, strict=True) if position >= 0]
    return key, [readable(text) for text in (key[key >= 0] if texts is None else texts)]


def readable(token: Any) -> str:
    """A token on one line: control characters escaped, blanks visible, the long ones cut."""
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(token))
    text = text if text.strip() else text.replace(" ", "\u2423")
    return text if len(text) <= LONGEST_TOKEN else text[: LONGEST_TOKEN - 1] + "…"


def fonts() -> list[str]:
    """The font in use and, after it, those installed that have Chinese, Japanese and Korean."""
    installed = set(get_font_names())
    return [*matplotlib.rcParams["font.family"], *(font for font in CJK if font in installed)]


def em_width(text: str) -> float:
    """The width of a text in units of its size."""
    font = FontProperties(family=fonts(), size=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # drawing warns of what no font has: once is enough
        width, _, _ = text_to_path.get_text_width_height_descent(text, font, ismath=False)
    return float(width)


def colours(name: str) -> Colormap:
    """A colour map in which what is missing is grey."""
    return matplotlib.colormaps[name].with_extremes(bad=MISSING)


def diverging(values: Any) -> tuple[Normalize, str]:
    """The norm of RdBu_r centred on 0, and what a colour bar's label must add about it.

    The scale is linear to the largest size. Where that is more than 20 times the median (of what
    is neither 0 nor NaN) it is logarithmic beyond the median, or one head would pale the others.
    """
    sizes = np.abs(values[np.isfinite(values) & (values != 0)])
    most, typical = (sizes.max(), float(np.median(sizes))) if sizes.size else (1.0, 1.0)
    if most <= SKEWED * typical:
        return Normalize(-most, most), ""
    return SymLogNorm(typical, vmin=-most, vmax=most), ", symmetric log scale"


def show(ax: Axes, values: Any, cmap: str, norm: Normalize) -> AxesImage:
    """The values as square cells in a pale frame."""
    image = ax.imshow(values, cmap=colours(cmap), norm=norm, interpolation="nearest")
    for side in ax.spines.values():
        side.set_color(MISSING)
    return image


def ticks(ax: Axes, across: list[str], down: list[str], *, size: float) -> None:
    """Label the columns and rows of an image."""
    ax.tick_params(length=0, labelsize=size, labelcolor=INK)
    label_ticks(ax.xaxis, across, cell=cell_of(ax), size=size)
    label_ticks(ax.yaxis, down, cell=cell_of(ax), size=size)


def cell_of(ax: Axes) -> float:
    """The side of a cell of an image, in inches."""
    rows, columns = ax.images[0].get_size()
    box = ax.get_window_extent()
    return float(min(box.width / columns, box.height / rows) / ax.figure.dpi)


def label_ticks(axis: Axis, labels: list[str], *, cell: float, size: float) -> None:
    """Label 0, 1, 2, ..., `cell` inches apart: all, or every second (third, ...) if they touch."""
    step = max(math.ceil(len(labels) / MOST_LABELS), math.ceil(1.2 * size / 72 / cell))
    shown = range(0, len(labels), step)
    axis.set_ticks(shown, [labels[i] for i in shown], parse_math=False)
    longest = max((len(labels[i]) for i in shown), default=0)
    if isinstance(axis, XAxis) and 0.7 * size / 72 * longest > step * cell:
        axis.set_tick_params(rotation=90)


def titles(ax: Axes, title: str | None, across: str, down: str, *, size: float = 11) -> None:
    """Title and axis labels in the colours of all pictures."""
    ax.set_title(title or "", color=INK, fontsize=size, parse_math=False)
    ax.set_xlabel(across, color=MUTED, parse_math=False)
    ax.set_ylabel(down, color=MUTED, parse_math=False)


def number_format(values: Any) -> str:
    """The format of sizes below 1 that gives a typical one of these numbers two digits."""
    sizes = np.abs(values[np.isfinite(values) & (values != 0)])
    digits = 1 - math.floor(math.log10(np.median(sizes))) if sizes.size else 2
    return f"z.{max(digits, 2)}f" if digits <= 4 else ".1e"


def number(value: float, form: str) -> str:
    """A number as short as a cell needs it."""
    if value == 0 and form.endswith("e"):
        return "0"
    if abs(value) < 1:
        return f"{value:{form}}"
    return f"{value:.2f}" if abs(value) < 10 else f"{value:.3g}"


def ink_on(mappable: ScalarMappable, value: float) -> str:
    """The colour of a text that can be read on this value's colour."""
    red, green, blue, _ = mappable.to_rgba(np.asarray(value))
    return "white" if 0.299 * red + 0.587 * green + 0.114 * blue < 0.5 else INK


def write_numbers(ax: Axes, image: AxesImage, values: Any) -> None:
    """Every number into its cell."""
    for (row, column), value in np.ndenumerate(values):
        if not math.isnan(value):
            style: dict[str, Any] = {"fontsize": 8, "color": ink_on(image, value)}
            ax.text(column, row, number(value, ".2f"), ha="center", va="center", **style)


def colour_bar(image: AxesImage, ax: Axes, label: str) -> None:
    """A bar as high as the image: an inset follows its axes, whatever their shape."""
    rows, columns = image.get_size()
    width = max(rows, columns) / columns / 32
    inset = ax.inset_axes((1 + width, 0, width, 1))
    bar = ax.figure.colorbar(image, cax=inset)
    apart = 1.6 * 8 / 72 / (rows * cell_of(ax))  # ticks of 8 points, as a share of the bar
    shown = log_ticks(image.norm, apart) if isinstance(image.norm, SymLogNorm) else []
    if not shown and apart > 0.25:
        shown = [end for end in image.get_clim() if end is not None]
    if shown:  # matplotlib's own ticks would overlap
        bar.set_ticks(shown, labels=[f"{tick:.3g}" for tick in shown])
        bar.minorticks_off()
    finish_bar(bar, label)


def log_ticks(norm: SymLogNorm, apart: float) -> list[float]:
    """The ends of a scale, 0, and the powers of ten, `apart` at least, as a share of its length."""
    kept = [most := float(norm.vmax or 1.0)]
    top = math.ceil(math.log10(most)) - 1
    for value in (0.0, *(10.0**power for power in range(top, top - 12, -1))):
        if all(abs(float(norm(value)) - float(norm(other))) >= apart for other in kept):
            kept.append(value)
    return sorted({*kept, *(-value for value in kept)})


def finish_bar(bar: Colorbar, label: str, *, loc: str = "center") -> None:
    """Label a colour bar, without frame and tick marks."""
    bar.set_label(label, loc=loc, color=MUTED, parse_math=False)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0, labelsize=8, labelcolor=MUTED)


def curve(ax: Axes, x: Any, y: Any, ends: list[Any]) -> None:
    """Points joined by a line, in axes of two sides, with error bars from low to high."""
    if ends:
        # Around their own middle: a mean may lie outside a skewed interval.
        low, high = ends
        bars: dict[str, Any] = {"fmt": "none", "ecolor": LINE, "elinewidth": 1.2, "capsize": 3}
        ax.errorbar(x, (low + high) / 2, yerr=(high - low) / 2, **bars)
    ax.plot(x, y, color=LINE, marker="o", markersize=5)
    ax.margins(x=0.08, y=0.15)
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(MUTED)
    ax.tick_params(color=MUTED, labelcolor=INK, labelsize=9)
    ax.grid(axis="y", color=MISSING)
    ax.set_axisbelow(True)


def beside(
    ax: Axes, text: str, x: float, y: float, offset: tuple[float, float], **style: Any
) -> None:
    """A small text near a point, `offset` in points."""
    style = {"fontsize": 8, "color": INK, "annotation_clip": False, **style}
    ax.annotate(text, (x, y), xytext=offset, textcoords="offset points", **style)


def apart(ax: Axes, x: Any) -> list[int]:
    """Which of these ascending x have room for a label."""
    ax.autoscale_view()
    inches = ax.transData.transform(np.column_stack([x, x]))[:, 0] / ax.figure.dpi
    kept: list[int] = []
    for i, at in enumerate(inches):
        if not kept or at - inches[kept[-1]] >= 0.36:
            kept.append(i)
    # Both ends are always labelled: the last, often factor 1, takes a close neighbour's place.
    return kept if len(kept) < 2 else [*kept[:-1], len(x) - 1]
