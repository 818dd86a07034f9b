"""The proof that a module's softmax is its attention, and which module its output goes into."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from probe.attention import AttentionCall
from probe.errors import UnsupportedModelError, WiringError
from probe.hearing import Heard
from probe.interface import Kernel
from probe.owncode import Ear, Finish, Spot
from probe.proof import prove, prove_mixing, prove_softmax


class Witness:
    """Keeps what a module computed, and then what its values are.

    A module behind whose softmax nothing is known runs a second time with every row attending to
    itself alone, which shows its values. Pattern and values must give what it projected.

    Args:
        spot: Where it computes attention.
        projections: Modules of which one may be its output projection.
    """

    awake = True

    def __init__(self, spot: Spot, projections: Sequence[nn.Module]) -> None:
        self.spot, self.layer = spot, spot.layer
        self._projections = projections
        self._again = self._weighed = False
        self._call: AttentionCall | None = None
        self._own: Tensor | None = None
        # What went into each, behind the softmax, and likewise with every row attending to itself.
        self._z: dict[nn.Module, Tensor] = {}
        self._values: dict[nn.Module, Tensor] = {}

    def listen(self) -> Callable[[], None]:
        """Begin; returns what ends it."""
        ear = Ear(self.spot, self, ExitStack())
        handles = [m.register_forward_pre_hook(self._look) for m in self._projections]
        handles.append(self.spot.module.register_forward_hook(self._repeat, with_kwargs=True))

        def close() -> None:
            ear.close()
            for handle in handles:
                handle.remove()

        return close

    def _repeat(self, module: nn.Module, args: Any, kwargs: Any, _: Any) -> None:
        self._weighed = False
        if not self._again and self.spot.kind == "softmax":
            self._again = True
            module(*args, **kwargs)

    def _look(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        kept = self._values if self._again else self._z
        if self._weighed and module not in kept and args and args[0].shape[-1] % self._heads == 0:
            kept[module] = args[0].reshape(*self._shape, self._heads, -1).clone()

    def serve(self, call: AttentionCall, kernel: Kernel) -> tuple[Tensor, Tensor | None]:
        z, weights = kernel(call)
        self._call, self._z[self.spot.module] = call, z.clone()
        return z, weights

    def weigh(self, call: AttentionCall, own: Tensor) -> tuple[Tensor | None, Finish]:
        self._weighed = True
        if self._again:
            return torch.eye(call.n_keys, device=own.device).expand(own.shape), _unseen
        self._call, self._own = call, own.clone()
        return None, _unseen

    @property
    def _heads(self) -> int:
        return self.spot.n_heads

    @property
    def _shape(self) -> tuple[int, int]:
        assert self._call is not None
        return self._call.shape[0], self._call.n_queries

    def pattern(self) -> Tensor:
        """(batch, head, query, key)."""
        assert self._call is not None
        return self._call.pattern() if self._own is None else self._own

    def proven(self, causal: bool) -> tuple[Spot, Heard]:
        """What was heard, after the proof that it is what the module computes, and where."""
        spot, call, own = self.spot, self._call, self._own
        assert call is not None
        if own is None:
            z = self._z[spot.module]
            prove(call, z, causal=causal)
            return spot, Heard(spot.module, call, z)
        prove_softmax(call, own, causal=causal)
        failed: WiringError | None = None
        for module, z in self._z.items():
            try:
                prove_mixing(call, own, self._values[module], z)
                return replace(spot, projection=module), Heard(spot.module, call, z)
            except WiringError as error:
                failed = failed or error
        raise failed or UnsupportedModelError(
            f"layer {spot.layer}: {type(spot.module).__name__} calls no module with a weight after "
            "its softmax, so where its output goes is not known. Put the output projection into a "
            "module, and name it: layout=probe.Layout(..., projection=...)."
        )


def _unseen(z: Tensor) -> Tensor:
    return z
