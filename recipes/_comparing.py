"""Tables of a comparison: of models, by relative depth, and of pairs."""

from collections.abc import Mapping
from itertools import combinations
from typing import Any

import numpy as np
import xarray as xr

from recipes import stats
from recipes._comparing_scores import HEADS, Options, Scored, over_problems
from recipes._metric import PROBLEM

FOUND = 0.3  # a head whose interval lies above this has the score
CRITICAL = 0.7  # document 002's composite of a critical head
MOST_BINS = 10


def means(found: Mapping[str, Scored]) -> xr.DataArray:
    """(model, metric, problem) float64: means over all heads; last, accuracy if it is known."""
    parts = {}
    for name, one in found.items():
        table = one.scores.to_dataarray("metric").astype("float64")
        parts[name] = table.mean(HEADS).drop_vars("correct", errors="ignore")
        if "correct" in one.scores.coords:
            right = one.scores["correct"].drop_vars("correct").astype("float64")
            rows = [parts[name], right.expand_dims(metric=["accuracy"])]
            parts[name] = xr.concat(rows, "metric")
    metrics = dict.fromkeys(str(m) for one in parts.values() for m in one["metric"].values)
    last = sorted(metrics, key="accuracy".__eq__)
    means: xr.DataArray = _stacked({n: one.reindex(metric=last) for n, one in parts.items()})
    return means


def _stacked(parts: Mapping[str, Any]) -> Any:
    """Arrays or tables of each model as one, along `model`."""
    return xr.concat(list(parts.values()), _labels("model", list(parts)), join="exact")


def _labels(dim: str, values: Any) -> xr.DataArray:
    """A new dim and its labels."""
    return xr.DataArray(values, dims=dim, name=dim)


def of_models(
    parts: Mapping[str, xr.Dataset],
    found: Mapping[str, Scored],
    each: xr.DataArray,
    options: Options,
) -> xr.Dataset:
    """`comparison/models` of `recipes.compare.compare`."""
    metrics = [metric for one in found.values() for metric in one.heads["metric"].values]
    metrics = list(dict.fromkeys([*metrics, *each["metric"].values]))
    tables = {}
    for name, one in found.items():
        means = over_problems(stats.bootstrap, each.sel(model=name, drop=True), **options)
        low, size = one.heads["low"], one.heads["low"].sizes
        total = size["layer"] * size["head"]
        count = (low > FOUND).sum(HEADS).where(low.notnull().any(HEADS))
        count = count.sel(metric=list(one.counted))
        known = one.scores.to_dataarray("metric").notnull().mean((PROBLEM, *HEADS))
        table = means[["mean", "low", "high"]].reindex(metric=metrics)
        table["known"] = known.reindex(metric=metrics)
        table["found"] = count.reindex(metric=metrics)
        table["share"] = table["found"] / total
        table["layers"], table["heads"] = size["layer"], total
        table["checkpoint"] = str(parts[name].attrs.get("model", name))
        tables[name] = table
    if all("hub_position" in one.heads for one in found.values()):
        most = max(one.heads.sizes["latent"] for one in found.values())
        tables = {
            name: table.assign(_hubs(found[name].heads, most, options["level"]))
            for name, table in tables.items()
        }
    stacked: xr.Dataset = _stacked(tables)
    return stacked


def _hubs(heads: xr.Dataset, most: int, level: float) -> dict[str, xr.DataArray]:
    """How many heads have their hub at each latent, and how many document 002 calls critical."""
    latents = xr.DataArray(np.arange(most), {"latent": np.arange(most)}, "latent")
    there = heads["hub_position"] == latents
    sure = heads["p_hub_family"] <= 1 - level
    return {
        "hubs": there.sum(HEADS),
        "hubs_beyond_chance": (there & sure).sum(HEADS),
        "document_hubs": (heads["document_hub_position"] == latents).sum(HEADS),
        "found_any": heads["found"].sum(),
        "critical": (heads["document_composite"] > CRITICAL).sum(),
    }


def by_depth(found: Mapping[str, Scored], options: Options) -> xr.Dataset:
    """`comparison/depth` of `recipes.compare.compare`."""
    bins = min(MOST_BINS, *(one.scores.sizes["layer"] for one in found.values()))
    metrics = list(dict.fromkeys(str(m) for one in found.values() for m in one.scores))
    edges = np.arange(bins + 1) / bins
    tables = {}
    for name, one in found.items():
        table = one.scores.to_dataarray("metric").astype("float64")
        place = np.minimum(table["depth"].values * bins, bins - 1).astype(int)
        means = [table.isel(layer=place == k).mean(HEADS) for k in range(bins)]
        binned = xr.concat(means, _labels("depth", edges[:-1] + 0.5 / bins))
        estimate = over_problems(stats.bootstrap, binned, **options)[["mean", "low", "high"]]
        tables[name] = estimate.reindex(metric=metrics)
    stacked: xr.Dataset = _stacked(tables)
    return stacked.assign_coords(start=("depth", edges[:-1]), end=("depth", edges[1:]))


def paired(each: xr.DataArray, options: Options) -> xr.Dataset:
    """`comparison/paired` of `recipes.compare.compare`."""
    pairs = list(combinations(each["model"].values.tolist(), 2))
    apart = [each.sel(model=b, drop=True) - each.sel(model=a, drop=True) for a, b in pairs]
    x = xr.concat(apart, _labels("pair", [f"{b} - {a}" for a, b in pairs]))
    found = over_problems(stats.bootstrap, x, **options).rename(mean="difference")
    draws, seed = options["draws"], options["seed"]
    tests = over_problems(stats.sign_flip, x, draws=draws, seed=seed)
    found = found.assign({name: tests[name] for name in ("t", "p", "p_family", "p_bh")})
    a, b = zip(*pairs, strict=True)
    return found.assign_coords(a=("pair", list(a)), b=("pair", list(b)))
