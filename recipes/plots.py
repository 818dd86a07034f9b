"""Pictures of heads and patterns, of what interventions do, and of latents, with matplotlib.

Every function draws into `ax` where one is given. Otherwise it makes a figure of its own, outside
pyplot, so nothing has to be closed and no display is needed: `ax.figure` shows it in a notebook,
`ax.figure.savefig("heads.png")` writes it. Nothing is averaged or selected silently: an array with
more dims than the picture has is a ValueError that names them.
Pictures of latents are whole figures, with their means in the titles: see `recipes.plots_latent`.

    >>> import numpy as np
    >>> ax = pattern(np.eye(3), ["The", " cat", " sat"])
    >>> ax.get_xlabel(), ax.get_ylabel()
    ('Key (attended to)', 'Query (attending from)')
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from recipes._drawing import (
    INK,
    MOST_NUMBERS,
    MUTED,
    colour_bar,
    finish_bar,
    keys_of,
    names_of,
    new_axes,
    new_figure,
    show,
    ticks,
    titles,
    values_of,
    write_numbers,
)
from recipes.plots_compare import (
    model_comparison_critical_heads,
    model_comparison_flow,
    model_comparison_hubs,
)
from recipes.plots_curves import cumulative, dose_response
from recipes.plots_effects import effect_map, token_strip
from recipes.plots_latent import (
    by_layer,
    critical_head_detail,
    hub_analysis,
    latent_knockout,
    latent_masses,
    latent_readout,
    ranking,
    top_heads,
)

__all__ = [
    "by_layer",
    "critical_head_detail",
    "cumulative",
    "dose_response",
    "effect_map",
    "head_grid",
    "head_map",
    "hub_analysis",
    "latent_knockout",
    "latent_masses",
    "latent_readout",
    "model_comparison_critical_heads",
    "model_comparison_flow",
    "model_comparison_hubs",
    "pattern",
    "ranking",
    "token_strip",
    "top_heads",
]

COLUMNS = 4  # of a grid of heads


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
    values = values_of(scores, "head_map", ("layer", "head"))
    rows, columns = values.shape
    ax = ax or new_axes(values.shape, cell=0.46)
    diverging = vmin is None and vmax is None and bool((values < 0).any())
    if diverging:
        vmax = float(np.nanmax(np.abs(values)))
        vmin = -vmax
    image = show(ax, values, "RdBu_r" if diverging else "Blues", Normalize(vmin, vmax))
    ticks(ax, names_of(scores, "head", columns), names_of(scores, "layer", rows), size=9)
    titles(ax, title, "Head", "Layer")
    if annotate and values.size <= MOST_NUMBERS:
        write_numbers(ax, image, values)
    name = scores.name if isinstance(scores, xr.DataArray) else None
    colour_bar(image, ax, label or (str(name) if name else ""))
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
    ax = ax or new_axes(values.shape, cell=0.46 if max(values.shape) <= 8 else 0.28)
    image = show(ax, values, "Blues", Normalize(0, 1))
    ticks(ax, across, down, size=9 if max(values.shape) <= 20 else 7)
    titles(ax, title, "Key (attended to)", "Query (attending from)")
    colour_bar(image, ax, "attention")
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
    names = names_of(patterns, "head", len(values))
    rows = math.ceil(len(values) / COLUMNS)
    figure = new_figure(2.6 * COLUMNS + 1.0, 2.7 * rows + 0.8)
    grid = figure.subplots(rows, COLUMNS, squeeze=False).ravel()
    panels, spare = list(grid[: len(values)]), grid[len(values) :]
    for ax in spare:
        ax.remove()
    for i, (ax, matrix, name) in enumerate(zip(panels, values, names, strict=True)):
        image = show(ax, matrix, "Blues", Normalize(0, 1))
        outer = i + COLUMNS >= len(values), i % COLUMNS == 0
        ticks(ax, across if outer[0] else [], down if outer[1] else [], size=7)
        titles(ax, f"Head {name}" if layer is None else f"L{layer}H{name}", "", "", size=9)
    if title:
        figure.suptitle(title, color=INK, parse_math=False)
    figure.supxlabel("Key (attended to)", color=MUTED, fontsize=10)
    figure.supylabel("Query (attending from)", color=MUTED, fontsize=10)
    if panels:
        bar = figure.colorbar(image, ax=panels, fraction=0.03, pad=0.01, aspect=30)
        finish_bar(bar, "attention")
    return figure


def _labelled_pattern(
    p: Any, tokens: Sequence[str] | None, name: str, lead: tuple[str, ...]
) -> tuple[Any, list[str], list[str]]:
    """The rows and columns that exist, with their labels across (keys) and down (queries)."""
    values = values_of(p, name, (*lead, "query", "key"))
    *_, n_query, n_key = values.shape
    coords = p.coords if isinstance(p, xr.DataArray) else {}
    key, labels = keys_of(p, tokens, name, n_key)
    last = key[n_key - n_query :] if n_query <= n_key else np.arange(n_query)
    query = np.asarray(coords.get("query_position", last))
    values = values[..., query >= 0, :][..., key >= 0]
    label = dict(zip(key[key >= 0].tolist(), labels, strict=True))
    return values, labels, [label.get(at, str(at)) for at in query[query >= 0].tolist()]
