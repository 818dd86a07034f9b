"""What the tests of metrics share: all of them by name, and a store that they can measure."""

from collections.abc import Callable
from typing import Any

import numpy as np
import xarray as xr

from recipes import flow, heads

DIMS = ("problem", "layer", "head", "query", "key")
PLAIN: dict[str, Callable[..., Any]] = {
    "entropy": heads.entropy,
    "normalised": lambda p, **at: heads.entropy(p, normalised=True, **at),
    "effective_keys": heads.effective_keys,
    "max": heads.concentration,
    "hhi": lambda p, **at: heads.concentration(p, kind="hhi", **at),
    "distance": heads.distance,
    "relative": lambda p, **at: heads.distance(p, relative=True, **at),
    "sink": heads.sink,
    "previous": heads.previous_token,
    "previous_tl": lambda p, **at: heads.previous_token(p, convention="transformerlens", **at),
}
TOKEN: dict[str, Callable[..., Any]] = {
    "duplicate": heads.duplicate_token,
    "induction": heads.induction,
    "induction_tl": lambda p, *x, **at: heads.induction(p, *x, convention="transformerlens", **at),
}
FLOW: dict[str, Callable[..., Any]] = {
    score.__name__: score
    for score in (
        flow.flow,
        flow.hub,
        flow.hub_position,
        flow.skip,
        flow.sequential,
        flow.long_range,
        flow.lift,
        flow.hub_lift,
        flow.composite,
    )
}
HEADS = PLAIN | TOKEN
ALL = HEADS | FLOW


def causal(rng: np.random.Generator, *shape: int) -> Any:
    p = np.tril(rng.exponential(size=shape) ** 2)
    return p / p.sum(-1, keepdims=True)


def store(lengths: list[int], *, n: int, dtype: str = "float64", seed: int = 0) -> xr.DataArray:
    """As `probe.open(...).pattern`: ragged problems padded at the end; length 0 is a failed one."""
    rng = np.random.default_rng(seed)
    p = np.zeros((len(lengths), 2, 3, n, n), dtype)
    position = np.full((len(lengths), n), -1, np.int32)
    for problem, length in enumerate(lengths):
        p[problem, :, :, :length, :length] = causal(rng, 2, 3, length, length)
        position[problem, :length] = np.arange(length)
    coords = {
        "problem": np.array([f"p{i}" for i in range(len(lengths))], dtype=np.dtypes.StringDType()),
        "layer": [3, 5],
        "head": [0, 1, 2],
        "query_position": (("problem", "query"), position),
        "key_position": (("problem", "key"), position),
        "token_id": (("problem", "key"), rng.integers(0, 4, position.shape).astype(np.int32)),
        "length": ("problem", np.array(lengths, np.int32)),
        "status": ("problem", np.where(np.array(lengths) > 0, 1, 2).astype(np.uint8)),
    }
    return xr.DataArray(p, dims=DIMS, coords=coords, name="pattern")


def arguments(name: str, p: xr.DataArray) -> tuple[list[Any], dict[str, Any]]:
    """What a plain array needs to be told and a store says by itself."""
    if name in FLOW:
        return [], {}
    at = {which: p[which].values for which in ("query_position", "key_position")}
    return ([p["token_id"].values] if name in TOKEN else []), at
