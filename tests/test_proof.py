"""The proof passes for what a kernel computed and fails for anything else."""

import math
from dataclasses import replace
from importlib.metadata import version
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from probe.attention import AttentionCall
from probe.errors import WiringError
from probe.proof import prove

N, WIDTH = 24, 16
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def call_of(dtype: torch.dtype, size: float = 3.0, seed: int = 0, **kwargs: Any) -> AttentionCall:
    """Grouped-query attention whose largest score is `size`."""
    random = torch.Generator().manual_seed(seed)
    query = torch.randn(2, 4, N, WIDTH, generator=random)
    key = torch.randn(2, 2, N, WIDTH, generator=random)
    value = torch.randn(2, 2, N, WIDTH, generator=random)
    largest = AttentionCall(query, key, value, causal=False).scores().abs().max()
    query = query * (size / largest)
    return AttentionCall(query.to(dtype), key.to(dtype), value.to(dtype), layer=7, **kwargs)


def window(width: int) -> Tensor:
    behind = torch.arange(N)[:, None] - torch.arange(N)
    return ((behind >= 0) & (behind < width))[None, None]


def fast(call: AttentionCall) -> Tensor:
    """What PyTorch's own fused kernel makes of a call."""
    z = scaled_dot_product_attention(
        call.query,
        call.key,
        call.value,
        attn_mask=call.mask,
        is_causal=call.mask is None,
        scale=call.scaling,
        enable_gqa=True,
    )
    return z.transpose(1, 2).contiguous()


def eager(call: AttentionCall) -> Tensor:
    """Attention written out in the dtype of the model, as transformers' eager mode does it."""
    key, value = (x.repeat_interleave(2, dim=1) for x in (call.key, call.value))
    scaling = WIDTH**-0.5 if call.scaling is None else call.scaling
    s = call.query @ key.transpose(-1, -2) * scaling
    if call.softcap is not None:
        s = torch.tanh(s / call.softcap) * call.softcap
    keep = window(N) if call.mask is None else call.mask
    s = s.masked_fill(~keep, torch.finfo(s.dtype).min)
    if call.sinks is not None:
        s = torch.cat([s, call.sinks.view(1, -1, 1, 1).expand(2, 4, N, 1).to(s.dtype)], -1)
    p = s.softmax(-1, dtype=torch.float32).to(value.dtype)[..., :N]
    return (p @ value).transpose(1, 2).contiguous()


def refused(call: AttentionCall, z: Tensor, match: str = "") -> None:
    with pytest.raises(WiringError, match=rf"^layer 7: .*{match}"):
        prove(call, z)


# --------------------------------------------------------------------------- what must pass


@settings(max_examples=80, deadline=None)
@given(
    st.sampled_from(DTYPES),
    st.floats(0.1, 30.0),
    st.integers(0, 99),
    st.sampled_from([None, 5, N]),
    st.sampled_from([fast, eager]),
)
def test_what_a_kernel_computed_passes_in_every_dtype_with_scores_up_to_30(
    dtype: torch.dtype, size: float, seed: int, width: int | None, kernel: Any
) -> None:
    mask = None if width is None else window(width)
    call = call_of(dtype, size, seed, mask=mask)
    prove(call, kernel(call))
    prove(call, kernel(call), rows=3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sinks_and_softcap_pass(dtype: torch.dtype) -> None:
    for size in (3.0, 30.0):
        for extra in ({"sinks": torch.linspace(-2, 4, 4)}, {"softcap": 5.0}):
            call = call_of(dtype, size, **extra)
            prove(call, eager(call))


@pytest.mark.parametrize("dtype", DTYPES)
def test_padding_rows_are_not_judged(dtype: torch.dtype) -> None:
    mask = window(N).repeat(2, 1, 1, 1)
    mask[0, :, :, :6] = False  # the first six rows of the first item see nothing
    call = call_of(dtype, mask=mask)
    prove(call, fast(call))
    prove(call, eager(call))  # there uniform, over everything


def test_values_of_any_size_pass() -> None:
    for factor in (0.0, 1e-20, 1e20):
        call = call_of(torch.float32)
        call = replace(call, value=call.value * factor)
        prove(call, fast(call))


def test_a_cached_step_and_a_single_token_pass() -> None:
    call = call_of(torch.float32)
    step = replace(call, query=call.query[:, :, -1:], mask=None)
    z = scaled_dot_product_attention(step.query, step.key, step.value, enable_gqa=True)
    prove(step, z.transpose(1, 2))
    one = replace(step, key=call.key[:, :, :1], value=call.value[:, :, :1])
    z = scaled_dot_product_attention(one.query, one.key, one.value, enable_gqa=True)
    prove(one, z.transpose(1, 2))


# --------------------------------------------------------------------------- what must not


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_output_of_another_mask_is_refused(dtype: torch.dtype) -> None:
    call = call_of(dtype, mask=window(N))
    blind = window(N).clone()
    blind[..., 5:, 2] = False
    refused(call, fast(replace(call, mask=blind)), "differs from the kernel's output by")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("off", [-1, 1])
def test_a_window_that_is_one_off_is_refused(dtype: torch.dtype, off: int) -> None:
    call = call_of(dtype, mask=window(5))
    refused(call, fast(replace(call, mask=window(5 + off))), "differs")


@pytest.mark.parametrize("dtype", DTYPES)
def test_swapped_heads_are_refused(dtype: torch.dtype) -> None:
    call = call_of(dtype)
    refused(call, fast(call)[:, :, [1, 0, 2, 3]], "differs")


@pytest.mark.parametrize("dtype", DTYPES)
def test_keys_dealt_out_to_the_wrong_query_heads_are_refused(dtype: torch.dtype) -> None:
    call = call_of(dtype)
    wrong = replace(call, key=call.key.repeat(1, 2, 1, 1), value=call.value.repeat(1, 2, 1, 1))
    refused(call, fast(wrong), "differs")


@pytest.mark.parametrize("size", [3.0, 10.0, 30.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_scores_that_are_5_percent_too_large_are_refused(dtype: torch.dtype, size: float) -> None:
    call = call_of(dtype, size)
    refused(call, fast(replace(call, scaling=1.05 * WIDTH**-0.5)), "differs")


@pytest.mark.parametrize("size", [10.0, 30.0])
def test_scores_that_are_twice_too_large_are_refused_even_in_bfloat16(size: float) -> None:
    # its 8 bits explain more than 5 percent
    call = call_of(torch.bfloat16, size)
    refused(call, fast(replace(call, scaling=2 * WIDTH**-0.5)), "differs")


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_leak_from_the_future_is_refused(dtype: torch.dtype) -> None:
    leak = window(N).clone()
    leak[..., 3, 9] = True
    call = call_of(dtype, mask=leak)
    refused(call, fast(call), "a causal row attends to its future with 0.")
    prove(replace(call, causal=False), fast(call))
    honest = replace(call, mask=None)
    refused(honest, fast(call), "differs")


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_missing_softcap_or_sink_is_refused(dtype: torch.dtype) -> None:
    for extra in ({"sinks": torch.full((4,), 3.0)}, {"softcap": 1.0}):
        call = call_of(dtype, **extra)
        refused(replace(call, softcap=None, sinks=None), eager(call), "differs")


@pytest.mark.parametrize("part", ["query", "key", "value", "z", "one z"])
def test_not_a_number_is_refused_wherever_it_is(part: str) -> None:
    call = call_of(torch.float32)
    pairs = [(call, fast(call))]
    if part == "z":
        pairs[0][1].mul_(math.nan)
    elif part == "one z":
        pairs[0][1][1, 7, 2, 3] = math.nan
    else:  # also where a kernel makes a number of it
        broken = replace(call, **{part: getattr(call, part) * math.nan})
        pairs = [(broken, fast(broken)), (broken, fast(call))]
    for broken, z in pairs:
        with pytest.raises((WiringError, FloatingPointError), match=r"^layer 7: "):
            prove(broken, z)


def test_one_wrong_number_in_one_row_is_refused() -> None:
    call = call_of(torch.float32)
    z = fast(call)
    z[1, 23, 3, 0] += 1e-3
    refused(call, z, "differs")


def test_only_the_rows_that_are_looked_at_are_judged() -> None:
    call = call_of(torch.float32)
    z = fast(call)
    z[:, 1] += 1
    prove(call, z, rows=2)  # the first and the last
    refused(call, z)


def test_the_message_shows_the_error_and_the_versions() -> None:
    call = call_of(torch.float32)
    with pytest.raises(WiringError) as caught:
        prove(call, fast(call) + 1)
    message = str(caught.value)
    assert "differs from the kernel's output by 4, " in message  # sqrt of 16 ones
    assert "times what torch.float32 explains" in message
    for name in ("torch", "transformers", "nnsight"):
        assert f"{name} {version(name)}" in message


def test_the_proof_leaves_no_gradient_behind_and_changes_nothing() -> None:
    call = call_of(torch.float32)
    query = call.query.clone().requires_grad_()
    z = fast(replace(call, query=query))
    prove(replace(call, query=query), z)
    assert torch.equal(query, call.query)
    assert query.grad is None


def test_under_eager_attention_the_mask_alone_must_hide_the_future() -> None:
    leak = window(N).clone()
    leak[..., 3, 5] = True  # row 3 sees key 5, in the mask and in what the kernel returned
    call = replace(call_of(torch.float32), mask=leak, causal=False)
    prove(call, eager(call))  # nothing says that this model is causal
    with pytest.raises(WiringError, match="layer 7: a causal row attends to its future"):
        prove(call, eager(call), causal=True)
