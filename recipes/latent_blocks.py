"""The latents' own block of attention, read from a latent store a few problems at a time."""

import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal, get_args

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from probe.errors import InputError
from probe.schema import DONE, PARTS

Convention = Literal["document", "published"]
Numbers = NDArray[np.float32]

LATENT = "latent"
BYTES = 2**26  # of what is read at once, about
_NEEDED = ("pattern", "mass", "query_segment", "segment", "status")


def block(ds: xr.Dataset, convention: Convention = "document") -> xr.DataArray:
    """How the latents look at each other: B_ij is the attention of latent i to latent j.

    Rows do not sum to 1: a latent also attends to what comes before the latents.

    Args:
        ds: A latent store, opened, or a part of it.
        convention: "document" for the rows and columns that document 002 means. "published" for
            what its script read: the step that opens counted as latent 0 and columns one ahead, so
            that M_kj = B_{k-1,j} for j < k. There row 0 and the last column are 0, what stands
            below the diagonal is self-attention, and flow is 1 for every head.

    Returns:
        (problem, layer, head, query, key) float32, n x n, all in memory; NaN where a problem is not
        done. `query_position` and `key_position` count latents from 0.

    Raises:
        InputError: It is no latent store, or its latents are not whole.

    Example:
        >>> block(noise(problems=2, layers=1, heads=3, n_latents=4)).shape
        (2, 1, 3, 4, 4)
    """
    n = latents(ds)
    done = ds["status"].values == DONE
    shape = (len(done), ds.sizes["layer"], ds.sizes["head"], n, n)
    out = np.full(shape, np.nan, "float32")
    if done.any():
        out[done] = np.concatenate(list(blocks(ds, convention)))
    coords: dict[str, Any] = {name: ds[name] for name in ("problem", "layer", "head")}
    coords |= {"query_position": ("query", np.arange(n)), "key_position": ("key", np.arange(n))}
    dims = ("problem", "layer", "head", "query", "key")
    return xr.DataArray(out, coords, dims, name="pattern")


def blocks(ds: xr.Dataset, convention: Convention = "document") -> Iterator[Numbers]:
    """The same for the finished problems alone, some at a time: (problem, layer, head, n, n).

    No more than a shard of the store, or about 64 MB, is in memory at once.

    Raises:
        InputError: As for `block`.
    """
    return (found for found, _, _ in _parts(ds, convention))


def blocks_and_masses(
    ds: xr.Dataset, convention: Convention = "document"
) -> Iterator[tuple[Numbers, Numbers]]:
    """The same blocks, and the mass of each latent's row: (problem, layer, head, latent, part).

    Raises:
        InputError: As for `block`.
    """
    for found, part, rows in _parts(ds, convention):
        yield found, _picked(part["mass"].values, rows, 3)


def _parts(
    ds: xr.Dataset, convention: Convention
) -> Iterator[tuple[Numbers, xr.Dataset, NDArray[np.int64]]]:
    """Blocks of finished problems, some at a time, the part of the store, and the latents' rows."""
    if convention not in get_args(Convention):
        raise InputError(
            f"convention={convention!r}. Choose from {', '.join(get_args(Convention))}."
        )
    n = latents(ds)
    rows = _places(ds, "query_segment", "query", n)
    columns = _places(ds, "segment", "key", n)
    order = [dim for dim in ("problem", "layer", "head", "query", "key") if dim in ds.dims]
    done = ds["status"].values == DONE
    for start, stop in _slices(ds):
        here = done[start:stop]
        if here.any():
            part = ds[["pattern", "mass"]].isel(problem=slice(start, stop))
            part = part if here.all() else part.isel(problem=np.flatnonzero(here))
            part, some = part.transpose(*order, "part"), np.arange(start, stop)[here]
            found = _picked(_picked(part["pattern"].values, rows[some], 3), columns[some], 4)
            found = found.astype("float32")
            yield shifted(found) if convention == "published" else found, part, rows[some]


def shifted(b: Numbers) -> Numbers:
    """The published reading of blocks (..., n, n): M_kj = B_{k-1,j} for j < k.

    Example:
        >>> shifted(np.array([[1.0, 0.0], [0.25, 0.75]], "float32"))
        array([[0., 0.],
               [1., 0.]], dtype=float32)
    """
    out = np.zeros_like(b)
    out[..., 1:, :] = np.tril(b)[..., :-1, :]
    return out


def latents(ds: xr.Dataset) -> int:
    """How many latents a store's problems have.

    Raises:
        InputError: It is no latent store.
    """
    missing = [name for name in _NEEDED if name not in ds.variables]
    told = ds.attrs.get("latent")
    if missing or not isinstance(told, Mapping) or "n_latents" not in told:
        lack = ", ".join(missing) or "the attribute `latent`"
        raise InputError(
            f"this is no store of a latent reasoner: it lacks {lack}. Make one with "
            "probe.latent.capture."
        )
    if "problem" not in ds.dims:
        raise InputError("this is one problem without its dim. Keep it: ds.sel(problem=[...]).")
    return int(told["n_latents"])


def _places(ds: xr.Dataset, name: str, dim: str, n: int) -> NDArray[np.int64]:
    """(problem, n): where the latents are along a dim; of finished problems only."""
    names = ds[name].transpose("problem", dim).values == LATENT
    out = np.zeros((len(names), n), np.int64)
    for i in np.flatnonzero(ds["status"].values == DONE):
        found = np.flatnonzero(names[i])
        if len(found) != n:
            raise InputError(
                f"problem {str(ds['problem'].values[i])!r} has {len(found)} latents among its "
                f"{'rows' if dim == 'query' else 'columns'}, and {n} were read. Capture all of "
                "them, as queries='segment:latent'."
            )
        out[i] = found
    return out


def _slices(ds: xr.Dataset) -> Iterator[tuple[int, int]]:
    """Neighbouring problems that are read together: whole shards where these are known."""
    each = sum(ds[name].nbytes for name in ("pattern", "mass")) // max(1, ds.sizes["problem"])
    step = max(1, BYTES // max(1, each))
    shards = ds["pattern"].encoding.get("shards") or ds["pattern"].encoding.get("chunks") or (1,)
    step = max(1, step // shards[0]) * shards[0] if step > shards[0] else shards[0]
    for start in range(0, ds.sizes["problem"], step):
        yield start, min(start + step, ds.sizes["problem"])


def _picked(values: Any, places: NDArray[np.int64], axis: int) -> Any:
    """Values at each problem's own places along an axis."""
    first, n = places[0], places.shape[1]
    if (places == first).all() and (np.diff(first) == 1).all():
        return np.moveaxis(np.moveaxis(values, axis, 0)[first[0] : first[0] + n], 0, axis)
    shape = [1] * values.ndim
    shape[0], shape[axis] = places.shape
    return np.take_along_axis(values, places.reshape(shape), axis)


def noise(
    problems: int = 100, layers: int = 16, heads: int = 32, n_latents: int = 6, seed: int = 0
) -> xr.Dataset:
    """A latent store of pure noise, in memory: scores are independent N(0, 1) numbers.

    No head, problem or latent differs from another but by chance, and all attention stays in the
    block. What is found here is found anywhere.

    Args:
        problems: How many.
        layers: Layers.
        heads: Heads in a layer.
        n_latents: Latents.
        seed: The same seed gives the same store.

    Returns:
        As `probe.latent.capture` gives it with rows and columns of latents alone; float16.

    Example:
        >>> noise(problems=2, layers=1, heads=1, n_latents=3).pattern.values[0, 0, 0, 0]
        array([1., 0., 0.], dtype=float16)
    """
    n, rng = n_latents, np.random.default_rng(seed)
    p = np.exp(rng.standard_normal((problems, layers, heads, n, n), dtype="float32"))
    p = np.tril(p)
    p /= p.sum(-1, keepdims=True)
    mass = np.zeros((*p.shape[:-1], len(PARTS)), "float32")
    mass[..., PARTS.index("self")] = np.diagonal(p, axis1=-2, axis2=-1)
    mass[..., PARTS.index("latent")] = np.tril(p, -1).sum(-1)
    ids = [f"noise_{i}" for i in range(problems)]
    names = np.full((problems, n), LATENT, dtype=object)
    at = np.tile(np.arange(n, dtype="int32"), (problems, 1))
    coords = {
        "problem": ids,
        "layer": np.arange(layers),
        "head": np.arange(heads),
        "part": list(PARTS),
        "query_position": (("problem", "query"), at),
        "key_position": (("problem", "key"), at),
        "segment": (("problem", "key"), names),
        "status": ("problem", np.full(problems, DONE, "uint8")),
        "error": ("problem", np.full(problems, "", dtype=object)),
    }
    data = {
        "pattern": (("problem", "layer", "head", "query", "key"), p.astype("float16")),
        "mass": (("problem", "layer", "head", "query", "part"), mass),
        "query_segment": (("problem", "query"), names),
        "correct": ("problem", np.full(problems, math.nan, "float32")),
    }
    attrs = {"model": "noise", "causal": True, "latent": {"kind": "noise", "n_latents": n}}
    return xr.Dataset(data, coords, attrs)
