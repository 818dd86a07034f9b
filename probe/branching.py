"""The layers above an edit, run again for several variants of one problem.

A `Trunk` is one forward over one problem, kept: what goes into each block and into each output
projection. A branch leaves it at a layer: the blocks below are skipped, the layer's output
projection is given several versions of z, one for each variant, and the model's own code does the
rest, at the price of its MLP and the blocks above.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from probe.attention import AttentionCall
from probe.interventions import Edit, Intervention
from probe.model import Model
from probe.plans import Item
from probe.reading import inputs, logits, output_logits

log = logging.getLogger("probe")


@dataclass(frozen=True, slots=True, eq=False)
class Trunk:
    """One forward over one problem, kept.

    Attributes:
        item: The problem.
        logits: (1, position, vocabulary).
        z: (1, position, head, head_dim) of each layer, before the output projection.
        entering: What goes into the block of each layer, (1, position, width); empty where blocks
            cannot be skipped.
    """

    item: Item
    logits: Tensor
    z: Mapping[int, Tensor]
    entering: Mapping[int, Tensor]


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


def grow(model: Model, item: Item, anatomy: Anatomy | None) -> Trunk:
    """Run one problem, and keep what branches need.

    Args:
        model: The model, in eval mode, without gradients.
        item: The problem.
        anatomy: From `dissect`; without it branches run the whole model.

    Raises:
        InputError: The model returns no logits of every token.
    """
    z: dict[int, Tensor] = {}
    entering: dict[int, Tensor] = {}

    def look(value: Tensor, call: AttentionCall) -> None:
        z[call.layer] = value

    with ExitStack() as stack:
        for layer, n in (anatomy.place if anatomy else {}).items():
            module = anatomy.stack[n]  # type: ignore[union-attr]

            def keep(_: nn.Module, args: Any, kwargs: Any, layer: int = layer) -> None:
                entering[layer] = _hidden(args, kwargs).clone()  # blocks may add in place

            handle = module.register_forward_pre_hook(keep, with_kwargs=True)
            stack.callback(handle.remove)
        found = logits(model, [item], Edit(site="z", function=look))
    return Trunk(item, found, z, entering)


def alone(model: Model, trunk: Trunk, one: Intervention) -> Mapping[int, Tensor]:
    """What z of each layer becomes under an intervention there, with all below it as it was.

    One forward does for all layers: each hands on the z that it had.

    Args:
        model: The model.
        trunk: The problem.
        one: What changes the layers.

    Returns:
        (1, position, head, head_dim) by layer.
    """
    new: dict[int, Tensor] = {}

    def swap(value: Tensor, call: AttentionCall) -> Tensor:
        new[call.layer] = value
        return trunk.z[call.layer]

    logits(model, [trunk.item], one, Edit(site="z", function=swap))
    return new


def branch(model: Model, trunk: Trunk, anatomy: Anatomy | None, layer: int, z: Tensor) -> Tensor:
    """Logits of variants of a problem that differ in one layer's z.

    Args:
        model: The model.
        trunk: The problem.
        anatomy: As the trunk was grown with.
        layer: Where the variants begin.
        z: (variant, position, head, head_dim), what each variant's heads return there.

    Returns:
        (variant, position, vocabulary).
    """
    if anatomy is None:
        put = Edit(site="z", function=lambda value, _: z, layers=[layer])
        return logits(model, [trunk.item] * len(z), put)
    with _grafted(anatomy, layer, trunk.entering[layer], z):
        return output_logits(model, inputs(model, [trunk.item]))


def dissect(model: Model, item: Item) -> Anatomy | None:
    """Find the blocks of a model, and prove on one problem that a branch equals the whole.

    Returns:
        Where they are; None, with a line in the log, where the model does not run its layers as one
        chain of blocks, or its output projections are not given z as it is: branches then run the
        whole model.
    """
    try:
        anatomy = _look(model, item)
        trunk = grow(model, item, anatomy)
        for layer in anatomy.place:
            _prove(model, trunk, anatomy, layer)
    except Unfit as reason:
        log.warning("%s runs whole for every variant: %s", model.name, reason)
        return None
    return anatomy


class Unfit(Exception):
    """Why blocks cannot be skipped."""


def _prove(model: Model, trunk: Trunk, anatomy: Anatomy, layer: int) -> None:
    """Prove branches of one layer: with its z as it is, and beside it z of 0 in the same batch.

    Raises:
        Unfit: They are not what the whole model gives.
    """
    z = trunk.z[layer]
    off = torch.zeros_like(z)
    try:
        whole = torch.cat([trunk.logits, branch(model, trunk, None, layer, off)])
        same = branch(model, trunk, anatomy, layer, z)
        both = branch(model, trunk, anatomy, layer, torch.cat([z, off]))
    except Exception as error:  # from within the model's own code, which may be of any kind
        raise Unfit(f"from layer {layer} on, {type(error).__name__}: {error}") from error
    if not torch.equal(same, trunk.logits):
        raise Unfit(f"from layer {layer} on, the same inputs gave other logits")
    # Two together round differently from each alone.
    near = torch.finfo(whole.dtype).eps ** 0.5 * float(whole.abs().max())
    if both.shape != whole.shape or not float((both - whole).abs().max()) <= near:
        raise Unfit(f"from layer {layer} on, two variants in a batch gave other logits than alone")


def _look(model: Model, item: Item) -> Anatomy:
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
        passed[module] = _hidden(args, kwargs), output

    def look(value: Tensor, call: AttentionCall) -> None:
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
        logits(model, [item], Edit(site="z", function=look))
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
    first, *rest = output if isinstance(output, tuple) and output else (output,)
    return _same(first, hidden) and not any(isinstance(other, Tensor) for other in rest)


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


@contextmanager
def _grafted(anatomy: Anatomy, layer: int, entering: Tensor, z: Tensor) -> Iterator[None]:
    """Skip the blocks below a layer and its attention, and give its output projection other z."""
    place = anatomy.place[layer]

    def enter(_: nn.Module, args: Any, kwargs: Any) -> Any:
        if "hidden_states" in kwargs:
            return args, kwargs | {"hidden_states": entering.clone()}
        return (entering.clone(), *args[1:]), kwargs

    def replace(_: nn.Module, args: Any) -> Any:
        return (rearrange(z, "b q h d -> b q (h d)"), *args[1:])

    def attend(*_: Any, **__: Any) -> Any:
        hidden = out(rearrange(z, "b q h d -> b q (h d)"))
        return hidden if rest is None else (hidden, *rest)

    out, (attention, rest) = anatomy.out[layer], anatomy.attention.get(layer, (None, None))
    with ExitStack() as stack:
        for module, is_tuple in zip(anatomy.stack[:place], anatomy.tuples, strict=False):
            stack.enter_context(_running(module, _skip_to_tuple if is_tuple else _skip))
        handle = anatomy.stack[place].register_forward_pre_hook(enter, with_kwargs=True)
        stack.callback(handle.remove)
        if attention is None:
            stack.callback(out.register_forward_pre_hook(replace).remove)
        else:
            stack.enter_context(_running(attention, attend))
        yield


@contextmanager
def _running(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """A module that runs other code."""
    own = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        if own is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = own


def _skip(*args: Any, **kwargs: Any) -> Tensor:
    """A block that hands on what it is given."""
    return _hidden(args, kwargs)


def _skip_to_tuple(*args: Any, **kwargs: Any) -> tuple[Tensor]:
    return (_hidden(args, kwargs),)


def _hidden(args: Any, kwargs: Mapping[str, Any]) -> Tensor:
    hidden = kwargs.get("hidden_states", args[0] if args else None)
    if not isinstance(hidden, Tensor) or hidden.ndim != 3:
        raise Unfit("a block is not given hidden states (batch, position, width)")
    return hidden


def _first(output: Any) -> Any:
    """The hidden states that a block returned; other tensors beside them would be lost."""
    if not isinstance(output, tuple):
        return output
    if any(isinstance(other, Tensor) for other in output[1:]):
        raise Unfit("a block returns more than its hidden states")
    return output[0] if output else None


def _same(some: Any, other: Any) -> bool:
    return (
        isinstance(some, Tensor)
        and isinstance(other, Tensor)
        and (some is other or (some.shape == other.shape and torch.equal(some, other)))
    )
