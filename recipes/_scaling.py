"""How scores and patterns are scaled on chosen edges."""

import sys
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from probe.attention import AttentionCall
from probe.errors import InputError
from probe.interventions import where
from recipes._choosing import are_per_item, columns, factors

_MOST = sys.float_info.max


def require_factors(factor: Any, keys: Any) -> None:
    """Refuse factors that are no numbers, or not one for each key."""
    for value in _flat(factor):
        good = isinstance(value, int | float) and not isinstance(value, bool)
        if not good or not 0 <= value <= _MOST:
            raise InputError(
                f"factor holds {value!r}. Give numbers of at least 0: 0 hides, 1 does nothing."
            )
    if not isinstance(factor, Sequence):
        return
    if are_per_item(factor) != are_per_item(keys) or any(_mixed(x) for x in (factor, keys)):
        raise InputError(
            f"factor={factor!r:.60} is not nested as keys={keys!r:.60} are. Give one number, or "
            "one for each key in the same lists."
        )
    mine, its = ([list(own) for own in x] if are_per_item(x) else [x] for x in (factor, keys))
    fits = isinstance(keys, Sequence) and not isinstance(keys, str) and len(mine) == len(its)
    if not fits or any(len(a) != len(b) for a, b in zip(mine, its, strict=True)):
        raise InputError(
            f"factor={factor!r:.60} does not fit keys={keys!r:.60}. Give one number, or one for "
            "each key in the same lists."
        )


def _mixed(values: Any) -> bool:
    return are_per_item(values) and not all(isinstance(own, list | tuple) for own in values)


def _flat(factor: Any) -> Iterable[Any]:
    if not isinstance(factor, Sequence) or isinstance(factor, str):
        return [factor]
    return [value for part in factor for value in _flat(part)]


def spread(chosen: Tensor, factor: float) -> Tensor:
    """A factor where something is chosen and 1 elsewhere, float64."""
    return torch.ones_like(chosen, dtype=torch.float64).masked_fill(chosen, factor)


def of_columns(call: AttentionCall, keys: Any, factor: Any) -> Tensor:
    """The factor of every column, (batch or 1, key) float64."""
    at = where(call)
    if not isinstance(factor, Sequence):
        return spread(columns(at, keys), factor)
    nested = are_per_item(keys)
    return factors(at, keys if nested else [keys], factor if nested else [factor])


def bias_of(call: AttentionCall, edges: Tensor, heads: Sequence[int]) -> Tensor:
    """A bias on scores in some heads, from the log factors of edges (batch or 1, query, key).

    A row of which nothing would be left keeps its own token.

    Returns:
        (batch or 1, head or 1, query, key).
    """
    bias = edges[:, None].to(call.dtype)
    if len(heads) < call.n_heads:
        chosen = torch.zeros(call.n_heads, dtype=torch.bool, device=bias.device)
        chosen[list(heads)] = True
        bias = torch.where(chosen[:, None, None], bias, 0.0)
    hidden = bias == -torch.inf
    if not bool(hidden.any()):
        return bias
    keep = call.keep()
    lost = keep.any(-1) & ~(keep & ~hidden).any(-1)
    own = where(call).query[:, None, :, None] == where(call).key[:, None, None, :]
    return bias.masked_fill(lost[..., None] & own, 0.0)


def multiplied(edges: Tensor, warned: list[bool], layer: int, scores: Tensor) -> Tensor:
    """Scores times a factor; the first time that this raises attention, `warned` is told."""
    seen = (scores != -torch.inf) & (edges != 1)
    raised = seen & (edges < 1) & (scores < 0)
    if not warned and bool(raised.any()):
        warned.append(True)
        share = int(raised.sum()) / int(seen.sum())
        warnings.warn(
            "mode='logit_mul' raised attention instead of lowering it, where scores are negative: "
            f"in {share:.0%} of the scaled scores of layer {layer}. Use mode='log_add', which "
            "always lowers it.",
            stacklevel=2,
        )
    return torch.where(seen, scores * edges, scores)


def shifted(edges: Tensor, scores: Tensor) -> Tensor:
    """The distance of scores from the least that a row may see, times a factor."""
    hidden = scores == -torch.inf
    least = scores.masked_fill(hidden, torch.inf).amin(-1, keepdim=True)
    return torch.where(hidden | (edges == 1), scores, least + edges * (scores - least))


def scaled(edges: Tensor, pattern: Tensor) -> Tensor:
    """Probabilities times a factor."""
    return pattern * edges
