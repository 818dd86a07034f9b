"""The MLPs of a model: found beside the attention of each block, read and changed by hooks.

Interventions change attention; these contexts are for what lies beside it, as path patching freezes
MLPs and ablations take their neurons out.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from probe import selection
from probe.anatomy import Unfit, stack_of
from probe.errors import InputError, UnsupportedModelError
from probe.model import Model
from probe.selection import Selector
from probe.text import Inputs


def mlps(model: Model) -> dict[int, nn.Module]:
    """The MLP of each layer: the one child of its block, beside attention, that holds matrices.

    Raises:
        UnsupportedModelError: A block has none, or several, or one that is more than an MLP.

    Example:
        >>> type(mlps(model)[0]).__name__
        'LlamaMLP'
    """
    attention = {layer: model.tap.layers[layer]._module for layer in model.layers}
    try:
        blocks, place = stack_of(model.module, attention)
    except Unfit as reason:
        raise UnsupportedModelError(
            f"the MLPs of {model.name} cannot be found: {reason}."
        ) from None
    found = {}
    for layer, module in attention.items():
        beside = [
            child
            for child in blocks[place[layer]].children()
            if module not in set(child.modules()) and any(p.ndim > 1 for p in child.parameters())
        ]
        if len(beside) != 1:
            names = ", ".join(type(child).__name__ for child in beside) or "nothing"
            raise UnsupportedModelError(
                f"the MLP of layer {layer} of {model.name} cannot be told: beside its attention "
                f"the block has {names}. Use hooks on model.module."
            )
        if "residual" in inspect.signature(type(beside[0]).forward).parameters:
            raise UnsupportedModelError(
                f"the {type(beside[0]).__name__} of {model.name} adds the residual stream itself, "
                "so that its output is not the MLP's alone. Use hooks on model.module."
            )
        found[layer] = beside[0]
    return found


@contextmanager
def frozen(model: Model, inputs: Inputs) -> Iterator[None]:
    """Inside the block, every MLP returns what it returns for these inputs, whatever it is given.

    Args:
        model: The model.
        inputs: As many, and as long, as those that run inside.
    """
    parts, kept = mlps(model), dict[int, Any]()
    with ExitStack() as stack, torch.no_grad():
        for layer, part in parts.items():

            def keep(_: nn.Module, args: Any, output: Any, layer: int = layer) -> None:
                kept[layer] = _copy(output)  # blocks may add to it in place

            stack.callback(part.register_forward_hook(keep).remove)
        model(inputs)
    with ExitStack() as stack:
        for layer, part in parts.items():
            hook = _returning(kept[layer])
            stack.callback(part.register_forward_hook(hook).remove)
        yield


def _returning(value: Any) -> Callable[..., Any]:
    return lambda module, args, output: _copy(value)


def _copy(output: Any) -> Any:
    if isinstance(output, tuple):
        return tuple(map(_copy, output))
    return output.clone() if isinstance(output, Tensor) else output


@contextmanager
def without(
    model: Model, layers: Mapping[int, Selector], reference: Inputs | None = None
) -> Iterator[None]:
    """Ablate MLPs, or some of their neurons, inside the block.

    Args:
        model: The model.
        layers: For each layer which neurons (inputs of the MLP's last matrix), by int, slice or
            list; None for the whole output of the MLP.
        reference: Replace by the mean over all tokens of these inputs, padding left out; default 0.

    Raises:
        InputError: No such layer or neuron.
        UnsupportedModelError: The MLP is not one module, or has no neurons (as a mixture).

    Example:
        >>> with without(model, {0: [3, 17], 1: None}):
        ...     logits = model("abcabc").logits
    """
    parts = mlps(model)
    where = {selection.axis(la, model.n_layers, "layers")[0]: n for la, n in layers.items()}
    if missing := [layer for layer in where if layer not in parts]:
        raise InputError(f"layer {missing[0]} has no attention, and so no MLP that is found by it.")
    lasts = {la: _last_matrix(model, la, parts[la]) for la, n in where.items() if n is not None}
    means = {} if reference is None else _means(model, reference, parts, where, lasts)
    with ExitStack() as stack:
        for layer, neurons in where.items():
            mean: Tensor | float = means.get(layer, 0.0)
            if neurons is None:
                hook = parts[layer].register_forward_hook(_put(mean))
            else:
                width = _width(lasts[layer])
                index = torch.tensor(selection.axis(neurons, width, "neurons"))
                hook = lasts[layer].register_forward_pre_hook(_put_some(index, mean))
            stack.callback(hook.remove)
        yield


def _put(value: Tensor | float) -> Callable[..., Any]:
    def hook(_: nn.Module, args: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        new = torch.zeros_like(hidden) + value
        return (new, *output[1:]) if isinstance(output, tuple) else new

    return hook


def _put_some(index: Tensor, mean: Tensor | float) -> Callable[..., Any]:
    def hook(_: nn.Module, args: Any) -> Any:
        new = args[0].clone()
        new[..., index] = mean[index] if isinstance(mean, Tensor) else mean
        return (new, *args[1:])

    return hook


def _last_matrix(model: Model, layer: int, part: nn.Module) -> nn.Module:
    """The module whose input are the MLP's neurons: the last that runs of those with a matrix.

    What it returns is as wide as what the MLP returns; a router's choice of experts is not.
    """
    ran: list[tuple[nn.Module, Any, Any]] = []  # the MLP itself comes last
    matrices = [m for m in part.modules() if getattr(getattr(m, "weight", None), "ndim", 0) == 2]
    with ExitStack() as stack, torch.no_grad():
        for m in (*matrices, part):

            def note(m: nn.Module, args: Any, output: Any) -> None:
                ran.append((m, args[0], output[0] if isinstance(output, tuple) else output))

            stack.callback(m.register_forward_hook(note).remove)
        ids = torch.zeros(1, 2, dtype=torch.long, device=model.device)
        model.tap.call({"input_ids": ids})
    *inner, (_, _, whole) = ran
    last, given, output = inner[-1] if 0 < len(inner) <= 3 else (part, whole, None)
    if getattr(output, "shape", None) != whole.shape or given.shape[:-1] != (1, 2):
        raise UnsupportedModelError(
            f"the {type(part).__name__} of layer {layer} has no neurons that one matrix reads. "
            "Ablate its whole output with None."
        )
    return last


def _width(last: nn.Module) -> int:
    inside = getattr(last, "in_features", None)  # transformers' Conv1D has none
    weight: Any = last.weight
    return int(inside if inside is not None else weight.shape[0])


def _means(
    model: Model,
    reference: Inputs,
    parts: Mapping[int, nn.Module],
    where: Mapping[int, Selector],
    lasts: Mapping[int, nn.Module],
) -> dict[int, Tensor]:
    """The mean of what is replaced, over all tokens of the reference."""
    batch = model.batch(reference)
    real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    out: dict[int, Tensor] = {}

    def mean(x: Tensor) -> Tensor:
        return x[real].double().mean(0).to(x.dtype)

    with ExitStack() as stack, torch.no_grad():
        for layer in where:

            def after(_: nn.Module, args: Any, output: Any, layer: int = layer) -> None:
                out[layer] = mean(output[0] if isinstance(output, tuple) else output)

            def before(_: nn.Module, args: Any, layer: int = layer) -> None:
                out[layer] = mean(args[0])

            handle = (
                lasts[layer].register_forward_pre_hook(before)
                if layer in lasts
                else parts[layer].register_forward_hook(after)
            )
            stack.callback(handle.remove)
        model.tap.call(batch)
    return out


__all__: Sequence[str] = ("frozen", "mlps", "without")
