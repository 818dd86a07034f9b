"""Models side by side, over the same problems: by relative depth, beyond chance, and paired.

    >>> from recipes import latent
    >>> small, large = latent.noise(layers=2, heads=3), latent.noise(layers=4, heads=2, seed=1)
    >>> tree = compare({"small": small, "large": large}, draws=200)
    >>> list(tree.children), tree["large"]["depth"].values.round(2).tolist()
    (['small', 'large', 'comparison'], [0.0, 0.33, 0.67, 1.0])
    >>> tree["comparison/paired"].pair.values.tolist()
    ['large - small']

Heads of two models are never matched by number: what is compared are means over the heads of a
model or of a range of relative depth, and counts of heads. Every number has its interval over
problems; what one model per arm cannot say is in the attribute `caution`.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import xarray as xr

from probe.errors import InputError
from recipes import stats
from recipes._comparing import FOUND, by_depth, means, of_models, paired
from recipes._comparing_problems import shared
from recipes._comparing_scores import Metrics, Options, scored
from recipes._files import plain
from recipes._metric import PROBLEM

CAUTION = (
    "There is one model per arm (n = 1): differences describe these checkpoints, not "
    "architectures, sizes or capacity. Intervals and p are over problems alone, and tokens are "
    "each model's own."
)
NODE = "comparison"

ESTIMATE = ("mean", "low", "high")
DIFFERENCE = ("a", "b", "metric", "difference", "low", "high", "n", "t", "p", "p_family", "p_bh")


def compare(
    stores: Mapping[str, xr.Dataset],
    *,
    metrics: Metrics = None,
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> xr.DataTree:
    """Compare what several models do with the same problems.

    Problems are matched by their ids, and only those that ran in all stores count; a warning says
    how many are left out. Where the stores are not of one list of problems, their questions must be
    the same, as far as stored tokens tell.

    Args:
        stores: Opened stores by a name of the model, two or more.
        metrics: Functions by name that take a pattern (problem, layer, head, query, key) and return
            (problem, layer, head), or names as "heads.entropy". Default, of stores of latents: the
            scores of `recipes.latent.scores`, the hub of each latent by itself, and `concentration`
            of the attention to earlier latents. Of others: `previous_token` and `sink` (less what
            even attention has, rescaled), `distance` (relative to even, less 1) and `concentration`
            (1 - normalised entropy). All are 0 under even attention and 1 at the most, but `self`,
            `question` and `sink` of latents, which are shares of attention.
        level: Of the intervals.
        draws: Of the bootstrap, and of the sign flips where there are too many for all.
        seed: Of both; the same seed gives the same answer.

    Returns:
        A tree. NaN where there is no number, and in estimates from fewer than 2 problems.

        - `NAME`, of each model: its scores, (problem, layer, head) float32; coords `depth` (layer),
          l / (L - 1), 0 for the only layer (of the model's layers if the store says how many there
          are, else up to the last stored one); `correct` (problem) where the store has it.
        - `NAME/heads`: `mean`, `low`, `high` (metric, layer, head). Of latents also the metrics hub
          and composite, `hub_position`, `p_hub`, `p_hub_family`, `found` and `type` of
          `recipes.latent.findings`, and `document_composite`, `document_hub_position` and
          `document_functional_type` of `recipes.latent.published`.
        - `comparison/models`, (model, metric): `mean`, `low`, `high` of the mean over heads of a
          problem, also of accuracy; `known`, the share of heads and problems with a number;
          `found`, how many heads have `low` above 0.3, and `share`, of all L x H. Not found are
          concentration, and shares of attention, which noise has too; found alone are hub and
          composite, which are of heads, not of problems. (model): `checkpoint`, `layers`, `heads`
          (L x H); of latents `found_any` and `critical` (heads with document 002's composite above
          0.7). (model, latent): `hubs`, how many heads have their hub there; `hubs_beyond_chance`,
          with `p_hub_family` of at most 1 - level, against the model's own null; `document_hubs`.
        - `comparison/depth`: `mean`, `low`, `high` (model, metric, depth) of the mean over the
          heads in equal ranges of relative depth, as many as the shallowest model has layers, 10 at
          most.
        - `comparison/paired`, (pair, metric): `difference` b - a of two models' means over heads,
          `low`, `high`, `n` (problems), and `t`, `p`, `p_family` (over all pairs and metrics) and
          `p_bh` of `recipes.stats.sign_flip`; also of accuracy. Coords `a`, `b` (pair).

        Attributes: `caution`, `models`, `problems`, `left_out`, `level`, `draws`, `seed`.

    Raises:
        InputError: Fewer than two stores, a name or metric that cannot be used, stores of other
            questions or rows, or fewer than two problems that ran in all.

    Example:
        >>> tree = compare({"a": ds, "b": ds}, metrics=["heads.entropy"])
        >>> paired = tree["comparison/paired"]
        >>> float(paired.difference[0, 0]), float(paired.p[0, 0])
        (0.0, 1.0)
    """
    _require_names(stores)
    parts, left_out = shared(stores)
    options: Options = {"level": level, "draws": draws, "seed": seed}
    found = scored(parts, metrics, options)
    each = means(found)
    nodes = {name: one.scores for name, one in found.items()}
    nodes |= {f"{name}/heads": one.heads for name, one in found.items()}
    nodes |= {
        f"{NODE}/models": of_models(parts, found, each, options),
        f"{NODE}/depth": by_depth(found, options),
        f"{NODE}/paired": paired(each, options),
    }
    tree = xr.DataTree.from_dict(nodes)
    problems = each.sizes[PROBLEM]
    tree.attrs = {"caution": CAUTION, "models": list(stores), "problems": problems}
    tree.attrs |= {"left_out": left_out, **options}
    return tree


def _require_names(stores: Mapping[str, xr.Dataset]) -> None:
    if not isinstance(stores, Mapping) or len(stores) < 2:
        got = len(stores) if isinstance(stores, Mapping) else type(stores).__name__
        raise InputError(
            f"compare takes two stores or more by name, got {got}. "
            "Give them as compare({'gpt2': ds, 'llama': other})"
        )
    for name in stores:
        if not isinstance(name, str) or not name or name in (".", "..", NODE) or "/" in name:
            raise InputError(
                f"{name!r} cannot name a model here. Give a text without '/', other than {NODE!r}."
            )


def summary(tree: xr.DataTree) -> str:
    """What `compare` found, in lines: means with intervals, heads found, differences, and caution.

    Args:
        tree: From `compare`.

    Returns:
        Text of several lines; "-" where there is no number.

    Example:
        >>> print(summary(compare({"a": ds, "b": ds}, metrics=["heads.entropy"])))
        2 problems compared, 0 left out; intervals of 95 % are over problems.
        a: demo-llama, 2 layers x 4 heads. b: demo-llama, 2 layers x 4 heads.
        heads.entropy: a ... [...], above 0.3 in ... of 8 heads; b ...
          b - a: 0.000 [0.000, 0.000], p = 1, 1 over the family
        There is one model per arm (n = 1): ...
    """
    return "\n".join(_lines(tree))


def _lines(tree: xr.DataTree) -> Iterator[str]:
    models, pairs = tree[f"{NODE}/models"].to_dataset(), tree[f"{NODE}/paired"].to_dataset()
    attrs, each = tree.attrs, [models.sel(model=name) for name in models["model"].values]
    yield (
        f"{attrs['problems']} problems compared, {attrs['left_out']} left out; intervals of "
        f"{attrs['level'] * 100:g} % are over problems."
    )
    yield " ".join(
        f"{one['model'].item()}: {one['checkpoint'].item()}, {one['layers'].item()} layers x "
        f"{one['heads'].item() // one['layers'].item()} heads."
        for one in each
    )
    for metric in models["metric"].values:
        yield f"{metric}: " + "; ".join(_of_model(one.sel(metric=metric)) for one in each)
        for pair in pairs["pair"].values if metric in pairs["metric"] else ():
            one = pairs.sel(pair=pair, metric=metric)
            if not math.isnan(one["difference"]):
                yield (
                    f"  {pair}: {_interval(one, 'difference')}, p = {one['p'].item():.2g}, "
                    f"{one['p_family'].item():.2g} over the family"
                )
    if "hubs" in models:
        yield "hubs: " + "; ".join(map(_hubs_of, each))
        yield "by document 002: " + "; ".join(
            f"{one['model'].item()} {one['critical'].item()} critical heads, hubs "
            f"{_counts(one['document_hubs'])}"
            for one in each
        )
    yield attrs["caution"]


def _of_model(one: xr.Dataset) -> str:
    parts = [] if math.isnan(one["mean"]) else [_interval(one, "mean")]
    if not math.isnan(one["found"]):
        parts += [f"above {FOUND} in {one['found'].item():.0f} of {one['heads'].item()} heads"]
    return f"{one['model'].item()} {', '.join(parts) or '-'}"


def _interval(one: xr.Dataset, name: str) -> str:
    return stats.told(one[name], one["low"], one["high"], ".3f")


def _hubs_of(one: xr.Dataset) -> str:
    beyond = int(one["hubs_beyond_chance"].sum())
    where = f" ({_counts(one['hubs_beyond_chance'])})" if beyond else ""
    return (
        f"{one['model'].item()} {_counts(one['hubs'])}, beyond chance in {beyond} of "
        f"{one['heads'].item()} heads{where}"
    )


def _counts(counts: xr.DataArray) -> str:
    pairs = zip(counts["latent"].values, counts.values, strict=True)
    return ", ".join(f"z{latent} {count}" for latent, count in pairs if count) or "none"


def as_json(tree: xr.DataTree) -> dict[str, Any]:
    """All that `compare` found of models and of pairs, as plain data for a JSON file.

    The scores of single heads and problems are in the tree alone. `hub_positions`, `critical_heads`
    and `attention_concentration` are document 002's points of comparison, each as it counts them
    and beyond chance.

    Args:
        tree: From `compare`.

    Returns:
        Dicts, lists, texts, numbers and None, which stands for NaN and infinity.

    Example:
        >>> data = as_json(compare({"a": ds, "b": ds}, metrics=["heads.entropy"]))
        >>> data["differences"][0]["difference"], data["problems"], data["hub_positions"]
        (0.0, {'compared': 2, 'left_out': 0}, None)
    """
    models, depth, pairs = (
        tree[f"{NODE}/{name}"].to_dataset() for name in ("models", "depth", "paired")
    )
    each = {str(name): models.sel(model=name) for name in models["model"].values}
    found: dict[str, Any] = {
        "problems": {"compared": tree.attrs["problems"], "left_out": tree.attrs["left_out"]},
        "models": {
            name: _values(one, "checkpoint", "layers", "heads") for name, one in each.items()
        },
        "hub_positions": None,
        "critical_heads": None,
        "attention_concentration": None,
        "scores": {
            name: _by_metric(one, *ESTIMATE, "known", "found", "share")
            for name, one in each.items()
        },
        "by_depth": {
            **_values(depth, "start", "end"),
            "scores": {name: _by_metric(depth.sel(model=name), *ESTIMATE) for name in each},
        },
        "differences": [
            _values(pairs.sel(pair=pair, metric=metric), *DIFFERENCE)
            for pair in pairs["pair"].values
            for metric in pairs["metric"].values
        ],
    }
    if "hubs" in models:
        found["hub_positions"] = {name: _positions(one) for name, one in each.items()}
        found["critical_heads"] = {name: _critical(one) for name, one in each.items()}
    if "concentration" in models["metric"]:
        found["attention_concentration"] = {
            name: _values(one.sel(metric="concentration"), *ESTIMATE) for name, one in each.items()
        }
    return found | {name: tree.attrs[name] for name in ("level", "draws", "seed", "caution")}


def _by_metric(one: xr.Dataset, *names: str) -> dict[str, dict[str, Any]]:
    return {str(metric): _values(one.sel(metric=metric), *names) for metric in one["metric"].values}


def _positions(one: xr.Dataset) -> dict[str, dict[str, int]]:
    names = {"document": "document_hubs", "all": "hubs", "beyond_chance": "hubs_beyond_chance"}
    latents = [f"z{latent}" for latent in one["latent"].values]
    return {
        said: dict(zip(latents, one[name].values.tolist(), strict=True))
        for said, name in names.items()
    }


def _critical(one: xr.Dataset) -> dict[str, Any]:
    critical, found, heads = (one[name].item() for name in ("critical", "found_any", "heads"))
    return {"document": critical, "found": found, "of": heads, "share_found": found / heads}


def _values(one: xr.Dataset, *names: str) -> dict[str, Any]:
    return {name: plain(one[name].values) for name in names}
