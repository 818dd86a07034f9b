"""How important a head is by the gradient of the loss: one forward and one backward, all heads.

Gradients are local: they say what a small change would do, and a head whose output is saturated or
has stand-ins may cost much more, or less, than its gradient says. Put a `sweep` beside them.
"""

from collections.abc import Callable, Sequence
from typing import Unpack

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from probe.attention import AttentionCall
from probe.errors import InputError
from probe.hearing import reading
from probe.interventions import Edit, lasting, where
from probe.loss import next_token_nll
from probe.model import Model
from probe.plans import Item
from probe.reading import logits
from probe.selection import Selector
from recipes._choosing import Pairs
from recipes._jobs import Options, planned
from recipes._placing import absolute
from recipes.effects import scored_tokens
from recipes.references import Reference


def importance(
    model: Model,
    problems: object,
    *,
    tokens: Selector = None,
    reference: Reference | None = None,
    **options: Unpack[Options],
) -> xr.DataArray:
    """The derivative of each problem's loss for a gate on each head's output (Michel et al. 2019).

        I_h = sum_t <z_h[t], dL/dz_h[t]>         (arXiv 1905.10650)

    The loss of a problem is the mean over its chosen tokens. `pruning_score` makes of it the score
    of the paper, the mean of |I_h| over problems. The absolute value is taken of each problem: of a
    batch together (as in a published script) signs cancel.

    Args:
        model: The model; its weights need no gradients.
        problems: An opened store or its folder, or whatever `probe.problems` reads.
        tokens: Which tokens' predictions count: see `effects.effect`.
        reference: Use (z_h - reference) in place of z_h: the HISP score (Conmy et al. 2023).
        options: `batch_size` and `max_length`.

    Returns:
        (problem, layer, head) float32, nats, signed: positive where more of the head's output would
        raise the loss. NaN where a layer has no such head, and where no prediction counts.

    Raises:
        InputError: Something cannot be used.

    Example:
        >>> scores = importance(model, probe.demos.repeated(count=2))
        >>> scores.dims
        ('problem', 'layer', 'head')
    """
    todo, tokens = planned(model, problems, options), lasting(tokens)
    scored = [scored_tokens(model, item, tokens) for item in todo.items]
    out = np.full((len(todo.items), len(model.layers), model.n_heads), np.nan, "float32")
    with reading(model.module), torch.enable_grad():
        for batch in todo.batches:
            items = [todo.items[i] for i in batch]
            found = _of_batch(model, items, [scored[i] for i in batch], reference)
            for layer, values in found.items():
                out[list(batch), model.layers.index(layer), : values.shape[1]] = values.cpu()
    out[[n for n, own in enumerate(scored) if not own]] = np.nan  # nothing was predicted
    ids = np.array([item.problem.id for item in todo.items], dtype=object)
    coords = {"problem": ids, "layer": list(model.layers), "head": range(model.n_heads)}
    return xr.DataArray(out, coords=coords, dims=tuple(coords), name="gradient_importance")


def pruning_score(scores: xr.DataArray, *, normalised: bool = True) -> xr.DataArray:
    """The mean of |I_h| over problems, each layer scaled to length 1 as in the paper.

    Args:
        scores: From `importance`, (problem, layer, head).
        normalised: Divide by the layer's L2 norm; without it layers can be compared.

    Returns:
        (layer, head), float64.

    Example:
        >>> scores = importance(model, probe.demos.repeated(count=2))
        >>> round(float((pruning_score(scores) ** 2).sum("head").mean()), 4)
        1.0
    """
    mean = abs(scores).astype("float64").mean("problem")
    if not normalised:
        return mean
    norm = (mean**2).sum("head") ** 0.5
    return mean / norm.where(norm > 0)


def finite_difference(
    model: Model,
    problems: object,
    heads: Pairs,
    *,
    step: float = 0.01,
    tokens: Selector = None,
    **options: Unpack[Options],
) -> xr.DataArray:
    """What `importance` should be, by changing each head's output a little up and down.

    Args:
        model: The model; in float64 the two agree to more digits.
        problems: As for `importance`.
        heads: (layer, head) pairs.
        step: z_h is multiplied by 1 + step and by 1 - step.
        tokens: As for `importance`.
        options: `batch_size` and `max_length`.

    Returns:
        (problem, pair) float64: (L(1 + step) - L(1 - step)) / (2 step).

    Raises:
        InputError: No such head, or no step.

    Example:
        >>> finite_difference(model, probe.demos.repeated(count=2), [(0, 3)]).shape
        (2, 1)
    """
    if not 0 < step < 1:
        raise InputError(f"step={step!r}. Give a number between 0 and 1.")
    todo, tokens, pairs = planned(model, problems, options), lasting(tokens), absolute(heads, model)
    scored = [scored_tokens(model, item, tokens) for item in todo.items]
    out = np.full((len(todo.items), len(pairs)), np.nan)
    with reading(model.module):
        for batch in todo.batches:
            items = [todo.items[i] for i in batch]
            for n, (layer, head) in enumerate(pairs):
                ends = []
                for factor in (1 + step, 1 - step):
                    gate = Edit(site="z", function=_times(factor), layers=layer, heads=[head])
                    rows = logits(model, items, gate)
                    ends.append(_losses(rows, items, [scored[i] for i in batch]))
                out[list(batch), n] = ((ends[0] - ends[1]) / (2 * step)).cpu()
    ids = np.array([item.problem.id for item in todo.items], dtype=object)
    coords = {"problem": ids, "pair": [f"L{la}H{h}" for la, h in pairs]}
    return xr.DataArray(out, coords=coords, dims=("problem", "pair"), name="finite_difference")


def _of_batch(
    model: Model,
    items: Sequence[Item],
    scored: Sequence[Sequence[int]],
    reference: Reference | None,
) -> dict[int, Tensor]:
    """I_h of each problem by layer, (problem, head) float64."""
    kept: dict[int, tuple[Tensor, Tensor]] = {}

    def keep(z: Tensor, call: AttentionCall) -> Tensor:
        # A tensor of its own on the model's path; the lowest layer has no gradient by itself where
        # the weights have none.
        own = (z if z.requires_grad else z.requires_grad_()).view_as(z)
        real = (where(call).query >= 0)[:, :, None, None]
        gone = 0.0 if reference is None else reference.at(call, tuple(range(call.n_heads)))
        kept[call.layer] = own, torch.where(real, z.detach().double() - gone, 0.0)
        return own

    rows = logits(model, items, Edit(site="z", function=keep))
    # Problems do not see each other, so the gradient of the sum is that of each.
    total = _losses(rows, items, scored).nan_to_num(0.0).sum()
    grads = torch.autograd.grad(total, [own for own, _ in kept.values()])
    return {
        layer: (grad.double() * z).sum((1, 3))
        for (layer, (_, z)), grad in zip(kept.items(), grads, strict=True)
    }


def _losses(rows: Tensor, items: Sequence[Item], scored: Sequence[Sequence[int]]) -> Tensor:
    """Mean loss of the chosen tokens of each problem, (problem) nats; NaN of none."""
    each = []
    for row, item, own in zip(rows, items, scored, strict=True):
        nll = next_token_nll(row[: item.length], torch.tensor(item.token_ids))
        each.append(nll[torch.tensor(own, dtype=torch.long, device=nll.device) - 1].double().mean())
    return torch.stack(each)


def _times(factor: float) -> Callable[[Tensor, AttentionCall], Tensor]:
    return lambda z, _: z * factor


__all__ = ["finite_difference", "importance", "pruning_score"]
