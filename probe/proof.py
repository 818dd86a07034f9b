"""The proof that every capture carries: what is read is what the model computed."""

from importlib.metadata import version

import torch
from torch import Tensor

from probe.attention import AttentionCall
from probe.errors import WiringError


def prove(call: AttentionCall, z: Tensor, *, causal: bool | None = None, rows: int = 64) -> None:
    """Check that what is read of an attention call is what the model computed with.

    On up to `rows` rows, spread evenly: patterns sum to 1 (less with sinks), nothing of a causal
    model's future is attended, and pattern @ value is what the model's own kernel returned.
    The tolerance follows from the dtype: a kernel stores a score of size s to within unit * s, and
    sums it in float32 to within that unit * |query| |key|, which is more where terms cancel; either
    moves z by as much times the size of the values.

    Args:
        call: What the kernel was given; not in training with dropout.
        z: (batch, query, head, value_dim), what it returned.
        causal: Whether the model hides the future; default what `call` says, which is nothing
            under eager attention, where only the mask hides it.
        rows: At most so many query rows are checked.

    Raises:
        WiringError: With the layer, the error and the versions.
        FloatingPointError: The model itself computes NaN or infinity.
    """
    index = _spread(call, rows)
    with torch.no_grad():
        scores = call.scores(queries=index)
        pattern = call.softmax(scores)
        attends = (scores != -torch.inf).any(-1)  # also where they are not numbers
        computed = z[:, index].transpose(1, 2)[attends]
        if not bool(computed.isfinite().all()):
            _overflows(call, z)
        hides = call.causal if causal is None else causal
        _check_rows(call, pattern, attends, index, z, causal=hides, slack=1e-4)
        v = _largest(call.value, call.share)
        error = (call.mix(pattern).float() - z[:, index].float()).norm(dim=-1).transpose(1, 2)
        unit = torch.finfo(z.dtype).eps / 2
        terms = call.query[:, :, index].float().norm(dim=-1) * _largest(call.key, call.share)
        terms = terms * abs(call.factor)
        size = scores.masked_fill(scores == -torch.inf, 0.0).abs().amax(-1)
        moved = unit * (8 + 4 * size) + torch.finfo(torch.float32).eps / 2 * 4 * terms
        excess = (error / (v * moved).clamp_min(1e-30))[attends]
        if excess.numel() and not bool(excess.max() <= 1):
            _fail(
                call,
                f"pattern @ value differs from the kernel's output by {error[attends].max():.3g}, "
                f"{excess.max():.3g} times what {z.dtype} explains",
            )


def prove_softmax(call: AttentionCall, own: Tensor, *, causal: bool, rows: int = 64) -> None:
    """Check what a module's own softmax made of its scores, on up to `rows` rows.

    Rows sum to 1, nothing of a causal model's future is attended, and what is read as masked the
    model leaves out too.

    Args:
        call: The scores: see `probe.owncode.of_scores`.
        own: (batch, head, query, key), what the softmax returned.
        causal: Whether the model hides the future.
        rows: At most so many query rows are checked.

    Raises:
        WiringError: With the layer, the error and the versions.
        FloatingPointError: The model itself computes NaN or infinity.
    """
    index = _spread(call, rows)
    with torch.no_grad():
        assert call.mask is not None  # which is the scores
        scores = call.mask[:, :, index]
        attends = (scores != -torch.inf).any(-1)  # also where they are not numbers
        pattern = own[:, :, index].to(scores.dtype)
        slack = 8 * torch.finfo(own.dtype).eps
        _check_rows(call, pattern, attends, index, own, causal=causal, slack=max(slack, 1e-4))
        error = (pattern - call.softmax(scores)).abs().amax(-1)[attends]
        if error.numel() and float(error.max()) > slack:
            _fail(call, f"the model's softmax differs from that of its scores by {error.max():.3g}")


def prove_mixing(call: AttentionCall, pattern: Tensor, values: Tensor, z: Tensor) -> None:
    """Check that pattern @ values is z, within what the dtype of z explains.

    Args:
        call: For messages.
        pattern: (batch, head, query, key).
        values: (batch, key, head, head_dim), z where each row attends to itself alone.
        z: (batch, query, head, head_dim), what went into the output projection.

    Raises:
        WiringError: With the layer, the error and the versions.
    """
    exact = torch.promote_types(z.dtype, torch.float32)
    mixed = torch.einsum("bhqk,bkhd->bqhd", pattern.to(exact), values.to(exact))
    error = (mixed - z.to(exact)).norm(dim=-1)
    size = values.to(exact).norm(dim=-1).amax(1, keepdim=True)
    excess = error / (8 * torch.finfo(z.dtype).eps * size).clamp_min(1e-30)
    if not bool((excess <= 1).all()):
        _fail(
            call,
            f"pattern @ value differs from what goes into the output projection by "
            f"{error.max():.3g}, {excess.max():.3g} times what {z.dtype} explains",
        )


def _spread(call: AttentionCall, rows: int) -> list[int]:
    """Up to so many rows, evenly."""
    index = torch.linspace(0, call.n_queries - 1, min(rows, call.n_queries)).long()
    return [int(i) for i in index]


def _check_rows(
    call: AttentionCall,
    pattern: Tensor,
    attends: Tensor,
    index: list[int],
    computed: Tensor,
    *,
    causal: bool,
    slack: float,
) -> None:
    """Check rows of a pattern that attend to something: finite, sum 1, no future."""
    total = pattern.sum(-1)[attends]
    if not bool(total.isfinite().all()):
        _overflows(call, computed)
    if bool((total > 1 + slack).any()) or (call.sinks is None and bool((total < 1 - slack).any())):
        _fail(call, f"rows sum to {total.min():.6g} .. {total.max():.6g}, not to 1")
    if causal and call.n_queries == call.n_keys:
        future = torch.arange(call.n_keys) > torch.as_tensor(index)[:, None]
        ahead = pattern.masked_fill(~attends[..., None], 0.0)
        ahead = ahead.masked_select(future.to(pattern.device))
        if ahead.numel() and ahead.max() > 0:
            _fail(call, f"a causal row attends to its future with {ahead.max():.6g}")


def _overflows(call: AttentionCall, computed: Tensor) -> None:
    raise FloatingPointError(
        f"layer {call.layer}: the model's own attention is not finite in {computed.dtype}. Its "
        "weights or its dtype overflow; load it in float32"
    )


def _largest(vectors: Tensor, share: int) -> Tensor:
    """The longest key or value of each query head: (batch, head, 1) float32."""
    longest: Tensor = vectors.float().norm(dim=-1).amax(-1, keepdim=True)
    return longest.repeat_interleave(share, dim=1)


def _fail(call: AttentionCall, what: str) -> None:
    names = ("torch", "transformers", "nnsight")
    versions = ", ".join(f"{name} {version(name)}" for name in names)
    raise WiringError(
        f"layer {call.layer}: {what}. What is read is not what the model computes, so nothing is "
        "recorded; this model's attention does something that the tap does not know. Load the "
        f"model with attn_implementation='eager', or give another. Versions: {versions}."
    )
