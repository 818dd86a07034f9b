"""How attention moves inside a square block: one segment of a text, or a chain of latents.

`p` is (…, query, key), n rows and the same n columns, causal; a torch tensor, a NumPy array, or a
DataArray with dims `query` and `key` in any order. Every function returns the leading dims in the
same kind. Rows need not sum to 1: a latent also attends to the question before the block.

- `flow`, `hub`, `hub_position`, `skip` and `composite` are the published scores of CODI's latents,
  as written. They depend on n and on how much attention stays in the block, and chance alone
  passes the published thresholds: compare with `nulls(n)`.
- `sequential`, `long_range`, `hub_lift` and `lift` are calibrated: see `recipes.calibrated`.
- A block without any attention is NaN (-1 as a position), not 0.0 as in the published code.
- Sums are float32 or wider: float16 and bfloat16 are cast first, float64 stays float64.
- Problems of different sizes in a DataArray are each measured over their own square, from the
  coords `query_position` and `key_position` (-1 pads the end; both must agree).
- A block that is not square, and blocks of several sizes under dask, are a ValueError.

    >>> import numpy as np
    >>> previous = np.eye(6)[[0, 0, 1, 2, 3, 4]]  # every row attends to the one before
    >>> round(float(flow(previous)), 4), round(nulls(6).flow, 4), float(sequential(previous))
    (0.8333, 0.5917, 1.0)
"""

import math
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np
import xarray as xr
from array_api_compat import array_namespace

from recipes._metric import Matrices, Metric, measure
from recipes.calibrated import hub_lift, hubs, lift, long_range, sequential

__all__ = [
    "Nulls",
    "composite",
    "flow",
    "hub",
    "hub_lift",
    "hub_position",
    "hubs",
    "lift",
    "long_range",
    "nulls",
    "sequential",
    "skip",
]

T = TypeVar("T")


def flow(p: T) -> T:
    """Share of the attention in the block that leaves the diagonal.

        flow = sum_{j<i} p_ij / sum_{j<=i} p_ij

    Causal attention has only one direction, so this is 1 minus the share of self-attention, not
    a direction. It is at most (n-1)/n when rows sum to 1, because row 0 sees only itself.

    Args:
        p: Attention probabilities, (…, query, key), square.

    Returns:
        (…), in [0, 1].

    Example:
        >>> import numpy as np
        >>> float(flow(np.eye(6)))
        0.0
    """
    return measure(Metric("flow", _flow, square=True), p)


def _flow(m: Matrices) -> Any:
    earlier = _total(m, m.xp.tril(m.p, k=-1))
    own = m.xp.sum(m.xp.linalg.diagonal(m.p), axis=-1)
    return m.ratio(earlier, earlier + own)


def _total(m: Matrices, values: Any) -> Any:
    return m.xp.sum(values, axis=(-2, -1))


def hub(p: T) -> T:
    """Variance of the column sums (ddof 0): how unevenly keys are attended to.

    Uniform causal attention is already uneven, and the value grows with the square of the
    attention that stays in the block; see `hub_lift`.

    Args:
        p: Attention probabilities, (…, query, key), square.

    Returns:
        (…), from 0 to n - 1 when rows sum to 1.

    Example:
        >>> import numpy as np
        >>> all_to_first = np.eye(6)[[0] * 6]
        >>> float(hub(all_to_first))
        5.0
    """
    return measure(Metric("hub", _hub, square=True), p)


def _hub(m: Matrices) -> Any:
    columns = m.xp.sum(m.p, axis=-2)
    apart = columns - m.xp.mean(columns, axis=-1, keepdims=True)
    return _if_any(m, m.xp.mean(apart * apart, axis=-1))


def _if_any(m: Matrices, value: Any, otherwise: float | int = math.nan) -> Any:
    """`value` where the block holds any attention; NaN in p counts as some, so that it shows."""
    return m.xp.where(m.xp.any(m.p != 0, axis=(-2, -1)), value, otherwise)


def hub_position(p: T) -> T:
    """Index in the block of the key with the largest column sum; the first of equals.

    Args:
        p: Attention probabilities, (…, query, key), square.

    Returns:
        (…), int64 from 0 to n - 1; -1 where the block holds no attention.

    Example:
        >>> import numpy as np
        >>> int(hub_position(np.eye(6)[[0, 1, 1, 1, 1, 1]]))
        1
    """
    return measure(Metric("hub_position", _hub_position, square=True, undefined=-1), p)


def _hub_position(m: Matrices) -> Any:
    return _if_any(m, m.xp.argmax(m.xp.sum(m.p, axis=-2), axis=-1), -1)


def skip(p: T) -> T:
    """Mean attention of the last row to each key of the first half: p[5, 0:3] for n = 6.

    A mean of n//2 shares of one row, so at most 1 / (n//2), and 1/n under uniform attention. A
    last row without attention is 0.0 when other rows have some: its attention went elsewhere.

    Args:
        p: Attention probabilities, (…, query, key), square.

    Returns:
        (…), in [0, 1 / (n//2)]; NaN for n = 1.

    Example:
        >>> import numpy as np
        >>> round(float(skip(np.eye(6)[[0] * 6])), 4)
        0.3333
    """
    return measure(Metric("skip", _skip, square=True), p)


def _skip(m: Matrices) -> Any:
    half = m.p.shape[-1] // 2
    if not half:
        return m.xp.full_like(m.p[..., -1, 0], math.nan)
    return _if_any(m, m.xp.mean(m.p[..., -1, :half], axis=-1))


def composite(p: T, weights: tuple[float, float, float] = (0.4, 0.4, 0.2)) -> T:
    """Published ranking score: .4 flow + .4 hub + .2 skip, the last two min-max over heads.

    Min-max makes the best head of any set look good, noise included: rank with it, compare
    nothing across models or stores. The published code averages problems first, in float32:
    `composite(p.astype("float32").mean("problem"))`. Where all heads are equal, min-max is 0.

    Args:
        p: Attention probabilities, (…, layer, head, query, key), square. The min and max are
            over the dims layer and head of a DataArray, over these two axes of an array.
        weights: Of flow, hub and skip.

    Returns:
        (…, layer, head), in [0, 1] when the weights sum to 1.

    Raises:
        ValueError: There is no layer and no head to compare (besides the module's errors).

    Example:
        >>> import numpy as np
        >>> heads = np.stack([np.eye(6), np.eye(6)[[0] * 6]])[None]
        >>> [round(float(score), 4) for score in composite(heads)[0]]
        [0.0, 0.9333]
    """
    parts: list[Any] = [flow(p), hub(p), skip(p)]
    if not isinstance(p, xr.DataArray):
        _require_heads(parts[0].ndim >= 2, tuple(np.shape(parts[0])))
        return _combined(*parts, weights=weights, axes=(-2, -1))  # type: ignore[no-any-return]
    heads = [dim for dim in ("layer", "head") if dim in p.dims]
    _require_heads(bool(heads), parts[0].dims)
    combined = xr.apply_ufunc(
        partial(_combined, weights=weights, axes=tuple(range(-len(heads), 0))),
        *parts,
        input_core_dims=[heads] * 3,
        output_core_dims=[heads],
        dask="parallelized",
        output_dtypes=[parts[0].dtype],
        dask_gufunc_kwargs={"allow_rechunk": True},  # layers in chunks: what is left is small
    )
    return combined.transpose(*parts[0].dims).rename("composite")  # type: ignore[no-any-return]


def _require_heads(enough: bool, lead: tuple[Any, ...]) -> None:
    if not enough:
        raise ValueError(
            "composite compares heads, so it needs p as (…, layer, head, query, key); "
            f"before query and key p has {lead}"
        )


def _combined(flow: Any, hub: Any, skip: Any, *, weights: Any, axes: tuple[int, ...]) -> Any:
    xp = array_namespace(flow)

    def min_max(x: Any) -> Any:
        known = ~xp.isnan(x)
        lowest = xp.min(xp.where(known, x, math.inf), axis=axes, keepdims=True)
        span = xp.max(xp.where(known, x, -math.inf), axis=axes, keepdims=True) - lowest
        return xp.where(known & (span <= 0), 0.0, (x - lowest) / xp.where(span > 0, span, 1.0))

    of_flow, of_hub, of_skip = weights
    return of_flow * flow + of_hub * min_max(hub) + of_skip * min_max(skip)


class Nulls(NamedTuple):
    """Published scores of uniform causal attention: what a head without structure gets."""

    flow: float
    hub: float
    skip: float


def nulls(n: int) -> Nulls:
    """The published scores of one n x n block where row i attends evenly to 0..i.

    Args:
        n: Rows of the block, at least 1.

    Returns:
        flow, hub and skip. When only a share m of each row's attention stays in the block, the
        null of flow is the same, that of skip is m times, and that of hub m^2 times as large.

    Raises:
        ValueError: n is less than 1.

    Example:
        >>> [round(null, 4) for null in nulls(6)]
        [0.5917, 0.5917, 0.1667]
    """
    if n < 1:
        raise ValueError(f"a block has at least 1 row, got n={n}")
    uniform = np.tril(np.ones((n, n))) / np.arange(1, n + 1)[:, None]
    return Nulls(*(float(score(uniform)) for score in (flow, hub, skip)))
