"""What each head does: statistics of its attention matrices.

Every metric takes probabilities `p` (…, query, key) of causal attention, rows summing to at most
1, as a torch tensor, a NumPy array, or a DataArray with dims `query` and `key` in any order, and
returns the leading dims in the same kind. What holds for all of them:

- The answer is a mean over rows. Rows that do not exist (position -1) or hold no attention at all
  are left out; a matrix with no row left is NaN. Ragged or failed problems dilute nothing.
- Sums are float32 or wider: float16 and bfloat16 are cast first, float64 stays float64.
- Token positions come from `query_position` (query,) and `key_position` (key,), which may lead
  with p's first dims, as (batch, query); for a DataArray from its coords of these names. Without
  them the keys are at 0, 1, 2, ... and the queries are the last of the keys.
- A store of any size is read in blocks; a dask-backed DataArray stays lazy.
- Anything else is a ValueError that says what is missing (a TypeError for what is no array).

    >>> import numpy as np
    >>> uniform = np.tril(np.ones((4, 4))) / np.arange(1, 5)[:, None]
    >>> round(float(effective_keys(uniform)), 6)
    2.5
"""

from typing import Any, Literal, TypeVar, get_args

import xarray as xr

from recipes._classifying import classify
from recipes._metric import Matrices, Metric, measure
from recipes.ranking import Ranked, rank

__all__ = [
    "Convention",
    "Ranked",
    "classify",
    "concentration",
    "distance",
    "duplicate_token",
    "effective_keys",
    "entropy",
    "induction",
    "previous_token",
    "rank",
    "sink",
]

T = TypeVar("T")
Convention = Literal["targets", "transformerlens"]


def entropy(
    p: T, *, normalised: bool = False, query_position: Any = None, key_position: Any = None
) -> T:
    """Mean entropy of a row, in nats: how widely the head spreads its attention.

        H_i = -sum_j p_ij ln p_ij, with 0 ln 0 = 0

    Args:
        p: Attention probabilities, (…, query, key).
        normalised: Divide H_i by ln n_i, where n_i counts the stored keys that row i can see.
            Raw entropy grows with length; this does not. Rows with n_i = 1 are left out.
        query_position: Token position of each row (see the module).
        key_position: Token position of each column.

    Returns:
        (…), in [0, ln n] nats, or [0, 1] normalised: 0 is one-hot, 1 uniform.

    Example:
        >>> import numpy as np
        >>> one_hot = np.eye(3)
        >>> float(entropy(one_hot)), float(entropy(one_hot, normalised=True))
        (0.0, 0.0)
    """

    def core(m: Matrices) -> Any:
        if not normalised:
            return m.mean(_row_entropy(m), m.rows)
        n = m.count(m.visible)
        several = n > 1
        most = m.xp.log(m.xp.where(several, n, 2.0))
        return m.mean(_row_entropy(m) / most, m.rows & several)

    name = "normalised_entropy" if normalised else "entropy"
    return _measure(name, core, p, query_position, key_position)


def effective_keys(p: T, *, query_position: Any = None, key_position: Any = None) -> T:
    """Mean of exp(H_i): over how many keys a row spreads, as if evenly.

    Args:
        p: Attention probabilities, (…, query, key).
        query_position: Token position of each row (see the module).
        key_position: Token position of each column.

    Returns:
        (…), in keys, from 1 (one-hot) to the number of keys.

    Example:
        >>> import numpy as np
        >>> float(effective_keys(np.eye(3)))
        1.0
    """

    def core(m: Matrices) -> Any:
        return m.mean(m.xp.exp(_row_entropy(m)), m.rows)

    return _measure("effective_keys", core, p, query_position, key_position)


def _row_entropy(m: Matrices) -> Any:
    return -m.xp.sum(m.p * m.xp.log(m.xp.where(m.p > 0, m.p, 1.0)), axis=-1)


def concentration(
    p: T,
    *,
    kind: Literal["max", "hhi"] = "max",
    query_position: Any = None,
    key_position: Any = None,
) -> T:
    """Mean over rows of max_j p_ij, or of sum_j p_ij^2.

    Args:
        p: Attention probabilities, (…, query, key).
        kind: "max" is the confidence of Voita et al. (2019); "hhi" the Herfindahl index.
        query_position: Token position of each row (see the module).
        key_position: Token position of each column.

    Returns:
        (…), in (0, 1]; 1 is one-hot. The first rows of any causal head are high: row 0 is 1.

    Example:
        >>> import numpy as np
        >>> float(concentration(np.array([[1.0, 0.0], [0.5, 0.5]]), kind="hhi"))
        0.75
    """
    if kind not in ("max", "hhi"):
        raise ValueError(f"kind is 'max' or 'hhi', got {kind!r}")

    def core(m: Matrices) -> Any:
        each = m.xp.max(m.p, axis=-1) if kind == "max" else m.xp.sum(m.p * m.p, axis=-1)
        return m.mean(each, m.rows)

    return _measure(f"concentration_{kind}", core, p, query_position, key_position)


def distance(
    p: T, *, relative: bool = False, query_position: Any = None, key_position: Any = None
) -> T:
    """Mean over rows of sum_j p_ij (i - j): how far back the head looks, in tokens.

    Args:
        p: Attention probabilities, (…, query, key).
        relative: Divide each row by what uniform attention over its visible stored keys would
            give. Rows where that is 0 (only the token itself) are left out.
        query_position: Token position of each row (see the module).
        key_position: Token position of each column.

    Returns:
        (…), in tokens, or relative to uniform: 0 looks at itself, 1 is uniform, 2 at the start.

    Example:
        >>> import numpy as np
        >>> previous = np.array([[1.0, 0, 0], [1, 0, 0], [0, 1, 0]])
        >>> round(float(distance(previous)), 4), float(distance(previous, relative=True))
        (0.6667, 1.5)
    """

    def core(m: Matrices) -> Any:
        reach = m.xp.sum(m.p * m.lag, axis=-1)
        if not relative:
            return m.mean(reach, m.rows)
        expected = m.mean(m.lag, m.visible)
        far = expected > 0  # also False where nothing is visible, which is NaN
        return m.mean(reach / m.xp.where(far, expected, 1.0), m.rows & far)

    name = "relative_distance" if relative else "distance"
    return _measure(name, core, p, query_position, key_position)


def sink(p: T, position: int = 0, *, query_position: Any = None, key_position: Any = None) -> T:
    """Mean attention that one position receives from itself and all later rows.

        sink = mean over i >= position of p_{i, position}        (Gu et al., ICLR 2025)

    Args:
        p: Attention probabilities, (…, query, key).
        position: Token position of the key, from 0. The published sink rate counts heads whose
            sink is above 0.3, on 64 tokens.
        query_position: Token position of each row (see the module).
        key_position: Token position of each column.

    Returns:
        (…), in [0, 1]; NaN where the position is not stored or no row follows it.

    Example:
        >>> import numpy as np
        >>> float(sink(np.eye(4)))
        0.25
    """
    if position < 0:
        raise ValueError(f"position is a token position, counted from 0, got {position}")

    def core(m: Matrices) -> Any:
        there = m.key == position
        asked = (m.query[..., 0] >= position) & m.xp.any(there, axis=-1)
        return m.mean(m.sum(m.p, there), m.rows & asked)

    return _measure("sink", core, p, query_position, key_position)


def previous_token(
    p: T,
    *,
    convention: Convention = "targets",
    query_position: Any = None,
    key_position: Any = None,
) -> T:
    """Mean over i >= 1 of p_{i, i-1}: attention to the token just before.

    Args:
        p: Attention probabilities, (…, query, key).
        convention: "targets" averages the rows whose previous key is stored; "transformerlens"
            is its detect_head "mul": sum(p * targets) / sum(p), over all rows.
        query_position: Token position of each row (see the module).
        key_position: Token position of each column.

    Returns:
        (…), in [0, 1].

    Example:
        >>> import numpy as np
        >>> previous = np.array([[1.0, 0, 0], [1, 0, 0], [0, 1, 0]])
        >>> float(previous_token(previous))
        1.0
    """
    _check(convention)

    def core(m: Matrices) -> Any:
        return _attended(m, (m.key >= 0) & (m.key == m.query - 1), m.rows, convention)

    return _measure("previous_token", core, p, query_position, key_position)


def duplicate_token(
    p: T,
    token_id: Any = None,
    *,
    convention: Convention = "targets",
    query_position: Any = None,
    key_position: Any = None,
) -> T:
    """Attention to earlier copies of the query's own token.

        duplicate = mean over queries with an earlier copy of sum_{j < i, x_j = x_i} p_ij

    Args:
        p: Attention probabilities, (…, query, key).
        token_id: Token of each column, (key,) or with p's first dims, as (batch, key); a
            DataArray (problem, key). Default: the coord `token_id`.
        convention: As for `previous_token`.
        query_position: Token position of each row (see the module).
        key_position: Token position of each column.

    Returns:
        (…), in [0, 1]; NaN where no token repeats. Rows whose own token is not stored are left
        out; if that is every row of p, a ValueError says so.

    Example:
        >>> import numpy as np
        >>> float(duplicate_token(np.eye(3)[[0, 1, 0]], [7, 8, 7]))
        1.0
    """
    _check(convention)

    def core(m: Matrices) -> Any:
        own, known = _token_at(m, m.query[..., 0])
        copy = known[..., None] & (m.token == own[..., None])
        return _attended(m, copy & (m.key >= 0) & (m.key < m.query), m.rows & known, convention)

    return _measure_tokens("duplicate_token", core, p, token_id, query_position, key_position)


def induction(
    p: T,
    token_id: Any = None,
    *,
    convention: Convention = "targets",
    query_position: Any = None,
    key_position: Any = None,
) -> T:
    """Attention to what followed earlier copies of the query's token (Olsson et al., 2022).

        induction = mean over queries with such a j of sum_{j < i, x_j = x_i, j+1 != i} p_{i, j+1}

    The sum is over all earlier copies: with several, a perfect head may split its attention.

    Args:
        p: Attention probabilities, (…, query, key).
        token_id: As for `duplicate_token`.
        convention: As for `previous_token`; TransformerLens also counts j + 1 = i, the query
            itself after two equal tokens. There a perfect head on n tokens twice scores about 1/2.
        query_position: Token position of each row (see the module).
        key_position: Token position of each column.

    Returns:
        (…), in [0, 1]; NaN where no token repeats. Rows whose own token is not stored are left
        out; if that is every row of p, a ValueError says so.

    Example:
        >>> import numpy as np
        >>> float(induction(np.eye(4)[[0, 1, 1, 2]], [7, 8, 7, 8]))
        1.0
    """
    _check(convention)

    def core(m: Matrices) -> Any:
        own, known = _token_at(m, m.query[..., 0])
        before, follows = _token_at(m, m.key[..., 0, :] - 1)
        target = known[..., None] & follows[..., None, :] & (before[..., None, :] == own[..., None])
        past = m.key < m.query if convention == "targets" else m.key <= m.query
        return _attended(m, target & past, m.rows & known, convention)

    return _measure_tokens("induction", core, p, token_id, query_position, key_position)


def _token_at(m: Matrices, position: Any) -> tuple[Any, Any]:
    """Token at each position (…, n), and whether that position is among the stored keys."""
    hit = (position[..., None] == m.key) & (m.key >= 0)
    return m.xp.sum(m.xp.where(hit, m.token, 0), axis=-1), m.xp.any(hit, axis=-1)


def _attended(m: Matrices, target: Any, rows: Any, convention: Convention) -> Any:
    """Attention to the targets, by either convention, over `rows`."""
    each = m.sum(m.p, target)
    if convention == "targets":
        return m.mean(each, rows & m.xp.any(target, axis=-1))
    return m.ratio(m.sum(each, rows), m.sum(m.xp.sum(m.p, axis=-1), rows))


def _check(convention: str) -> None:
    if convention not in get_args(Convention):
        raise ValueError(f"convention is 'targets' or 'transformerlens', got {convention!r}")


def _measure(name: str, core: Any, p: T, query_position: Any, key_position: Any) -> T:
    metric = Metric(name, core)
    return measure(metric, p, query_position=query_position, key_position=key_position)


def _measure_tokens(
    name: str, core: Any, p: T, token_id: Any, query_position: Any, key_position: Any
) -> T:
    if token_id is None and isinstance(p, xr.DataArray):
        token_id = p.coords.get("token_id")
    if token_id is None:
        raise ValueError(f"{name} needs token_id: (…, key) ids, or a DataArray with that coord")
    where = {"query_position": query_position, "key_position": key_position}
    return measure(Metric(name, core), p, token_id=token_id, **where)
