"""Transformers' side of the tap: attention functions that call a model's own kernel, overheard.

A registered attention function runs in place of a model's own. It looks up the listener of the
module that calls it, and with nobody awake it does nothing but call the model's own kernel. Models
whose attention goes through transformers' `AttentionInterface` need no code of their own: which
modules have attention is found by running one short forward and seeing who calls.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from probe.attention import AttentionCall
from probe.errors import InputError, ProbeError, UnsupportedModelError

Kernel = Callable[[AttentionCall], tuple[Tensor, Tensor | None]]

LISTENER = "_probe_listener"  # in the __dict__ of each attention module, so never in its state

# Original implementation -> the name under which its tapped form is registered. Transformers
# looks for "sdpa" and "flash" inside such names, so they are numbered and not spelt.
_registered: dict[str, str] = {}


class Listener(Protocol):
    """Whoever hears the attention calls of a module."""

    layer: int

    @property
    def awake(self) -> bool:
        """Whether the next call is wanted; when it is not, the tap costs nothing."""

    def serve(self, call: AttentionCall, kernel: Kernel) -> tuple[Tensor, Tensor | None]:
        """Observe or edit `call`, run the kernel, return (z, weights or None)."""


def _attend(
    implementation: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The registered attention function: the model's own kernel, overheard."""
    own = _kernel(module, implementation)
    listener: Listener | None = module.__dict__.get(LISTENER)
    if listener is None or not listener.awake:
        result: tuple[Tensor, Tensor | None] = own(
            module, query, key, value, attention_mask, **kwargs
        )
        return result

    def kernel(call: AttentionCall) -> tuple[Tensor, Tensor | None]:
        # The kernel gets the model's own mask object back unless somebody replaced it.
        mask = attention_mask if call.mask is given.mask else _mask(implementation, call)
        _require_seen(given, call)
        out: tuple[Tensor, Tensor | None] = own(
            module, call.query, call.key, call.value, mask, **kwargs
        )
        return out

    given = _call(implementation, module, query, key, value, attention_mask, kwargs)
    given = replace(given, layer=listener.layer)
    return listener.serve(given, kernel)


def _require_seen(given: AttentionCall, call: AttentionCall) -> None:
    """Refuse an assigned call whose change the model's kernel would not see."""
    for name in ("scaling", "softcap", "sinks", "window", "causal", "dropout"):
        old, new = getattr(given, name), getattr(call, name)
        if new is not old and (isinstance(new, Tensor) or new != old):
            raise InputError(
                f"the call assigned to layer {call.layer} changes {name!r}, which the model's "
                "kernel would not see. Change query, key, value or mask, or assign the pattern: "
                "attn.pattern = call.pattern()."
            )


def _mask(implementation: str, call: AttentionCall) -> Tensor | None:
    """A mask that somebody assigned, in the form that the kernel reads."""
    mask = call.mask
    if mask is None or "flash" in implementation:
        return mask
    if mask.ndim == 2:
        mask = call.keep()
    if mask.dtype == torch.bool and implementation != "sdpa":
        low = torch.finfo(call.query.dtype).min
        mask = torch.zeros_like(mask, dtype=call.query.dtype).masked_fill(~mask, low)
    return mask if mask.dtype == torch.bool else mask.to(call.query.dtype)


def _kernel(module: nn.Module, implementation: str) -> Callable[..., Any]:
    """What the module's own file would have called: its interface, its eager function."""
    names = inspect.unwrap(type(module).forward).__globals__
    interface = names.get("ALL_ATTENTION_FUNCTIONS", ALL_ATTENTION_FUNCTIONS)
    kernel: Callable[..., Any] | None = interface.get_interface(
        implementation, names.get("eager_attention_forward")
    )
    if kernel is None:
        raise UnsupportedModelError(
            f"{type(module).__name__} has no eager_attention_forward beside it, so its own eager "
            "attention cannot be called. Load the model with attn_implementation='sdpa'."
        )
    return kernel


def _call(
    implementation: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Any,
    kwargs: Mapping[str, Any],
) -> AttentionCall:
    for name in ("position_bias", "cache"):
        if kwargs.get(name) is not None:
            raise UnsupportedModelError(
                f"{type(module).__name__} passes {name!r} to its attention kernel, which the tap "
                "does not read. Its patterns would be wrong, so they are refused."
            )
    if mask is not None and not isinstance(mask, Tensor):
        raise UnsupportedModelError(
            f"{type(module).__name__} under {implementation!r} gives its kernel a "
            f"{type(mask).__name__} as mask. Load the model with attn_implementation='sdpa'."
        )
    causal = kwargs.get("is_causal")
    causal = bool(getattr(module, "is_causal", True) if causal is None else causal)
    flash = "flash" in implementation
    if flash and mask is None:  # flash aligns at the bottom right, as a 2-D mask says
        mask = torch.ones(key.shape[0], key.shape[2], dtype=torch.bool, device=key.device)
    return AttentionCall(
        query,
        key,
        value,
        mask,
        scaling=kwargs.get("scaling"),
        softcap=kwargs.get("softcap"),
        sinks=kwargs.get("s_aux"),
        window=kwargs.get("sliding_window") if flash else None,
        causal=causal and implementation != "eager",  # eager hides nothing by itself
        dropout=kwargs.get("dropout") or 0.0,
    )


def register(implementation: str) -> str:
    """The name of the tapped form of an implementation, registered with its mask function.

    Without the mask function a model would silently get no mask at all.
    """
    if implementation not in _registered:
        if implementation not in ALL_MASK_ATTENTION_FUNCTIONS:
            raise UnsupportedModelError(
                f"attention implementation {implementation!r} has no mask function in "
                "transformers. Load the model with attn_implementation='sdpa' or 'eager'."
            )
        name = f"probe-{len(_registered)}"
        AttentionInterface.register(name, partial(_attend, implementation))
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[implementation])
        _registered[implementation] = name
    return _registered[implementation]


class Heard(NamedTuple):
    """One attention call of a forward: who called, with what, and what the kernel returned."""

    module: nn.Module
    call: AttentionCall
    z: Tensor


def implementations(module: nn.Module) -> dict[PreTrainedModel, str]:
    """The attention implementation of each config inside a model, outermost first."""
    found: dict[int, tuple[PreTrainedModel, str]] = {}
    for model in module.modules():
        if isinstance(model, PreTrainedModel) and id(model.config) not in found:
            found[id(model.config)] = model, model.config._attn_implementation
    if not found:
        raise UnsupportedModelError(
            f"{type(module).__name__} is not a transformers model, so its attention cannot be "
            "found. Give a model of transformers, or one that contains it (peft, DDP)."
        )
    for model, implementation in found.values():
        if implementation in _registered.values():
            raise UnsupportedModelError(
                f"this {type(model).__name__} is tapped already. Close the first probe.Model "
                "(or use it) before loading the same module again."
            )
    return dict(found.values())


@torch.no_grad()
def overhear(module: nn.Module, n_tokens: int = 16) -> list[Heard]:
    """One short forward with every module listening: who calls attention, and with what."""
    heard: list[Heard] = []
    model = next(m for m in module.modules() if isinstance(m, PreTrainedModel))
    vocabulary = vocabulary_size(model)
    context = getattr(model.config, "max_position_embeddings", None) or n_tokens
    ids = torch.arange(min(n_tokens, context), device=model.device)[None] % vocabulary
    modes = {m: m.training for m in module.modules()}
    for m in modes:
        m.__dict__[LISTENER] = _Recorder(m, heard)
    try:
        module.eval()
        module(input_ids=ids, use_cache=False)
    except ProbeError:
        raise
    except Exception as error:
        raise UnsupportedModelError(
            f"a forward of {type(module).__name__} over {ids.shape[1]} token ids failed with "
            f"{type(error).__name__}: {error}. The tap needs a model that runs on input_ids."
        ) from error
    finally:
        for m, training in modes.items():
            m.training = training
            m.__dict__.pop(LISTENER, None)
    return heard


def vocabulary_size(model: PreTrainedModel) -> int:
    """Rows of the input embedding: token ids are below it."""
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    return weight.shape[0]


def numbered(heard: list[Heard]) -> dict[int, nn.Module]:
    """Attention modules by absolute layer: their layer_idx, else the order of their calls."""
    modules = [module for module, _, _ in heard]
    if not modules:
        raise UnsupportedModelError(
            "no module of this model called its attention kernel, so there is nothing to read. "
            "Models without softmax attention are not supported."
        )
    if len({id(m) for m in modules}) < len(modules):
        raise UnsupportedModelError(
            f"{type(modules[0]).__name__} runs more than once in one forward (shared layers), "
            "which the tap cannot tell apart."
        )
    numbers = [call.layer for _, call, _ in heard]
    if len(set(numbers)) < len(numbers) or min(numbers) < 0:
        numbers = list(range(len(modules)))
    return dict(sorted(zip(numbers, modules, strict=True)))


class _Recorder:
    """Overhears one forward: which modules call, with what, and what their kernel returned."""

    awake = True

    def __init__(self, module: nn.Module, heard: list[Heard]) -> None:
        self._module, self._heard = module, heard
        self.layer = getattr(module, "layer_idx", None)
        if not isinstance(self.layer, int):
            self.layer = -1

    def serve(self, call: AttentionCall, kernel: Kernel) -> tuple[Tensor, Tensor | None]:
        z, weights = kernel(call)
        self._heard.append(Heard(self._module, call, z))
        return z, weights
