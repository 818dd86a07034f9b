"""What a change did to the next-token distributions of one problem."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from probe.loss import next_token_nll
from probe.plans import Item

_ROWS = 256  # of logits that are widened at a time

PER_TOKEN = ("delta_nll", "kl", "delta_logit", "base_rank", "rank")
TARGET = ("base_p", "p", "delta_logit", "base_rank", "rank")
Numbers = npt.NDArray[np.float64]


def nll_of(logits: Tensor, ids: Tensor) -> Numbers:
    """Negative log-likelihood of each token but the first, nats: (position - 1) float64.

    Args:
        logits: (position, vocabulary), perhaps of more positions.
        ids: (position), the tokens.
    """
    found: Numbers = next_token_nll(logits[: len(ids)], ids).double().cpu().numpy()
    return found


def mean_of(nll: Numbers, scored: Sequence[int]) -> float:
    """The mean over some tokens, by position from 1; NaN of none."""
    return float(nll[..., np.array(scored, dtype=int) - 1].mean()) if len(scored) else float("nan")


def mean_nll(logits: Tensor, ids: Tensor, scored: Sequence[int]) -> float:
    """Mean negative log-likelihood of some tokens, nats, float64; NaN of none."""
    return mean_of(nll_of(logits, ids), scored)


def accuracy(logits: Tensor, ids: Tensor, scored: Sequence[int]) -> float:
    """Share of some tokens that have the greatest logit; NaN of none. Arguments as `mean_nll`."""
    at = torch.tensor(scored, dtype=torch.long)
    right = logits[at - 1].argmax(-1).cpu() == ids.cpu()[at]
    return float(right.double().mean()) if len(scored) else float("nan")


def over_problems(rows: Tensor, items: Sequence[Item], scored: Sequence[Sequence[int]]) -> Numbers:
    """Mean loss and accuracy of the chosen tokens of each problem of a batch: (2, problem).

    Args:
        rows: (problem, position, vocabulary) logits.
        items: The problems.
        scored: Positions of the chosen tokens of each.
    """
    ids = [torch.tensor(item.token_ids) for item in items]
    each = list(zip(rows, ids, scored, strict=True))
    return np.array([[mean_nll(*one) for one in each], [accuracy(*one) for one in each]])


def per_token(base: Tensor, changed: Tensor, ids: Tensor) -> dict[str, Numbers]:
    """Differences of the predictions made at each token.

    Args:
        base: (position, vocabulary) logits before the change.
        changed: Likewise, after it.
        ids: (position), the tokens.

    Returns:
        (position) float64 each, of the prediction made there; those of the token that follows are
        NaN at the last: "delta_nll" (nats, changed - base), "kl" (KL(base || changed), nats),
        "delta_logit" (of the token that follows), "base_rank" and "rank" (tokens with a greater
        logit than it). Computed in float32, or float64 where the logits are.
    """
    n = len(ids)
    out = {name: np.full(n, np.nan) for name in PER_TOKEN}
    following = torch.cat([ids[1:], ids[:1]]).to(base.device)
    for start in range(0, n, _ROWS):
        rows = slice(start, min(start + _ROWS, n))
        some, other = (_wide(logits[rows]) for logits in (base, changed))
        before, after = some.log_softmax(-1), other.log_softmax(-1)
        token = following[rows, None]
        found = {
            "delta_nll": (before - after).gather(1, token)[:, 0],
            "kl": (before.exp() * (before - after)).sum(-1),
            "delta_logit": (other - some).gather(1, token)[:, 0],
            "base_rank": rank(some, token),
            "rank": rank(other, token),
        }
        for name, values in found.items():
            out[name][rows] = values.double().cpu().numpy()
    for name in PER_TOKEN:
        if name != "kl":
            out[name][n - 1 :] = np.nan
    return out


def of_target(base: Tensor, changed: Tensor, target: int) -> dict[str, float]:
    """What became of one token as the next one: of (vocabulary) logits before and after.

    Returns:
        Probabilities "base_p" and "p", "delta_logit", and "base_rank" and "rank", 0 for the top.
    """
    some, other = _wide(base), _wide(changed)
    token = torch.tensor([[target]], device=some.device)
    return {
        "base_p": float(some.softmax(-1)[target]),
        "p": float(other.softmax(-1)[target]),
        "delta_logit": float(other[target] - some[target]),
        "base_rank": float(rank(some[None], token)),
        "rank": float(rank(other[None], token)),
    }


def rank(logits: Tensor, token: Tensor) -> Tensor:
    """How many tokens have a greater logit: logits (n, vocabulary), token (n, 1)."""
    return (logits > logits.gather(1, token)).sum(-1)


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def arrays_of(dims: Sequence[str], names: Sequence[str], prefix: str = "") -> dict[str, Any]:
    """Dims of some results by name."""
    return {f"{prefix}{name}": tuple(dims) for name in names}
