"""Telling checkpoints apart, so that a store never mixes two."""

import hashlib

import torch
from torch import Tensor, nn

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def fingerprint(base: nn.Module, module: nn.Module) -> str:
    """A hash of a model's class and of its weights' names, shapes, dtypes and bits.

    Any one changed weight changes it. Weights that are offloaded (meta) count by their names.

    Args:
        base: The transformers model.
        module: The same, or a wrapper around it that adds weights (peft).

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256(type(base).__name__.encode())
    for name, weight in module.named_parameters():
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        if not weight.is_meta and weight.numel():
            digest.update(_digest(weight.detach()))
    return digest.hexdigest()


def _digest(weight: Tensor) -> bytes:
    """The sum of all bits, which any one changed weight changes, and 64 weights for their order.

    Integer sums are exact in any order, so every device gives the same.
    """
    bits = weight.contiguous().view(_BITS[weight.element_size()]).flatten()
    at = torch.linspace(0, len(bits) - 1, 64, dtype=torch.float64).long().to(bits.device)
    figures = torch.cat([bits.sum(dtype=torch.int64)[None], bits[at].long()])
    return figures.cpu().numpy().tobytes()
