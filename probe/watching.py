"""Who watches or edits the attention of a model now, and the rules that keep it right.

One thread at a time, one forward at a time, and under gradient checkpointing the same edits in the
second forward as in the first.
"""

import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from greenlet import getcurrent
from torch import Tensor, nn

from probe.attention import AttentionCall
from probe.compiled import eagerly
from probe.errors import InputError, UnsupportedModelError, WiringError
from probe.interventions import Add, Change, Intervention
from probe.positions import Ruler, Script
from probe.proof import prove, prove_softmax


class Watch:
    """The state that a tap shares with its attention modules.

    Attributes:
        lock: Held while anybody watches: a second thread waits.
        ruler: The positions of the tokens that are being read.
        interventions: In the order in which they act.
        causal: Whether no layer sees the future.
        proving: Whether each layer proves that what is read is what the model computed.
        inside: What the forward that runs has entered, left when nobody watches any more.
    """

    def __init__(
        self,
        model: nn.Module,
        n_layers: int,
        *,
        causal: bool,
        whole: nn.Module,
        ids: str = "input_ids",
    ) -> None:
        self.lock = threading.RLock()
        self.ruler = Ruler(model, ids)
        self.interventions: tuple[Intervention, ...] = ()
        self.n_layers, self.causal = n_layers, causal
        self.proving = False
        self.inside = ExitStack()
        self._model, self._whole = model, whole
        self._depth, self._thread = 0, 0
        self._greenlet: object = None
        self._running = self._checkpointing = False
        self._refused: set[int] = set()
        self._marks: weakref.WeakSet[_Token] = weakref.WeakSet()

    @contextmanager
    def on(
        self,
        *interventions: Intervention,
        prompt: Tensor | None = None,
        length: Tensor | None = None,
        script: Sequence[Script] | None = None,
    ) -> Iterator[None]:
        """Watch every forward of the model while this is entered; contexts may be nested.

        Args:
            interventions: Act after those of the contexts around this one.
            prompt: (batch), tokens of each input that are its prompt; default all.
            length: (batch), tokens of each input, where it is padded on the right without a mask.
            script: What each sequence will say, where parts of it are read as embeddings.
        """
        with self.lock, eagerly(self._whole):
            ruler = self.ruler
            outside = self.interventions, ruler.prompt, ruler.length, ruler.script
            if self._depth == 0:
                handles = (
                    self._model.register_forward_pre_hook(self._before, with_kwargs=True),
                    self._model.register_forward_hook(self._after, always_call=True),
                )
                self._thread, self._greenlet = threading.get_ident(), getcurrent()
            self._depth += 1
            self.interventions = (*self.interventions, *interventions)
            ruler.prompt = ruler.prompt if prompt is None else prompt
            ruler.length = ruler.length if length is None else length
            ruler.script = ruler.script if script is None else script
            try:
                yield
            finally:
                self.interventions, ruler.prompt, ruler.length, ruler.script = outside
                self._depth -= 1
                if self._depth == 0:
                    self._running = False
                    self.inside.close()
                    ruler.forget()
                    for handle in handles:
                        handle.remove()

    @property
    def awake(self) -> bool:
        """Whether the next attention call matters to anybody."""
        if not self.interventions and not self._marks:  # torch.compile can follow this, no more
            return False
        if _in_backward():  # perhaps in a thread of autograd's own
            return True
        return bool(self.interventions) and threading.get_ident() == self._thread

    def edits(self, call: AttentionCall) -> list[Add | Change]:
        """All that the interventions change in a call.

        Raises:
            WiringError: A second forward under gradient checkpointing runs without the edits of
                the first.
            UnsupportedModelError: Reentrant gradient checkpointing.
        """
        if _in_backward():
            # One that nobody marked ran without them; marks of losses still held count too.
            for mark in list(self._marks) or [_Token((), self.ruler.position)]:
                if not _same(mark.interventions, self.interventions):
                    raise WiringError(
                        f"layer {call.layer} runs again for its gradients (gradient "
                        "checkpointing), and not under the hooks and interventions of its first "
                        "run: the gradients would be wrong. Call forward and backward() inside the "
                        "same with block, and keep no loss of an earlier one (but loss.item())."
                    )
                if not self.ruler.same(mark.position):
                    raise WiringError(
                        f"layer {call.layer} runs again for its gradients (gradient "
                        "checkpointing), after another batch was read: which tokens are where is "
                        "not known any more. Call backward() after each forward, and keep no loss "
                        "of an earlier one (but loss.item())."
                    )
        elif self._checkpointing and not torch.is_grad_enabled():
            raise UnsupportedModelError(
                "this model trains under reentrant gradient checkpointing, in which edits lose "
                "their gradients. Use gradient_checkpointing_enable({'use_reentrant': False})."
            )
        return [edit for one in self.interventions for edit in one.edits(call)]

    def mark(self, z: Tensor) -> Tensor:
        """Remember, for as long as the graph of z lives, under which interventions it was made."""
        if not (self.interventions and torch.is_grad_enabled()):
            return z
        # Below the first weight that is trained z has no gradient; run again it is all the same.
        anchor = torch.zeros((), requires_grad=self._checkpointing)
        token = _Token(self.interventions, self.ruler.position)
        if not _in_backward():
            self._marks.add(token)
        marked: Tensor = _Mark.apply(z, anchor, token)  # type: ignore[no-untyped-call]
        return marked

    def prove(self, call: AttentionCall, z: Tensor) -> None:
        """Prove what the kernel returned, where a run asked for it."""
        if self.proving:
            prove(call, z, causal=self.causal)

    def prove_softmax(self, call: AttentionCall, own: Tensor) -> None:
        """Prove what a module's own softmax returned, likewise."""
        if self.proving:
            prove_softmax(call, own, causal=self.causal)

    def _before(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        thread = threading.get_ident()
        if thread != self._thread:
            self._refused.add(thread)
            raise InputError(
                "this model is watched by another thread now. Call it through its probe.Model, "
                "which waits, or give each thread a model of its own."
            )
        if self._running or getcurrent() is not self._greenlet:  # a trace's body has its own
            self._refused.add(thread)
            raise InputError(
                "this model was called inside its own forward, by a hook, an intervention or the "
                "body of a trace. Call it before or after, or use a second copy."
            )
        self._running = True
        self._checkpointing = recomputes(self._model) and any(
            p.requires_grad for p in self._model.parameters()
        )
        self.ruler.read(args, kwargs)

    def _after(self, *_: object) -> None:
        thread = threading.get_ident()
        if thread in self._refused:  # this is called of refused forwards too
            self._refused.remove(thread)
        else:
            self._running = False


def recomputes(module: nn.Module) -> bool:
    """Whether a forward now would run again for its gradients: gradient checkpointing."""
    return torch.is_grad_enabled() and any(
        m.training and getattr(m, "gradient_checkpointing", False) for m in module.modules()
    )


class _Token:
    def __init__(self, interventions: Sequence[Intervention], position: Tensor | None) -> None:
        self.interventions, self.position = interventions, position


class _Mark(torch.autograd.Function):
    """The identity, whose node in the graph keeps a token alive."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, _: Tensor, token: _Token) -> Tensor:
        ctx.token = token
        return z.view_as(z)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0], None, None


def _same(some: Sequence[object], others: Sequence[object]) -> bool:
    return len(some) == len(others) and all(a is b for a, b in zip(some, others, strict=True))


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1
