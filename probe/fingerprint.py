"""Telling checkpoints apart, so that a store never mixes two."""

import hashlib
from typing import Any

import torch
from torch import Tensor, nn

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def fingerprint(base: nn.Module, module: nn.Module) -> str:
    """A hash of a model's class and of all its weights: names, shapes, dtypes and bits.

    Any one changed weight changes it. Weights that are offloaded (meta) count by their names.

    Args:
        base: The transformers model.
        module: The same, or a wrapper around it that adds weights (peft).

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256(type(base).__name__.encode())
    weights = dict(module.named_parameters())
    for name, weight in weights.items():
        _update(digest, name, weight)
    for name, value in module.state_dict().items():
        if name not in weights:  # buffers, and what quantised layers keep packed
            _update(digest, name, value)
    return digest.hexdigest()


def _update(digest: Any, name: str, value: object) -> None:
    if isinstance(value, tuple | list):
        for i, part in enumerate(value):
            _update(digest, f"{name}.{i}", part)
    elif isinstance(value, Tensor) and value.is_quantized:
        _update(digest, name, value.dequantize())  # with its scales
    elif isinstance(value, Tensor):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        if not value.is_meta and value.numel():
            digest.update(_digest(value.detach()))
    else:
        digest.update(f"{name} {value}".encode())


def _digest(weight: Tensor) -> bytes:
    """The sum of all bits, which any one changed weight changes, and 64 weights for their order.

    Integer sums are exact in any order, so every device gives the same.
    """
    bits = weight.contiguous().view(_BITS[weight.element_size()]).flatten()
    at = torch.linspace(0, len(bits) - 1, 64, dtype=torch.float64).long().to(bits.device)
    figures = torch.cat([bits.sum(dtype=torch.int64)[None], bits[at].long()])
    return figures.cpu().numpy().tobytes()
