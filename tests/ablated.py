"""What the tests of ablation share: heads taken out by hand, of plain transformers models."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tests.edited import Step
from tests.references import projections

N_HEADS = 4
PAIRS = [(0, 1), (1, 0), (1, 3), (-1, -1)]  # of three layers
OUT = {0: [1], 1: [0, 3], 2: [3]}


def taken_out(dim: int, step: Step) -> Step:
    """A step of attention by hand that only the heads in `OUT` go through."""

    def some(layer: int, x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        index = torch.tensor(OUT[layer])
        return x.index_copy(
            dim, index, step(layer, x.index_select(dim, index), rows, columns).to(x.dtype)
        )

    return some


def uniform(_: int, p: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """The same for all keys that had any weight."""
    seen = (p > 0).to(p.dtype)
    return seen / seen.sum(-1, keepdim=True).clamp_min(1)


def first(_: int, p: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """All on the first key that had any weight."""
    new = torch.zeros_like(p)
    for at in (p > 0).any(-1).nonzero().tolist():
        new[*at, int((p[*at] > 0).nonzero()[0])] = 1
    return new


def identity(_: int, p: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    own = (rows[:, :, None] == columns[:, None, :]) & (rows >= 0)[:, :, None]
    return own[:, None].to(p.dtype).expand_as(p)


def mean_of_real(_: int, z: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    real = torch.stack([x for row, some in zip(rows, z, strict=True) for x in some[row >= 0]])
    return real.mean(0).expand_as(z)


PATTERNS = {"uniform": uniform, "first": first, "identity": identity}


@contextmanager
def on_z(model: Any, function: Callable[[int, Tensor], Tensor | None]) -> Iterator[None]:
    """Give the output projections of a plain model another input.

    Args:
        model: One of the five families, that nothing taps.
        function: Gets the layer and z (batch, query, head, head_dim); None leaves it.
    """
    handles = []
    for layer, module in enumerate(projections(model)):

        def hook(_: nn.Module, args: Any, layer: int = layer) -> Any:
            new = function(layer, args[0].unflatten(-1, (N_HEADS, -1)))
            return None if new is None else (new.flatten(2).to(args[0].dtype),)

        handles.append(module.register_forward_pre_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def logits_of(model: Any, ids: Sequence[int]) -> Tensor:
    """(position, vocabulary) of one problem without padding."""
    logits: Tensor = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    return logits


def z_of(model: Any, ids: Sequence[int]) -> list[Tensor]:
    """(position, head, head_dim) of each layer, what goes into the output projections."""
    found: list[Tensor] = []
    with on_z(model, lambda _, z: found.append(z[0].clone())):
        logits_of(model, ids)
    return found


def without(model: Any, ids: Sequence[int], layer: int, head: int, new: Tensor) -> Tensor:
    """Logits with the z of one head replaced by (position, head_dim) or what expands to it."""

    def put(la: int, z: Tensor) -> Tensor | None:
        if la != layer:
            return None
        z = z.clone()
        z[:, :, head] = new
        return z

    with on_z(model, put):
        return logits_of(model, ids)


def nll(logits: Tensor, ids: Sequence[int]) -> list[float]:
    """Of each token but the first, one at a time in float64."""
    p = logits.double().log_softmax(-1).tolist()
    return [-p[n][token] for n, token in enumerate(ids[1:])]


def mean_nll(logits: Tensor, ids: Sequence[int], scored: Sequence[int] | None = None) -> float:
    """Over the tokens at some positions, default all that have one before them."""
    each = nll(logits, ids)
    some = [each[n - 1] for n in (range(1, len(ids)) if scored is None else scored)]
    return math.fsum(some) / len(some)
