"""Curves of what interventions do; call them as `plots.dose_response` and `plots.cumulative`.

Intervals are given as in `recipes.plots_effects`.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from recipes._drawing import (
    HALO,
    MUTED,
    apart,
    beside,
    curve,
    estimates,
    floats,
    label_ticks,
    new_figure,
    number,
    number_format,
    one_each,
    readable,
    titles,
)


def dose_response(
    factors: Any,
    mean: Any,
    low: Any = None,
    high: Any = None,
    *,
    ax: Axes | None = None,
    title: str | None = None,
    ylabel: str = "accuracy",
    reference: float | None = None,
) -> Axes:
    """What a model does as something in it is scaled by a factor, on a log axis that has 0.

    Args:
        factors: (factor,) tensor, array or list, in any order; drawn ascending. Below the smallest
            size other than 0 the axis is linear, so that 0 (and negative factors) have a place.
        mean: (factor,) in the unit of `ylabel`; or a Dataset (see the module). NaN leaves a gap.
        low: Lower ends of the error bars, as `mean`.
        high: Upper ends.
        ax: Where to draw; a new figure by default.
        title: Above the curve.
        ylabel: The quantity and its unit.
        reference: Where to draw a dashed line labelled "chance".

    Returns:
        The axes. Points too close to others for a label have no number and no tick.

    Raises:
        ValueError: Factors that are not finite, not one mean per factor, or wrong intervals (see
            `effect_map`).

    Example:
        >>> ax = dose_response([1, 0.5, 0], [0.9, 0.8, 0.5], reference=0.5)
        >>> [tick.get_text() for tick in ax.get_xticklabels()]
        ['0', '0.5', '1']
    """
    x = floats(factors).ravel()
    if not np.isfinite(x).all():
        raise ValueError(f"dose_response needs finite factors, got {x.tolist()}")
    values, ends = estimates(
        mean, low, high, "dose_response", lambda y: one_each(y, len(x), "dose_response", "factor")
    )
    order = np.argsort(x, kind="stable")
    x, values, ends = x[order], values[order], [end[order] for end in ends]
    ax = ax or new_figure(min(max(0.85 * len(x), 3.2), 11) + 1.6, 3.6).subplots()
    smallest = min(np.abs(x[x != 0]), default=1.0)
    ax.set_xscale("symlog", base=2, linthresh=smallest, linscale=0.5)
    curve(ax, x, values, ends)
    ax.margins(x=0.15)
    if reference is not None:
        ax.axhline(reference, color=MUTED, linestyle="--", linewidth=1.2)
        across = ax.get_yaxis_transform()
        text = f"chance\n{reference:.3g}"
        beside(ax, text, 1, reference, (5, 0), color=MUTED, va="center", xycoords=across)
    labelled = apart(ax, x)
    ax.set_xticks(x[labelled], [f"{factor:g}" for factor in x[labelled]])
    ax.minorticks_off()
    form = number_format(values)
    falls = np.append(values[1:] < values[:-1], True)
    for i in labelled:
        if math.isfinite(values[i]):
            # Above the point, on the side that the line to the next one leaves free.
            side, ha = (6, "left") if falls[i] else (-6, "right")
            style: dict[str, Any] = {"ha": ha, "path_effects": [HALO]}
            beside(ax, number(values[i], form), x[i], values[i], (side, 4), **style)
    titles(ax, title, f"Factor (log scale from {smallest:g})", ylabel)
    return ax


def cumulative(
    names: Sequence[str],
    mean: Any,
    low: Any = None,
    high: Any = None,
    *,
    ax: Axes | None = None,
    title: str | None = None,
    ylabel: str = "Δ loss (nats)",
    baseline: Any = None,
) -> Axes:
    """What changes as heads are ablated one after another, each with all before it.

    Args:
        names: The heads in their order, as "L1H0"; shown as "+L1H0".
        mean: (head,) in the unit of `ylabel`; or a Dataset (see the module). NaN leaves a gap.
        low: Lower ends of the error bars, as `mean`.
        high: Upper ends.
        ax: Where to draw; a new figure by default.
        title: Above the curve.
        ylabel: The quantity and its unit.
        baseline: (head,) what as many heads in a random order do: dashed, "random heads".

    Returns:
        The axes. Past 40 heads, every second (third, ...) is named.

    Raises:
        ValueError: Not one mean, or one baseline, per name; or wrong intervals (see `effect_map`).

    Example:
        >>> ax = cumulative(["L1H0", "L0H3"], [0.2, 0.9], baseline=[0.0, 0.1])
        >>> [tick.get_text() for tick in ax.get_xticklabels()], ax.texts[0].get_text()
        (['+L1H0', '+L0H3'], 'random heads')
    """
    n = len(names)
    values, ends = estimates(
        mean, low, high, "cumulative", lambda x: one_each(x, n, "cumulative", "head")
    )
    ax = ax or new_figure(min(max(0.42 * n, 3.2), 11) + 1.6, 3.6).subplots()
    curve(ax, np.arange(n), values, ends)
    if baseline is not None:
        chance = one_each(baseline, n, "cumulative", "head")
        ax.plot(chance, color=MUTED, linestyle="--", linewidth=1.2, marker="" if n > 1 else ".")
        for at in np.flatnonzero(np.isfinite(chance))[-1:]:
            beside(ax, "random heads", at, chance[at], (8, 0), color=MUTED, va="center")
    ax.set_xlim(-0.5, max(n, 1) - 0.5)
    cell = ax.get_window_extent().width / max(n, 1) / ax.figure.dpi
    names = ["+" + readable(name).removeprefix("+") for name in names]
    label_ticks(ax.xaxis, names, cell=cell, size=9)
    titles(ax, title, "Heads ablated, one more at a time", ylabel)
    return ax
