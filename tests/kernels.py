"""Kernels that run anywhere, so that transformers' own code around them can run as it is.

FlashAttention as its documentation says it, since its libraries need a GPU; and flex attention
without a compiler, which takes seconds for every mask.
"""

import warnings
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from transformers import (
    PreTrainedModel,
    masking_utils,
    modeling_flash_attention_utils,
    modeling_utils,
)
from transformers.integrations import flex_attention as flex_integration

FLASH = ("flash_attention_2", "flash_attention_3")


def one_sequence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
) -> Tensor:
    """(row, head, head_dim): the last row is aligned with the last key."""
    share = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(share, dim=1) for x in (k, v))
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    s = torch.einsum("qhd,khd->hqk", q, k) * scale
    if softcap:
        s = softcap * torch.tanh(s / softcap)
    left, right = window_size
    for i in range(len(q)):
        own = i + len(k) - len(q)
        for j in range(len(k)):
            ahead = j - own
            hidden = (causal and ahead > 0) or (0 <= left < -ahead) or (0 <= right < ahead)
            if hidden:
                s[:, i, j] = -torch.inf
    return torch.einsum("hqk,khd->qhd", s.softmax(-1).nan_to_num(0.0), v)


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
) -> Tensor:
    """(batch, row, head, head_dim)."""
    assert dropout_p == 0
    each = zip(q, k, v, strict=True)
    return torch.stack(
        [one_sequence(*qkv, softmax_scale, causal, window_size, softcap) for qkv in each]
    )


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
) -> Tensor:
    """(token, head, head_dim) of sequences one after the other."""
    assert dropout_p == 0
    out = torch.zeros(*q.shape[:2], v.shape[-1], dtype=q.dtype)
    ends_q, ends_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    assert max_seqlen_q == max(b - a for a, b in pairwise(ends_q))
    assert max_seqlen_k == max(b - a for a, b in pairwise(ends_k))
    rest = (softmax_scale, causal, window_size, softcap)
    for i in range(len(ends_q) - 1):
        rows, keys = slice(*ends_q[i : i + 2]), slice(*ends_k[i : i + 2])
        out[rows] = one_sequence(q[rows], k[keys], v[keys], *rest)
    return out


def install_flash(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let transformers find this in place of the libraries, by their names alone."""
    utils = modeling_flash_attention_utils

    def imports(implementation: str, *_: Any, **__: Any) -> tuple[Callable[..., Any] | None, ...]:
        assert implementation in utils.FLASH_ATTN_KERNEL_FALLBACK, implementation
        return flash_attn_func, flash_attn_varlen_func, None, utils._pad_input, utils._unpad_input

    monkeypatch.setattr(utils, "_lazy_imports", imports)
    for name in ("_loaded_implementation", "_flash_fn", "_flash_varlen_fn", "_pad_fn", "_unpad_fn"):
        monkeypatch.setattr(utils, name, None)
    for name in ("_process_flash_kwargs_fn", "_process_with_kvcache_kwargs_fn"):
        monkeypatch.setattr(utils, name, None)
    monkeypatch.setattr(PreTrainedModel, "_flash_attn_can_dispatch", lambda *_, **__: True)
    monkeypatch.setattr(modeling_utils, "is_kernels_available", lambda: False)


def is_packed(positions: Tensor | None, n_batch: int) -> bool:
    """What transformers decides."""
    decide: Any = modeling_flash_attention_utils._is_packed_sequence
    return bool(decide(positions, n_batch))


def uncompiled_flex(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let transformers run flex attention and make its masks without compiling them."""

    def blocks(*args: Any, _compile: bool, **kwargs: Any) -> Any:
        return create_block_mask(*args, **kwargs)

    def attend(q: Tensor, k: Tensor, v: Tensor, training: bool = False, **kwargs: Any) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it says that it is slow, which is the point
            return flex_attention(q, k, v, **kwargs)

    monkeypatch.setattr(masking_utils, "create_block_mask", blocks)
    monkeypatch.setattr(flex_integration, "compile_friendly_flex_attention", attend)
