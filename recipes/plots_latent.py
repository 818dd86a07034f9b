"""Pictures of one latent reasoner: document 002's figures 1 to 5, with chance beside each number.

They draw what `recipes.latent.aggregate` and `recipes.latent.findings` return. Every function makes
a figure of its own, outside pyplot.

    >>> from recipes import latent
    >>> ds = latent.noise(problems=50, layers=2, heads=4)
    >>> figure = hub_analysis(latent.aggregate(ds), latent.findings(latent.scores(ds), draws=200))
    >>> "in 0 of 8 heads" in figure.get_suptitle()
    True
"""

import math
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure

from recipes._comparing_scores import depth
from recipes._drawing import INK, MUTED, colour_bar, new_figure, titles
from recipes._drawing_latents import (
    BLUE,
    SMALL,
    axes_of_blocks,
    block,
    block_size,
    form_of,
    headline,
    legend,
    level_line,
    plain,
    scale,
    stacked,
)
from recipes._latent_tables import (
    AGGREGATE,
    FINDINGS,
    SHARES,
    best_heads,
    interval,
    latent_names,
    mean_block,
    require,
    require_head,
    tell_head,
    told,
)
from recipes.plots_found import hub_analysis, ranking
from recipes.plots_thinking import latent_knockout, latent_masses, latent_readout

__all__ = [
    "by_layer",
    "critical_head_detail",
    "hub_analysis",
    "latent_knockout",
    "latent_masses",
    "latent_readout",
    "ranking",
    "top_heads",
]

HEADS_ACROSS, LAYERS_ACROSS = 5, 8
SAID = {
    "long_range": "long range",
    "self": "to itself",
    "question": "to the question",
    "sink": "to the first token",
}


def top_heads(aggregated: xr.Dataset, scores: xr.Dataset, *, top: int = 10) -> Figure:
    """Figure 1: how latents look at each other in the heads of the highest composite.

    Args:
        aggregated: From `recipes.latent.aggregate`.
        scores: From `recipes.latent.findings`; or from `recipes.latent.published`, for document
            002's composite and types.
        top: How many heads at most.

    Returns:
        A figure; its first axes are the heads, best first: the mean block, one scale for all, with
        numbers up to 12 latents. Titles say the head's type, its composite (with the interval, if
        there is one) and the block's mass: the share of the latents' attention that stays in it.

    Raises:
        ValueError: Other tables, no head with a composite, or `top` below 1.

    Example:
        >>> from recipes import latent
        >>> mean = latent.aggregate(latent.noise(problems=9, layers=1, heads=2))
        >>> print(top_heads(mean, latent.published(mean)).axes[0].get_title())
        L0H0 · Multi-Purpose
        composite 0.84
        block mass 1.00
    """
    require("top_heads", aggregated, AGGREGATE, "mean", "std")
    best = best_heads("top_heads", scores, top)
    for layer, head in best:
        require_head("top_heads", aggregated, layer, head)
    p = mean_block(aggregated)
    blocks = [p.sel(layer=layer, head=head).values for layer, head in best]
    form, most = form_of(np.stack(blocks), p.sizes["key"]), float(np.nanmax(blocks))
    rows, columns = _shape(len(best), HEADS_ACROSS)
    size = block_size(p.sizes["key"], form)
    figure = new_figure(max(5.5, (size + 0.25) * columns + 1.4), (size + 0.75) * rows + 1.0)
    panels = _grid(figure, len(best), (rows, columns))
    for i, (ax, at, values) in enumerate(zip(panels, best, blocks, strict=True)):
        outer: dict[str, Any] = {"across": i + columns >= len(best), "down": i % columns == 0}
        image = block(ax, values, most, form=form, **outer)
        mass = f"block mass {values.sum() / len(values):.2f}"
        titles(ax, "\n".join([*tell_head(scores, *at), mass]), "", "", size=8)
    which = "document 002's composite" if "composite" in scores else "composite beyond chance"
    total = p.sizes["layer"] * p.sizes["head"]
    headline(figure, f"Highest {which}: {len(best)} of {total} heads", told(aggregated))
    axes_of_blocks(figure)
    scale(figure, image, panels, "mean attention, one scale for all")
    return figure


def _shape(count: int, across: int) -> tuple[int, int]:
    """Rows and columns of a grid that is nowhere wider than `across`, and as full as it can be."""
    rows = math.ceil(count / across)
    return rows, math.ceil(count / rows)


def _grid(figure: Figure | SubFigure, count: int, shape: tuple[int, int]) -> list[Axes]:
    """As many axes, in lines."""
    grid = list(figure.subplots(*shape, squeeze=False).ravel())
    for spare in grid[count:]:
        spare.remove()
    return grid[:count]


def by_layer(aggregated: xr.Dataset) -> Figure:
    """Figure 2: each layer's mean over heads, and where latents look, by relative depth.

    Args:
        aggregated: From `recipes.latent.aggregate`.

    Returns:
        A figure; its first axes are the layers' mean blocks, one scale for all. Below, where the
        latents' attention goes, mean over heads and latents: bars at l / (L - 1) that sum to 1.

    Raises:
        ValueError: Another table.

    Example:
        >>> from recipes import latent
        >>> figure = by_layer(latent.aggregate(latent.noise(problems=9, layers=3, heads=2)))
        >>> [ax.get_title() for ax in figure.axes[:3]]
        ['Layer 0', 'Layer 1', 'Layer 2']
    """
    require("by_layer", aggregated, AGGREGATE, "mean", "mass")
    p = mean_block(aggregated).mean("head")
    layers = p["layer"].values.tolist()
    rows, columns = _shape(len(layers), LAYERS_ACROSS)
    n = p.sizes["key"]
    form, size = form_of(p.values, n), max(block_size(n, None), min(2.4, 6.4 / columns))
    form = form if form and block_size(n, form) <= size else None
    heights = [(size + 0.3) * rows + 0.6, 3.0]
    figure = new_figure(max(8.0, (size + 0.1) * columns + 1.6), sum(heights) + 0.6)
    (above,), (below,) = figure.subfigures(2, 1, squeeze=False, height_ratios=heights)
    panels = _grid(above, len(layers), (rows, columns))
    for i, (ax, layer) in enumerate(zip(panels, layers, strict=True)):
        outer: dict[str, Any] = {"across": i + columns >= len(layers), "down": i % columns == 0}
        image = block(ax, p.sel(layer=layer).values, float(p.max()), form=form, **outer)
        titles(ax, f"Layer {layer}", "", "", size=8)
    axes_of_blocks(above)
    scale(above, image, panels, "mean attention")
    _profile(below.subplots(), aggregated)
    headline(figure, "Attention between latents, mean over the heads of a layer", told(aggregated))
    return figure


def _profile(ax: Axes, aggregated: xr.Dataset) -> None:
    """Where latents look, layer by layer."""
    mass = aggregated["mass"].mean(("head", "query")).transpose("layer", "part")
    at = depth(aggregated)
    apart = min(np.diff(at), default=0.5)
    stacked(ax, at, mass, width=0.9 * apart)
    ax.set(xlim=(at[0] - 0.6 * apart, at[-1] + 0.6 * apart), ylim=(0, 1))
    plain(ax)
    depths = at if len(at) <= 5 else [0, 0.25, 0.5, 0.75, 1]
    ax.set_xticks(depths, [f"{x:.2g}" for x in depths])
    upper = ax.secondary_xaxis("top")
    cell = ax.get_window_extent().width / ax.figure.dpi * apart / (at[-1] - at[0] + 1.2 * apart)
    names = [str(layer) for layer in aggregated["layer"].values]
    step = math.ceil(0.3 / cell)
    upper.set_xticks(at[::step], names[::step])
    upper.tick_params(length=0, labelsize=8, labelcolor=INK)
    upper.spines["top"].set_visible(False)
    upper.set_xlabel("Layer", color=MUTED)
    titles(ax, None, "Relative depth of the layer", "Share of the latents' attention", size=9)
    legend(ax, loc="center left", bbox_to_anchor=(1.01, 0.5), reverse=True)


def critical_head_detail(
    aggregated: xr.Dataset, findings: xr.Dataset, layer: int, head: int
) -> Figure:
    """Figure 5: one head: its mean block, the spread over problems, where it looks, its scores.

    Args:
        aggregated: From `recipes.latent.aggregate`.
        findings: From `recipes.latent.findings`.
        layer: The head's layer, as labelled.
        head: The head, as labelled.

    Returns:
        A figure of four axes, and two colour bars: the mean block; its standard deviation over
        problems; each latent's attention to the parts; scores with their intervals, where filled
        points are 0 by chance and hollow ones shares of attention.

    Raises:
        ValueError: Other tables, or no such head.

    Example:
        >>> from recipes import latent
        >>> ds = latent.noise(problems=9, layers=1, heads=2)
        >>> tables = latent.aggregate(ds), latent.findings(latent.scores(ds), draws=99)
        >>> [ax.get_title() for ax in critical_head_detail(*tables, 0, 1).axes[:2]]
        ['Mean over problems', 'Standard deviation over problems']
    """
    require("critical_head_detail", aggregated, AGGREGATE, "mean", "std", "mass")
    require("critical_head_detail", findings, FINDINGS, "mean", "low", "high", "score", "type")
    require_head("critical_head_detail", aggregated, layer, head)
    one, scores = (x.sel(layer=layer, head=head) for x in (aggregated, findings))
    n = one.sizes["key"]
    size = max(2.6, block_size(n, form_of(one["mean"].values, n)))
    figure = new_figure(2 * size + 4.4, size + 0.3 * len(scores["score"]) + 2.4)
    (left, right), (lower_left, lower_right) = figure.subplots(
        2, 2, height_ratios=[size, 0.28 * len(scores["score"]) + 0.4]
    )
    for ax, name, title in ((left, "mean", "Mean"), (right, "std", "Standard deviation")):
        values = one[name].transpose("query", "key").values
        image = block(ax, values, float(np.nanmax(values)), form=form_of(values, n))
        titles(ax, f"{title} over problems", "Latent attended to", "Latent attending", size=10)
        colour_bar(image, ax, "attention")
    _rows(lower_left, one["mass"].transpose("query", "part"))
    _scores(lower_right, scores)
    name, _ = tell_head(findings, layer, head)
    headline(figure, name, told(aggregated))
    return figure


def _rows(ax: Axes, mass: xr.DataArray) -> None:
    """Where each latent looks, in the order of the blocks' rows."""
    at = np.arange(len(mass))
    stacked(ax, at, mass, width=0.8, across=True)
    ax.set(xlim=(0, 1), ylim=(len(mass) - 0.5, -0.5))
    ax.set_yticks(at, latent_names(len(mass)))
    plain(ax)
    titles(ax, None, "Share of the latent's attention", "Latent attending")
    legend(ax, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)


def _scores(ax: Axes, scores: xr.Dataset) -> None:
    """Every score that there is, with its interval, and shares of attention last."""
    known = [str(s) for s in scores["score"].values if scores["mean"].sel(score=s).notnull()]
    order = ["composite", "sequential", "long_range", "hub"]
    order += [score for score in known if score.startswith("hub_")] + list(SHARES)
    shown = [score for score in order if score in known]
    for y, score in enumerate(shown):
        one = scores.sel(score=score)
        share = score in SHARES
        ax.hlines(y, one["low"], one["high"], color=BLUE, linewidth=1.6)
        ax.plot(one["mean"], y, "o", color="white" if share else BLUE, markeredgecolor=BLUE, ms=5)
        ax.annotate(
            interval(one), (1, y), (4, 0), ax.get_yaxis_transform(), "offset points",
            va="center", fontsize=SMALL, color=INK, annotation_clip=False,
        )  # fmt: skip
    ax.set_yticks(range(len(shown)), [_said(score) for score in shown])
    ax.set_ylim(len(shown) - 0.5, -0.5)
    ax.set_xlim(min(-0.1, ax.get_xlim()[0]), 1.05)
    plain(ax, grid="x")
    level_line(ax, 0.0, "chance", across=False)
    level = 100 * scores.attrs.get("level", 0.95)
    titles(ax, None, f"Score with its {level:g} % interval (hollow: shares)", "")


def _said(score: str) -> str:
    return f"hub at z{score[4:]}" if score.startswith("hub_") else SAID.get(score, score)
