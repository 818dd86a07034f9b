"""Which modules compute attention in code of their own, found by running one short forward.

A softmax, or a scaled_dot_product_attention, over (query, key) makes a module a candidate. Nothing
is trusted: a `Witness` of each proves that what it reads is what the module computes.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from probe.errors import ProbeError, UnsupportedModelError
from probe.hearing import Heard, distinct, layer_number, reading
from probe.intake import Intake, settled
from probe.layout import Layout, placed
from probe.owncode import EAR, FUNCTIONS, Kind, Spot
from probe.witness import Witness

_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "n_kv_head")


class Found(NamedTuple):
    """What a forward has shown: how the model takes tokens, and who attends, with what."""

    intake: Intake
    spots: list[Spot]
    heard: list[Heard]
    causal: bool


def discover(module: nn.Module, intake: Intake, layout: Layout | None = None) -> Found:
    """Find and prove the attention modules of a model.

    Args:
        module: The model; it runs in eval mode, and is left as it was.
        intake: How it takes tokens.
        layout: Where they are, if it is known.

    Raises:
        UnsupportedModelError: Nothing is found, or what is found cannot be told apart.
        InputError: A path of the layout leads nowhere.
        WiringError: What is found is not what the model computes.
        FloatingPointError: The model itself computes NaN or infinity.
    """
    named = None if layout is None else placed(layout, module)
    if any(EAR in m.__dict__ for m in module.modules()):
        raise UnsupportedModelError(
            f"this {type(module).__name__} is tapped already. Close the first probe.Model (or use "
            "it) before loading the same module again."
        )
    ids = intake.sample()
    with reading(module):
        recorder = _Recorder(module, ids)
        _forward(module, intake, ids, recorder)
        witnesses = [Witness(*one) for one in _spots(module, recorder.events, named)]
        with ExitStack() as stack:
            for witness in witnesses:
                stack.callback(witness.listen())
            _forward(module, intake, ids)
        causal = not any(bool((w.pattern().triu(1) > 0).any()) for w in witnesses)
        proven = [w.proven(causal) for w in witnesses]
    spots, heard = [spot for spot, _ in proven], [one for _, one in proven]
    return Found(settled(intake, layout, ids, recorder.tables), spots, heard, causal)


def _forward(
    module: nn.Module, intake: Intake, ids: Tensor, recorder: "_Recorder | None" = None
) -> None:
    inputs = {"input_ids": ids, "use_cache": False}
    args, kwargs, _ = intake.arguments(inputs, causal=True)
    try:
        with ExitStack() as stack:
            if recorder is not None:
                stack.callback(recorder.close)
                stack.enter_context(recorder)
            module(*args, **kwargs)
    except (ProbeError, FloatingPointError):
        raise
    except Exception as error:
        raise UnsupportedModelError(
            f"a forward of {type(module).__name__} over {tuple(ids.shape)} token ids failed with "
            f"{type(error).__name__}: {error}. The tap needs a model that runs on token ids alone; "
            "what argument takes them, and how many it knows, layout=probe.Layout(...) can say."
        ) from error


# ------------------------------------------------------------------------- what a forward calls


@dataclass(frozen=True, slots=True, eq=False)
class _Event:
    """A call that may be attention, or the start of a module that may be a projection.

    Attributes:
        kind: What is called.
        stack: The modules inside whose forwards it is, outermost first.
        n_heads: Of a call over (batch, head, query, key); 0 of others.
    """

    kind: Kind | None
    stack: tuple[nn.Module, ...]
    n_heads: int = 0


class _Recorder(TorchFunctionMode):
    """Writes down who calls what in one forward over `ids`."""

    def __init__(self, module: nn.Module, ids: Tensor) -> None:
        super().__init__()
        self.events: list[_Event] = []
        self.tables: list[tuple[nn.Embedding, Tensor]] = []
        self._ids = ids
        self._stack: list[nn.Module] = []
        self._handles: list[RemovableHandle] = []
        for m in module.modules():
            self._handles += [
                m.register_forward_pre_hook(self._begin, with_kwargs=True),
                m.register_forward_hook(self._end, always_call=True),
            ]

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        for kind, functions in FUNCTIONS.items():
            if func in functions:
                heads = (_softmax_heads if kind == "softmax" else _sdpa_heads)(
                    self._ids.shape, *args, **kwargs
                )
                self.events.append(_Event(kind, tuple(self._stack), heads))
        return func(*args, **kwargs)

    def _begin(self, module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        self._stack.append(module)
        x = next(iter((*args, *kwargs.values())), None)
        if not isinstance(x, Tensor):
            return
        if isinstance(module, nn.Embedding):
            self.tables.append((module, x))
        # A row for each token, of anything but its attention.
        rows = x.shape[:-1].numel() == self._ids.numel() and x.shape[-1] != self._ids.shape[1]
        if rows and x.is_floating_point() and any(p.ndim > 1 for p in module.parameters()):
            self.events.append(_Event(None, tuple(self._stack)))

    def _end(self, *_: Any) -> None:
        self._stack.pop()


def _softmax_heads(
    tokens: Sequence[int],
    input: Tensor,
    dim: int | None = None,
    *_: Any,
    **__: Any,
) -> int:
    """Heads of a softmax over the keys; 0 if it is over something else."""
    n_batch, n = tokens
    last = dim is not None and dim in (-1, input.ndim - 1)
    if not last or input.ndim < 3 or input.shape[-2:] != (n, n):
        return 0
    rest = input.shape[:-2].numel()
    return rest // n_batch if rest % n_batch == 0 else 0


def _sdpa_heads(tokens: Sequence[int], query: Tensor, key: Tensor, *_: Any, **__: Any) -> int:
    """Heads of a scaled_dot_product_attention over all tokens; 0 if it is something else."""
    n_batch, n = tokens
    fits = query.ndim == 4 and query.shape[0] == n_batch and query.shape[2] == key.shape[-2] == n
    return query.shape[1] if fits else 0


# ----------------------------------------------------------------------- what may be attention


def _spots(
    module: nn.Module,
    events: Sequence[_Event],
    named: Mapping[nn.Module, tuple[int, nn.Module | None]] | None,
) -> list[tuple[Spot, list[nn.Module]]]:
    """Where attention may be computed, and what may be its output projection behind a softmax."""
    paths = {m: path for path, m in module.named_modules()}
    found: dict[nn.Module, tuple[int, list[nn.Module]]] = {}
    for i, event in enumerate(events):
        owner = _owner(event, events[i:], named) if event.n_heads else None
        if owner is None:
            continue
        if owner in found:
            raise UnsupportedModelError(
                f"{paths[owner] or type(module).__name__!r} ({type(owner).__name__}) computes "
                "attention more than once in one forward: it has a module for each head, or runs "
                "as several layers. Which pattern is the layer's the tap cannot tell. Compute all "
                "heads at once, in a module of each layer's own."
            )
        told = None if named is None else named[owner][1]
        later = [e.stack[-1] for e in events[i:] if e.kind is None and owner in e.stack[:-1]]
        found[owner] = i, [told] if told else list(dict.fromkeys(later))
    _require(module, paths, found, named)
    numbers = distinct([layer_number(m, paths[m]) for m in found])
    out = []
    for number, (owner, (i, projections)) in zip(numbers, found.items(), strict=True):
        layer, heads = named[owner][0] if named else number, events[i].n_heads
        kind = events[i].kind or "softmax"
        before = sum(e.kind == kind and owner in e.stack for e in events[:i])
        spot = Spot(owner, layer, kind, before, heads, _kv_heads(owner, heads))
        out.append((spot, [] if kind == "sdpa" else projections))
    return out


def _owner(
    event: _Event, rest: Sequence[_Event], named: Mapping[nn.Module, object] | None
) -> nn.Module | None:
    """The attention module of a call: behind a softmax, one that projects what comes of it."""
    inside = event.stack if named is None else [m for m in event.stack if m in named]
    if event.kind == "sdpa" or named is not None:
        return inside[-1] if inside else None
    for later in rest:
        both = [m for m in inside if m in later.stack[:-1]]
        if later.kind is None and both:
            return both[-1]
    return None


def _require(
    module: nn.Module,
    paths: Mapping[nn.Module, str],
    found: Mapping[nn.Module, object],
    named: Mapping[nn.Module, object] | None,
) -> None:
    lost = [paths[m] for m in named or () if m not in found]
    if lost:
        raise UnsupportedModelError(
            f"{lost[0]!r}, which the layout names, did not call softmax or "
            "scaled_dot_product_attention over (head, query, key), with an output projection after "
            "it, in a forward. Name the module that does, and its projection=."
        )
    if not found:
        raise UnsupportedModelError(
            f"no module of this {type(module).__name__} called transformers' AttentionInterface, "
            "or softmax or scaled_dot_product_attention over (head, query, key), in a forward, so "
            "there is nothing to read: it has no softmax attention (as mamba), or fuses it (as "
            "nn.MultiheadAttention). If it has, say where: layout=probe.Layout(...)."
        )
    if module in found:
        raise UnsupportedModelError(
            f"{type(module).__name__} computes attention in its own forward and not in that of a "
            "module inside it, so that its layers cannot be told apart. Put it into a module."
        )


def _kv_heads(module: nn.Module, n_heads: int) -> int:
    """Key heads, where a module or its config says how many; they must share the query heads."""
    for place in (module, getattr(module, "config", None)):
        for name in _KV_HEADS:
            n = getattr(place, name, None)
            if isinstance(n, int) and n > 0 and n_heads % n == 0:
                return n
    return n_heads
