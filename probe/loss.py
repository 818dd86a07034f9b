"""The next-token loss."""

from typing import Any

import torch
from torch import Tensor, nn


def next_token_nll(logits: Tensor, token_ids: Tensor) -> Tensor:
    """Negative log-likelihood of each next token.

    Args:
        logits: (n, vocabulary) of a sequence without padding.
        token_ids: (n), its tokens.

    Returns:
        (n - 1) nats, computed in float32 or wider; entry i is of token i + 1.

    Example:
        >>> next_token_nll(torch.zeros(3, 4), torch.tensor([0, 1, 2]))
        tensor([1.3863, 1.3863])
    """
    wide = logits if logits.dtype == torch.float64 else logits.float()
    targets = token_ids.to(logits.device)
    return nn.functional.cross_entropy(wide[:-1], targets[1:], reduction="none")


def logits_of(output: Any) -> Tensor | None:
    """The logits in what a model returns: a field of them, or a tensor, alone or first in a tuple.

    Returns:
        (batch, position, vocabulary), or None.

    Example:
        >>> logits_of((torch.zeros(1, 3, 4), None)).shape
        torch.Size([1, 3, 4])
    """
    logits = output[0] if isinstance(output, tuple | list) and output else output
    logits = getattr(output, "logits", logits)
    if not isinstance(logits, Tensor) or logits.ndim != 3 or not logits.is_floating_point():
        return None
    return logits
