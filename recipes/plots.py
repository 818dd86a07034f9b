"""Pictures of heads and patterns, with matplotlib.

Every function draws into `ax` where one is given. Otherwise it makes a figure of its own, outside
pyplot, so nothing has to be closed and no display is needed: `ax.figure` shows it in a notebook,
`ax.figure.savefig("heads.png")` writes it. Nothing is averaged or selected silently: an array with
more dims than the picture has is a ValueError that names them.

    >>> import numpy as np
    >>> ax = pattern(np.eye(3), ["The", " cat", " sat"])
    >>> ax.get_xlabel(), ax.get_ylabel()
    ('Key (attended to)', 'Query (attending from)')
"""

import math
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
import xarray as xr
from array_api_compat import is_torch_array
from matplotlib.axes import Axes
from matplotlib.colorbar import Colorbar
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.layout_engine import ConstrainedLayoutEngine

MOST_LABELS = 40  # beyond this many, token labels are thinned
MOST_NUMBERS = 12 * 16  # beyond this many cells, a map shows no numbers
LONGEST_TOKEN = 14  # characters
COLUMNS = 4  # of a grid of heads
INK, MUTED, MISSING = "#1f2933", "#52606d", "#e4e7eb"


def head_map(
    scores: Any,
    *,
    ax: Axes | None = None,
    title: str | None = None,
    label: str | None = None,
    vmin: float | None = None,
    vmax: float | None = None,
    annotate: bool = True,
) -> Axes:
    """One number per head, as an image of layers (down) by heads (across).

    Args:
        scores: (layer, head) tensor, array or DataArray (in either order). NaN is grey.
        ax: Where to draw; a new figure by default.
        title: Above the map.
        label: Beside the colour bar; a DataArray's name by default.
        vmin: Value of the palest colour; the lowest score by default.
        vmax: Value of the deepest colour; the highest score by default. When scores go below 0
            and neither is given, colours diverge symmetrically around 0.
        annotate: Write the numbers into the cells, as long as there are at most 192.

    Returns:
        The axes, with the colour bar beside them.

    Raises:
        ValueError: `scores` has other dims than layer and head.

    Example:
        >>> import numpy as np
        >>> ax = head_map(np.array([[0.1, 0.9], [0.2, np.nan]]), label="induction")
        >>> [text.get_text() for text in ax.texts]
        ['0.10', '0.90', '0.20']
    """
    values = _values(scores, "head_map", ("layer", "head"))
    rows, columns = values.shape
    ax = ax or _new_axes(values.shape, cell=0.46)
    diverging = vmin is None and vmax is None and bool((values < 0).any())
    if diverging:
        vmax = float(np.nanmax(np.abs(values)))
        vmin = -vmax
    image = _show(ax, values, "RdBu_r" if diverging else "Blues", vmin, vmax)
    _ticks(ax, _names(scores, "head", columns), _names(scores, "layer", rows), size=9)
    _titles(ax, title, "Head", "Layer")
    if annotate and values.size <= MOST_NUMBERS:
        _write_numbers(ax, image, values)
    name = scores.name if isinstance(scores, xr.DataArray) else None
    _colour_bar(image, ax, label or (str(name) if name else ""))
    return ax


def pattern(
    p: Any, tokens: Sequence[str] | None = None, *, ax: Axes | None = None, title: str | None = None
) -> Axes:
    """One attention matrix as a heat map: white is 0, dark blue is 1.

    Args:
        p: (query, key) tensor, array or DataArray. Rows and columns of a DataArray that do not
            exist (position -1) are not drawn.
        tokens: One text per key; the queries are the last of them, as for the metrics, or those
            at a DataArray's positions. Default: the coord `token`, else positions. Past 40, every
            second (third, ...) is labelled.
        ax: Where to draw; a new figure by default.
        title: Above the map.

    Returns:
        The axes; tokens are shown as they are, `$` included.

    Raises:
        ValueError: `p` has other dims than query and key, or there is not one token per key.

    Example:
        >>> import numpy as np
        >>> ax = pattern(np.eye(2), ["costs", " $5"], title="L0H0")
        >>> [label.get_text() for label in ax.get_xticklabels()]
        ['costs', ' $5']
    """
    values, across, down = _labelled_pattern(p, tokens, "pattern", ())
    ax = ax or _new_axes(values.shape, cell=0.46 if max(values.shape) <= 8 else 0.28)
    image = _show(ax, values, "Blues", 0.0, 1.0)
    _ticks(ax, across, down, size=9 if max(values.shape) <= 20 else 7)
    _titles(ax, title, "Key (attended to)", "Query (attending from)")
    _colour_bar(image, ax, "attention")
    return ax


def head_grid(
    patterns: Any,
    tokens: Sequence[str] | None = None,
    *,
    layer: int | None = None,
    title: str | None = None,
) -> Figure:
    """All heads of one layer as small heat maps, four across, on one colour scale from 0 to 1.

    Args:
        patterns: (head, query, key) tensor, array or DataArray; or with a layer dim in front, of
            which `layer` is drawn.
        tokens: As for `pattern`; past 20, every second (third, ...) is labelled.
        layer: Which layer, as labelled in a DataArray. Heads are then called L3H0, L3H1, ...
        title: Above the grid.

    Returns:
        A figure; its first axes are the heads, in order.

    Raises:
        ValueError: `patterns` has other dims, or there is not one token per key.

    Example:
        >>> import numpy as np
        >>> figure = head_grid(np.stack([np.eye(3)] * 6), layer=2)
        >>> [ax.get_title() for ax in figure.axes[:6]]
        ['L2H0', 'L2H1', 'L2H2', 'L2H3', 'L2H4', 'L2H5']
    """
    labelled = isinstance(patterns, xr.DataArray)
    if layer is not None and labelled and "layer" in patterns.dims:
        patterns = patterns.sel(layer=layer)
    elif layer is not None and not labelled and patterns.ndim == 4:
        patterns = patterns[layer]
    if layer is None and labelled and "layer" in patterns.coords and "layer" not in patterns.dims:
        layer = int(patterns["layer"])
    values, across, down = _labelled_pattern(patterns, tokens, "head_grid", ("head",))
    names = _names(patterns, "head", len(values))
    rows = math.ceil(len(values) / COLUMNS)
    figure = _new_figure(2.6 * COLUMNS + 1.0, 2.7 * rows + 0.8)
    grid = figure.subplots(rows, COLUMNS, squeeze=False).ravel()
    panels, spare = list(grid[: len(values)]), grid[len(values) :]
    for ax in spare:
        ax.remove()
    for i, (ax, matrix, name) in enumerate(zip(panels, values, names, strict=True)):
        image = _show(ax, matrix, "Blues", 0.0, 1.0)
        outer = i + COLUMNS >= len(values), i % COLUMNS == 0
        _ticks(ax, across if outer[0] else [], down if outer[1] else [], size=7)
        _titles(ax, f"Head {name}" if layer is None else f"L{layer}H{name}", "", "", size=9)
    if title:
        figure.suptitle(title, color=INK, parse_math=False)
    figure.supxlabel("Key (attended to)", color=MUTED, fontsize=10)
    figure.supylabel("Query (attending from)", color=MUTED, fontsize=10)
    if panels:
        bar = figure.colorbar(image, ax=panels, fraction=0.03, pad=0.01, aspect=30)
        _finish_bar(bar, "attention")
    return figure


def _new_figure(width: float, height: float) -> Figure:
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12)
    return Figure(figsize=(width, height), layout=layout)


def _new_axes(shape: tuple[int, int], *, cell: float) -> Axes:
    """Axes with room for (rows, columns) square cells, in inches, and for what is around them."""
    rows, columns = shape
    cell = min(cell, 10 / max(rows, columns, 1))
    return _new_figure(max(cell * columns, 1.5) + 2.0, max(cell * rows, 1.2) + 1.4).subplots()


def _values(x: Any, name: str, dims: tuple[str, ...]) -> Any:
    """`x` as a NumPy array with these dims in this order."""
    if isinstance(x, xr.DataArray):
        if set(x.dims) != set(dims):
            raise ValueError(
                f"{name} draws dims {dims}, got {tuple(x.dims)}. Select or average the others "
                "first, and rename what has another name"
            )
        x = x.transpose(*dims).values
    elif is_torch_array(x):
        x = x.detach().cpu().double().numpy()
    x = np.asarray(x, dtype=np.float64)
    if x.ndim != len(dims):
        raise ValueError(f"{name} draws dims {dims}, got an array of shape {x.shape}")
    return x


def _names(x: Any, dim: str, size: int) -> list[str]:
    labelled = isinstance(x, xr.DataArray) and dim in x.coords
    return [str(each) for each in (x[dim].values if labelled else range(size))]


def _labelled_pattern(
    p: Any, tokens: Sequence[str] | None, name: str, lead: tuple[str, ...]
) -> tuple[Any, list[str], list[str]]:
    """The rows and columns that exist, with their labels across (keys) and down (queries)."""
    values = _values(p, name, (*lead, "query", "key"))
    *_, n_query, n_key = values.shape
    coords = p.coords if isinstance(p, xr.DataArray) else {}
    key = np.asarray(coords.get("key_position", np.arange(n_key)))
    last = key[n_key - n_query :] if n_query <= n_key else np.arange(n_query)
    query = np.asarray(coords.get("query_position", last))
    texts = coords["token"].values if tokens is None and "token" in coords else tokens
    if texts is not None and len(texts) not in (n_key, (key >= 0).sum()):
        raise ValueError(f"{name} needs one token per key: {n_key} keys, {len(texts)} tokens")
    if texts is not None and len(texts) == n_key:
        texts = [text for text, position in zip(texts, key, strict=True) if position >= 0]
    values = values[..., query >= 0, :][..., key >= 0]
    query, key = query[query >= 0].tolist(), key[key >= 0].tolist()
    label = {at: _readable(text) for at, text in zip(key, texts or key, strict=True)}
    return values, list(label.values()), [label.get(at, str(at)) for at in query]


def _readable(token: Any) -> str:
    """A token on one line: control characters escaped, blanks visible, the long ones cut."""
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(token))
    text = text if text.strip() else text.replace(" ", "\u2423")
    return text if len(text) <= LONGEST_TOKEN else text[: LONGEST_TOKEN - 1] + "…"


def _show(ax: Axes, values: Any, cmap: str, vmin: float | None, vmax: float | None) -> AxesImage:
    colours = matplotlib.colormaps[cmap].with_extremes(bad=MISSING)
    image = ax.imshow(values, cmap=colours, vmin=vmin, vmax=vmax, interpolation="nearest")
    for side in ax.spines.values():
        side.set_color(MISSING)
    return image


def _ticks(ax: Axes, across: list[str], down: list[str], *, size: float) -> None:
    """Label columns and rows: all of them, or every second (third, ...) where they would touch."""
    ax.tick_params(length=0, labelsize=size, labelcolor=INK)
    rows, columns = ax.images[0].get_size()
    box, inch = ax.get_window_extent(), ax.figure.dpi
    cell = min(box.width / columns, box.height / rows) / inch
    for axis, labels in ((ax.xaxis, across), (ax.yaxis, down)):
        step = max(math.ceil(len(labels) / MOST_LABELS), math.ceil(1.2 * size / 72 / cell))
        shown = range(0, len(labels), step)
        axis.set_ticks(shown, [labels[i] for i in shown], parse_math=False)
        longest = max((len(labels[i]) for i in shown), default=0)
        if axis is ax.xaxis and 0.7 * size / 72 * longest > step * cell:
            ax.tick_params(axis="x", rotation=90)


def _titles(ax: Axes, title: str | None, across: str, down: str, *, size: float = 11) -> None:
    ax.set_title(title or "", color=INK, fontsize=size, parse_math=False)
    ax.set_xlabel(across, color=MUTED)
    ax.set_ylabel(down, color=MUTED)


def _write_numbers(ax: Axes, image: AxesImage, values: Any) -> None:
    for (row, column), value in np.ndenumerate(values):
        if math.isnan(value):
            continue
        red, green, blue, _ = image.to_rgba(value)
        dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
        text = f"{value:.2f}" if abs(value) < 10 else f"{value:.3g}"
        colour = "white" if dark else INK
        ax.text(column, row, text, ha="center", va="center", fontsize=8, color=colour)


def _colour_bar(image: AxesImage, ax: Axes, label: str) -> None:
    """A bar as high as the image: an inset follows its axes, whatever their shape."""
    rows, columns = image.get_size()
    width = max(rows, columns) / columns / 32
    inset = ax.inset_axes((1 + width, 0, width, 1))
    _finish_bar(ax.figure.colorbar(image, cax=inset), label)


def _finish_bar(bar: Colorbar, label: str) -> None:
    bar.set_label(label, color=MUTED, parse_math=False)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0, labelsize=8, labelcolor=MUTED)
