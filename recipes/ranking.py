"""Heads in the order of a score."""

import math
from typing import Any, NamedTuple

import xarray as xr
from array_api_compat import array_namespace

from recipes._metric import PROBLEM


class Ranked(NamedTuple):
    """One head and its score."""

    layer: int
    head: int
    score: float
    label: str  # as "L3H6"


def rank(scores: Any, *, top: int | None = 10, descending: bool = True) -> list[Ranked]:
    """The heads by score, best first.

    Args:
        scores: (…, layer, head) tensor or array, averaged over its leading dims; or a DataArray
            with dims layer and head, and perhaps problem, averaged over problems. NaN is skipped.
        top: How many to return; None for all.
        descending: Highest first.

    Returns:
        At most `top` rows (layer, head, score, label). Heads that are NaN throughout are left
        out, equal scores keep the order of layers and heads. Layers and heads are the coords of a
        DataArray where it has them. The mean is float32 or wider.

    Raises:
        ValueError: `scores` has no layer and head, or a dim that is not one of the three.

    Example:
        >>> import numpy as np
        >>> [row.label for row in rank(np.array([[0.1, 0.9], [0.5, np.nan]]), top=2)]
        ['L0H1', 'L1H0']
    """
    layers, heads = None, None
    if isinstance(scores, xr.DataArray):
        if {"layer", "head"} - set(scores.dims) or set(scores.dims) - {PROBLEM, "layer", "head"}:
            raise ValueError(
                f"rank takes dims layer and head, and perhaps problem, got {tuple(scores.dims)}. "
                "Reduce or select the others first"
            )
        scores = scores.transpose(PROBLEM, "layer", "head", missing_dims="ignore")
        layers, heads = scores["layer"].values.tolist(), scores["head"].values.tolist()
        scores = scores.values
    if scores.ndim < 2:
        raise ValueError(f"rank takes (…, layer, head) scores, got shape {tuple(scores.shape)}")
    table = _mean_of_numbers(scores).tolist()
    rows = [
        Ranked(layer, head, score, f"L{layer}H{head}")
        for layer, line in zip(layers or range(len(table)), table, strict=True)
        for head, score in zip(heads or range(len(line)), line, strict=True)
        if not math.isnan(score)
    ]
    return sorted(rows, key=lambda row: -row.score if descending else row.score)[:top]


def _mean_of_numbers(scores: Any) -> Any:
    """(layer, head): mean over all leading dims, leaving NaN out."""
    xp = array_namespace(scores)
    wide = xp.astype(scores, xp.result_type(scores.dtype, xp.float32))
    flat = xp.reshape(wide, (-1, *scores.shape[-2:]))
    known = ~xp.isnan(flat)
    count = xp.sum(xp.astype(known, wide.dtype), axis=0)
    total = xp.sum(xp.where(known, flat, 0.0), axis=0)
    return xp.where(count > 0, total / xp.where(count > 0, count, 1.0), math.nan)
