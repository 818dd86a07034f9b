"""What stands in place of a head's pattern or of its output."""

from collections.abc import Sequence

import torch
from torch import Tensor

from probe.attention import AttentionCall
from probe.errors import InputError
from probe.interventions import where

PATTERNS = ("uniform", "first", "identity")


def pattern_of(mode: str, call: AttentionCall) -> Tensor:
    """A pattern that looks at nothing in particular.

    Args:
        mode: "uniform": evenly over all keys that a row may see; "first": all on the first of them
            (the first token, unless a window hides it); "identity": all on the row's own token.
        call: The attention call.

    Returns:
        (batch or 1, head or 1, query, key), rows sum to 1; rows of padding are 0.
    """
    keep = call.keep()
    if mode == "uniform":
        return keep.to(call.dtype) / keep.sum(-1, keepdim=True).clamp_min(1)
    if mode == "first":
        return (keep & (keep.long().cumsum(-1) == 1)).to(call.dtype)
    at = where(call)
    own = (at.query[:, None, :, None] == at.key[:, None, None, :]) & (at.query >= 0)[
        :, None, :, None
    ]
    return (keep & own).to(call.dtype)


def deranged(call: AttentionCall, seed: int) -> Tensor:
    """For each batch item another one of the same length: (batch) int64.

    Raises:
        InputError: An item is alone with its length.
    """
    at = where(call)
    lengths = at.prompt.expand(call.shape[0]).tolist()
    generator = torch.Generator().manual_seed(seed)
    out = torch.arange(len(lengths))
    for length in sorted(set(lengths)):
        group = torch.tensor([n for n, own in enumerate(lengths) if own == length])
        if len(group) < 2:
            raise InputError(
                f"mode='resample' takes z from another input of the same length, and only one of "
                f"this batch has {length} tokens. Batch inputs of equal length, or give reference= "
                "a cache of other inputs."
            )
        # One cycle through a random order has no fixed point.
        order = group[torch.randperm(len(group), generator=generator)]
        out[order] = order.roll(1)
    return out


def require_rows(call: AttentionCall) -> Tensor:
    """Which rows of a batch are tokens, where their mean is taken: bool (batch, query).

    Raises:
        InputError: There are fewer than two, so that the mean would be the thing itself.
    """
    real = (where(call).query >= 0).expand(call.shape[0], -1)
    if int(real.sum()) < 2:
        raise InputError(
            "mode='mean' without a reference takes the mean over the batch that runs, and here it "
            "has one token. Give reference=ablation.reference(model, problems)."
        )
    return real


def aligned(
    own: Tensor, positions: Sequence[Sequence[int]], places: Sequence[Sequence[int]], chosen: Tensor
) -> Tensor:
    """Where the tokens of a call are in the tensors of another run.

    Args:
        own: (batch or 1, n) positions of the call's tokens, -1 for padding.
        positions: Those that the other run has, for each of its sequences (one, or as many).
        places: Where they are in its tensors.
        chosen: (batch or 1, n), which tokens are asked for.

    Returns:
        (batch, n) int64; 0 for those that are not asked for.

    Raises:
        InputError: It has no such token, or other sequences.
    """
    batch = max(len(own), len(chosen))
    if len(positions) not in (1, batch):
        raise InputError(
            f"the cache holds {len(positions)} inputs, and this batch has {batch}. Give a cache of "
            "one input, or of as many."
        )
    out = torch.zeros(batch, own.shape[1], dtype=torch.long)
    wanted = own.masked_fill(~chosen, -1).expand(batch, -1).tolist()
    for item, row in enumerate(wanted):
        n = item if len(positions) > 1 else 0
        known = dict(zip(positions[n], places[n], strict=True))
        if missing := [p for p in row if p >= 0 and p not in known]:
            raise InputError(
                f"the cache has no token at position {missing[0]} of input {item} (it has "
                f"{len(known)} tokens). Give one of inputs that are as long."
            )
        out[item] = torch.tensor([known.get(p, 0) for p in row])
    return out.to(own.device)
