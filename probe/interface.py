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
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from probe import masks
from probe.attention import AttentionCall
from probe.errors import InputError, UnsupportedModelError

Kernel = Callable[[AttentionCall], tuple[Tensor, Tensor | None]]

T = TypeVar("T")

LISTENER = "_probe_listener"  # in the __dict__ of each attention module, so never in its state


class Name(str):
    """The name of a tapped implementation, which answers to its own one's name too.

    Models ask `config._attn_implementation in ("eager", "sdpa")` before they decide what to give
    to their kernel: a tapped model must decide as it does untapped. `!=`, by which transformers
    sees that an implementation changes, still tells the two apart, and so does a dict.

    Attributes:
        own: The implementation whose tapped form it names.
        plain: The name as a plain str, by which torch.compile can follow the methods below.
    """

    own = ""
    plain = ""

    def __hash__(self) -> int:
        return hash(self.plain)

    def __ne__(self, other: object) -> bool:
        return self.plain != other

    def __eq__(self, other: object) -> bool:
        return other == self.own or other == self.plain


# Original implementation -> the name under which its tapped form is registered. Transformers
# looks for "sdpa" and "flash" inside such names, so they are numbered and not spelt.
_registered: dict[str, Name] = {}


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
    own = partial(_kernel(module, implementation), _named(module, implementation))
    listener: Listener | None = module.__dict__.get(LISTENER)
    if listener is None or not listener.awake:
        result: tuple[Tensor, Tensor | None] = own(query, key, value, attention_mask, **kwargs)
        return result

    def kernel(call: AttentionCall) -> tuple[Tensor, Tensor | None]:
        require_seen(given, call)
        rest = dict(kwargs)
        if call.mask is given.mask:
            mask = attention_mask  # the model's own object
        elif masks.form(implementation) == "dense":
            mask = masks.for_kernel(call, implementation)
            if "position_bias" in kwargs:  # what `call.mask` was, and what replaced it, holds it
                rest["position_bias"] = None
        else:  # flex and flash kernels take no dense mask, so here attention is computed as read
            return call.mix(call.pattern()), None
        out: tuple[Tensor, Tensor | None] = own(call.query, call.key, call.value, mask, **rest)
        return out

    layer = listener.layer
    given = _call(implementation, module, query, key, value, attention_mask, kwargs, layer)
    return listener.serve(given, kernel)


def require_seen(given: AttentionCall, call: AttentionCall) -> None:
    """Refuse an assigned call whose change the model's kernel would not see."""
    for name in ("scaling", "softcap", "sinks", "window", "causal", "dropout"):
        old, new = getattr(given, name), getattr(call, name)
        if new is not old and (isinstance(new, Tensor) or new != old):
            raise InputError(
                f"the call assigned to layer {call.layer} changes {name!r}, which the model's "
                "kernel would not see. Change query, key, value or mask, or assign the pattern: "
                "attn.pattern = call.pattern()."
            )


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


def _named(module: nn.Module, implementation: str) -> nn.Module:
    """The module as its kernel must see it: flash kernels are looked up by the name in its config.

    A twin shares everything with it but that name, so that no other thread sees a change.
    """
    if masks.form(implementation) != "padding":
        return module
    config: Any = module.config
    return _twin(module, config=_twin(config, _attn_implementation_internal=implementation))


def _twin(original: T, **changed: Any) -> T:
    twin = object.__new__(type(original))
    twin.__dict__.update(original.__dict__ | changed)
    return twin


def _call(
    implementation: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Any,
    kwargs: Mapping[str, Any],
    layer: int = 0,
) -> AttentionCall:
    kind = masks.form(implementation)
    unread = ["cache"]
    if kind != "dense":  # which take these in place of a mask
        unread += ["position_bias", "indices", "block_indices"]
    for name in unread:
        if kwargs.get(name) is not None:
            raise UnsupportedModelError(
                f"{type(module).__name__} passes {name!r} to its attention kernel under "
                f"{implementation!r}, which the tap does not read. Its patterns would be wrong, so "
                "they are refused. Load the model with attn_implementation='sdpa' or 'eager'."
            )
    sinks = kwargs.get("s_aux")
    if sinks is None:
        sinks = kwargs.get("sinks")
    if sinks is not None and sinks.ndim != 1:
        raise UnsupportedModelError(
            f"{type(module).__name__} gives each row a sink of its own, of shape "
            f"{tuple(sinks.shape)}, and the tap reads one for each head. Its patterns would be "
            "wrong, so they are refused. Give a model whose sinks are one for each head."
        )
    if mask is not None and not isinstance(mask, Tensor | BlockMask):
        raise UnsupportedModelError(
            f"{type(module).__name__} under {implementation!r} gives its kernel a "
            f"{type(mask).__name__} as mask. Load the model with attn_implementation='sdpa'."
        )
    causal = kwargs.get("is_causal")
    causal = bool(getattr(module, "is_causal", True) if causal is None else causal)
    mask = masks.readable(
        mask, query, key, implementation=implementation, causal=causal, kwargs=kwargs
    )
    call = AttentionCall(
        query,
        key,
        value,
        mask,
        scaling=kwargs.get("scaling"),
        softcap=kwargs.get("softcap"),
        sinks=sinks,
        window=kwargs.get("sliding_window") if kind == "padding" else None,
        # eager and flex attention hide nothing by themselves
        causal=causal and implementation != "eager" and kind != "blocks",
        dropout=kwargs.get("dropout") or 0.0,
        layer=layer,
    )
    bias = kwargs.get("position_bias")
    return call if bias is None else replace(call, mask=_biased(call, bias))


def _biased(call: AttentionCall, bias: Tensor) -> Tensor:
    """The mask of a call whose kernel also adds a bias to the scores: both in one."""
    if call.mask is not None and call.mask.dtype != torch.bool:
        return call.mask + bias
    return bias.masked_fill(~call.keep(), torch.finfo(bias.dtype).min)


def register(implementation: str) -> str:
    """The name of the tapped form of an implementation, registered with its mask function.

    Without the mask function a model would silently get no mask at all.
    """
    if implementation not in _registered:
        if implementation.startswith("paged|"):
            raise UnsupportedModelError(
                f"attention implementation {implementation!r} packs all requests of continuous "
                "batching into one row of rented pages, whose tokens the tap cannot tell apart. "
                f"Load the model with attn_implementation={implementation[6:]!r}."
            )
        if implementation not in ALL_MASK_ATTENTION_FUNCTIONS:
            raise UnsupportedModelError(
                f"attention implementation {implementation!r} has no mask function in "
                "transformers. Load the model with attn_implementation='sdpa' or 'eager'."
            )
        plain = f"probe-{len(_registered)}"
        name = Name(plain)
        name.own, name.plain = implementation, plain
        own = ALL_MASK_ATTENTION_FUNCTIONS[implementation]
        mask = masks.flash_mask if masks.form(implementation) == "padding" else own
        # A plain str: torch.compile hashes the keys of these dicts in every model.
        AttentionInterface.register(plain, partial(_attend, implementation))
        AttentionMaskInterface.register(plain, mask)
        _registered[implementation] = name
    return _registered[implementation]


def implementations(module: nn.Module) -> dict[PreTrainedModel, str]:
    """The attention implementation of each config inside a model, outermost first.

    Empty for a module that holds no transformers model.
    """
    found: dict[int, tuple[PreTrainedModel, str]] = {}
    for model in module.modules():
        if isinstance(model, PreTrainedModel) and id(model.config) not in found:
            found[id(model.config)] = model, model.config._attn_implementation
    for model, implementation in found.values():
        if isinstance(implementation, Name):
            raise UnsupportedModelError(
                f"this {type(model).__name__} is tapped already. Close the first probe.Model "
                "(or use it) before loading the same module again."
            )
    return dict(found.values())
