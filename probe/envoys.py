"""Nnsight's side of the tap: envoys whose attention can be read and assigned inside any trace."""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from nnsight.intervention.envoy import Envoy
from nnsight.intervention.eproperty import eproperty
from torch import Tensor, nn

from probe import backward
from probe.attention import AttentionCall, Site
from probe.editing import changed, edited
from probe.errors import InputError, UnsupportedModelError
from probe.interface import Kernel
from probe.interventions import Add, Change
from probe.matrices import Matrices, Readable
from probe.owncode import Finish, nobody
from probe.watching import Watch, recomputes

backward.install()


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
        if recomputes(self._module):
            raise UnsupportedModelError(
                "this model trains under gradient checkpointing, whose second forward runs outside "
                "the trace: gradients would be wrong. Use model.hooks or model.intervene around "
                "forward and backward, call gradient_checkpointing_disable(), or read under "
                "torch.no_grad()."
            )
        watch: Watch = self.__dict__["watch"]
        with watch.on():
            return super().interleave(*args, **kwargs)

    @property
    def device(self) -> torch.device | None:
        device = super().device
        return None if device is None or device.type == "meta" else device


class AttentionEnvoy(LazyEnvoy):
    """An attention module inside a trace: `.call`, `.scores`, `.pattern`, `.seen`, `.z`, in order.

    Each can be read, and all but `seen` assigned. Reading leaves the model on its own kernel; once
    scores or pattern are edited (assigned or changed in place), the output is computed from them.
    """

    @eproperty(description="what the kernel is given")  # type: ignore[untyped-decorator]
    def call(self, value: AttentionCall) -> AttentionCall:
        """The `AttentionCall`; assign one to change query, key, value or mask.

        Under flex and flash attention, whose kernels take no dense mask, a layer whose mask is
        changed is computed from its pattern. A static cache's key and value are views that later
        steps overwrite: clone what you keep.
        """
        return value

    @eproperty(description="(batch, head, query, key) before softmax")  # type: ignore[untyped-decorator]
    def scores(self, value: Tensor) -> Tensor:
        """Scaled, masked scores, float32, -inf where nothing is attended."""
        return value

    @eproperty(description="(batch, head, query, key) after softmax")  # type: ignore[untyped-decorator]
    def pattern(self, value: Tensor) -> Tensor:
        """Attention probabilities before dropout, float32."""
        return value

    @eproperty(description="what rows and heads can be read from")  # type: ignore[untyped-decorator]
    def seen(self, value: Readable) -> Readable:
        """What was attended in the end: `.seen.pattern(queries=, keys=, heads=)` computes rows."""
        return value

    @eproperty(description="(batch, query, head, head_dim)")  # type: ignore[untyped-decorator]
    def z(self, value: Tensor) -> Tensor:
        """Per-head output, before the output projection."""
        return value


class Publisher:
    """Serves a module's attention calls: to the interventions, then to the traces of its envoy."""

    def __init__(self, envoy: AttentionEnvoy, layer: int, watch: Watch) -> None:
        self._envoy, self.layer, self._watch = weakref.ref(envoy), layer, watch

    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        return nobody, ()  # a copy of the module is nobody's

    @property
    def awake(self) -> bool:
        return self._watch.awake or self._interleaver() is not None

    def serve(self, call: AttentionCall, kernel: Kernel) -> tuple[Tensor, Tensor | None]:
        """A kernel that is given q, k, v and a mask: returns (z, weights or None)."""
        call, edits = self._placed(call)
        call = self._handle("call", edited(call, edits))
        scores, cut = self._offer("scores", call.scores, edits)
        compute = call.pattern if scores is None else partial(call.softmax, scores)
        # Edited scores make an edited pattern, whether or not anybody reads it.
        pattern, touched = self._offer("pattern", compute, edits, needed=cut)
        seen: Readable = call
        if cut or touched:
            seen = _matrices(call, scores, pattern)
            z, weights = call.mix(pattern), pattern.to(call.value.dtype)
        else:
            z, weights = kernel(call)
            self._watch.prove(call, z)
        self._handle("seen", seen)
        return self._finish(edits, z), weights

    def weigh(self, call: AttentionCall, own: Tensor) -> tuple[Tensor | None, Finish]:
        """A softmax in a module's own code: see `probe.owncode.OwnListener`."""
        self._watch.prove_softmax(call, own)
        given, edits = self._placed(call)
        self._refuse_inputs(edits)
        call = edited(given, edits)
        scores, cut = self._offer("scores", call.scores, edits)
        cut |= call is not given
        compute: Callable[[], Tensor] = partial(_without_empty_rows, own, call)
        if cut:
            compute = call.pattern if scores is None else partial(call.softmax, scores)
        pattern, touched = self._offer("pattern", compute, edits, needed=True)
        self._handle("seen", _matrices(call, scores, pattern))
        return pattern if cut or touched else None, partial(self._finish, edits)

    def _placed(self, call: AttentionCall) -> tuple[AttentionCall, list[Add | Change]]:
        """The call with what its rows and columns are, and the edits that it gets."""
        watch = self._watch
        place = watch.ruler.place(call.n_queries, call.n_keys, call.query.device)
        call = replace(call, where=place, n_layers=watch.n_layers)
        return call, watch.edits(call)

    def _finish(self, edits: Sequence[Add | Change], z: Tensor) -> Tensor:
        """What becomes of (batch, query, head, head_dim)."""
        z, _ = changed("z", z, edits)
        return self._watch.mark(self._handle("z", z))

    def _refuse_inputs(self, edits: Sequence[Add | Change]) -> None:
        """Refuse to read or change what only a module's own code has seen."""
        names = [e.name for e in edits if isinstance(e, Change) and e.site in ("q", "k", "v")]
        if self._asked("call"):
            names.append(".call (q, k and v)")
        if any(isinstance(e, Add) and e.opens for e in edits):
            raise InputError(
                f"the mask of layer {self.layer} is in its module's own code, and what it hides "
                "cannot be opened. Leave out allow_future."
            )
        if names:
            raise InputError(
                f"{names[0]} cannot be read or changed in layer {self.layer}, whose module turns "
                "q and k into scores in code of its own. Use scores, pattern or z, or the modules "
                "that compute q, k and v, in a trace of model.envoy."
            )
        self._handle("call", None)  # counted all the same: see `_offer`

    def _interleaver(self) -> Any:
        """nnsight's, while a trace runs."""
        envoy = self._envoy()
        return None if envoy is None or not envoy.interleaver.interleaving else envoy.interleaver

    def _handle(self, name: str, value: Any) -> Any:
        interleaver, envoy = self._interleaver(), self._envoy()
        if interleaver is None or envoy is None:
            return value
        result = interleaver.handle(f"{envoy.path}.{name}", value)
        return result if result is value else _assigned(f"{envoy.path}.{name}", result, value)

    def _offer(
        self,
        name: Literal["scores", "pattern"],
        compute: Callable[[], Tensor],
        edits: Sequence[Add | Change],
        *,
        needed: bool = False,
    ) -> tuple[Any, bool]:
        """Offer a computed value: (the value or None if nobody asked, was it edited)."""
        asked = self._asked(name)
        touched = any(isinstance(edit, Change) and edit.site == name for edit in edits)
        if not (needed or asked or touched):
            # The visit counts all the same: `tracer.iter` numbers the steps by it.
            return self._handle(name, None), False
        value, cut = changed(name, compute(), edits)
        version = None if value.is_inference() else value._version
        after = self._handle(name, value)
        # An inference tensor does not count its in-place edits, so it passes for edited.
        fresh = after is not value or (asked and (version is None or after._version != version))
        return after, cut or fresh

    def _asked(self, name: str) -> bool:
        """Whether the body of a trace waits for a value."""
        interleaver, envoy = self._interleaver(), self._envoy()
        if interleaver is None or envoy is None:
            return False
        return f"{envoy.path}.{name}" in interleaver.parked


def _assigned(location: str, result: Any, value: Any) -> Any:
    """What a trace put in the place of a value, if it can stand there."""
    if isinstance(value, Tensor):
        fits, wanted = isinstance(result, Tensor), f"a tensor of shape {tuple(value.shape)}"
        fits = fits and result.shape == value.shape
    else:
        fits, wanted = isinstance(result, type(value)), f"one of {type(value).__name__}"
    if not fits:
        found = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
        raise InputError(f"{location} was assigned {found} in a trace. Assign {wanted}.")
    return result


def _matrices(call: AttentionCall, scores: Tensor | None, pattern: Tensor) -> Matrices:
    full: dict[Site, Tensor] = {"pattern": pattern}
    return Matrices(full if scores is None else full | {"scores": scores}, call)


def _without_empty_rows(own: Tensor, call: AttentionCall) -> Tensor:
    """A pattern that a model computed; rows that attend to nothing are not uniform but 0."""
    assert call.mask is not None
    empty = (call.mask == -torch.inf).all(-1, keepdim=True)
    return own.to(call.dtype).masked_fill(empty, 0.0)
