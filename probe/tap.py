"""The tap: a model switched to overheard kernels, its attention published to nnsight's traces."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from nnsight.intervention.envoy import Envoy
from nnsight.intervention.interleaver import OutOfOrderError
from torch import nn
from transformers import PreTrainedModel

from probe.discovery import Found, discover
from probe.envoys import AttentionEnvoy, LazyEnvoy, Publisher, RootEnvoy
from probe.errors import InputError, UnsupportedModelError, WiringError
from probe.hearing import numbered, overhear
from probe.intake import Intake, guess
from probe.interface import LISTENER, implementations, register
from probe.layout import Layout
from probe.owncode import Ear
from probe.proof import prove
from probe.watching import Watch

_NNSIGHT_STATE = "__nnsight__"  # where nnsight keeps its own state on a module


class Shape(NamedTuple):
    """What a layer has.

    Attributes:
        heads: Query heads.
        kv_heads: Key heads.
        width: Numbers of a head's output, z.
    """

    heads: int
    kv_heads: int
    width: int


class Tap:
    """A model with its attention tapped; `close` restores everything.

    Args:
        module: A transformers model, perhaps wrapped (peft, DDP), or any module that reads token
            ids; it is changed in place only in its attention implementation, in hooks and in
            nnsight's wrappers, never in its state.
        layout: Where a module of one's own has its attention, if that is not found by itself.

    Attributes:
        module: The model.
        envoy: nnsight's root envoy; attention envoys in it are `AttentionEnvoy`.
        layers: Absolute layer index -> attention envoy, in order.
        intake: How the model takes its tokens.
        implementation: The attention implementation that the model keeps running on.
        causal: Whether no layer sees the future.
        shapes: What each layer has, by absolute layer.
        watch: Who watches and edits the attention now.

    Raises:
        UnsupportedModelError: The attention cannot be reached.
        InputError: A path of the layout leads nowhere.
        WiringError: What is read is not what the model computes.
    """

    def __init__(self, module: nn.Module, layout: Layout | None = None) -> None:
        self.module = module
        self._open = True
        self._own_forward = {
            m: m.__dict__.get("forward")
            for m in module.modules()
            if _NNSIGHT_STATE not in m.__dict__
        }
        self._implementations = implementations(module)
        self._names: Mapping[PreTrainedModel, str] = {}
        self._ears: list[Ear] = []
        modules = set(module.modules())
        try:
            intake = guess(module, layout)
            found = None if layout else self._over_interface(intake)
            if found is None:
                self._names = {}
                self._restore()
                found = discover(module, intake, layout)
            _require_kept(module, modules)
            self._listen(found)
        except FloatingPointError as error:
            self.close()
            raise UnsupportedModelError(f"{error}.") from error
        except BaseException:
            self.close()
            raise

    def _over_interface(self, intake: Intake) -> Found | None:
        """Switch to overheard kernels and hear who calls them; None if nobody does."""
        self._names = {
            model: register(implementation)
            for model, implementation in self._implementations.items()
            if model._can_set_attn_implementation()
        }
        for model, name in self._names.items():
            _switch(model, name)
            if model.config._attn_implementation != name:
                return None
        if not self._names:
            return None
        heard = overhear(self.module, next(iter(self._implementations)))
        for caller, call, z in heard:
            prove(call, z, causal=bool(getattr(caller, "is_causal", False)))
        causal = not any(bool(call.keep().triu(1).any()) for _, call, _ in heard)
        return Found(intake, [], heard, causal) if heard else None

    def _listen(self, found: Found) -> None:
        """Put listeners on the attention modules, and their envoys into nnsight's tree."""
        attention = numbered(found.heard)
        self.intake, self.causal = found.intake, found.causal
        self.shapes = {
            layer: Shape(h.call.n_heads, h.call.n_kv_heads, h.z.shape[-1])
            for layer, module in attention.items()
            for h in found.heard
            if h.module is module
        }
        self.implementation = _implementation(found, self._implementations)
        self.watch = Watch(
            self.intake.base,
            max(attention) + 1,
            causal=self.causal,
            whole=self.module,
            ids=self.intake.ids,
        )
        self.envoy, self.layers = self._wrap(attention)
        spots = {spot.module: spot for spot in found.spots}
        for layer, module in attention.items():
            publisher = Publisher(self.layers[layer], layer, self.watch)
            if module in spots:
                self._ears.append(Ear(spots[module], publisher, self.watch.inside))
            else:
                module.__dict__[LISTENER] = publisher

    def _wrap(self, attention: dict[int, nn.Module]) -> tuple[Envoy, dict[int, AttentionEnvoy]]:
        classes = {type(m): AttentionEnvoy for m in attention.values()}
        root = RootEnvoy(self.module, envoys={**classes, nn.Module: LazyEnvoy})
        root.__dict__["watch"] = self.watch
        paths = {m: name for name, m in self.module.named_modules()}
        return root, {layer: root.get(paths[module]) for layer, module in attention.items()}

    def call(self, inputs: Mapping[str, Any]) -> Any:
        """Run the model on inputs named as transformers names them.

        Returns:
            What the model returns.

        Raises:
            InputError: Padding that matters, and a model that takes no mask.
        """
        args, kwargs, lengths = self.intake.arguments(inputs, causal=self.causal)
        if lengths is None:
            return self.module(*args, **kwargs)
        with self.watch.on(length=lengths):
            return self.module(*args, **kwargs)

    def shape(self, layers: Iterable[int]) -> Shape:
        """What these layers have, all the same.

        Raises:
            InputError: They differ in their heads.
        """
        found = {layer: self.shapes[layer] for layer in layers}
        require_alike({layer: shape.heads for layer, shape in found.items()})
        return next(iter(found.values()))

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
        for ear in self._ears:
            ear.close()
        self._restore()

    def _restore(self) -> None:
        for model, implementation in self._implementations.items():
            _switch(model, implementation)


def require_alike(heads: Mapping[int, int]) -> None:
    """Refuse layers that do not fit into one array.

    Args:
        heads: How many each layer has.

    Raises:
        InputError: They differ.
    """
    first = next(iter(heads.values()))
    like = [layer for layer, n in heads.items() if n == first]
    for layer, n in heads.items():
        if n != first:
            raise InputError(
                f"the layers differ in their heads: layers {like} have {first}, layer {layer} has "
                f"{n}. One array holds layers of one shape: choose them, as layers={like}."
            )


def _require_kept(module: nn.Module, before: set[nn.Module]) -> None:
    new = [type(m).__name__ for m in module.modules() if m not in before]
    if new:
        raise UnsupportedModelError(
            f"{type(module).__name__} replaced its own {new[0]} when it ran on a short input, so "
            "it is not the model any more that was given. Load it anew in the form that short "
            "inputs take (BigBird: attention_type='original_full')."
        )


def _switch(model: PreTrainedModel, implementation: str) -> None:
    """Switch one model's own config; what is inside it (an audio tower) has its own turn."""
    model.set_attn_implementation({"": implementation})


def _implementation(found: Found, own: Mapping[PreTrainedModel, str]) -> str:
    """What a store says of how the model computes its attention."""
    kinds = sorted({spot.kind for spot in found.spots})
    return f"own code: {', '.join(kinds)}" if kinds else next(iter(own.values()))


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
        box["output"] = tap.call(kwargs)
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
