"""Which heads of a latent reasoner stand out, and which only seem to: figures 3 and 4."""

from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from recipes._drawing import INK, MUTED, beside, new_figure, titles
from recipes._drawing_latents import (
    BLUE,
    PALE,
    RED,
    SMALL,
    even_mark,
    headline,
    legend,
    level_line,
    plain,
    spread,
)
from recipes._latent_tables import (
    AGGREGATE,
    FINDINGS,
    HEADS,
    PUBLISHED,
    SURE,
    best_heads,
    even_columns,
    head_name,
    hubs,
    latent_names,
    mean_block,
    require,
    require_document,
    require_head,
    told,
)
from recipes.latent_findings import FOUND

STRIP = 0.8  # of the room of a latent: its heads, side by side


def hub_analysis(
    aggregated: xr.Dataset, findings: xr.Dataset, *, threshold: float = FOUND
) -> Figure:
    """Figure 3: the attention that each latent receives, and what of it is beyond chance.

    Args:
        aggregated: From `recipes.latent.aggregate`, by the convention "document".
        findings: From `recipes.latent.findings`.
        threshold: What a hub's interval must lie above to count.

    Returns:
        A figure of two axes. Left, document 002's column sums: how they lie over heads, and what
        they would be if each row spread its attention in the block evenly. Above each latent: in
        how many heads its sum is the largest. Right, how much of a hub each latent is in each head,
        0 by chance, with intervals. Above: how many of them lie above the threshold.

    Raises:
        ValueError: Other tables, or the published convention.

    Example: See `recipes.plots_latent`.
    """
    require("hub_analysis", aggregated, AGGREGATE, "mean")
    require("hub_analysis", findings, FINDINGS, "mean", "low", "high", "score", "p_hub_family")
    require_document("hub_analysis", aggregated)
    n = aggregated.sizes["key"]
    figure = new_figure(max(11.0, 0.8 * n + 3.0), 5.0)
    left, right = figure.subplots(1, 2, width_ratios=[1, 1.7])
    _received(left, mean_block(aggregated))
    any_found = _kappas(right, findings, threshold)
    for ax in (left, right):
        ax.set_xticks(range(n), latent_names(n))
        ax.set_xlim(-0.6, n - 0.4)
        plain(ax, grid="y")
    sure = int((findings["p_hub_family"] <= SURE).sum())
    found = f"interval above {threshold:g} in {int(any_found.sum())} of {any_found.size} heads"
    headline(
        figure,
        f"Hubs among latents: {found}, p ≤ {SURE:g} over all heads in {sure}",
        told(aggregated),
    )
    return figure


def _received(ax: Axes, p: xr.DataArray) -> None:
    """Column sums of all heads, and what even rows would give."""
    sums = p.sum("query").values.reshape(-1, p.sizes["key"])
    even = even_columns(p).reshape(sums.shape)
    for j, column in enumerate(sums.T):
        spread(ax, j, column, BLUE, label="" if j else "heads: 5-95 %, 25-75 %, median")
    even_mark(ax, np.arange(len(sums.T)), even.mean(0), "even rows (mean)")
    ax.set_ylim(0, 1.2 * ax.get_ylim()[1])  # room for the legend
    largest = np.bincount(sums[sums.any(-1)].argmax(-1), minlength=len(sums.T))
    _above(ax, dict(enumerate(largest.tolist())))
    titles(
        ax, "Document 002's: column sums\n\n", "Latent attended to", "Attention received", size=10
    )
    beside(ax, "heads with their largest sum there", 0.5, 1, (0, 17), **_centred(ax))
    legend(ax, loc="upper right")


def _kappas(ax: Axes, findings: xr.Dataset, threshold: float) -> Any:
    """Intervals of all heads, latent by latent, in ascending order; whether each head is found."""
    mean, low, high = (hubs(findings, name).values for name in ("mean", "low", "high"))
    counts = {}
    for j, (m, lower, upper) in enumerate(zip(mean, low, high, strict=True)):
        order = np.argsort(m[np.isfinite(m)], kind="stable")
        m, lower, upper = (x[np.isfinite(m)][order] for x in (m, lower, upper))
        if len(m):
            x = j + STRIP * ((np.arange(len(m)) + 0.5) / len(m) - 0.5)
            found = lower > threshold
            width = float(np.clip(60 / len(m), 0.4, 3.0))
            ax.vlines(x[~found], lower[~found], upper[~found], color=PALE, linewidth=width)
            ax.vlines(x[found], lower[found], upper[found], color=BLUE, linewidth=max(width, 1.5))
            ax.plot(x, m, "." if len(m) <= 40 else "-", color=INK, linewidth=0.8, markersize=4)
            ax.plot(x[found], m[found], ".", color=BLUE, markersize=6)  # intervals may be narrow
            counts[j] = int(found.sum())
        else:
            style: dict[str, Any] = {"color": MUTED, "ha": "center", "va": "center"}
            ax.text(j, 0.5, "under 2\nreaders", fontsize=8, **style)
    ax.set_ylim(min(-0.1, ax.get_ylim()[0]), 1.05)
    level_line(ax, 0.0, "chance")
    level_line(ax, threshold, f"{threshold:g}")
    _above(ax, counts)
    title = f"Beyond chance: intervals of {100 * findings.attrs.get('level', 0.95):g} %\n\n"
    titles(ax, title, "Latent attended to", "Hub (0 chance, 1 perfect)", size=10)
    text = f"heads whose interval lies above {threshold:g} (blue)"
    beside(ax, text, 0.5, 1, (0, 17), **_centred(ax))
    return (low > threshold).any(0)


def _above(ax: Axes, counts: dict[int, int]) -> None:
    """A count above each latent."""
    style: dict[str, Any] = {"ha": "center", "xycoords": ax.get_xaxis_transform()}
    for j, count in counts.items():
        beside(ax, str(count), j, 1, (0, 4), **style)


def _centred(ax: Axes) -> dict[str, Any]:
    return {"ha": "center", "xycoords": ax.transAxes, "color": MUTED}


def ranking(findings: xr.Dataset, published: xr.Dataset, *, top: int = 20) -> Figure:
    """Figure 4: the heads of the highest composite beyond chance, and how sure their ranks are.

    Args:
        findings: From `recipes.latent.findings`.
        published: From `recipes.latent.published`, of the same heads.
        top: How many heads at most.

    Returns:
        A figure of three axes with a line for each head, best first: the composite with its
        interval, where 0 is chance; the share of draws in which the head is among the best
        `findings.top`, with the interval of its rank; document 002's composite, and its rank there.

    Raises:
        ValueError: Other tables, no head with a composite, or `top` below 1.

    Example:
        >>> from recipes import latent
        >>> ds = latent.noise(problems=9, layers=1, heads=2)
        >>> found = latent.findings(latent.scores(ds), draws=99)
        >>> figure = ranking(found, latent.published(latent.aggregate(ds)))
        >>> [text.get_text() for text in figure.axes[0].get_yticklabels()]
        ['L0H1 · untyped', 'L0H0 · untyped']
    """
    ends = ("rank_low", "rank_high", "p_top")
    require("ranking", findings, FINDINGS, "mean", "low", "high", "score", "type", *ends)
    require("ranking", published, PUBLISHED, "composite")
    best = best_heads("ranking", findings, top)
    for layer, head in best:
        require_head("ranking", published, layer, head)
    figure = new_figure(11.5, 0.26 * len(best) + 2.0)
    left, middle, right = figure.subplots(1, 3, sharey=True, width_ratios=[2, 1.3, 1.3])
    table = findings.sel(score="composite", drop=True)
    rows = [table.sel(layer=layer, head=head) for layer, head in best]
    y = np.arange(len(rows))
    mean, low, high, p_top = (
        np.array([row[name].item() for row in rows]) for name in ("mean", "low", "high", "p_top")
    )
    # an interval is open where some draws of problems leave a head without a number
    edge = min(-0.05, *(x - 0.05 for x in (*low, *mean) if np.isfinite(x)))
    left.hlines(y, np.maximum(low, edge), high, color=BLUE, linewidth=1.6)
    left.plot(mean, y, "o", color=BLUE, markersize=5)
    middle.barh(y, p_top, 0.6, color=PALE)
    for at, row in enumerate(rows):
        span = f"{p_top[at]:.2f}   ({row['rank_low'].item():.0f}-{row['rank_high'].item():.0f})"
        beside(middle, span, p_top[at], at, (3, 0), va="center", fontsize=SMALL)
    _documents(right, published, best)
    left.set_yticks(y, [head_name(*at, r["type"].item()) for at, r in zip(best, rows, strict=True)])
    left.set(ylim=(len(rows) - 0.5, -0.5))
    left.set_xlim(edge, max(0.4, 1.1 * high.max()))
    middle.set_xlim(0, 1.75)
    middle.set_xticks([0, 0.5, 1])
    for ax in (left, middle, right):
        plain(ax, grid="x")
    level_line(left, 0.0, "chance", across=False)
    level = f"{100 * findings.attrs.get('level', 0.95):g} %"
    titles(left, None, f"Composite beyond chance, {level} interval", "")
    k = findings.attrs.get("top", 10)
    titles(middle, None, f"P(rank ≤ {k}), and ranks ({level})", "")
    titles(right, None, "Document 002's composite, rank", "")
    title = f"Highest composite beyond chance: {len(best)} of {table['mean'].size} heads"
    headline(figure, title, told(findings))
    return figure


def _documents(ax: Axes, published: xr.Dataset, best: list[tuple[int, int]]) -> None:
    """Document 002's composite of these heads, and their ranks by it."""
    x = published["composite"].transpose(*HEADS)
    for y, (layer, head) in enumerate(best):
        value = x.sel(layer=layer, head=head).item()
        if np.isfinite(value):
            ax.plot(value, y, "D", color=RED, markersize=5)
            beside(ax, f"{int((x > value).sum()) + 1}", value, y, (6, 0), va="center", fontsize=8)
    ax.set_xlim(0, 1.1)
