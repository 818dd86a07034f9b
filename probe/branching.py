"""The layers above an edit, run again for several variants of one problem.

A `Trunk` is one forward over one problem, kept: what goes into each block and into each output
projection. A branch leaves it at a layer: the blocks below are skipped, the layer's output
projection is given several versions of z, one for each variant, and the model's own code does the
rest, at the price of its MLP and the blocks above.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from probe.anatomy import Anatomy, Unfit, hidden_of, look
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

    def see(value: Tensor, call: AttentionCall) -> None:
        z[call.layer] = value

    with ExitStack() as stack:
        for layer, n in (anatomy.place if anatomy else {}).items():
            module = anatomy.stack[n]  # type: ignore[union-attr]

            def keep(_: nn.Module, args: Any, kwargs: Any, layer: int = layer) -> None:
                entering[layer] = hidden_of(args, kwargs).clone()  # blocks may add in place

            handle = module.register_forward_pre_hook(keep, with_kwargs=True)
            stack.callback(handle.remove)
        found = logits(model, [item], Edit(site="z", function=see))
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
        anatomy = look(model, item)
        trunk = grow(model, item, anatomy)
        for layer in anatomy.place:
            _prove(model, trunk, anatomy, layer)
    except Unfit as reason:
        log.warning("%s runs whole for every variant: %s", model.name, reason)
        return None
    return anatomy


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


@contextmanager
def _grafted(anatomy: Anatomy, layer: int, entering: Tensor, z: Tensor) -> Iterator[None]:
    """Skip the blocks below a layer and its attention, and give its output projection other z."""
    place = anatomy.place[layer]

    def enter(_: nn.Module, args: Any, kwargs: Any) -> Any:
        if "hidden_states" in kwargs:
            return args, kwargs | {"hidden_states": entering.clone()}
        return (entering.clone(), *args[1:]), kwargs

    def replace(_: nn.Module, args: Any) -> Any:
        return (given, *args[1:])

    def attend(*_: Any, **__: Any) -> Any:
        return out(given) if rest is None else (out(given), *rest)

    given = rearrange(z, "b q h d -> b q (h d)")
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
    return hidden_of(args, kwargs)


def _skip_to_tuple(*args: Any, **kwargs: Any) -> tuple[Tensor]:
    return (hidden_of(args, kwargs),)
