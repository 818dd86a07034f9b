"""The scores of a store's heads, problem by problem, and what they are over problems."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypedDict

import numpy as np
import xarray as xr

from probe.errors import InputError
from recipes import _importing, heads, latent, stats
from recipes._metric import PROBLEM
from recipes.calibrated import UNDEFINED_BELOW

Metrics = Mapping[str, Callable[[xr.DataArray], xr.DataArray]] | Sequence[str] | None

HEADS = ("layer", "head")
NAMES = ("sequential", "long_range", "self", "question", "sink")  # of `recipes.latent.scores`
NOT_BY_CHANCE = ("self", "question", "sink", "concentration")  # which of these noise has too
AT_ONCE = 2**24  # numbers of blocks of latents in memory
TAKEN = (PROBLEM, *HEADS, "depth", "correct", "accuracy")


class Options(TypedDict):
    """Of the bootstrap over problems."""

    level: float
    draws: int
    seed: int


class Scored(NamedTuple):
    """The scores of one store.

    Attributes:
        scores: (problem, layer, head) float32 by metric; coord `correct` (problem) where known.
        heads: mean, low, high (metric, layer, head) over problems; more of a store of latents.
        counted: The metrics that are 0 by chance, or the user's own: heads that have them count.
    """

    scores: xr.Dataset
    heads: xr.Dataset
    counted: Sequence[str]


def scored(
    stores: Mapping[str, xr.Dataset], metrics: Metrics, options: Options
) -> dict[str, Scored]:
    """The scores of each store: see `recipes.compare.compare`.

    Raises:
        InputError: A metric cannot be used, or the stores do not hold the same rows.
    """
    latents = {name: "query_segment" in ds for name, ds in stores.items()}
    if metrics is None and all(latents.values()):
        return {name: _of_latents(ds, options) for name, ds in stores.items()}
    if metrics is None and any(latents.values()):
        kinds = ", ".join(
            f"{name} {'does' if has else 'does not'}" for name, has in latents.items()
        )
        raise InputError(
            f"not all stores hold latents ({kinds}), so that no scores are theirs by default. "
            "Name some, as metrics=['heads.entropy']"
        )
    _require_same_rows(stores)
    functions = _functions(metrics)
    return {name: _by_metrics(name, ds, functions, options) for name, ds in stores.items()}


def _require_same_rows(stores: Mapping[str, xr.Dataset]) -> None:
    for which in ("queries", "keys"):
        chosen = {n: ds.attrs.get("selection", {}).get(which) for n, ds in stores.items()}
        if any(one != next(iter(chosen.values())) for one in chosen.values()):
            said = ", ".join(f"{name} {one!r}" for name, one in chosen.items())
            raise InputError(
                f"the stores hold different {which}: {said}. Capture the same of each model."
            )


def _functions(metrics: Metrics) -> Mapping[str, Callable[[xr.DataArray], xr.DataArray]]:
    if metrics is None:
        return DEFAULT
    if not isinstance(metrics, Mapping):
        names = [metrics] if isinstance(metrics, str) else metrics
        metrics = {name: _named(name) for name in names}
    if taken := [name for name in metrics if name in TAKEN]:
        raise InputError(f"{taken[0]!r} cannot name a metric. Choose another name.")
    if not metrics:
        raise InputError("metrics is empty. Name some, as heads.entropy, or leave it out.")
    return metrics


def _named(name: str) -> Callable[[xr.DataArray], xr.DataArray]:
    """heads.entropy, flow.hub, or any importable package.module.function."""
    if (found := _importing.metric(str(name))) is not None:
        return found
    raise InputError(
        f"there is no metric {name!r}. Name one as heads.entropy, or give a mapping from names to "
        "functions of a pattern."
    )


def _by_metrics(
    name: str, ds: xr.Dataset, functions: Mapping[str, Any], options: Options
) -> Scored:
    found = {}
    for metric, function in functions.items():
        scores = function(ds["pattern"])
        if set(getattr(scores, "dims", ())) != {PROBLEM, *HEADS}:
            got = getattr(scores, "dims", type(scores).__name__)
            raise InputError(
                f"{metric} of {name} is {got}. A metric takes a pattern and returns a DataArray "
                "with dims problem, layer and head."
            )
        found[metric] = scores.transpose(PROBLEM, *HEADS)
    table = _table(ds, found)
    estimate = over_problems(stats.bootstrap, table.to_dataarray("metric"), **options)
    return Scored(table, estimate, [name for name in found if functions[name] is not concentration])


def _table(ds: xr.Dataset, found: Mapping[str, xr.DataArray]) -> xr.Dataset:
    """Scores under the labels of problems, layers and heads alone."""
    dims = (PROBLEM, *HEADS)
    coords: dict[str, Any] = {dim: ds.get_index(dim) for dim in dims}
    coords["depth"] = ("layer", depth(ds))
    if "correct" in ds and ds["correct"].notnull().any():
        coords["correct"] = (PROBLEM, ds["correct"].values)
    scores = {name: (dims, np.asarray(one.values, "float32")) for name, one in found.items()}
    return xr.Dataset(scores, coords)


def depth(ds: xr.Dataset) -> Any:
    """(layer,): where in its model each layer is, from 0 for the first to 1 for the last."""
    layers = ds.get_index("layer").to_numpy()
    last = ds.attrs.get("n_layers", layers.max() + 1) - 1
    return layers / max(last, 1)


def over_problems(estimate: Any, x: xr.DataArray, **options: Any) -> xr.Dataset:
    """An estimate of `recipes.stats`; NaN in all cells where fewer than 2 problems have a number.

    Args:
        estimate: `stats.bootstrap` or `stats.sign_flip`.
        x: (…, problem).
        options: Of the estimate.
    """
    enough = x.notnull().any([dim for dim in x.dims if dim != PROBLEM]).sum() >= 2
    found: xr.Dataset = estimate(x if enough else xr.zeros_like(x), **options)
    return found if enough else found.where(False)


def _of_latents(ds: xr.Dataset, options: Options) -> Scored:
    raw = latent.scores(ds)
    found = latent.findings(raw, **options)
    published = latent.published(latent.aggregate(ds))
    scores = {name: raw[name] for name in NAMES}
    for j, hub in enumerate(raw["hub"].transpose("key", ...)):
        if hub.notnull().any():  # the last two have no two readers
            scores[f"hub_{j}"] = hub
    scores["concentration"] = _concentration_of_latents(ds)
    table = _table(ds, {name: one.transpose(PROBLEM, *HEADS) for name, one in scores.items()})
    names = [name for name in found["score"].values if name in (*scores, "hub", "composite")]
    estimates = found[["mean", "low", "high"]].sel(score=names).rename(score="metric")
    more = over_problems(
        stats.bootstrap, table[["concentration"]].to_dataarray("metric"), **options
    )
    by_head = xr.concat(
        [one[["mean", "low", "high"]].reset_coords(drop=True) for one in (estimates, more)],
        "metric",
    )
    by_head["latent"] = np.arange(raw.sizes["key"])
    for name in ("hub_position", "p_hub", "p_hub_family", "found", "type"):
        by_head[name] = found[name]
    for name in ("composite", "hub_position", "functional_type"):
        by_head[f"document_{name}"] = published[name]
    chance = [name for name in by_head["metric"].values if name not in NOT_BY_CHANCE]
    return Scored(table, by_head, chance)


def _concentration_of_latents(ds: xr.Dataset) -> xr.DataArray:
    """Concentration of attention on earlier latents, a part of the store at a time."""
    each = latent.block(ds.isel({PROBLEM: [0]})).size
    step = max(1, AT_ONCE // each)
    parts = [
        _concentration_of_blocks(latent.block(ds.isel({PROBLEM: slice(start, start + step)})))
        for start in range(0, ds.sizes[PROBLEM], step)
    ]
    return xr.concat(parts, PROBLEM)


def _concentration_of_blocks(block: xr.DataArray) -> xr.DataArray:
    at = np.arange(block.sizes["key"])
    before = xr.DataArray(at[:, None] > at, dims=("query", "key"))
    earlier = block.where(before, 0.0)
    mass = earlier.sum("key", skipna=False)
    shares = earlier / mass.where(~(mass < UNDEFINED_BELOW), np.inf)
    # As if each row stood at the latent before its own, which is then the last that it may see.
    return concentration(shares, query_position=at - 1, key_position=at)


def concentration(p: xr.DataArray, **positions: Any) -> xr.DataArray:
    """1 - normalised entropy of the rows: 0 is even, 1 all on one token."""
    return 1.0 - heads.entropy(p, normalised=True, **positions)


def _beyond_even(metric: Any) -> Callable[[xr.DataArray], xr.DataArray]:
    """A metric that is 1 at best, less what even attention over the same keys has, rescaled."""

    def rescaled(p: xr.DataArray) -> xr.DataArray:
        # Problems whose rows and columns are at the same positions have the same chance.
        queries, keys = (p[name].values for name in ("query_position", "key_position"))
        kinds, which = np.unique(np.hstack([queries, keys]), axis=0, return_inverse=True)
        n = queries.shape[1]
        each = [float(metric(**_even(one[:n], one[n:]))) for one in kinds]
        chance = xr.DataArray(np.array(each, "float32")[which.ravel()], dims=PROBLEM)
        found: xr.DataArray = (metric(p) - chance) / (1.0 - chance).where(chance < 1.0)
        return found

    return rescaled


def _even(query: Any, key: Any) -> dict[str, Any]:
    sees = (key >= 0) & (key <= query[:, None])
    p = sees / np.maximum(sees.sum(axis=1, keepdims=True), 1)
    return {"p": p, "query_position": query, "key_position": key}


DEFAULT: Mapping[str, Callable[[xr.DataArray], xr.DataArray]] = {
    "previous_token": _beyond_even(heads.previous_token),
    "sink": _beyond_even(heads.sink),
    "distance": lambda p: heads.distance(p, relative=True) - 1.0,
    "concentration": concentration,
}
