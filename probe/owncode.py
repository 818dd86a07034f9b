"""Attention in a module's own code, overheard while its forward runs.

Torch shows every function that it is asked for to the `TorchFunctionMode` on top of its stack. An
`Ear` is on that stack only inside the forward of the attention module that it listens to, and only
while its listener is awake. It hears the one call of softmax, or of scaled_dot_product_attention,
that computes the module's attention, and, behind a softmax, what goes into the output projection.
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from greenlet import getcurrent
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from probe import masks
from probe.attention import AttentionCall
from probe.errors import WiringError
from probe.indexing import wide
from probe.interface import Listener, require_seen

Kind = Literal["softmax", "sdpa"]
Finish = Callable[[Tensor], Tensor]

FUNCTIONS: Mapping[Kind, frozenset[Any]] = {
    "softmax": frozenset({F.softmax, torch.softmax, torch.special.softmax, Tensor.softmax}),
    "sdpa": frozenset({F.scaled_dot_product_attention}),
}
EAR = "_probe_ear"  # in the __dict__ of the modules that it listens to, so never in their state

# Such scores are masked: models add -1e4, -1e9 or a dtype's minimum, divided by sqrt(head_dim) or
# not, where others put -inf.
HIDDEN = -1000.0


@dataclass(frozen=True, slots=True, eq=False)
class Spot:
    """Where a module computes its attention.

    Attributes:
        module: The attention module.
        layer: Its absolute layer.
        kind: What it calls.
        ordinal: How many calls of this kind come before, in its forward.
        n_heads: Query heads.
        n_kv_heads: Key heads.
        projection: The module whose input is z, behind a softmax.
    """

    module: nn.Module
    layer: int
    kind: Kind
    ordinal: int
    n_heads: int
    n_kv_heads: int
    projection: nn.Module | None = None


class OwnListener(Listener, Protocol):
    """Whoever hears attention that is computed step by step."""

    def weigh(self, call: AttentionCall, own: Tensor) -> tuple[Tensor | None, Finish]:
        """Observe or edit scores and pattern.

        Args:
            call: The scores, as the mask of queries and keys that have no width.
            own: (batch, head, query, key), what the model's softmax made of them.

        Returns:
            (the pattern to go on with, or None for the model's own; what to do with z).
        """


class Ear(TorchFunctionMode):
    """Overhears one attention module.

    Args:
        spot: What to listen to.
        listener: Who wants to hear it.
        inside: Is left, whatever happens, when nobody watches any more.
    """

    def __init__(self, spot: Spot, listener: OwnListener, inside: ExitStack) -> None:
        super().__init__()
        self.spot, self.listener, self._inside = spot, listener, inside
        self._greenlet: object = None
        self._calls, self._shape = 0, (0, 0, 0)
        self._finish: Finish | None = None
        self._handles = [
            spot.module.register_forward_pre_hook(_enter),
            spot.module.register_forward_hook(_leave, always_call=True),
        ]
        spot.module.__dict__[EAR] = self
        if spot.projection is not None:
            hook = spot.projection.register_forward_pre_hook(_project, with_kwargs=True)
            self._handles.append(hook)
            spot.projection.__dict__[EAR] = self

    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        return nobody, ()  # a copy of the module is nobody's

    def close(self) -> None:
        """Leave the modules as they were."""
        for handle in self._handles:
            handle.remove()
        for module in (self.spot.module, self.spot.projection):
            if module is not None:
                module.__dict__.pop(EAR, None)

    @property
    def listening(self) -> bool:
        """Whether this runs inside the module's forward, and not in the body of a trace."""
        return self._greenlet is not None and self._greenlet is getcurrent()

    def __enter__(self) -> "Ear":
        self._greenlet, self._calls, self._finish = getcurrent(), 0, None
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exception: Any) -> None:
        self._greenlet = None
        super().__exit__(*exception)  # type: ignore[no-untyped-call]

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in FUNCTIONS[self.spot.kind] or not self.listening:
            return func(*args, **kwargs)
        self._calls += 1
        if self._calls != self.spot.ordinal + 1:
            return func(*args, **kwargs)
        hear = self._softmax if self.spot.kind == "softmax" else self._sdpa
        return hear(func, args, kwargs)

    def enter(self) -> None:
        """The module's forward begins."""
        if self.listener.awake and self._greenlet is None:
            self._inside.enter_context(self)

    def leave(self, *, finished: bool) -> None:
        """The module's forward has ended; `finished` unless it failed."""
        if not self.listening:
            return
        self._inside.close()
        spot = self.spot
        deaf = self._calls <= spot.ordinal
        if finished and (deaf or (spot.projection and self._finish)):
            missed = "scaled_dot_product_attention" if spot.kind == "sdpa" else "softmax"
            if not deaf:
                missed = f"output projection ({type(spot.projection).__name__})"
            raise WiringError(
                f"layer {spot.layer}: {type(spot.module).__name__} did not call its {missed} as it "
                "did when it was loaded, so nothing of it could be read or edited. Run it as it "
                "was then (without output_attentions, with the same attn_implementation)."
            )

    def _softmax(self, func: Any, args: Any, kwargs: Mapping[str, Any]) -> Tensor:
        own: Tensor = func(*args, **kwargs)
        scores: Tensor = args[0] if args else kwargs["input"]
        rows, keys = scores.shape[-2:]
        shape = (-1, self.spot.n_heads, rows, keys)
        call = of_scores(scores.reshape(shape), self.spot)
        self._shape = call.shape[0], rows, self.spot.n_heads
        pattern, self._finish = self.listener.weigh(call, own.reshape(shape))
        return own if pattern is None else pattern.to(own.dtype).reshape(own.shape)

    def _sdpa(self, func: Any, args: Any, kwargs: Mapping[str, Any]) -> Tensor:
        arguments = _arguments(*args, **kwargs)
        given = of_sdpa(arguments, self.spot.layer)

        def kernel(call: AttentionCall) -> tuple[Tensor, None]:
            require_seen(given, call)
            changed: dict[str, Any] = {"query": call.query, "key": call.key, "value": call.value}
            if call.mask is not given.mask:
                mask = masks.for_kernel(call, "sdpa")
                # Causal where there is no mask, but not for a single row: see AttentionCall.
                causal = mask is None and call.causal and call.n_queries > 1
                changed |= {"attn_mask": mask, "is_causal": causal}
            return func(**arguments | changed).transpose(1, 2), None

        z, _ = self.listener.serve(given, kernel)
        return z.transpose(1, 2)

    def project(self, x: Tensor) -> Tensor:
        """What goes into the output projection, heard and perhaps changed."""
        if self._finish is None or not self.listening:
            return x
        finish, self._finish = self._finish, None
        return finish(x.reshape(*self._shape, -1)).reshape(x.shape)


def of_scores(scores: Tensor, spot: Spot) -> AttentionCall:
    """Scores that a module computed: a call whose queries and keys have no width, and its mask.

    Args:
        scores: (batch, head, query, key), any float dtype, before the softmax.
        spot: Where they come from.
    """
    scores = wide(scores)
    scores = scores.masked_fill(scores <= HIDDEN, -torch.inf)
    batch, _, rows, keys = scores.shape
    query = scores.new_empty(batch, spot.n_heads, rows, 0)
    key = scores.new_empty(batch, spot.n_kv_heads, keys, 0)
    return AttentionCall(query, key, key, mask=scores, scaling=1.0, causal=False, layer=spot.layer)


def of_sdpa(arguments: Mapping[str, Any], layer: int) -> AttentionCall:
    """What scaled_dot_product_attention was given, over (batch, head, query, head_dim)."""
    query, key, mask = arguments["query"], arguments["key"], arguments["attn_mask"]
    if mask is not None:
        mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
    elif arguments["is_causal"] and query.shape[2] == 1 and key.shape[2] > 1:
        # Causal from the top left leaves a single row its first key; a call without a mask, all.
        mask = (torch.arange(key.shape[2], device=key.device) == 0).view(1, 1, 1, -1)
    return AttentionCall(
        query,
        key,
        arguments["value"],
        mask,
        scaling=arguments["scale"],
        causal=arguments["is_causal"],
        dropout=arguments["dropout_p"],
        layer=layer,
    )


def _arguments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> dict[str, Any]:
    """By name, with the defaults of scaled_dot_product_attention."""
    return locals()


def _ear(module: nn.Module) -> Ear | None:
    """Who listens to a module; nobody while torch.compile reads its code."""
    return None if torch.compiler.is_compiling() else module.__dict__.get(EAR)


def _enter(module: nn.Module, _: Any) -> None:
    ear = _ear(module)
    if ear is not None:
        ear.enter()


def _leave(module: nn.Module, _: Any, output: Any) -> None:
    ear = _ear(module)
    if ear is not None:
        ear.leave(finished=output is not None)


def _project(module: nn.Module, args: Any, kwargs: Any) -> Any:
    ear = _ear(module)
    if ear is None:
        return None
    if args:
        return (ear.project(args[0]), *args[1:]), kwargs
    name = next(iter(kwargs))
    return args, {**kwargs, name: ear.project(kwargs[name])}


def nobody() -> None:
    """Who listens to a copy of a module."""
