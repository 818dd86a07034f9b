"""What the tests of comparisons share: stores in memory, with known numbers, and loops."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr

from probe.schema import DONE, FAILED
from recipes import latent

NAN = math.nan
DIMS = ("problem", "layer", "head")
LENGTHS = (6, 3, 7, 5, 6, 4, 7, 2)
FAST: dict[str, Any] = {"draws": 200}


def store(
    layers: int = 2,
    heads: int = 3,
    lengths: Sequence[int] = LENGTHS,
    *,
    seed: int = 0,
    ids: Sequence[str] | None = None,
    words: str = "w",
    **attrs: Any,
) -> xr.Dataset:
    """An ordinary store in memory: random causal attention of ragged problems."""
    rng = np.random.default_rng(seed)
    n, most = len(lengths), max(lengths)
    score = rng.normal(size=(n, layers, heads, most, most))
    at = np.arange(most)
    position = np.array([np.where(at < length, at, -1) for length in lengths], "int32")
    sees = (position[:, None] >= 0) & (position[:, None] <= position[:, :, None])
    weight = np.where(sees[:, None, None], np.exp(score), 0.0)
    weight /= np.maximum(weight.sum(-1, keepdims=True), 1e-9)
    text = np.array([[f" {words}{i}_{k}" for k in at] for i in range(n)], dtype=object)
    there = position >= 0
    coords: dict[str, Any] = {
        "problem": list(ids or [f"p{i}" for i in range(n)]),
        "layer": np.arange(layers),
        "head": np.arange(heads),
        "query_position": (("problem", "query"), position),
        "key_position": (("problem", "key"), position),
        "token": (("problem", "key"), np.where(there, text, "")),
        "token_id": (("problem", "key"), np.where(there, at, -1)),
        "segment": (("problem", "key"), np.where(there, "text", "").astype(object)),
        "status": ("problem", np.full(n, DONE, "uint8")),
        "error": ("problem", np.full(n, "", dtype=object)),
    }
    arrays = {
        "pattern": ((*DIMS, "query", "key"), weight.astype("float32")),
        "length": ("problem", np.array(lengths, "int32")),
    }
    return xr.Dataset(arrays, coords, {"model": f"random {layers}x{heads}", **attrs})


def of_values(values: Any, **more: Any) -> tuple[xr.Dataset, dict[str, Any]]:
    """A store, and a metric that gives it (problem, layer, head) values."""
    values = np.asarray(values, float)
    n, layers, count = values.shape
    ds = store(layers, count, [3] * n, **more)
    ds["pattern"][:] = values[..., None, None]  # as the metric finds them
    return ds, {"value": lambda p: p.astype("float64").isel(query=0, key=0, drop=True)}


def fail(ds: xr.Dataset, *which: int) -> xr.Dataset:
    """Some problems failed, and what they hold is no number of theirs."""
    ds = ds.copy(deep=True)
    ds["status"][list(which)] = FAILED
    ds["pattern"][list(which)] = 0.77
    return ds


def normal(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).normal(size=shape)


def reasoner(
    layers: int = 2, count: int = 3, *, problems: int = 30, n: int = 6, seed: int = 0
) -> xr.Dataset:
    found: xr.Dataset = latent.noise(
        problems=problems, layers=layers, heads=count, n_latents=n, seed=seed
    )
    return found


def table(tree: xr.DataTree, node: str) -> xr.Dataset:
    """The numbers of a node of a comparison."""
    found = tree[node]
    assert isinstance(found, xr.DataTree)
    return found.to_dataset()


def loop_means(values: Any) -> list[float]:
    """Of each problem, over the layers and heads that have a number."""
    out = []
    for problem in values:
        known = [float(x) for layer in problem for x in layer if not math.isnan(x)]
        out.append(sum(known) / len(known) if known else NAN)
    return out


def loop_flips(x: Sequence[float]) -> float:
    """p of a mean by all sign patterns."""
    signs = itertools.product([1, -1], repeat=len(x))
    sums = [abs(sum(s * v for s, v in zip(some, x, strict=True))) for some in signs]
    return sum(one >= sums[0] - 1e-9 for one in sums) / len(sums)
