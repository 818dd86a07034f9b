"""Which heads stand out beyond chance: bootstrapped scores, ranks, and types."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from scipy import stats

from probe.errors import InputError
from recipes.latent_scores import HEADS, SHARES
from recipes.ranking import rank

WEIGHTS = {"sequential": 0.4, "hub": 0.4, "long_range": 0.2}  # of the composite
FOUND = 0.3  # a calibrated score counts where its whole interval lies above
SHARE = 0.5  # and a share of mass likewise
NEAR = 0.1  # two types so near each other are mixed; a score so near 0 is chance
NUMBERS = 2**22  # held at once in any one array of draws


class Estimate(NamedTuple):
    """A mean over problems, and the ends of its interval."""

    mean: float
    low: float
    high: float


def findings(
    scores: xr.Dataset, *, top: int = 10, draws: int = 2000, level: float = 0.95, seed: int = 0
) -> xr.Dataset:
    """Scores with bootstrap intervals over problems, ranks with theirs, and a type for each head.

    Problems are drawn anew with replacement, the same for all heads and scores; percentiles of the
    means (Efron and Tibshirani 1993). Means are float32 matrix products of at most some thousand
    terms, good to about 1e-6.

    Args:
        scores: What `recipes.latent_scores.scores` returns.
        top: Rank up to which a head counts as one of the best.
        draws: How often to draw.
        level: Of the intervals.
        seed: The same seed gives the same answer.

    Returns:
        (score, layer, head): `mean`, `low`, `high`; `rank` (1 is the highest; ties share the best),
        `rank_low`, `rank_high`, and `p_top`, the share of draws in which the rank is at most `top`.
        `score` is sequential, long_range, self, question, sink, hub_0, hub_1, ...; hub, the
        greatest of the hub_j; and composite = .4 sequential + .4 hub + .2 long_range. NaN where a
        head has no number.
        (layer, head): `hub_position` (-1 for none); `p_hub`, one-sided, of the strongest hub_j
        against permuted rows, Bonferroni-corrected for keys, and `p_hub_family` for all heads too;
        `found`, whether sequential, long_range or a hub_j has its interval above 0.3; `type`: see
        `kind`.

    Raises:
        InputError: Fewer than 2 problems, or options that are none.

    Example:
        >>> from recipes.latent_blocks import noise
        >>> from recipes.latent_scores import scores
        >>> bool(findings(scores(noise(layers=2, heads=2)), draws=200).found.any())
        False
    """
    n = scores.sizes["problem"]
    if n < 2:
        raise InputError(f"the spread over problems needs 2, and there are {n}. Give more.")
    if draws < 1 or top < 1 or not 0 < level < 1:
        raise InputError(
            f"draws={draws}, top={top} and level={level} must be above 0, level below 1."
        )
    heads = (scores.sizes["layer"], scores.sizes["head"])
    tables = _tables(scores)
    means = {name: _means(x, np.ones((1, n), "float32"))[0] for name, x in tables.items()}
    drawn: dict[str, Any] = {name: [] for name in tables}
    for times in _times(n, draws, seed):
        for name, x in tables.items():
            drawn[name].append(_means(x, times))
    drawn = _derived({name: np.concatenate(some) for name, some in drawn.items()})
    means = _derived(means)
    ends = ((1 - level) / 2, (1 + level) / 2)
    out: dict[str, list[Any]] = {
        name: [] for name in ("mean", "low", "high", "rank", "rank_low", "rank_high", "p_top")
    }
    for name, mean in means.items():
        known = ~np.isnan(mean)
        ranks = _ranks(drawn[name])
        for key, value in {
            "mean": mean,
            **dict(zip(("low", "high"), _quantiles(drawn[name], ends), strict=True)),
            "rank": _ranks(mean[None])[0],
            **dict(zip(("rank_low", "rank_high"), np.quantile(ranks, ends, axis=0), strict=True)),
            "p_top": (ranks <= top).mean(0),
        }.items():
            out[key].append(np.where(known, value, math.nan).reshape(heads))
    coords = {"score": list(means), **{dim: scores[dim].values for dim in HEADS}}
    data = {key: (("score", *HEADS), np.stack(values)) for key, values in out.items()}
    attrs = {**scores.attrs, "top": top, "draws": draws, "level": level, "seed": seed}
    return _with_types(xr.Dataset(data, coords, attrs), scores)


def best(findings: xr.Dataset, score: str = "composite", top: int = 10) -> list[tuple[int, int]]:
    """The (layer, head) that rank first by a score, best first; without those that have none.

    Args:
        findings: From `findings`.
        score: One of its scores.
        top: How many at most.

    Raises:
        InputError: There is no such score.
    """
    known = findings["score"].values.tolist()
    if score not in known:
        raise InputError(f"score={score!r}: there is none. Choose from {', '.join(known)}.")
    ranked = rank(findings["mean"].sel(score=score, drop=True), top=top)
    return [(row.layer, row.head) for row in ranked]


def _tables(scores: xr.Dataset) -> dict[str, NDArray[np.float32]]:
    """(problem, head of all layers) of each score."""
    n = scores.sizes["problem"]
    plain = ("sequential", "long_range", *SHARES)
    order = ("problem", *HEADS)
    tables = {name: scores[name].transpose(*order).values.reshape(n, -1) for name in plain}
    hub = scores["hub"].transpose("key", *order).values
    return tables | {f"hub_{j}": one.reshape(n, -1) for j, one in enumerate(hub)}


def _times(n: int, draws: int, seed: int) -> Any:
    """(some draws, problem): how often each problem was drawn."""
    rng = np.random.default_rng(seed)
    step = max(1, min(draws, NUMBERS // n))
    for start in range(0, draws, step):
        rows = min(step, draws - start)
        picked = rng.integers(0, n, (rows, n)) + n * np.arange(rows)[:, None]
        yield np.bincount(picked.ravel(), minlength=rows * n).reshape(rows, n).astype("float32")


def _means(x: NDArray[np.float32], times: NDArray[np.float32]) -> Any:
    """(draw, head): weighted means that leave NaN out."""
    gaps = np.isnan(x)
    if not gaps.any():
        return times @ x / times.sum(1, keepdims=True)
    count = times @ (~gaps).astype("float32")
    total = times @ np.where(gaps, np.float32(0), x)
    return np.where(count > 0, total / np.where(count > 0, count, 1), np.float32(math.nan))


def _derived(means: Mapping[str, Any]) -> dict[str, Any]:
    """The same with hub and composite, of means and not of single problems."""
    hubs = np.stack([x for name, x in means.items() if name.startswith("hub_")])
    known = ~np.isnan(hubs).all(0)
    best = np.where(known, np.where(np.isnan(hubs), -np.inf, hubs).max(0), np.float32(math.nan))
    composite = sum(
        weight * (best if name == "hub" else means[name]) for name, weight in WEIGHTS.items()
    )
    return {**means, "hub": best, "composite": composite}


def _ranks(x: Any) -> Any:
    """(draw, head): 1 for the highest; heads without a number come last."""
    return stats.rankdata(np.where(np.isnan(x), np.inf, -x), method="min", axis=1)


def _quantiles(x: Any, ends: tuple[float, float]) -> Any:
    return np.quantile(np.where(np.isnan(x), -np.inf, x), ends, axis=0, method="nearest")


def _p_hub(scores: xr.Dataset) -> Any:
    """(layer, head): the least p over keys, times their number.

    The distribution under permutation has its own mean, variance and skewness exactly, and between
    them the form of Pearson's type III, which the normal one would understate in the far tail.
    """
    order = (*HEADS, "key")
    z, skew = (scores[name].transpose(*order).values for name in ("hub_z", "hub_skew"))
    known = ~np.isnan(z)
    p = np.where(known, stats.pearson3.sf(np.where(known, z, 0), np.where(known, skew, 0)), 2.0)
    return np.where(known.any(-1), np.minimum(p.min(-1) * known.sum(-1), 1.0), math.nan)


def _with_types(table: xr.Dataset, scores: xr.Dataset) -> xr.Dataset:
    hubs = [str(s) for s in table["score"].values if str(s).startswith("hub_")]
    means = table["mean"].sel(score=hubs).values
    some = ~np.isnan(means).all(0)
    at = np.where(some, np.where(np.isnan(means), -np.inf, means).argmax(0), -1)
    p = _p_hub(scores)
    calibrated = ["sequential", "long_range", *hubs]
    found = (table["low"].sel(score=calibrated) > FOUND).any("score")
    kinds = np.full(at.shape, "", dtype=object)
    names = [str(score) for score in table["score"].values]
    every = np.stack([table[name].values for name in ("mean", "low", "high")])
    for layer, head in np.ndindex(*at.shape):
        own = {s: Estimate(*every[:, k, layer, head].tolist()) for k, s in enumerate(names)}
        kinds[layer, head] = kind(own)
    return table.assign(
        hub_position=(HEADS, at),
        p_hub=(HEADS, p),
        p_hub_family=(HEADS, np.minimum(p * p.size, 1.0)),
        found=found,
        type=(HEADS, kinds),
    )


def kind(scores: Mapping[str, Estimate]) -> str:
    """What a head is, by its calibrated scores.

    Args:
        scores: By name: sequential, long_range and hub_0, hub_1, ..., where 0 is chance and 1 is
            perfect; self, question and sink, shares of attention.

    Returns:
        previous, long_range or hub(k) where the interval lies above 0.3; self, question_reader or
        sink where it lies above 0.5; the strongest of these, or "mixed" where the two strongest are
        within 0.1. "uniform" where all intervals of sequential, long_range and hub_k lie within 0.1
        of 0, else "untyped".

    Example:
        >>> kind({"sequential": Estimate(0.8, 0.7, 0.9), "self": Estimate(0.2, 0.1, 0.3)})
        'previous'
    """
    names = {"sequential": "previous", "question": "question_reader"}
    strong = []
    chance = []
    for name, (mean, low, high) in scores.items():
        if name in ("hub", "composite"):
            continue
        if low > (SHARE if name in SHARES else FOUND):
            label = f"hub({name[4:]})" if name.startswith("hub_") else names.get(name, name)
            strong.append((mean, label))
        if name not in SHARES and not math.isnan(mean):
            chance.append(low > -NEAR and high < NEAR)
    return strongest(strong) or ("uniform" if chance and all(chance) else "untyped")


def strongest(strong: Sequence[tuple[float, str]]) -> str:
    """The type of the highest score of those that count; "mixed" with another near; "" for none."""
    order = sorted(strong, reverse=True)
    if len(order) > 1 and order[0][0] - order[1][0] < NEAR:
        return "mixed"
    return order[0][1] if order else ""
