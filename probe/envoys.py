"""Nnsight's side of the tap: envoys whose attention can be read and assigned inside any trace."""

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from nnsight.intervention.envoy import Envoy
from nnsight.intervention.eproperty import eproperty
from torch import Tensor, nn

from probe.attention import AttentionCall
from probe.errors import UnsupportedModelError
from probe.interface import Kernel


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
        order = {name: i for i, name in enumerate(self._module._modules)}
        return sorted(super()._named_children(), key=lambda n: order.get(n[0], len(order)))


class RootEnvoy(LazyEnvoy):
    """The model's envoy; inputs follow its parameters, also when some are offloaded."""

    def interleave(self, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled() and any(
            m.training and getattr(m, "gradient_checkpointing", False)
            for m in self._module.modules()
        ):
            raise UnsupportedModelError(
                "this model trains under gradient checkpointing, whose second forward runs outside "
                "the trace: gradients would be wrong. Call gradient_checkpointing_disable(), or "
                "read under torch.no_grad()."
            )
        return super().interleave(*args, **kwargs)

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


class Publisher:
    """Serves a module's attention calls to the traces of its envoy."""

    def __init__(self, envoy: AttentionEnvoy, layer: int) -> None:
        self._envoy, self.layer = weakref.ref(envoy), layer

    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        return _nobody, ()  # a copy of the module is nobody's

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


def _nobody() -> None:
    return None
