"""Latent stores, in memory, whose heads do what one knows."""

import numpy as np
import xarray as xr

from probe.schema import PARTS
from recipes import latent

PREVIOUS, HUB, FAR = (0, 0), (0, 1), (1, 0)  # the heads that do something


def structured(
    problems: int = 24, layers: int = 2, heads: int = 4, n_latents: int = 6, seed: int = 0
) -> xr.Dataset:
    """Noise of which a third stays in the block, but for three heads.

    `PREVIOUS` reads the latent before, `HUB` the first latent, `FAR` those three before or more.
    """
    ds = latent.noise(problems, layers, heads, n_latents, seed)
    rng = np.random.default_rng(seed + 1)
    p = ds["pattern"].values.astype("float32")
    i, j = np.indices((n_latents, n_latents))
    wanted = {PREVIOUS: i - j == 1, HUB: (j == 0) & (i > 0), FAR: i - j >= 3}
    for (layer, head), cells in wanted.items():
        p[:, layer, head] = np.where(cells, 6.0, 1.0) * p[:, layer, head]
        p[:, layer, head] /= p[:, layer, head].sum(-1, keepdims=True)
    inside = rng.uniform(0.2, 0.5, (problems, layers, heads, n_latents, 1)).astype("float32")
    p *= inside
    mass = np.zeros(ds["mass"].shape, "float32")
    mass[..., PARTS.index("self")] = np.diagonal(p, axis1=-2, axis2=-1)
    mass[..., PARTS.index("latent")] = np.tril(p, -1).sum(-1)
    by_depth = np.linspace(0.2, 0.7, layers, dtype="float32")[:, None, None]
    for part, share in (("bos", by_depth), ("question", 0.9 - by_depth), ("bot", 0.1)):
        mass[..., PARTS.index(part)] = share * (1 - inside[..., 0])
    dims = ds["pattern"].dims
    ds = ds.assign(pattern=(dims, p.astype("float16")), mass=(ds["mass"].dims, mass))
    return ds.assign_attrs(model="structured")


def readout(problems: int = 3, layers: int = 2, n: int = 6) -> xr.DataArray:
    """What closes reads the last latent, the answer the latent of the layer's number."""
    x = np.full((problems, layers, 2, 2, n), 0.01, "float32")
    x[:, :, :, 0, n - 1] = 0.5
    for layer in range(layers):
        x[:, layer, :, 1, layer % n] = 0.3
    x[0] = np.nan  # a failed problem
    dims = ("problem", "layer", "head", "row", "key")
    coords = {"layer": np.arange(layers), "row": ["eot", "answer"], "key": np.arange(n)}
    return xr.DataArray(x, coords, dims)


def masses(problems: int = 3, n: int = 6) -> xr.DataArray:
    """(problem, row, part): half at the first token, the rest at the row itself."""
    rows = [*(f"z{k}" for k in range(n)), "eot", "answer"]
    x = np.zeros((problems, len(rows), len(PARTS)))
    x[..., PARTS.index("bos")] = x[..., PARTS.index("self")] = 0.5
    return xr.DataArray(x, {"row": rows, "part": list(PARTS)}, ("problem", "row", "part"))


def knocked(problems: int = 20, n: int = 6, seed: int = 0) -> xr.Dataset:
    """What hiding latent k costs: k / 10 nats, and as much as a tenth of that for the control."""
    rng = np.random.default_rng(seed)
    cost = np.append(np.arange(n) / 10, 1.0) + rng.normal(0, 0.05, (problems, n + 1))
    dims = ("problem", "hidden")
    right = (rng.random((problems, n + 1)) > np.append(np.arange(n) / 10, 0.9)).astype("float32")
    data = {
        "delta_loss": (dims, cost),
        "correct": (dims, right),
        "control_delta_loss": (dims, cost / 10),
        "control_correct": (dims, np.ones((problems, n + 1))),
        "base_correct": ("problem", np.ones(problems)),
    }
    coords = {"hidden": [*(f"z{k}" for k in range(n)), "all"]}
    return xr.Dataset(data, coords, {"model": "structured"})
