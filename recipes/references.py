"""The mean z of every head over a stated set of problems, to ablate with."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, Unpack

import torch
from torch import Tensor

from probe.attention import AttentionCall
from probe.errors import InputError
from probe.hearing import reading
from probe.interventions import Edit, where
from probe.model import Model
from probe.plans import Plan
from probe.reading import logits
from recipes._jobs import Options, planned


@dataclass(frozen=True, eq=False)
class Reference:
    """The mean z of every head over a stated set of problems.

    Attributes:
        z: By layer, (head, head_dim); or by position, (position, head, head_dim). float32.
        source: What it is the mean of, in words.
    """

    z: Mapping[int, Tensor]
    source: str

    def at(self, call: AttentionCall, heads: tuple[int, ...]) -> Tensor:
        """The means for a call: (batch or 1, query or 1, head, head_dim).

        Raises:
            InputError: There is none for its layer, or for one of its positions.
        """
        if call.layer not in self.z:
            raise InputError(f"the reference ({self.source}) has no layer {call.layer}.")
        z = self.z[call.layer].to(call.device)
        if z.ndim == 2:
            return z[None, None, list(heads)]
        at = where(call).query
        if int(at.max()) >= len(z):
            raise InputError(
                f"the reference ({self.source}) has means for {len(z)} positions, and a token is "
                f"at {int(at.max())}. Take it over longer problems, or with per='all'."
            )
        return z[at.clamp_min(0)][:, :, list(heads)]


def reference(
    model: Model,
    problems: object,
    *,
    per: Literal["all", "position"] = "all",
    **options: Unpack[Options],
) -> Reference:
    """The mean z of every head, to ablate with.

    Args:
        model: The model, perhaps inside `model.intervene`.
        problems: An opened store or its folder, or whatever `probe.problems` reads.
        per: "all": one mean over all tokens of all problems; "position": one for each position,
            over the problems that reach it.
        options: `batch_size` and `max_length`.

    Returns:
        Means, summed in float64.

    Raises:
        InputError: Something cannot be used.

    Example:
        >>> means = reference(model, probe.demos.repeated(count=4))
        >>> means.z[0].shape, means.source
        (torch.Size([4, 16]), 'mean over all tokens of 4 problems of list')
    """
    if per not in ("all", "position"):
        raise InputError(f"per={per!r}. Choose 'all' or 'position'.")
    return _of_plan(model, planned(model, problems, options), per)


def stated(one: Any, model: Model, todo: Plan) -> Any:
    """An intervention that takes the mean of the batch that runs, with that of all problems."""
    if getattr(one, "mode", None) != "mean" or getattr(one, "reference", 0) is not None:
        return one
    return replace(one, reference=_of_plan(model, todo, "all"))


def _of_plan(model: Model, todo: Plan, per: str) -> Reference:
    longest = max(item.length for item in todo.items)
    sums: dict[int, Tensor] = {}
    count = torch.zeros(longest, dtype=torch.float64)

    def add(z: Tensor, call: AttentionCall) -> None:
        at = where(call).query.expand(z.shape[0], -1).to("cpu")
        total = sums.setdefault(call.layer, torch.zeros(longest, *z.shape[2:], dtype=torch.float64))
        total.index_add_(0, at[at >= 0], z.detach().to("cpu", torch.float64)[at >= 0])
        if call.layer == model.layers[0]:
            count.index_add_(0, at[at >= 0], torch.ones(int((at >= 0).sum()), dtype=torch.float64))

    with reading(model.module):
        for batch in todo.batches:
            logits(model, [todo.items[i] for i in batch], Edit(site="z", function=add))
    where_from = f"{len(todo.items)} problems of {todo.attrs['problems']['source']}"
    if per == "position":
        means = {layer: (s / count[:, None, None]).float() for layer, s in sums.items()}
        return Reference(means, f"mean at each position of {where_from}")
    means = {layer: (s.sum(0) / count.sum()).float() for layer, s in sums.items()}
    return Reference(means, f"mean over all tokens of {where_from}")
