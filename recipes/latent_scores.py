"""Scores of latent blocks: document 002's of the mean, and calibrated ones of each problem."""

import math
from typing import Any

import numpy as np
import xarray as xr

from probe.errors import InputError
from probe.schema import DONE
from recipes import calibrated, flow
from recipes.latent_blocks import Convention, blocks_and_masses, latents

HEADS = ("layer", "head")
CELLS = (*HEADS, "query", "key")
TYPES = ("Forward Flow", "Hub Aggregator", "Skip Connection")
MULTI = "Multi-Purpose"
SHARES = {"self": "self", "question": "question", "sink": "bos"}  # shares of mass, by their part


def aggregate(ds: xr.Dataset, convention: Convention = "document") -> xr.Dataset:
    """Mean and spread over the finished problems of a latent store.

    Args:
        ds: A latent store.
        convention: See `recipes.latent_blocks.block`.

    Returns:
        `mean`, `std` (layer, head, query, key) of the latents' block, ddof 0 as in document 002,
        and `mass` (layer, head, query, part), the mean of what each latent gives to each part. All
        float64, summed in float64. Attributes: n (problems), convention, model.

    Raises:
        InputError: It is no latent store, or has no finished problem.

    Example:
        >>> from recipes.latent_blocks import noise
        >>> aggregate(noise(problems=3, layers=1, heads=2)).attrs["n"]
        3
    """
    n = int((ds["status"].values == DONE).sum())
    if not n:
        raise InputError("the store has no finished problem. Wait, or resume its capture.")
    total: Any = 0.0
    squares: Any = 0.0
    mass: Any = 0.0
    for some, masses in blocks_and_masses(ds, convention):
        wide = some.astype("float64")
        total, squares = total + wide.sum(0), squares + (wide**2).sum(0)
        mass = mass + masses.sum(0, dtype="float64")
    mean = total / n
    size = latents(ds)
    coords: dict[str, Any] = {name: ds[name] for name in (*HEADS, "part")}
    coords |= {"query_position": ("query", np.arange(size))}
    coords |= {"key_position": ("key", np.arange(size))}
    data = {
        "mean": (CELLS, mean),
        "std": (CELLS, np.sqrt(np.maximum(squares / n - mean**2, 0.0))),
        "mass": ((*HEADS, "query", "part"), mass / n),
    }
    attrs = {"n": n, "convention": convention, "model": str(ds.attrs.get("model", ""))}
    return xr.Dataset(data, coords, attrs)


def published(aggregated: xr.Dataset) -> xr.Dataset:
    """Document 002's scores of each head, from the mean block, as its pipeline has them.

    Args:
        aggregated: What `aggregate` returns. Of the convention "published", min-max is taken of
            flow too, as the original script does: flow is 1 for every head there, its min-max 0,
            and the composite at most .6.

    Returns:
        (layer, head): `flow`, `hub`, `hub_position`, `skip`, `composite`: see `recipes.flow`; and
        `functional_type`: the largest of the three after min-max over heads, or Multi-Purpose where
        two are above .7. NaN, -1 and "" for a head without attention in the block.

    Example:
        >>> from recipes.latent_blocks import noise
        >>> found = published(aggregate(noise(problems=3, layers=1, heads=4), "published"))
        >>> float(found.flow.min()), round(float(found.composite.max()), 1)
        (1.0, 0.6)
    """
    p = aggregated["mean"]
    found = {"flow": flow.flow(p), "hub": flow.hub(p), "skip": flow.skip(p)}
    scaled = xr.concat([_min_max(x) for x in found.values()], "score")
    if aggregated.attrs["convention"] == "published":
        composite = 0.4 * scaled[0] + 0.4 * scaled[1] + 0.2 * scaled[2]
    else:
        composite = flow.composite(p)
    names = np.array(TYPES, dtype=object)[scaled.fillna(-1.0).argmax("score").values]
    several = (scaled > 0.7).sum("score").values >= 2
    names = np.where(found["flow"].isnull().values, "", np.where(several, MULTI, names))
    data = {**found, "hub_position": flow.hub_position(p), "composite": composite}
    out = xr.Dataset({name: x.drop_attrs() for name, x in data.items()}, attrs=aggregated.attrs)
    return out.assign(functional_type=(HEADS, names.astype(object)))


def _min_max(x: xr.DataArray) -> xr.DataArray:
    span = x.max() - x.min()
    return (x - x.min()) / span.where(span > 1e-10, math.inf)


def scores(ds: xr.Dataset) -> xr.Dataset:
    """Calibrated scores of each finished problem: 0 is chance and 1 is perfect.

    Args:
        ds: A latent store.

    Returns:
        (problem, layer, head) float32: `sequential` and `long_range`, see `recipes.calibrated`;
        `self`, `question` and `sink`, mean shares of the latents' attention that go to themselves,
        the question and the first token. (problem, layer, head, key): `hub`, see
        `recipes.calibrated.hubs`. (layer, head, key) float64: `hub_z`, how far the mean lift of
        each key lies above 1, in standard deviations of what permuting the entries of each row, in
        each problem on its own, would give, and `hub_skew`, the skewness of that. NaN where nothing
        can be said.

    Raises:
        InputError: It is no latent store, or has no finished problem.

    Example:
        >>> from recipes.latent_blocks import noise
        >>> bool(abs(scores(noise(layers=1, heads=1)).sequential.mean()) < 0.1)
        True
    """
    latents(ds)  # refuses what is no latent store
    pieces: dict[str, list[Any]] = {name: [] for name in ("sequential", "long_range", "hub")}
    pieces |= {name: [] for name in SHARES}
    moments: Any = 0.0
    names = [str(part) for part in ds["part"].values]
    for p, masses in blocks_and_masses(ds):
        pieces["sequential"].append(calibrated.sequential(p))
        pieces["long_range"].append(calibrated.long_range(p))
        pieces["hub"].append(calibrated.hubs(p))
        moments = moments + _permuted(p)
        for name, which in SHARES.items():
            pieces[name].append(masses[..., names.index(which)].mean(3))
    if not pieces["hub"]:
        raise InputError("the store has no finished problem. Wait, or resume its capture.")
    done = ds["status"].values == DONE
    coords: dict[str, Any] = {name: ds[name].values for name in HEADS}
    coords["problem"] = ds["problem"].values[done]
    dims: dict[str, tuple[str, ...]] = {"hub": ("problem", *HEADS, "key")}
    data = {
        name: (dims.get(name, ("problem", *HEADS)), np.concatenate(some).astype("float32"))
        for name, some in pieces.items()
    }
    with np.errstate(invalid="ignore", divide="ignore"):
        above, variance, third = moments
        z = np.where(variance > 0, above / np.sqrt(variance), math.nan)
        skew = np.where(variance > 0, third / variance**1.5, math.nan)
    keys = (*HEADS, "key")
    found = xr.Dataset({**data, "hub_z": (keys, z), "hub_skew": (keys, skew)}, coords)
    return found.assign_attrs(model=str(ds.attrs.get("model", "")), n=int(done.sum()))


def _permuted(p: Any) -> Any:
    """(3, layer, head, key), over problems: lift - 1, and its variance and third moment.

    The last two are those under permutation of the i entries of each row, which keeps their mean
    1/i and their central moments, therefore those of each entry; rows and problems are independent.
    """
    lower = np.tril(p.astype("float64"), -1)
    mass = lower.sum(-1, keepdims=True)
    rows = mass >= calibrated.UNDEFINED_BELOW
    n = p.shape[-1]
    index = np.arange(n, dtype="float64")
    size = np.maximum(index, 1.0)[:, None]
    below = index[:, None] > index
    apart = np.where(rows & below, size * lower / np.where(rows, mass, 1.0) - 1.0, 0.0)
    reads = np.broadcast_to(rows & below, p.shape)
    count = reads.sum(-2)
    known = count >= 2
    out = [apart.sum(-2)]
    for power in (2, 3):
        each = (apart**power).sum(-1, keepdims=True) / size
        out.append(np.where(reads, each, 0.0).sum(-2))
    safe = np.where(known, count, 1)
    return np.stack([np.where(known, x / safe ** (k + 1), 0.0).sum(0) for k, x in enumerate(out)])
