"""Pictures of several latent reasoners side by side: document 002's figures 6 to 8.

They draw what `recipes.latent.aggregate` and `recipes.latent.findings` return, of each model by its
name. Heads are never matched by number, depth is l / (L - 1), and whatever depends on how much
attention stays among the latents stands beside what the same model would have if its rows were
even. Every function makes a figure of its own, outside pyplot.

    >>> from recipes import latent
    >>> ds = latent.noise(problems=20, layers=2, heads=4)
    >>> tables = latent.aggregate(ds), latent.findings(latent.scores(ds), draws=99)
    >>> figure = model_comparison_critical_heads({"a": tables, "b": tables})
    >>> figure.get_supxlabel()
    'One model per arm: differences describe these two checkpoints only.'
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from recipes import flow
from recipes._comparing_scores import depth
from recipes._drawing import MUTED, new_figure, titles
from recipes._drawing_latents import (
    MODELS,
    PALE,
    SMALL,
    caption,
    even_mark,
    headline,
    legend,
    level_line,
    plain,
    spread,
)
from recipes._latent_tables import (
    FINDINGS,
    HEADS,
    SURE,
    Models,
    checked,
    even_columns,
    even_flow,
    hubs,
    latent_names,
    mean_block,
    one_per_arm,
    require,
)
from recipes.latent_findings import FOUND

ROOM = 0.8  # of what a latent, or a type, has: the models beside each other
EVEN = "even rows"
DEPTH = "Relative depth of the layer"
LAST = ("mixed", "uniform", "untyped", "none")


def model_comparison_hubs(
    models: Models,
    *,
    nulls: Mapping[str, xr.Dataset] | None = None,
    threshold: float = FOUND,
) -> Figure:
    """Figure 6: which latents are attended to, each model against its own null.

    Args:
        models: By name, from `recipes.latent.aggregate` and `recipes.latent.findings`.
        nulls: By name, from `recipes.latent.findings` of noise of the model's size; drawn grey.
        threshold: What a hub's interval must lie above to count.

    Returns:
        A figure of three axes. Document 002's column sums over heads, with what each model's rows
        would give if they were even (level marks). How much of a hub each latent is, over heads,
        0 by chance. The share of heads whose interval lies above the threshold, by latent and for
        any; and whose hub has p of at most 0.05 over all heads when its own rows are permuted.

    Raises:
        ValueError: No mapping of one to six names, other tables, or the published convention.

    Example: See the module.
    """
    tables = checked("model_comparison_hubs", models)
    for name, null in (nulls or {}).items():
        require(f"model_comparison_hubs ({name})", null, FINDINGS, "mean", "score")
    n = max(aggregated.sizes["key"] for aggregated, _ in tables.values())
    figure = new_figure(max(13.0, 0.3 * n * (3 + len(tables)) + 3.0), 4.8)
    received, beyond, shares = figure.subplots(1, 3, width_ratios=[1, 1, 1.2])
    room = ROOM / len(tables)
    for name, colour, x, (aggregated, findings) in _beside(tables):
        _received(received, x, mean_block(aggregated), colour, name)
        apart = room / 4 if nulls else 0.0
        for j, column in enumerate(hubs(findings).values):
            spread(beyond, j + x - apart, column, colour)
            if nulls and name in nulls and j < len(chance := hubs(nulls[name])):
                spread(beyond, j + x + apart, chance.values[j], PALE)
        _shares(shares, x, findings, n, threshold, color=colour, width=0.9 * room, label=name)
    even_mark(received, [], [], EVEN)
    received.set_ylim(bottom=0)
    legend(received, loc="upper right")
    level_line(beyond, 0.0, "chance")
    shares.set_ylim(0, max(0.05, shares.get_ylim()[1]))
    latents = latent_names(n)
    labels = [latents, latents, [*latents, "any", f"p ≤ {SURE:g}"]]
    for ax, names in zip((received, beyond, shares), labels, strict=True):
        ax.set_xticks(range(len(names)), names)
        ax.set_xlim(-0.6, len(names) - 0.4)
        plain(ax, grid="y")
    title = f"Heads whose interval is above {threshold:g}, or p ≤ {SURE:g}"
    titles(received, "Document 002's: column sums", "Latent", "Attention received", size=10)
    grey = " (grey: noise)" if nulls else ""
    titles(beyond, f"Beyond chance{grey}", "Latent", "Hub (0 chance, 1 perfect)", size=10)
    titles(shares, title, "Latent", "Share of the model's heads", size=10)
    headline(figure, "Hubs among latents (heads: 5-95 %, 25-75 %, median)")
    caption(figure, one_per_arm(tables))
    return figure


def _received(ax: Axes, x: float, p: xr.DataArray, colour: str, name: str) -> None:
    """Column sums of all heads, and what even rows would give on average."""
    sums, even = (y.reshape(-1, p.sizes["key"]) for y in (p.sum("query").values, even_columns(p)))
    for j, (column, chance) in enumerate(zip(sums.T, even.T, strict=True)):
        spread(ax, j + x, column, colour, label=None if j else name)
        even_mark(ax, j + x, chance.mean())


def _shares(
    ax: Axes, x: float, findings: xr.Dataset, n: int, threshold: float, **style: Any
) -> None:
    """Shares of heads with a hub at each latent, at any, and with one by permutation."""
    found = hubs(findings, "low").values > threshold
    sure = findings["p_hub_family"].values <= SURE
    places = [*range(len(found)), n, n + 1]
    bars = ax.bar(np.array(places) + x, [*found.mean(1), found.any(0).mean(), sure.mean()], **style)
    counts = [*found.sum(1), found.any(0).sum(), sure.sum()]
    ax.bar_label(bars, [str(count or "") for count in counts], fontsize=SMALL, color=MUTED)


def model_comparison_flow(models: Models, *, comparison: xr.DataTree | None = None) -> Figure:
    """Figure 7: document 002's flow and the calibrated one, by relative depth.

    Args:
        models: As for `model_comparison_hubs`.
        comparison: From `recipes.compare.compare` of the same names: its means over ranges of
            depth, with their own intervals, take the place of the layers' at the right.

    Returns:
        A figure of two axes. Left, the layers' mean over heads of document 002's flow, and dashed
        what the model would have if its rows were even. Right, the mean over heads of `sequential`
        (0 chance, 1 all on the latent before). Without `comparison` its band is the mean of the
        heads' intervals, which is no narrower than the interval of the mean.

    Raises:
        ValueError: As for `model_comparison_hubs`; or names that `comparison` lacks.

    Example:
        >>> from recipes import latent
        >>> ds = latent.noise(problems=20, layers=2, heads=4)
        >>> tables = latent.aggregate(ds), latent.findings(latent.scores(ds), draws=99)
        >>> [ax.get_title() for ax in model_comparison_flow({"a": tables}).axes]
        ["Document 002's: flow", 'Beyond chance: sequential']
    """
    tables = checked("model_comparison_flow", models)
    by_depth = None if comparison is None else _by_depth(comparison, list(tables))
    figure = new_figure(11.0, 4.6)
    left, right = figure.subplots(1, 2)
    for name, colour, _, (aggregated, findings) in _beside(tables):
        p, at = mean_block(aggregated), depth(aggregated)
        line: dict[str, Any] = {"color": colour, "marker": "o", "markersize": 4}
        left.plot(at, flow.flow(p).mean("head"), label=name, **line)
        even = np.nanmean(even_flow(p), axis=1)
        left.plot(at, even, "--", color=colour, linewidth=1)
        if by_depth is None:
            one = findings.sel(score="sequential").transpose(*HEADS, ...).mean("head")
        else:
            one, at = by_depth.sel(model=name, metric="sequential"), by_depth["depth"].values
        right.fill_between(at, one["low"], one["high"], color=colour, alpha=0.2, linewidth=0)
        right.vlines(at, one["low"], one["high"], color=colour, alpha=0.4, linewidth=1)
        right.plot(at, one["mean"], **line)
    left.plot([], [], "--", color=MUTED, linewidth=1, label=f"{EVEN} (dashed)")
    level_line(right, 0.0, "chance")
    titles(left, "Document 002's: flow", DEPTH, "Flow, mean over heads", size=10)
    titles(right, "Beyond chance: sequential", DEPTH, "Sequential, mean over heads", size=10)
    for ax in (left, right):
        plain(ax, grid="y")
        ax.set_xlim(-0.04, 1.04)
    left.set_ylim(0, 1)
    legend(left, loc="best")
    band = "mean of the heads' intervals" if by_depth is None else "interval over problems"
    headline(figure, f"Attention from latent to latent, by depth (band: {band})")
    caption(figure, one_per_arm(tables))
    return figure


def _by_depth(comparison: xr.DataTree, names: list[str]) -> xr.Dataset:
    table = comparison["comparison/depth"].to_dataset()
    held = [str(name) for name in table["model"].values]
    if missing := [name for name in names if name not in held]:
        raise ValueError(
            f"model_comparison_flow finds no {missing[0]!r} in the comparison, which has "
            f"{', '.join(held)}. Compare stores of the same names"
        )
    return table


def model_comparison_critical_heads(models: Models, *, top: int = 10) -> Figure:
    """Figure 8: how many heads of each type a model has, and how strong its first ones are.

    Args:
        models: As for `model_comparison_hubs`.
        top: How many heads of each model at most.

    Returns:
        A figure of two axes: the share of the model's L x H heads of each type, with their number;
        the highest composites beyond chance with their intervals, by rank, where 0 is chance.

    Raises:
        ValueError: As for `model_comparison_hubs`; or `top` below 1.

    Example: See the module.
    """
    name = "model_comparison_critical_heads"
    tables = checked(name, models)
    if top < 1:
        raise ValueError(f"{name} draws the first heads, got top={top}. Give 1 or more")
    kinds = [_kinds(findings) for _, findings in tables.values()]
    order = sorted(set[str]().union(*kinds), key=lambda kind: (kind in LAST, kind))
    figure = new_figure(12.0, max(4.0, 0.18 * len(tables) * len(order) + 2.2))
    left, right = figure.subplots(1, 2, width_ratios=[1, 1.2])
    for (name, colour, place, (_, findings)), counts in zip(_beside(tables), kinds, strict=True):
        numbers = [counts.get(kind, 0) for kind in order]
        _types(left, place, numbers, color=colour, height=0.9 * ROOM / len(tables))
        label = f"{name} ({findings.sizes['layer']} x {findings.sizes['head']} heads)"
        _firsts(right, place, findings, top, color=colour, label=label)
    left.set_yticks(range(len(order)), order)
    left.set_ylim(len(order) - 0.4, -0.6)
    left.margins(x=0.1)
    plain(left, grid="x")
    titles(left, "Types of heads", "Share of the model's heads (and their number)", "", size=10)
    plain(right, grid="y")
    legend(right, loc="upper right")
    level_line(right, 0.0, "chance")
    right.set_xlim(0.4, min(top, max(one["type"].size for _, one in tables.values())) + 0.6)
    right.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    right.margins(y=0.1)
    title = "First heads of each model, with intervals"
    titles(right, title, "Rank in the model", "Composite beyond chance", size=10)
    headline(figure, "What stands out in each model")
    caption(figure, one_per_arm(tables))
    return figure


def _kinds(findings: xr.Dataset) -> dict[str, int]:
    """How many heads there are of each type; "none" without a number."""
    found, counts = np.unique(findings["type"].values.astype(str), return_counts=True)
    return dict(zip([kind or "none" for kind in found], counts.tolist(), strict=True))


def _types(ax: Axes, y: float, numbers: list[int], **style: Any) -> None:
    """Shares of a model's heads, of each type, and how many they are."""
    bars = ax.barh(np.arange(len(numbers)) + y, np.array(numbers) / sum(numbers), **style)
    ax.bar_label(bars, [str(n or "") for n in numbers], fontsize=SMALL, color=MUTED, padding=2)


def _firsts(ax: Axes, x: float, findings: xr.Dataset, top: int, *, color: str, label: str) -> None:
    """The highest composites with their intervals."""
    one = findings[["mean", "low", "high"]].sel(score="composite").stack(cell=HEADS)
    one = one.isel(cell=np.argsort(-one["mean"].values, kind="stable")[:top])
    at = np.arange(1, 1 + one.sizes["cell"]) + x
    ax.vlines(at, one["low"], one["high"], color=color, linewidth=1.6)
    label += "" if one["mean"].notnull().any() else ": none, which takes 4 latents"
    ax.plot(at, one["mean"], "o", color=color, markersize=4.5, label=label)


def _beside(tables: Models) -> Iterator[tuple[str, str, float, tuple[xr.Dataset, xr.Dataset]]]:
    """Name, colour, and place beside the others, of each model."""
    middle = (len(tables) - 1) / 2
    for k, (name, each) in enumerate(tables.items()):
        yield name, MODELS[k], (k - middle) * ROOM / len(tables), each
