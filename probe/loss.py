"""The next-token loss, and what a forward is asked to return."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from probe.errors import InputError
from probe.indexing import wide

# Logits at once: on a CPU they stay in a core's cache, on a GPU the launches few.
_BLOCK = {"cpu": 1 << 19}
_GPU_BLOCK = 1 << 25

ReturnType = Literal["logits", "loss", "both"] | None


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
    targets = token_ids.to(logits.device)[1:]
    rows = max(1, _BLOCK.get(logits.device.type, _GPU_BLOCK) // max(1, logits.shape[-1]))
    if logits.requires_grad or len(targets) <= rows:  # autograd keeps all of it anyway
        return nn.functional.cross_entropy(wide(logits)[:-1], targets, reduction="none")
    some = zip(torch.split(logits[:-1], rows), torch.split(targets, rows), strict=True)
    return torch.cat([nn.functional.cross_entropy(wide(x), t, reduction="none") for x, t in some])


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


def returned(output: Any, batch: Mapping[str, Any], return_type: ReturnType, *, who: str) -> Any:
    """What a forward is asked to return, as in TransformerLens.

    Args:
        output: What the model returned.
        batch: What it was given: input_ids and perhaps attention_mask, (batch, position).
        return_type: "logits" (batch, position, vocabulary); "loss", the mean next-token loss over
            all tokens in nats, padding left out; "both"; or None.
        who: The model, for messages.

    Raises:
        InputError: There are no logits, or what is padding is not known.
    """
    if return_type is None:
        return None
    if return_type not in ("logits", "loss", "both"):
        raise InputError(f"return_type={return_type!r}. Choose logits, loss, both or None.")
    logits = logits_of(output)
    if logits is None:
        raise InputError(
            f"{who} returned a {type(output).__name__} without logits "
            "(batch, position, vocabulary). Use return_type=None, or call the model itself."
        )
    if return_type == "logits":
        return logits
    ids = batch["input_ids"]
    real = batch.get("attention_mask", torch.ones_like(ids)).bool()
    if real.ndim != 2:
        raise InputError(
            f"a loss leaves padding out, which a mask of shape {tuple(real.shape)} does not "
            "tell from text. Give a mask (batch, position), or use return_type='logits'."
        )
    each = [next_token_nll(x[r], i[r]) for x, i, r in zip(logits, ids, real, strict=True)]
    loss = torch.cat(each).mean()
    return loss if return_type == "loss" else (logits, loss)
