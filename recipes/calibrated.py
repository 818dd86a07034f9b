"""Flow inside a square block, calibrated: 0 is chance and 1 is perfect, whatever the block's mass.

These read the conditional block C_ij = p_ij / sum_{k<i} p_ik, j < i, whose rows sum to 1 whatever
else a row attends to. A row with less than 0.01 there says nothing: it is left out, and with no
row left the answer is NaN. `sequential`, `long_range` and `hub_lift` are 0 under uniform attention
and 1 at the most; below 0 is less than chance. Inputs, dtypes and ragged problems: see
`recipes.flow`, where these are also found.
"""

import math
from typing import Any, NamedTuple, TypeVar

from array_api_compat import device

from recipes._metric import Matrices, Metric, measure

T = TypeVar("T")

# Attention on earlier rows of the block, below which shares of it mean nothing.
UNDEFINED_BELOW = 0.01
FAR = 3  # the lag from which `long_range` counts


def sequential(p: T) -> T:
    """Attention to the row just before, beyond chance.

        (seen - null) / (1 - null), seen = mean_{i>=2} C_{i,i-1}, null = mean_{i>=2} 1/i

    over the same rows i; row 1 is left out because it has no choice.

    Args:
        p: Attention probabilities, (…, query, key), square.

    Returns:
        (…), at most 1; 0 is uniform, 1 all on the row before. NaN for n < 3.

    Example:
        >>> import numpy as np
        >>> float(sequential(np.eye(6)[[0, 0, 1, 2, 3, 4]]))
        1.0
    """
    return measure(Metric("sequential", _sequential, square=True), p)


def _sequential(m: Matrices) -> Any:
    block = _conditional(m)
    rows = block.rows & (block.index >= 2)
    previous = m.sum(block.shares, block.index[:, None] - block.index == 1)
    chance = m.mean(1.0 / m.xp.where(block.index < 1, 1.0, block.index), rows)
    return m.ratio(m.mean(previous, rows) - chance, 1.0 - chance)


def long_range(p: T) -> T:
    """Share of the last row's attention to rows at least 3 before it, beyond chance.

        (seen - null) / (1 - null), seen = sum_{j <= n-4} C_{n-1,j}, null = (n-3) / (n-1)

    For n = 6 this is the published skip, made conditional: null 3/5.

    Args:
        p: Attention probabilities, (…, query, key), square.

    Returns:
        (…), from -(n-3)/2 to 1; 0 is uniform. NaN for n < 4, where no row is 3 before another.

    Example:
        >>> import numpy as np
        >>> float(long_range(np.eye(6)[[0] * 6]))
        1.0
    """
    return measure(Metric("long_range", _long_range, square=True), p)


def _long_range(m: Matrices) -> Any:
    block = _conditional(m)
    n = m.p.shape[-1]
    if n <= FAR:
        return m.xp.full_like(m.p[..., -1, 0], math.nan)
    seen = m.xp.sum(block.shares[..., -1, : n - FAR], axis=-1)
    chance = (n - FAR) / (n - 1)
    return m.xp.where(block.rows[..., -1], (seen - chance) / (1.0 - chance), math.nan)


def lift(p: T) -> T:
    """How much more than evenly each key of the block is attended to by the rows after it.

        lift_j = mean_{i>j} i C_ij

    Args:
        p: Attention probabilities, (…, query, key), square.

    Returns:
        (…, key), from 0; 1 is uniform, and all attention on key j gives the mean of its i. NaN for
        a key with fewer than 2 readers, which are the rows after it that are not left out.

    Example:
        >>> import numpy as np
        >>> lift(np.eye(4)[[0, 0, 0, 0]])
        array([ 2.,  0., nan, nan])
    """
    return measure(Metric("lift", lambda m: _lift(m)[0], square=True, out=("key",)), p)


def _lift(m: Matrices) -> tuple[Any, Any]:
    """(…, key): lift, and its greatest possible value; NaN where a key has under 2 readers."""
    block = _conditional(m)
    reads = m.xp.matrix_transpose(block.rows[..., None] & (block.index[:, None] > block.index))
    even = m.xp.matrix_transpose(
        block.shares * block.index[:, None]
    )  # (…, key, query), 1 if uniform
    several = m.count(reads) >= 2
    return tuple(
        m.xp.where(several, m.mean(values, reads), math.nan) for values in (even, block.index)
    )


def hubs(p: T) -> T:
    """How much of a hub each key of the block is, beyond chance.

        (lift_j - 1) / (mean_{i>j} i - 1), over the readers i of j

    Args:
        p: Attention probabilities, (…, query, key), square.

    Returns:
        (…, key), at most 1; 0 is uniform, also on average over noise, and 1 is all attention of
        the rows after j, among the earlier ones, on j. NaN where `lift` is.

    Example:
        >>> import numpy as np
        >>> hubs(np.eye(4)[[0, 0, 0, 0]])
        array([ 1.        , -0.66666667,         nan,         nan])
    """
    return measure(Metric("hubs", _hubs, square=True, out=("key",)), p)


def _hubs(m: Matrices) -> Any:
    lifts, most = _lift(m)
    return m.ratio(lifts - 1.0, most - 1.0)


def hub_lift(p: T) -> T:
    """Strength of the strongest hub, beyond chance.

        (lift_j - 1) / (mean_{i>j} i - 1), at the j of the largest lift, over its readers i

    Args:
        p: Attention probabilities, (…, query, key), square.

    Returns:
        (…), at most 1; 0 is uniform, 1 when all rows after j attend only to j among the earlier
        ones. As a maximum over keys it lies above 0 on noise. NaN where all lifts are.

    Example:
        >>> import numpy as np
        >>> float(hub_lift(np.eye(6)[[0] * 6]))
        1.0
    """
    return measure(Metric("hub_lift", _hub_lift, square=True), p)


def _hub_lift(m: Matrices) -> Any:
    lifts, _ = _lift(m)
    known = ~m.xp.isnan(lifts)
    best = m.xp.argmax(m.xp.where(known, lifts, -1.0), axis=-1)[..., None]
    return m.xp.take_along_axis(_hubs(m), best, axis=-1)[..., 0]


class _Conditional(NamedTuple):
    """The strictly lower block with rows that sum to 1."""

    shares: Any  # C, (…, query, key)
    rows: Any  # (…, query): enough attention to speak of shares
    index: Any  # (query,): 0 … n-1, as numbers


def _conditional(m: Matrices) -> _Conditional:
    earlier = m.xp.tril(m.p, k=-1)
    mass = m.xp.sum(earlier, axis=-1)
    rows = ~(mass < UNDEFINED_BELOW)  # so that NaN stays in, and shows
    shares = earlier / m.xp.where(rows, mass, 1.0)[..., None]
    index = m.xp.arange(m.p.shape[-1], dtype=m.p.dtype, device=device(m.p))
    return _Conditional(shares, rows, index)
