"""What pictures of latents read from tables: names, orders, chance, and what they refuse."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from recipes import stats
from recipes.ranking import rank

Models = Mapping[str, tuple[xr.Dataset, xr.Dataset]]

HEADS = ("layer", "head")
AGGREGATE, FINDINGS = "recipes.latent.aggregate", "recipes.latent.findings"
PUBLISHED = "recipes.latent.published"
SHARES = ("self", "question", "sink")  # of attention: chance is not 0
MOST_MODELS = ("two", "three", "four", "five", "six")  # and one
SURE = 0.05  # of a p over all heads


def latent_names(n: int) -> list[str]:
    """z0, z1, ... for n latents."""
    return [f"z{k}" for k in range(n)]


def require(name: str, given: Any, source: str, *variables: str) -> None:
    """Refuse what lacks a variable, as another table in its place would."""
    if not isinstance(given, xr.Dataset) or set(variables) - set(given.variables):
        held = list(map(str, given)) if isinstance(given, xr.Dataset) else type(given).__name__
        raise ValueError(
            f"{name} draws what {source} returns, with {', '.join(variables)}. Got {held}"
        )


def require_document(name: str, aggregated: xr.Dataset) -> None:
    """Refuse the published reading where latents' attention is held against even attention."""
    convention = aggregated.attrs.get("convention", "document")
    if convention != "document":
        raise ValueError(
            f"{name} compares with even attention among latents, and the convention {convention!r} "
            "reads other rows. Aggregate with convention='document'"
        )


def mean_block(aggregated: xr.Dataset) -> xr.DataArray:
    """(layer, head, query, key): the mean block."""
    return aggregated["mean"].transpose(*HEADS, "query", "key")


def told(aggregated: xr.Dataset) -> str:
    """What the numbers are means of, for a title."""
    n, model = aggregated.attrs.get("n"), aggregated.attrs.get("model")
    shifted = aggregated.attrs.get("convention", "document") != "document"
    parts = [str(model)] * bool(model) + [f"mean over {n} problems"] * bool(n)
    return ", ".join([*parts, *["rows and columns as published, one off"] * shifted])


def even_columns(p: xr.DataArray) -> NDArray[np.float64]:
    """(…, key): column sums if each row spread what it gives to the block evenly over 0..i."""
    rows = _rows(p) / np.arange(1, p.sizes["key"] + 1)
    return np.asarray(np.flip(np.cumsum(np.flip(rows, -1), -1), -1))


def even_flow(p: xr.DataArray) -> NDArray[np.float64]:
    """(…): document 002's flow if each row spread what it gives to the block evenly over 0..i."""
    rows, at = _rows(p), np.arange(p.sizes["key"])
    total = rows.sum(-1)
    flow = (rows * at / (at + 1)).sum(-1) / np.where(total > 0, total, 1.0)
    return np.where(total > 0, flow, np.nan)


def _rows(p: xr.DataArray) -> NDArray[np.float64]:
    """(…, query): what each latent gives to the block."""
    return np.asarray(p.transpose(..., "query", "key").values.sum(-1), np.float64)


def hubs(findings: xr.Dataset, name: str = "mean") -> xr.DataArray:
    """(key, head of all layers): a number of each hub_j."""
    scores = [str(score) for score in findings["score"].values if str(score).startswith("hub_")]
    return findings[name].sel(score=scores).transpose("score", *HEADS).stack(cell=HEADS)


def best_heads(name: str, scores: xr.Dataset, top: int) -> list[tuple[int, int]]:
    """The (layer, head) of the highest composite, best first; equals in their order."""
    x = composite(name, scores)
    ranked = rank(x, top=None)
    if top < 1 or not ranked:
        raise ValueError(
            f"{name} ranks heads by their composite: top={top}, and {len(ranked)} of {x.size} "
            "heads have one. Give a top of 1 or more; beyond chance, a composite takes 4 latents "
            "or more"
        )
    return [(row.layer, row.head) for row in ranked[:top]]


def composite(name: str, scores: xr.Dataset) -> xr.DataArray:
    """(layer, head): the composite of either table of scores."""
    if isinstance(scores, xr.Dataset) and "composite" in scores:
        require(name, scores, PUBLISHED, "functional_type")
        return scores["composite"].transpose(*HEADS)
    require(name, scores, FINDINGS, "mean", "low", "high", "score", "type")
    return scores["mean"].sel(score="composite", drop=True).transpose(*HEADS)


def tell_head(scores: xr.Dataset, layer: int, head: int) -> tuple[str, str]:
    """A head with its type, and its composite."""
    one = scores.sel(layer=layer, head=head)
    if "composite" in one:
        text = f"composite {one['composite'].item():.2f}"
        return head_name(layer, head, one["functional_type"].item()), text
    text = f"composite {interval(one.sel(score='composite'))}"
    return head_name(layer, head, one["type"].item()), text


def head_name(layer: int, head: int, kind: str = "") -> str:
    """A head, and what it is."""
    return f"L{layer}H{head}" + (f" · {kind}" if kind else "")


def interval(one: xr.Dataset) -> str:
    """A mean and its interval."""
    return stats.told(one["mean"], one["low"], one["high"], "z.2f")


def require_head(name: str, table: xr.Dataset, layer: int, head: int) -> None:
    """Refuse a head that is not there."""
    layers, heads = (table[dim].values.tolist() for dim in HEADS)
    if layer not in layers or head not in heads:
        raise ValueError(
            f"{name} finds no L{layer}H{head}: there are layers {layers[0]} to {layers[-1]} and "
            f"heads {heads[0]} to {heads[-1]}. Choose one of these"
        )


def checked(name: str, models: Models) -> Models:
    """Tables of several models, refused where they cannot be drawn."""
    most = len(MOST_MODELS) + 1
    if not isinstance(models, Mapping) or not 1 <= len(models) <= most:
        got = len(models) if isinstance(models, Mapping) else type(models).__name__
        raise ValueError(
            f"{name} draws 1 to {most} models by name, got {got}. Give them as "
            "{'gpt2': (aggregated, findings)}"
        )
    needed = ("mean", "low", "high", "score", "type", "p_hub_family")
    for model, tables in models.items():
        if not isinstance(tables, tuple) or len(tables) != 2:
            raise ValueError(
                f"{name} takes two tables of each model, and {model!r} has "
                f"{type(tables).__name__}. Give (aggregated, findings)"
            )
        require(f"{name} ({model})", tables[0], AGGREGATE, "mean")
        require(f"{name} ({model})", tables[1], FINDINGS, *needed)
        require_document(f"{name} ({model})", tables[0])
    return models


def one_per_arm(models: Models) -> str:
    """What a comparison cannot say; nothing of one model."""
    if len(models) == 1:
        return ""
    which = MOST_MODELS[len(models) - 2]
    return f"One model per arm: differences describe these {which} checkpoints only."
