"""What experiments found, in lines that say no more than was measured."""

from collections.abc import Sequence

import xarray as xr

from recipes import stats
from recipes.gradients import pruning_score
from recipes.ranking import rank

WORTH = 0.1  # nats: what less than that costs is not missed by anything
MISSED = 0.1  # of what an ablation costs: a gradient that says less has missed it


def missed(delta: xr.DataArray, gradient: xr.DataArray) -> list[str]:
    """The heads whose ablation costs far more than their gradient says, in words.

    Args:
        delta: (problem, layer, head), what ablating each costs, nats; of a `sweep`.
        gradient: (problem, layer, head), of `ablation.importance` over the same problems.

    Returns:
        A line for each head whose mean cost is above 0.1 nats with an interval above 0, and of
        which the mean |gradient| is less than a tenth; the costliest first.

    Example:
        >>> import numpy as np, xarray as xr
        >>> dims = ("problem", "layer", "head")
        >>> delta = xr.DataArray(np.full((4, 1, 2), [4.8, 0.2]), dims=dims)
        >>> print(*missed(delta, delta * [0.004, 0.9]))
        gradient importance misses L0H0: it says 0.019 nats, and ablating it costs 4.80 (rank 2 ...
    """
    cost, local = stats.bootstrap(delta), pruning_score(gradient, normalised=False)
    by_gradient = [row.label for row in rank(local, top=None)]
    lines = []
    for place, row in enumerate(rank(cost["mean"], top=None), start=1):
        at = {"layer": row.layer, "head": row.head}
        said = float(local.sel(at))
        sure = row.score > WORTH and float(cost["low"].sel(at)) > 0
        if sure and said < MISSED * row.score:
            lines.append(
                f"gradient importance misses {row.label}: it says {said:.2g} nats, and ablating it "
                f"costs {row.score:.2f} (rank {by_gradient.index(row.label) + 1} by gradient, "
                f"{place} by ablation). Gradients are local."
            )
    return lines


def together(names: Sequence[str], alone: Sequence[float], group: float) -> str | None:
    """Whether heads stand in for each other: what they cost together, and the sum of each alone.

    Args:
        names: The heads, as "L1H0".
        alone: Mean delta loss of each alone, nats.
        group: That of all together.

    Returns:
        A sentence where they cost more than twice the sum together, and more than 0.1 nats.

    Example:
        >>> together(["L1H0", "L1H1"], [0.05, 0.07], 3.0)
        'L1H0, L1H1 stand in for each other: together they cost 3.00 nats, each alone 0.12 in all.'
    """
    if len(names) < 2 or not (group > WORTH and group > 2 * sum(alone)):  # or NaN
        return None
    return (
        f"{', '.join(names)} stand in for each other: together they cost {group:.2f} nats, each "
        f"alone {sum(alone):.2f} in all."
    )


def estimate(x: xr.DataArray) -> xr.DataArray | xr.Dataset:
    """What a picture shows of differences over problems: intervals where there are two problems.

    Example:
        >>> estimate(xr.DataArray([[1.0, 2.0]], dims=("problem", "factor"))).values
        array([1., 2.])
    """
    known = x.dropna("problem", how="all")
    return stats.bootstrap(known) if known.sizes["problem"] > 1 else known.mean("problem")


def interval(x: xr.DataArray, form: str = ".4f") -> str:
    """A mean over problems with its 95 % bootstrap interval; the one number of a single problem.

    Example:
        >>> interval(xr.DataArray([0.0, 1.0, 2.0, 1.0], dims="problem"), ".2f")
        '1.00 [0.25, 1.75]'
    """
    known = x.dropna("problem")
    if known.sizes["problem"] < 2:
        return f"{float(known.mean()):{form}}" if known.size else "-"
    found = stats.bootstrap(known)
    return stats.told(found["mean"], found["low"], found["high"], form)
