"""The tap: the only file that knows transformers' attention interface and nnsight's envoys.

`Tap` switches a loaded model to a registered attention function that calls the model's own kernel
and, in between, publishes what the kernel is given. Models whose attention goes through
transformers' `AttentionInterface` need no code of their own: the attention modules are found by
running one short forward and seeing who calls.
"""

import inspect
import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import torch
from nnsight.intervention.envoy import Envoy
from nnsight.intervention.eproperty import eproperty
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from probe.attention import AttentionCall
from probe.errors import ProbeError, UnsupportedModelError
from probe.proof import prove

Kernel = Callable[[AttentionCall], tuple[Tensor, Tensor | None]]

_LISTENER = "_probe_listener"  # in the __dict__ of each attention module, so never in its state
_NNSIGHT_STATE = "__nnsight__"  # where nnsight keeps its own state on a module

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
    listener: Listener | None = module.__dict__.get(_LISTENER)
    if listener is None or not listener.awake:
        result: tuple[Tensor, Tensor | None] = own(
            module, query, key, value, attention_mask, **kwargs
        )
        return result

    def kernel(call: AttentionCall) -> tuple[Tensor, Tensor | None]:
        # The kernel gets the model's own mask object back unless somebody replaced it.
        mask = attention_mask if call.mask is given.mask else call.mask
        out: tuple[Tensor, Tensor | None] = own(
            module, call.query, call.key, call.value, mask, **kwargs
        )
        return out

    given = _call(implementation, module, query, key, value, attention_mask, kwargs)
    given = replace(given, layer=listener.layer)
    return listener.serve(given, kernel)


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


def _register(implementation: str) -> str:
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


class LazyEnvoy(Envoy):  # type: ignore[misc]
    """An envoy whose children are wrapped when they are first touched.

    A trace pays for every wrapped module, so a model in which only attention is read keeps only
    attention wrapped; whoever walks or prints the tree gets all of it.
    """

    def _add_envoy(self, name: str, module: nn.Module) -> Envoy | None:
        if self._module._modules.get(name) is module:
            return None
        return super()._add_envoy(name, module)

    def _named_children(self) -> list[tuple[str, Envoy]]:
        for name, child in self._module._modules.items():
            if child is not None and name not in self._child_map:
                self._wrap_envoy(name, child)
        return super()._named_children()  # type: ignore[no-any-return]


class RootEnvoy(LazyEnvoy):
    """The model's envoy; inputs follow its parameters, also when some are offloaded."""

    @property
    def device(self) -> torch.device | None:
        device = super().device
        return None if device is None or device.type == "meta" else device


class AttentionEnvoy(LazyEnvoy):
    """An attention module inside a trace: `.call`, `.scores`, `.pattern`, `.z`, in that order.

    Each can be read and assigned. Reading leaves the model on its own kernel; once scores or
    pattern are edited (assigned or changed in place), the output is computed from them.
    """

    @eproperty(description="what the kernel is given")  # type: ignore[untyped-decorator]
    def call(self, value: AttentionCall) -> AttentionCall:
        """The `AttentionCall`; assign one to change query, key, value or mask."""
        return value

    @eproperty(description="(batch, head, query, key) before softmax")  # type: ignore[untyped-decorator]
    def scores(self, value: Tensor) -> Tensor:
        """Scaled, masked scores, float32, -inf where nothing is attended."""
        return value

    @eproperty(description="(batch, head, query, key) after softmax")  # type: ignore[untyped-decorator]
    def pattern(self, value: Tensor) -> Tensor:
        """Attention probabilities before dropout, float32."""
        return value

    @eproperty(description="(batch, query, head, head_dim)")  # type: ignore[untyped-decorator]
    def z(self, value: Tensor) -> Tensor:
        """Per-head output, before the output projection."""
        return value


class _Publisher:
    """Serves a module's attention calls to the traces of its envoy."""

    def __init__(self, envoy: AttentionEnvoy, layer: int) -> None:
        self._envoy, self.layer = weakref.ref(envoy), layer

    @property
    def awake(self) -> bool:
        envoy = self._envoy()
        return envoy is not None and bool(envoy.interleaver.interleaving)

    def serve(self, call: AttentionCall, kernel: Kernel) -> tuple[Tensor, Tensor | None]:
        envoy = self._envoy()
        assert envoy is not None
        path, interleaver = envoy.path, envoy.interleaver
        call = interleaver.handle(f"{path}.call", call)
        scores, cut = _offer(interleaver, f"{path}.scores", call.scores)
        compute = call.pattern if scores is None else partial(call.softmax, scores)
        if cut:  # edited scores make an edited pattern, whether or not anybody reads it
            pattern, _ = _offer(interleaver, f"{path}.pattern", compute, always=True)
        else:
            pattern, cut = _offer(interleaver, f"{path}.pattern", compute)
        z, weights = kernel(call) if not cut else (call.mix(pattern), pattern.to(call.value.dtype))
        return interleaver.handle(f"{path}.z", z), weights


def _offer(
    interleaver: Any, location: str, compute: Callable[[], Tensor], *, always: bool = False
) -> tuple[Any, bool]:
    """Offer a computed value at a location: (the value or None if nobody asked, was it edited)."""
    if not always and location not in interleaver.parked:
        # The visit counts all the same: `tracer.iter` numbers the steps by it.
        return interleaver.handle(location, None), False
    before = compute()
    version = None if before.is_inference() else before._version
    after = interleaver.handle(location, before)
    # An inference tensor does not count its in-place edits, so it passes for edited.
    return after, after is not before or version is None or after._version != version


class _Recorder:
    """Overhears one forward: which modules call, with what, and what their kernel returned."""

    awake = True

    def __init__(self, module: nn.Module, heard: list["Heard"]) -> None:
        self._module, self._heard = module, heard
        self.layer = getattr(module, "layer_idx", None)
        if not isinstance(self.layer, int):
            self.layer = -1

    def serve(self, call: AttentionCall, kernel: Kernel) -> tuple[Tensor, Tensor | None]:
        z, weights = kernel(call)
        self._heard.append((self._module, call, z))
        return z, weights


Heard = tuple[nn.Module, AttentionCall, Tensor]


class Tap:
    """A model with its attention tapped; `close` restores everything.

    Args:
        module: A transformers model, perhaps wrapped (peft, DDP); it is changed in place only in
            its attention implementation and in nnsight's wrappers, never in its state.

    Attributes:
        module: The model.
        envoy: nnsight's root envoy; attention envoys in it are `AttentionEnvoy`.
        layers: Absolute layer index -> attention envoy, in order.
        implementation: The attention implementation that the model keeps running on.
        causal: Whether no layer sees the future.
        n_heads: Query heads per layer.
        n_kv_heads: Key heads per layer.

    Raises:
        UnsupportedModelError: The attention cannot be reached.
        WiringError: What is read is not what the model computes.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._own_forward = {
            m: m.__dict__.get("forward")
            for m in module.modules()
            if _NNSIGHT_STATE not in m.__dict__
        }
        self._implementations = _implementations(module)
        self.implementation = next(iter(self._implementations.values()))
        try:
            self._switch({m: _register(i) for m, i in self._implementations.items()})
            heard = _overhear(module)
            for _, call, z in heard:
                prove(call, z)
            attention = _numbered(heard)
            self.envoy, self.layers = self._wrap(attention)
        except FloatingPointError as error:
            self.close()
            raise UnsupportedModelError(f"{error}.") from error
        except BaseException:
            self.close()
            raise
        calls = [call for _, call, _ in heard]
        self.n_heads, self.n_kv_heads = calls[0].n_heads, calls[0].n_kv_heads
        self.causal = all(_sees_no_future(call) for call in calls)

    def _wrap(self, attention: dict[int, nn.Module]) -> tuple[Envoy, dict[int, AttentionEnvoy]]:
        classes = {type(m): AttentionEnvoy for m in attention.values()}
        root = RootEnvoy(self.module, envoys={**classes, nn.Module: LazyEnvoy})
        paths = {m: name for name, m in self.module.named_modules()}
        layers = {}
        for layer, module in attention.items():
            layers[layer] = root.get(paths[module])
            module.__dict__[_LISTENER] = _Publisher(layers[layer], layer)
        return root, layers

    def _switch(self, names: Mapping[PreTrainedModel, str]) -> None:
        for module, name in names.items():
            module.set_attn_implementation(name)
            if module.config._attn_implementation != name:
                raise UnsupportedModelError(
                    f"{type(module).__name__} has attention code of its own: it does not use "
                    "transformers' AttentionInterface, so its attention cannot be tapped."
                )

    def close(self) -> None:
        """Give the model back as it was: its own implementation, no wrappers."""
        for module in self.module.modules():
            module.__dict__.pop(_LISTENER, None)
        for module, forward in self._own_forward.items():
            if module.__dict__.pop(_NNSIGHT_STATE, None) is not None:
                module.__dict__.pop("forward", None)
                if forward is not None:
                    module.__dict__["forward"] = forward
        for model, implementation in self._implementations.items():
            model.set_attn_implementation(implementation)


def _implementations(module: nn.Module) -> dict[PreTrainedModel, str]:
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
def _overhear(module: nn.Module, n_tokens: int = 16) -> list[Heard]:
    """One short forward with every module listening: who calls attention, and with what."""
    heard: list[Heard] = []
    model = next(m for m in module.modules() if isinstance(m, PreTrainedModel))
    vocabulary = vocabulary_size(model)
    context = getattr(model.config, "max_position_embeddings", None) or n_tokens
    ids = torch.arange(min(n_tokens, context), device=model.device)[None] % vocabulary
    modes = {m: m.training for m in module.modules()}
    for m in modes:
        m.__dict__[_LISTENER] = _Recorder(m, heard)
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
            m.__dict__.pop(_LISTENER, None)
    return heard


def vocabulary_size(model: PreTrainedModel) -> int:
    """Rows of the input embedding: token ids are below it."""
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    return weight.shape[0]


def _numbered(heard: list[Heard]) -> dict[int, nn.Module]:
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


def _sees_no_future(call: AttentionCall) -> bool:
    return not bool(call.keep().triu(1).any())


def run(
    tap: Tap,
    visit: Callable[[int, AttentionEnvoy], None],
    inputs: Mapping[str, Any],
    *,
    layers: tuple[int, ...],
) -> Any:
    """One traced forward; `visit(layer, envoy)` reads or edits each layer as it runs.

    This holds the only trace of the package. Grad mode is the caller's: nnsight would leak one
    opened inside the trace into the model's forward.

    Returns:
        What the model returns.
    """
    box: dict[str, Any] = {}

    def forward(**kwargs: Any) -> Any:
        box["output"] = tap.module(**kwargs)
        return box["output"]

    envoys = [(layer, tap.layers[layer]) for layer in layers]
    with tap.envoy.trace(fn=forward, **inputs):
        for layer, envoy in envoys:
            visit(layer, envoy)
    return box["output"]
