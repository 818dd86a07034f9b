"""Where the blocks of a model are, its attention in them, and the projections that are given z."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from probe.attention import AttentionCall
from probe.interventions import Edit
from probe.model import Model
from probe.plans import Item
from probe.reading import logits


class Unfit(Exception):
    """Why blocks cannot be skipped."""


@dataclass(frozen=True, slots=True, eq=False)
class Anatomy:
    """Where a model's blocks can be left out.

    Attributes:
        stack: All blocks, in the order in which they run.
        place: Where each layer's block is in the stack.
        out: The module of each layer that is given z.
        tuples: Whether a block returns a tuple, its hidden states first.
        attention: The attention module of each layer that hands on what `out` returns, and what
            else it returns, if that is a tuple: it need not run where z is given.
    """

    stack: Sequence[nn.Module]
    place: Mapping[int, int]
    out: Mapping[int, nn.Module]
    tuples: Sequence[bool]
    attention: Mapping[int, tuple[nn.Module, tuple[Any, ...] | None]]


def look(model: Model, item: Item) -> Anatomy:
    """Find the blocks of a model, in one forward over a problem.

    Raises:
        Unfit: They are no chain, or an output projection is not given z as it is.
    """
    attention = {layer: model.tap.layers[layer]._module for layer in model.layers}
    stack, place = stack_of(model.module, attention)
    passed: dict[nn.Module, tuple[Tensor, Any]] = {}
    given: dict[int, nn.Module] = {}
    more: dict[int, bool] = {}  # whether it is given more than that
    gave: dict[nn.Module, Any] = {}
    z: dict[int, Tensor] = {}

    def block(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if module in passed:
            raise Unfit("a block runs more than once in a forward")
        passed[module] = hidden_of(args, kwargs), output

    def see(value: Tensor, call: AttentionCall) -> None:
        z[call.layer] = rearrange(value, "b q h d -> b q (h d)")

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        if module in (*given.values(), *attention.values()):
            gave[module] = output

    with ExitStack() as hooks:
        for module in stack:
            handle = module.register_forward_hook(block, with_kwargs=True)
            hooks.callback(handle.remove)
        for layer, module in attention.items():
            for part in module.modules():
                hooks.callback(part.register_forward_hook(keep).remove)

                def inner(part: nn.Module, args: Any, kwargs: Any, layer: int = layer) -> None:
                    fresh = layer in z and layer not in given  # what is inside it is given z by it
                    if fresh and args and _same(args[0], z[layer]):
                        given[layer] = part
                        more[layer] = bool(args[1:] or kwargs)

                if part is not module:
                    handle = part.register_forward_pre_hook(inner, with_kwargs=True)
                    hooks.callback(handle.remove)
        logits(model, [item], Edit(site="z", function=see))
    if missing := [layer for layer in attention if layer not in given]:
        raise Unfit(f"no module of layer {missing[0]} is given z as it is")
    if any(module not in passed for module in stack):
        raise Unfit("not all blocks ran")
    results = [passed[module][1] for module in stack]
    for before, after in pairwise(stack):
        if not _same(_first(passed[before][1]), passed[after][0]):
            raise Unfit("what goes into a block is not what the block before it returned")
    tuples = [isinstance(r, tuple) for r in results]
    alone = {
        layer: (module, gave[module][1:] if isinstance(gave[module], tuple) else None)
        for layer, module in attention.items()
        if not more[layer] and _hands_on(gave.get(module), gave.get(given[layer]))
    }
    return Anatomy(stack, place, given, tuples, alone)


def _hands_on(output: Any, hidden: Any) -> bool:
    """Whether a module returns nothing but some hidden states."""
    first, more = _parts(output)
    return not more and _same(first, hidden)


def stack_of(
    module: nn.Module, attention: Mapping[int, nn.Module]
) -> tuple[list[nn.Module], dict[int, int]]:
    """The list of blocks that holds all attention modules, and the place of each layer in it."""
    for candidate in module.modules():
        if isinstance(candidate, nn.ModuleList):
            parts = [set(block.modules()) for block in candidate]
            place = {
                layer: n for layer, m in attention.items() for n, p in enumerate(parts) if m in p
            }
            if len(place) == len(attention) == len(set(place.values())):
                return list(candidate), place
    raise Unfit("its layers are not blocks of one list")


def hidden_of(args: Any, kwargs: Mapping[str, Any]) -> Tensor:
    """The hidden states that a block is given, (batch, position, width)."""
    hidden = kwargs.get("hidden_states", args[0] if args else None)
    if not isinstance(hidden, Tensor) or hidden.ndim != 3:
        raise Unfit("a block is not given hidden states (batch, position, width)")
    return hidden


def _parts(output: Any) -> tuple[Any, bool]:
    """The first of what a module returned, and whether there are other tensors beside it."""
    first, *others = output if isinstance(output, tuple) and output else (output,)
    return first, any(isinstance(other, Tensor) for other in others)


def _first(output: Any) -> Any:
    """The hidden states that a block returned; other tensors beside them would be lost."""
    first, more = _parts(output)
    if more:
        raise Unfit("a block returns more than its hidden states")
    return first


def _same(some: Any, other: Any) -> bool:
    return (
        isinstance(some, Tensor)
        and isinstance(other, Tensor)
        and (some is other or (some.shape == other.shape and torch.equal(some, other)))
    )
