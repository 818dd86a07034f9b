"""The tap: a model switched to overheard kernels, its attention published to nnsight's traces."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from nnsight.intervention.envoy import Envoy
from nnsight.intervention.interleaver import OutOfOrderError
from torch import nn
from transformers import PreTrainedModel

from probe.attention import AttentionCall
from probe.envoys import AttentionEnvoy, LazyEnvoy, Publisher, RootEnvoy
from probe.errors import InputError, UnsupportedModelError, WiringError
from probe.interface import LISTENER, implementations, numbered, overhear, register
from probe.proof import prove
from probe.watching import Watch

_NNSIGHT_STATE = "__nnsight__"  # where nnsight keeps its own state on a module


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
        value_dim: Numbers of a head's output, z.
        watch: Who watches and edits the attention now.

    Raises:
        UnsupportedModelError: The attention cannot be reached.
        WiringError: What is read is not what the model computes.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._open = True
        self._own_forward = {
            m: m.__dict__.get("forward")
            for m in module.modules()
            if _NNSIGHT_STATE not in m.__dict__
        }
        self._implementations = implementations(module)
        self.implementation = next(iter(self._implementations.values()))
        try:
            self._check_upcast()
            self._names = {m: register(i) for m, i in self._implementations.items()}
            self._switch(self._names)
            heard = overhear(module)
            for caller, call, z in heard:
                prove(call, z, causal=bool(getattr(caller, "is_causal", False)))
            attention = numbered(heard)
            self.n_heads, self.n_kv_heads = _heads([call for _, call, _ in heard])
            self.value_dim = heard[0].z.shape[-1]
            self.causal = not any(bool(call.keep().triu(1).any()) for _, call, _ in heard)
            model = next(iter(self._implementations))
            self.watch = Watch(model, max(attention) + 1, causal=self.causal)
            self.envoy, self.layers = self._wrap(attention)
        except FloatingPointError as error:
            self.close()
            raise UnsupportedModelError(f"{error}.") from error
        except BaseException:
            self.close()
            raise

    def _wrap(self, attention: dict[int, nn.Module]) -> tuple[Envoy, dict[int, AttentionEnvoy]]:
        classes = {type(m): AttentionEnvoy for m in attention.values()}
        root = RootEnvoy(self.module, envoys={**classes, nn.Module: LazyEnvoy})
        root.__dict__["watch"] = self.watch
        paths = {m: name for name, m in self.module.named_modules()}
        layers = {}
        for layer, module in attention.items():
            layers[layer] = root.get(paths[module])
            module.__dict__[LISTENER] = Publisher(layers[layer], layer, self.watch)
        return root, layers

    def _check_upcast(self) -> None:
        for m in self.module.modules():
            if getattr(m, "reorder_and_upcast_attn", False) and self.implementation == "eager":
                raise UnsupportedModelError(
                    f"{type(m).__name__} runs attention code of its own (reorder_and_upcast_attn) "
                    "under 'eager'. Load the model with attn_implementation='sdpa'."
                )

    def _switch(self, names: Mapping[PreTrainedModel, str]) -> None:
        for module, name in names.items():
            module.set_attn_implementation(name)
            if module.config._attn_implementation != name:
                raise UnsupportedModelError(
                    f"{type(module).__name__} has attention code of its own: it does not use "
                    "transformers' AttentionInterface, so its attention cannot be tapped."
                )

    def check(self) -> None:
        """Refuse a model that is not tapped any more.

        Raises:
            InputError: It was closed, or its attention implementation was changed.
        """
        if not self._open:
            raise InputError(
                "this model was closed, so its attention cannot be read. Load it again."
            )
        for module, name in self._names.items():
            if module.config._attn_implementation != name:
                raise InputError(
                    f"the attention implementation of this {type(module).__name__} was changed to "
                    f"{module.config._attn_implementation!r} after it was loaded, so its attention "
                    "cannot be read. Close the model, and load it again."
                )

    def close(self) -> None:
        """Give the model back as it was: its own implementation, no wrappers."""
        if not self._open:  # the module may be somebody else's by now
            return
        self._open = False
        for module in self.module.modules():
            module.__dict__.pop(LISTENER, None)
        for module, forward in self._own_forward.items():
            if module.__dict__.pop(_NNSIGHT_STATE, None) is not None:
                module.__dict__.pop("forward", None)
                if forward is not None:
                    module.__dict__["forward"] = forward
        for model, implementation in self._implementations.items():
            model.set_attn_implementation(implementation)


def _heads(calls: list[AttentionCall]) -> tuple[int, int]:
    """Query and key heads of a layer, the same in all."""
    shapes = {(call.n_heads, call.n_kv_heads) for call in calls}
    if len(shapes) > 1:
        raise UnsupportedModelError(
            "the layers of this model differ in their (query, key) heads: "
            f"{', '.join(map(str, sorted(shapes)))}. A store holds layers of one shape."
        )
    return shapes.pop()


def run(
    tap: Tap,
    visit: Callable[[int, AttentionEnvoy], None],
    inputs: Mapping[str, Any],
    *,
    layers: tuple[int, ...],
    proof: bool = False,
) -> Any:
    """One traced forward; `visit(layer, envoy)` reads or edits each layer as it runs.

    This holds the only trace of the package. Grad mode is the caller's: nnsight would leak one
    opened inside the trace into the model's forward.

    Args:
        tap: Of the model.
        visit: Called with each layer, in the order of `layers`.
        inputs: What the model's forward takes, by name.
        layers: Absolute layers to visit.
        proof: Whether each layer proves what it shows: see `probe.proof`.

    Returns:
        What the model returns.

    Raises:
        WiringError: A layer did not call its attention, or was read out of order; the proof failed.
    """
    box: dict[str, Any] = {}

    def forward(**kwargs: Any) -> Any:
        box["output"] = tap.module(**kwargs)
        return box["output"]

    todo = list(layers)
    with tap.watch.on(), _proving(tap.watch, proof):
        try:
            with tap.envoy.trace(fn=forward, **inputs):
                for layer in layers:
                    visit(layer, tap.layers[layer])
                    todo.remove(layer)
        except OutOfOrderError as error:
            raise WiringError(f"layer {todo[0]} could not be read: {error}.") from error
    if todo:  # nnsight only warns when the body of a trace dies
        raise WiringError(f"the trace ended before layers {todo} were read.")
    return box["output"]


@contextmanager
def _proving(watch: Watch, proof: bool) -> Iterator[None]:
    watch.proving = proof
    try:
        yield
    finally:
        watch.proving = False
