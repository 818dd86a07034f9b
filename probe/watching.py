"""Who watches or edits the attention of a model now, and the rules that keep it right.

One thread at a time, one forward at a time, and under gradient checkpointing the same edits in the
second forward as in the first.
"""

import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from probe.attention import AttentionCall
from probe.errors import InputError, UnsupportedModelError, WiringError
from probe.interventions import Add, Change, Intervention
from probe.positions import Ruler
from probe.proof import prove


class Watch:
    """The state that a tap shares with its attention modules.

    Attributes:
        lock: Held while anybody watches: a second thread waits.
        ruler: The positions of the tokens that are being read.
        interventions: In the order in which they act.
        causal: Whether no layer sees the future.
        proving: Whether each layer proves that what is read is what the model computed.
    """

    def __init__(self, model: nn.Module, n_layers: int, *, causal: bool) -> None:
        self.lock = threading.RLock()
        self.ruler = Ruler(model)
        self.interventions: tuple[Intervention, ...] = ()
        self.n_layers, self.causal = n_layers, causal
        self.proving = False
        self._model = model
        self._depth, self._thread = 0, 0
        self._running = self._checkpointing = False
        self._marks: weakref.WeakSet[_Token] = weakref.WeakSet()

    @contextmanager
    def on(
        self,
        *interventions: Intervention,
        prompt: Tensor | None = None,
        length: Tensor | None = None,
    ) -> Iterator[None]:
        """Watch every forward of the model while this is entered; contexts may be nested.

        Args:
            interventions: Act after those of the contexts around this one.
            prompt: (batch), tokens of each input that are its prompt; default all.
            length: (batch), tokens of each input, where it is padded on the right without a mask.
        """
        with self.lock:
            ruler = self.ruler
            outside = self.interventions, ruler.prompt, ruler.length
            if self._depth == 0:
                handles = (
                    self._model.register_forward_pre_hook(self._before, with_kwargs=True),
                    self._model.register_forward_hook(self._after, always_call=True),
                )
                self._thread = threading.get_ident()
            self._depth += 1
            self.interventions = (*self.interventions, *interventions)
            ruler.prompt = ruler.prompt if prompt is None else prompt
            ruler.length = ruler.length if length is None else length
            try:
                yield
            finally:
                self.interventions, ruler.prompt, ruler.length = outside
                self._depth -= 1
                if self._depth == 0:
                    self._running = False
                    ruler.forget()
                    for handle in handles:
                        handle.remove()

    @property
    def awake(self) -> bool:
        """Whether the next attention call matters to anybody."""
        return bool(self.interventions) or (bool(self._marks) and _in_backward())

    def edits(self, call: AttentionCall) -> list[Add | Change]:
        """All that the interventions change in a call.

        Raises:
            WiringError: A second forward under gradient checkpointing runs without the edits of
                the first.
            UnsupportedModelError: Reentrant gradient checkpointing.
        """
        if _in_backward():
            for mark in self._marks:
                if not _same(mark.interventions, self.interventions):
                    raise WiringError(
                        f"layer {call.layer} runs again for its gradients (gradient "
                        "checkpointing), and not under the hooks and interventions of its first "
                        "run: the gradients would be wrong. Call backward() inside the with block."
                    )
                if not self.ruler.same(mark.position):
                    raise WiringError(
                        f"layer {call.layer} runs again for its gradients (gradient "
                        "checkpointing), after another batch was read: which tokens are where is "
                        "not known any more. Call backward() after each forward."
                    )
        elif self._checkpointing and not torch.is_grad_enabled():
            raise UnsupportedModelError(
                "this model trains under reentrant gradient checkpointing, in which edits lose "
                "their gradients. Use gradient_checkpointing_enable({'use_reentrant': False})."
            )
        return [edit for one in self.interventions for edit in one.edits(call)]

    def mark(self, z: Tensor) -> Tensor:
        """Remember, for as long as the graph of z lives, under which interventions it was made."""
        if not (self._checkpointing and z.requires_grad and self.interventions) or _in_backward():
            return z
        token = _Token(self.interventions, self.ruler.position)
        self._marks.add(token)
        marked: Tensor = _Mark.apply(z, token)  # type: ignore[no-untyped-call]
        return marked

    def prove(self, call: AttentionCall, z: Tensor) -> None:
        """Prove what the kernel returned, where a run asked for it."""
        if self.proving:
            prove(call, z, causal=self.causal)

    def _before(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if threading.get_ident() != self._thread:
            raise InputError(
                "this model is watched by another thread now. Call it through its probe.Model, "
                "which waits, or give each thread a model of its own."
            )
        if self._running:
            raise InputError(
                "this model was called inside its own forward, by a hook, an intervention or the "
                "body of a trace. Call it before or after, or use a second copy."
            )
        self._running = True
        self._checkpointing = torch.is_grad_enabled() and any(
            m.training and getattr(m, "gradient_checkpointing", False)
            for m in self._model.modules()
        )
        self.ruler.read(args, kwargs)

    def _after(self, *_: object) -> None:
        self._running = False


class _Token:
    def __init__(self, interventions: Sequence[Intervention], position: Tensor | None) -> None:
        self.interventions, self.position = interventions, position


class _Mark(torch.autograd.Function):
    """The identity, whose node in the graph keeps a token alive."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, token: _Token) -> Tensor:
        ctx.token = token
        return z.view_as(z)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0], None


def _same(some: Sequence[object], others: Sequence[object]) -> bool:
    return len(some) == len(others) and all(a is b for a, b in zip(some, others, strict=True))


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1
