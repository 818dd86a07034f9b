"""Where latents look, which latents the answer reads, and which words each latent reads."""

from typing import Any

import numpy as np
import xarray as xr

from probe.errors import InputError
from probe.schema import DONE
from recipes.latent_blocks import latents

READERS = ("eot", "answer")
AT_ONCE = 64  # problems whose masses are held in memory
TABLE = ("problem", "latent", "rank", "token", "position", "attention")


def readout(ds: xr.Dataset) -> xr.DataArray:
    """Which latent the answer reads.

    Args:
        ds: A latent store with rows of what closes and of the answer, and all columns.

    Returns:
        (problem, layer, head, row, key) float32: attention to each latent of the mean row of "eot"
        and of "answer"; NaN where a problem has no such row or is not done.

    Raises:
        InputError: It is no latent store, or has no such rows.

    Example:
        >>> from recipes.latent_blocks import noise
        >>> readout(noise(problems=1))
        Traceback (most recent call last):
        ...
        probe.errors.InputError: the store has rows of latent, and none of eot or answer. ...
    """
    n = latents(ds)
    names = ds["query_segment"].transpose("problem", "query").values
    if not np.isin(names, READERS).any():
        has = ", ".join(dict.fromkeys(name for name in names.ravel() if name)) or "nothing"
        raise InputError(
            f"the store has rows of {has}, and none of eot or answer. Capture them, as "
            "queries='segment:latent,eot,answer'."
        )
    segments = ds["segment"].transpose("problem", "key").values
    sizes = (ds.sizes["problem"], ds.sizes["layer"], ds.sizes["head"], len(READERS), n)
    out = np.full(sizes, np.nan, "float32")
    for i in np.flatnonzero(ds["status"].values == DONE):
        columns = np.flatnonzero(segments[i] == "latent")
        if len(columns) != n:
            raise InputError(
                f"problem {str(ds['problem'].values[i])!r} has {len(columns)} columns of latents, "
                f"and {n} were read. Capture all of them, as keys=None."
            )
        p = ds["pattern"].isel(problem=i).transpose("layer", "head", "query", "key").values
        for k, reader in enumerate(READERS):
            rows = np.flatnonzero(names[i] == reader)
            if len(rows):
                out[i, :, :, k] = p[:, :, rows][..., columns].astype("float32").mean(2)
    coords: dict[str, Any] = {name: ds[name].values for name in ("problem", "layer", "head")}
    coords |= {"row": list(READERS), "key": np.arange(n)}
    return xr.DataArray(out, coords, ("problem", "layer", "head", "row", "key"), name="readout")


def masses(ds: xr.Dataset) -> xr.DataArray:
    """Where each latent, what closes and the answer look.

    Args:
        ds: A latent store.

    Returns:
        (problem, row, part) float32, mean over layers and heads: what rows z0, z1, ..., "eot" and
        "answer" (the mean of its tokens) give to each part of all that they see. NaN where a
        problem has no such row or is not done.

    Raises:
        InputError: It is no latent store.

    Example:
        >>> from recipes.latent_blocks import noise
        >>> masses(noise(problems=1)).row.values.tolist()
        ['z0', 'z1', 'z2', 'z3', 'z4', 'z5']
    """
    n = latents(ds)
    names = ds["query_segment"].transpose("problem", "query").values
    rows = [f"z{k}" for k in range(n)] + [name for name in READERS if (names == name).any()]
    out = np.full((ds.sizes["problem"], len(rows), ds.sizes["part"]), np.nan, "float32")
    for start in range(0, len(names), AT_ONCE):
        some = ds["mass"].isel(problem=slice(start, start + AT_ONCE))
        means = some.mean(("layer", "head")).transpose("problem", "query", "part").values
        for i, mass in enumerate(means, start):
            own = np.flatnonzero(names[i] == "latent")
            out[i, : len(own)] = mass[own]
            for k, name in enumerate(rows[n:], n):
                if (names[i] == name).any():
                    out[i, k] = mass[names[i] == name].mean(0)
    out[ds["status"].values != DONE] = np.nan
    coords = {"problem": ds["problem"].values, "row": rows, "part": ds["part"].values}
    return xr.DataArray(out, coords, ("problem", "row", "part"), name="masses")


def top_tokens(ds: xr.Dataset, k: int = 10) -> list[dict[str, object]]:
    """The tokens of the question that each latent attends to most, over all layers and heads.

    This mean is the procedure behind CODI's figure of what latents attend to.

    Args:
        ds: A latent store with all columns.
        k: Tokens for each latent.

    Returns:
        Rows problem, latent (from 0), rank (from 1), token, position, attention (mean over layers
        and heads, float64); of finished problems.

    Raises:
        InputError: It is no latent store, has no columns of the question, or k is below 1.
    """
    latents(ds)
    if k < 1:
        raise InputError(f"k={k} gives no tokens. Give at least 1.")
    names = ds["query_segment"].transpose("problem", "query").values
    segments = ds["segment"].transpose("problem", "key").values
    if not (segments == "question").any():
        raise InputError("the store has no columns of the question. Capture it with keys=None.")
    out: list[dict[str, object]] = []
    for i in np.flatnonzero(ds["status"].values == DONE):
        one = ds.isel(problem=i)
        p = one["pattern"].transpose("layer", "head", "query", "key").values
        mean = p.mean((0, 1), dtype="float64")
        columns = np.flatnonzero(segments[i] == "question")
        token, position = one["token"].values, one["key_position"].values
        for latent, row in enumerate(np.flatnonzero(names[i] == "latent")):
            best = columns[np.argsort(-mean[row, columns], kind="stable")[:k]]
            for rank, at in enumerate(best, 1):
                values = (str(one["problem"].item()), latent, rank, str(token[at]))
                numbers = (int(position[at]), float(mean[row, at]))
                out.append(dict(zip(TABLE, (*values, *numbers), strict=True)))
    return out
