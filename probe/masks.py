"""Masks as flex and flash kernels take them, in the dense form that an `AttentionCall` reads."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_mask
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    bidirectional_mask_function,
    causal_mask_function,
    flash_attention_mask,
    flex_attention_mask,
)

from probe.attention import AttentionCall
from probe.errors import InputError, UnsupportedModelError

# dense: 4-D, bool or float. blocks: a BlockMask of torch's flex_attention. padding: 2-D or none.
Form = Literal["dense", "blocks", "padding"]


def form(implementation: str) -> Form:
    """What an attention implementation takes as mask, by the mask function that it goes with."""
    own: Any = ALL_MASK_ATTENTION_FUNCTIONS.get(implementation)
    if own is flash_attention_mask:
        return "padding"
    return "blocks" if own is flex_attention_mask else "dense"


def readable(
    mask: Tensor | BlockMask | None,
    query: Tensor,
    key: Tensor,
    *,
    implementation: str,
    causal: bool,
    kwargs: Mapping[str, Any],
) -> Tensor | None:
    """The mask that a kernel was given, as an `AttentionCall` reads it.

    Args:
        mask: The model's own object.
        query: (batch, head, query, head_dim).
        key: (batch, kv_head, key, head_dim).
        implementation: Whose kernel it is.
        causal: Whether the kernel itself hides the future.
        kwargs: What else the kernel was given.

    Raises:
        InputError: A mask given by the user, which the kernel misreads.
        UnsupportedModelError: Packed sequences, which a kernel takes apart without a mask.
    """
    n_batch, n_queries, n_keys = key.shape[0], query.shape[2], key.shape[2]
    if isinstance(mask, BlockMask):
        return from_blocks(mask, n_queries, n_keys)
    kind = form(implementation)
    if mask is not None and mask.dtype == torch.bool and _adds(implementation):
        raise InputError(
            f"{implementation!r} attention adds its mask to the scores, so that one of torch.bool, "
            f"{tuple(mask.shape)}, hides nothing. Give a float mask (0 where a row attends, the "
            "dtype's minimum where not), or load the model with attn_implementation='sdpa'."
        )
    if kind == "blocks" and mask is not None and mask.shape[1] > 1:
        raise InputError(
            f"{implementation!r} attention takes the first head of a mask {tuple(mask.shape)} for "
            "all. Give one (batch, 1, query, key), or load the model with "
            "attn_implementation='sdpa'."
        )
    if kind != "padding":
        return mask
    if mask is None:
        if "cu_seq_lens_q" in kwargs or is_packed(kwargs.get("position_ids"), n_batch):
            raise UnsupportedModelError(
                "several sequences are packed into one row (cu_seq_lens, or position_ids that do "
                f"not count up by one), which {implementation!r} takes apart unseen by the tap. "
                "Give one sequence in each row, padded and with its attention_mask, or load the "
                "model with attn_implementation='sdpa'."
            )
        return torch.ones(n_batch, n_keys, dtype=torch.bool, device=key.device)
    if mask.ndim != 2:
        raise InputError(
            f"{implementation!r} attention reads a mask (batch, key) of the tokens that are not "
            f"padding, and got one of shape {tuple(mask.shape)}. Give the model such a mask, or "
            "load it with attn_implementation='sdpa'."
        )
    window = kwargs.get("sliding_window")
    return from_padding(mask, n_queries, n_keys, causal=causal, window=window)


def for_kernel(call: AttentionCall, implementation: str) -> Tensor | None:
    """A mask that somebody assigned to a call, in the form that a dense kernel reads."""
    mask = call.mask
    if mask is None:
        return None
    if mask.ndim == 2:
        mask = call.keep()
    if mask.dtype == torch.bool and implementation != "sdpa":
        low = torch.finfo(call.query.dtype).min
        mask = torch.zeros_like(mask, dtype=call.query.dtype).masked_fill(~mask, low)
    return mask if mask.dtype == torch.bool else mask.to(call.query.dtype)


def _adds(implementation: str) -> bool:
    return implementation == "eager" or form(implementation) == "blocks"


def from_blocks(mask: BlockMask, n_queries: int, n_keys: int) -> Tensor:
    """A flex kernel's mask, its blocks' padding cut: bool (batch or 1, head or 1, query, key)."""
    batch, heads = mask.shape[:2]
    return create_mask(mask.mask_mod, batch, heads, n_queries, n_keys, mask.kv_indices.device)


def from_padding(
    mask: Tensor, n_queries: int, n_keys: int, *, causal: bool, window: int | None
) -> Tensor:
    """A flash kernel's 2-D keep-mask: bool (batch, 1, query, key).

    Such a kernel drops padding and closes the gaps, so that causality and window count real tokens
    alone, and the row of a padding token is empty. Keys beyond the mask are those that a static
    cache has not filled yet.
    """
    n_seen = mask.shape[1]
    keys = torch.zeros(len(mask), n_keys, dtype=torch.bool, device=mask.device)
    keys[:, :n_seen] = mask.bool()
    # A single row is never padding: it is the step that is being generated.
    rows = keys[:, n_seen - n_queries : n_seen] if n_queries > 1 else keys.new_ones(len(mask), 1)
    after = keys.sum(-1, keepdim=True) - rows.sum(-1, keepdim=True)  # the last row is the last key
    behind = (rows.cumsum(-1) + after)[:, :, None] - keys.cumsum(-1)[:, None]
    keep = rows[:, :, None] & keys[:, None]
    if causal:
        keep = keep & (behind >= 0)
    if window is not None:
        keep = keep & (behind.abs() < window)
    return keep[:, None]


def is_packed(positions: Tensor | None, n_batch: int) -> bool:
    """Whether a flash kernel takes these position_ids for several sequences in a row."""
    if positions is None or n_batch > 1 or positions.shape[-1] == 1:
        return False
    first = positions.min()
    steps = torch.arange(positions.shape[-1], device=positions.device)
    return not bool((positions - first == steps).all())


def flash_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """Transformers' mask function for flash kernels, right also where the kernel's name is hidden.

    By that name transformers keeps the mask that says how far a static cache is filled, and refuses
    chunked attention, of which a flash kernel knows nothing. A tapped model goes by another name.
    """
    chunk = getattr(kwargs.get("config"), "attention_chunk_size", None)
    stop = kv_length + kv_offset
    if chunk is not None and kwargs.get("local_size") == chunk and stop > chunk:
        raise UnsupportedModelError(
            f"flash attention cannot attend in chunks of {chunk} tokens, and this input reaches "
            f"token {stop}. Load the model with attn_implementation='sdpa'."
        )
    seen = int(q_offset) + q_length  # a static cache gives a tensor
    if attention_mask is None and seen < stop and mask_function is not bidirectional_mask_function:
        attention_mask = torch.ones(batch_size, seen, dtype=torch.bool, device=kwargs.get("device"))
    mask: Tensor | None = flash_attention_mask(
        batch_size,
        q_length,
        kv_length,
        q_offset,
        kv_offset,
        mask_function,
        attention_mask,
        **kwargs,
    )
    return mask
