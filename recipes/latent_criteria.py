"""Document 002's criteria of success, with what is known against each."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import xarray as xr


class Criterion(NamedTuple):
    """One criterion.

    Attributes:
        phase: 1 or 2, as in document 002.
        name: What is asked.
        value: What was found.
        threshold: What it is held against.
        passed: Whether document 002 calls it a success.
        caveat: Why passing it may mean nothing.
    """

    phase: int
    name: str
    value: float
    threshold: float
    passed: bool
    caveat: str


def criteria(aggregated: xr.Dataset, published: xr.Dataset) -> list[Criterion]:
    """Document 002's Phase 1 and Phase 2, literally.

    Args:
        aggregated: What `recipes.latent_scores.aggregate` returns.
        published: What `recipes.latent_scores.published` returns.

    Returns:
        Six criteria. Of `recipes.latent_blocks.noise` the first four always pass, often all six.

    Example:
        >>> from recipes.latent_blocks import noise
        >>> from recipes.latent_scores import aggregate, published
        >>> mean = aggregate(noise())
        >>> sum(one.passed for one in criteria(mean, published(mean)))
        5
    """
    return list(_criteria(aggregated, published))


def _criteria(aggregated: xr.Dataset, published: xr.Dataset) -> Iterator[Criterion]:
    strong = float((aggregated["mean"].max("key") > 0.4).mean())
    yield Criterion(
        1, "share of rows whose largest mean attention is above .4", strong, 0.1, strong > 0.1,
        "Rows 0 and 1 pass in any head whose attention stays in the block: a third of six latents.",
    )  # fmt: skip
    spread = float(aggregated["std"].mean())
    yield Criterion(
        1, "mean std over problems below .2", spread, 0.2, spread < 0.2,
        "Cells above the diagonal are 0 in every problem: 15 of 36 with six latents.",
    )  # fmt: skip
    hub = float(published["hub"].max())
    yield Criterion(
        1, "largest hub score", hub, 0.2, hub > 0.2,
        "Uniform causal attention alone has .592 (six latents, all mass in the block).",
    )  # fmt: skip
    order = np.argsort(-published["composite"].values.ravel(), kind="stable")
    ranked = published["composite"].values.ravel()[order]
    ranked = ranked[~np.isnan(ranked)]
    ranked = ranked if len(ranked) else np.full(1, np.nan)
    best = float(ranked[0])
    yield Criterion(
        2, "composite of the top head", best, 0.6, best > 0.6,
        "Min-max over heads makes the best head of any set look good.",
    )  # fmt: skip
    last = float(ranked[-50:].mean())
    times = float(ranked[:10].mean()) / last if last else float("inf")
    yield Criterion(
        2, "top 10 heads' composite, in times of the last 50's", times, 2.0, times > 2.0,
        "Sorted noise has a top and a bottom too; of fewer than 60 heads the two overlap.",
    )  # fmt: skip
    types = published["functional_type"].values.ravel()[order][:10]
    several = len(set(types.astype(str)))
    yield Criterion(
        2, "functional types among the top 10", float(several), 1.0, several > 1,
        "Types are the largest of three min-max scores: noise has several.",
    )  # fmt: skip
