"""What each head of a store is, by its scores and their intervals over problems."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import xarray as xr

from probe.errors import InputError
from recipes import stats
from recipes.latent_findings import FOUND, strongest

EVEN = 0.95  # of the entropy that even rows have: uniform


def classify(
    ds: xr.Dataset, *, draws: int = 2000, level: float = 0.95, seed: int = 0
) -> xr.Dataset:
    """What each head of a store is, with the scores that say so.

    Args:
        ds: An opened store with patterns; of a latent reasoner, `recipes.latent.findings` answers.
        draws: Of the bootstrap over problems.
        level: Of the intervals.
        seed: The same seed gives the same answer.

    Returns:
        (score, layer, head) `mean`, `low`, `high` of the shares of attention that go to the first
        token (`sink`), the token before (`previous`), earlier copies of the token (`duplicate`) and
        what followed them (`induction`), and of normalised entropy (`uniform`); NaN where no
        problem has such tokens. (layer, head) `type`: the strongest whose interval lies above 0.3
        (above 0.95 for uniform); "mixed" where the next one is within 0.1; else "untyped".

    Raises:
        InputError: There is no pattern, or fewer than 2 finished problems.

    Example:
        >>> with probe.load("demo-llama") as model:
        ...     ds = probe.capture(model, "demo:repeated", "copies.zarr", progress=False)
        >>> classify(ds, draws=200).type.sel(layer=1).values.tolist()
        ['induction', 'induction', 'induction', 'induction']
    """
    if "mass" in ds and "query_segment" in ds:
        from recipes import latent

        return latent.findings(latent.scores(ds), draws=draws, level=level, seed=seed)
    if "pattern" not in ds:
        raise InputError(
            f"the store has no pattern (it has: {', '.join(map(str, ds.data_vars))}). Capture it "
            "with sites=('pattern',)."
        )
    found = {}
    for name, metric in _metrics().items():
        scores = metric(ds["pattern"])
        found[name] = stats.bootstrap(scores, draws=draws, level=level, seed=seed).drop_vars("n")
    out = xr.concat(list(found.values()), "score").assign_coords(score=list(found))
    types = xr.apply_ufunc(
        partial(_type, list(found)),
        out["mean"],
        out["low"],
        input_core_dims=[["score"], ["score"]],
        vectorize=True,
        output_dtypes=[object],
    )
    return out.assign(type=types)


def _metrics() -> Mapping[str, Callable[[xr.DataArray], Any]]:
    from recipes import heads  # which shows `classify` as its own

    return {
        "sink": heads.sink,
        "previous": heads.previous_token,
        "duplicate": heads.duplicate_token,
        "induction": heads.induction,
        "uniform": partial(heads.entropy, normalised=True),
    }


def _type(names: list[str], mean: Any, low: Any) -> str:
    counts = low > np.where(np.array(names) == "uniform", EVEN, FOUND)
    strong = [(float(mean[n]), names[n]) for n in np.flatnonzero(counts)]
    return strongest(strong) or "untyped"
