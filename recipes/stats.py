"""Paired statistics over problems: how sure a mean difference is, and which cells have one.

`bootstrap` and `sign_flip` read a DataArray x of signed differences, one for each problem and each
cell of its other dims (layer, head, query …): as the loss with a head ablated minus the loss
without, in nats. Any dtype is read as float64. One rule for NaN: problems that are NaN in every
cell are failed ones and are left out, a cell uses the problems that it has, and a cell with fewer
than 2 is NaN in every answer. Attributes of x are not kept, coords that lie along other dims are.
"""

import math
import warnings
from collections.abc import Iterator
from typing import Any, Literal, get_args

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from scipy import stats

from probe.errors import InputError
from recipes._metric import PROBLEM

Method = Literal["percentile", "BCa", "basic"]
Array = NDArray[np.float64]

EXACT = 4096  # sign patterns up to which all are tried
TIE = 1e-12  # of a squared cosine: closer than this is equal, whatever the order of the sum was
NUMBERS = 2**22  # held at once in any one array of draws: 32 MB


def told(mean: Any, low: Any, high: Any, form: str = ".4f") -> str:
    """A number with its interval, in words.

    Example:
        >>> told(1.0, 0.25, 1.75, ".2f")
        '1.00 [0.25, 1.75]'
    """
    return f"{float(mean):{form}} [{float(low):{form}}, {float(high):{form}}]"


def bootstrap(
    x: xr.DataArray,
    *,
    dim: str = PROBLEM,
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
    method: Method = "percentile",
) -> xr.Dataset:
    """Mean over problems, and its bootstrap interval (Efron and Tibshirani 1993).

    Problems are drawn anew with replacement, each with all its cells, by `scipy.stats.bootstrap`.
    Cells that have the same problems get the same draws. Each interval is for its own cell alone.

    Args:
        x: (…, problem) signed differences, any unit. For NaN see the head of this module.
        dim: Name of the dim of problems.
        level: Share of intervals that would hold the true mean, between 0 and 1.
        draws: How often to resample.
        seed: The same seed gives the same answer.
        method: "percentile", "BCa" (bias-corrected and accelerated) or "basic".

    Returns:
        mean, low, high: (…) float64, in the unit of x. A constant cell has low = high = mean. NaN
        for fewer than 2 problems, and low and high where BCa is undefined for lack of draws.
        n: (…) integer, problems used. The attribute `level` is kept.

    Raises:
        InputError: Not a DataArray, no such dim, fewer than 2 problems, an infinite value, `level`
            not between 0 and 1, `draws` below 1, or no such method.

    Example:
        >>> import xarray as xr
        >>> x = xr.DataArray([[0.0, 3.0], [1.0, 3.0], [2.0, 3.0]], dims=("problem", "head"))
        >>> bootstrap(x).high.values
        array([2., 3.])
    """
    if not 0 < level < 1:
        raise InputError(f"level must lie between 0 and 1, got {level}. Give 0.95 for 95 %")
    if method not in get_args(Method):
        raise InputError(f"There is no method {method!r}. Choose one of {get_args(Method)}")
    x, n = _kept(x, dim, draws)
    mean = x.mean(dim).where(n >= 2)
    options = {"confidence_level": level, "n_resamples": draws, "method": method, "rng": seed}
    varies = x.max(dim) > x.min(dim)  # BCa divides by the spread
    low, high = (_cells(n, bound).where(varies, mean) for bound in _bounds(_table(x), options))
    found = {"mean": mean, "low": low, "high": high, "n": n}
    return xr.Dataset(found, attrs={"level": level})


def _bounds(table: Array, options: dict[str, Any]) -> Array:
    """(low and high, cell) of a (problem, cell) table, whose cells may have gaps."""
    bounds = np.full((2, table.shape[1]), math.nan)
    gaps = np.isnan(table)
    counts = np.sum(~gaps, axis=0)
    # Gaps last, so that all cells with as many problems can be resampled at once.
    packed = np.take_along_axis(table, np.argsort(gaps, axis=0, kind="stable"), axis=0)
    for count in np.unique(counts[counts >= 2]):
        cells = np.flatnonzero(counts == count)
        for some in np.array_split(cells, math.ceil(cells.size * options["n_resamples"] / NUMBERS)):
            bounds[:, some] = _bounds_without_gaps(packed[:count, some], options)
    return bounds


def _bounds_without_gaps(table: Array, options: dict[str, Any]) -> Any:
    """(low and high, cell) of a (problem, cell) table."""
    n = len(table)

    def means(drawn: NDArray[np.int64], axis: int) -> Array:
        """(cell, draw) for the (draw, problem) numbers of problems; (cell,) for a single draw."""
        rows = drawn.reshape(-1, drawn.shape[-1])
        apart = rows + n * np.arange(len(rows))[:, None]
        times = np.bincount(apart.ravel(), minlength=n * len(rows)).reshape(-1, n)
        return (table.T @ times.T / rows.shape[1]).reshape(-1, *drawn.shape[:-1])

    # scipy draws numbers of problems, and one product with how often each was drawn then gives
    # the means of all cells. Given the table itself, it would copy the table once per draw.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # constant cells, and a single draw
        batch = max(1, NUMBERS // n)
        drawn = stats.bootstrap((np.arange(n),), means, vectorized=True, batch=batch, **options)
    return drawn.confidence_interval


def sign_flip(
    x: xr.DataArray, *, dim: str = PROBLEM, draws: int = 10_000, seed: int = 0
) -> xr.Dataset:
    """Which cells have a mean other than zero: sign-flip permutation tests over problems.

    Under the null hypothesis a problem's differences are as likely with all signs turned. Each flip
    turns the signs of some problems, the same ones in all cells, which keeps the dependence between
    cells. All 2**n patterns are tried for n <= 12 problems, and beyond that `draws` random ones,
    with what was seen counted as one more (Phipson and Smyth 2010), so that p is never 0.

    Args:
        x: (…, problem) signed differences, any unit. For NaN see the head of this module.
        dim: Name of the dim of problems.
        draws: How many random flips, where not all patterns are tried.
        seed: The same seed gives the same answer, and the same flips whatever the cells are.

    Returns:
        All (…) float64 without unit but mean, and NaN for cells with fewer than 2 problems.
        mean: In the unit of x.
        t: mean / (std / sqrt(n)), std with n - 1. 0 for an all-zero cell, infinite for another
        constant one.
        p: Share of flips whose |t| in this cell is at least the one seen (two-sided).
        p_family: Share of flips whose largest |t| of all cells is at least the one seen in this
        cell. It controls the family-wise error (Westfall and Young 1993, single-step max T).
        p_bh: p adjusted over all cells for the false discovery rate (Benjamini and Hochberg 1995).

    Raises:
        InputError: Not a DataArray, no such dim, fewer than 2 problems, an infinite value, or
            `draws` below 1.

    Example:
        >>> import xarray as xr
        >>> x = xr.DataArray([[1, 0], [2, 0], [3, 0], [4, 0], [5, 0]], dims=("problem", "head"))
        >>> sign_flip(x).p.values  # 2 of 32 patterns have all signs alike
        array([0.0625, 1.    ])
    """
    x, n = _kept(x, dim, draws)
    mean = x.mean(dim).where(n >= 2)
    # From the least value on, so that constant cells have a spread of exactly 0.
    error = (x - x.min(dim)).std(dim, ddof=1) / np.sqrt(n)
    t = (mean / error).where(mean != 0, 0.0)

    enough = n.values.ravel() >= 2
    p, p_family, p_bh = np.full((3, enough.size), math.nan)
    p[enough], p_family[enough] = _shares(_table(x)[:, enough], draws, seed)
    p_bh[enough] = stats.false_discovery_control(p[enough]) if enough.any() else math.nan
    shares = {"p": p, "p_family": p_family, "p_bh": p_bh}
    return xr.Dataset(
        {"mean": mean, "t": t, **{name: _cells(n, share) for name, share in shares.items()}}
    )


def _shares(table: Array, draws: int, seed: int) -> tuple[Array, Array]:
    """(cell,) p and p_family of a (problem, cell) table with at least 2 numbers per cell."""
    known = ~np.isnan(table)
    x = np.where(known, table, 0.0)
    problems, dof = len(x) - 1, known.sum(axis=0) - 1
    squares = (dof + 1) * np.sum(x**2, axis=0)  # which no flip changes
    squares = np.where(squares > 0, squares, 1.0)

    def strength(signs: Array) -> Any:
        """(flip, cell): t² / (problems + t²), in the order of |t| but finite, from 0 to 1."""
        cosine2 = (signs @ x) ** 2 / squares
        return dof * cosine2 / (problems * (1.0 - cosine2) + dof * cosine2)

    seen = strength(np.ones((1, len(x))))[0] - TIE
    exact = 2 ** len(x) <= EXACT
    # scipy.stats.permutation_test flips all cells alike too, but it copies the table once per flip
    # and keeps every t. As no flip changes the squares, one product here does for many flips.
    total, alone, family = np.full((3, x.shape[1]), 0 if exact else 1)
    for signs in _signs(len(x), draws, seed, rows=max(1, NUMBERS // max(x.shape))):
        flipped = strength(signs)
        total += len(signs)
        alone += np.sum(flipped >= seen, axis=0)
        family += np.sum(flipped.max(axis=1, initial=0.0)[:, None] >= seen, axis=0)
    return alone / total, family / total


def _signs(n: int, draws: int, seed: int, *, rows: int) -> Iterator[Array]:
    """(flip, problem) blocks of 1 and -1, at most `rows` long: all patterns, or random ones."""
    exact = 2**n <= EXACT
    rng = np.random.default_rng(seed)
    total = 2**n if exact else draws
    for start in range(0, total, rows):
        flips = np.arange(start, min(start + rows, total))
        # One random number for each sign, so that the blocks do not change what is drawn.
        minus = (flips[:, None] >> np.arange(n)) & 1 if exact else rng.random((len(flips), n)) < 0.5
        yield np.where(minus, -1.0, 1.0)


def agreement(a: xr.DataArray, b: xr.DataArray) -> float:
    """Spearman rank correlation of two scores of the same heads.

    Args:
        a: (layer, head) scores, in either order of dims. NaN heads are left out of both.
        b: The same heads, by their labels; a dim without labels counts from 0.

    Returns:
        From -1 to 1, without unit, in float64; ties get their mean rank. NaN for fewer than 3
        heads that both score, or where one score is the same for all of them.

    Raises:
        InputError: Not DataArrays with dims layer and head, or heads that differ.

    Example:
        >>> import xarray as xr
        >>> a = xr.DataArray([[1.0, 2.0], [3.0, 4.0]], dims=("layer", "head"))
        >>> agreement(a, -(a**3))
        -1.0
    """
    for scores in (a, b):
        if not isinstance(scores, xr.DataArray) or set(scores.dims) != {"layer", "head"}:
            got = getattr(scores, "dims", type(scores).__name__)
            raise InputError(
                f"agreement takes DataArrays with dims layer and head, got {got}. "
                "Reduce or select the other dims first"
            )
    for dim in ("layer", "head"):
        ours, theirs = a.get_index(dim), b.get_index(dim)
        if not ours.equals(theirs):
            raise InputError(
                f"The two scores differ in {dim}: {ours.tolist()} and {theirs.tolist()}. "
                "Take what they share: a, b = xr.align(a, b, join='inner')"
            )
    left, right = (
        scores.transpose("layer", "head").values.astype(np.float64).ravel() for scores in (a, b)
    )
    both = ~(np.isnan(left) | np.isnan(right))
    left, right = left[both], right[both]
    if left.size < 3 or np.all(left == left[0]) or np.all(right == right[0]):
        return math.nan
    return float(stats.spearmanr(left, right).statistic)


def _kept(x: xr.DataArray, dim: str, draws: int) -> tuple[xr.DataArray, xr.DataArray]:
    """(…, dim) float64 x without its failed problems, and (…) how many of them each cell has."""
    if draws < 1:
        raise InputError(f"draws must be at least 1, got {draws}. Give some thousands")
    if not isinstance(x, xr.DataArray):
        raise InputError(
            f"x must be a DataArray, got {type(x).__name__}. "
            f"Name its dims: xr.DataArray(x, dims=({dim!r}, 'layer', 'head'))"
        )
    if dim not in x.dims:
        raise InputError(f"x has no dim {dim!r}, only {x.dims}. Name that of the problems as dim=")
    wide = x.astype(np.float64).drop_attrs(deep=False).transpose(..., dim).compute()
    kept = wide.dropna(dim, how="all")
    if kept.sizes[dim] < 2:
        raise InputError(
            f"x has {kept.sizes[dim]} problems that are not all NaN, of {x.sizes[dim]}, and the "
            "spread over problems needs 2. Give more problems"
        )
    if infinite := int(np.isinf(kept).sum()):
        raise InputError(
            f"x is infinite in {infinite} of {kept.size} places. Make these NaN to leave them out"
        )
    return kept, kept.count(dim)


def _table(x: xr.DataArray) -> Array:
    """(problem, cell) values of (…, problem)."""
    return np.asarray(x.values.reshape(-1, x.shape[-1]).T)


def _cells(like: xr.DataArray, values: Array) -> xr.DataArray:
    """(cell,) values under the dims and coords of `like`."""
    return like.copy(data=values.reshape(like.shape))
