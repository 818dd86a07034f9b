"""Interventions: changes of attention as data, in forward, in generation and under traces.

An intervention says for each attention call what to change, as `Add` (a bias on the scores, fused
into the kernel's mask) and `Change` (a function of a site). Whatever the order in which they are
given, a call is changed site by site: q, k and v; the sum of all biases; scores; pattern; z. Within
a site, interventions act in the order in which they are given. The cost follows the kind: `Add`,
q, k, v and z leave the model on its own kernel; scores and pattern are materialised, in the layers
that name them.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, Protocol

import torch
from torch import Tensor

from probe import selection
from probe.attention import AttentionCall
from probe.errors import InputError
from probe.positions import Positions
from probe.selection import Selector

Site = Literal["q", "k", "v", "scores", "pattern", "z"]
SITES: tuple[Site, ...] = ("q", "k", "v", "scores", "pattern", "z")


@dataclass(frozen=True, slots=True, eq=False)
class Add:
    """Add to the scaled scores; -inf hides.

    Attributes:
        bias: (batch or 1, head or 1, query or 1, key or 1), float.
        opens: Whether it stands in place of the model's own mask: all but padding is seen then,
            unless a bias hides it.
    """

    bias: Tensor
    opens: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Change:
    """Put a function on a site.

    Attributes:
        site: "q" (batch, query, head, head_dim), "k" and "v" (batch, key, kv_head, head_dim), all
            cached keys included; "scores" and "pattern" (batch, head, query, key), float32; or
            "z" (batch, query, head, head_dim), before the output projection.
        function: Gets the value, its own copy, and returns the new one of the same shape; None
            stands for the value itself, changed in place or not at all. (Changes through `.data`
            and NumPy cannot be seen: return a copy then.)
        name: For messages.
        heads: Only these go through the function, default all; of "k" and "v", key heads.
    """

    site: Site
    function: Callable[[Tensor], Tensor | None]
    name: str
    heads: Selector = None


class Intervention(Protocol):
    """What changes attention: usually a frozen dataclass whose fields are recorded as data."""

    def edits(self, call: AttentionCall) -> Iterable[Add | Change]:
        """What to change in this call; nothing in the layers that it does not name."""


def of_items(one: Intervention, items: Sequence[int], n: int) -> Intervention:
    """An intervention for some of n problems, in the order in which they run.

    One that says something else of each problem has a method `of_items(items, n)`.

    Raises:
        InputError: It speaks of another number of problems.
    """
    chosen = getattr(one, "of_items", None)
    found: Intervention = one if chosen is None else chosen(items, n)
    return found


@dataclass(frozen=True, kw_only=True)
class Bias:
    """Add a number to the scores of chosen edges; -inf knocks them out.

    Adding ln(a) multiplies the probability of an edge by a and renormalises its row.

    Attributes:
        value: In nats.
        queries: Rows by token position, default all: see `probe.positions.chosen`.
        keys: Columns, likewise.
        layers: int, negative int, slice or list; default all.
        heads: Query heads, likewise.

    Raises:
        InputError: The value is no number, NaN or infinity.

    Example:
        >>> with model.intervene(probe.Bias(value=-float("inf"), queries=-1, keys=0, layers=1)):
        ...     _, cache = model.run_with_cache("abcabc", sites="pattern")
        >>> bool((cache["pattern", 1][0, :, -1, 0] == 0).all())
        True
    """

    value: float
    queries: Selector = None
    keys: Selector = None
    layers: Selector = None
    heads: Selector = None

    def __post_init__(self) -> None:
        try:
            # A text and a tensor of several numbers are none; an int may be too large for a float.
            finite = not isinstance(self.value, str) and float(self.value) < float("inf")
        except (TypeError, ValueError, RuntimeError, OverflowError):
            finite = False
        if not finite:
            raise InputError(f"value={self.value!r:.60}. Give a number, or -inf to hide an edge.")
        _keep(self, "queries", "keys", "layers", "heads")

    def edits(self, call: AttentionCall) -> Iterable[Add]:
        """A bias on the edges that this call has."""
        if not names(self.layers, call):
            return
        at = where(call)
        edge = at.rows(self.queries)[:, None, :, None] & at.columns(self.keys)[:, None, None, :]
        if self.heads is not None:
            chosen = torch.zeros(call.n_heads, dtype=torch.bool, device=edge.device)
            chosen[list(selection.axis(self.heads, call.n_heads, "heads"))] = True
            edge = edge & chosen[:, None, None]
        # Never the future: hiding what is hidden, or biasing it, would change nothing.
        if bool(edge.any()):
            yield Add(torch.zeros_like(edge, dtype=call.dtype).masked_fill(edge, self.value))


@dataclass(frozen=True, kw_only=True)
class Edit:
    """Change a site by any function.

    Attributes:
        site: "q", "k", "v", "scores", "pattern" or "z"; shapes as in `Change`.
        function: `function(value, call)` returns the new value, or None for the value itself,
            changed in place or not. `call` is the `AttentionCall` before all changes; its `where`
            has the token positions of rows and columns.
        layers: int, negative int, slice or list; default all.
        heads: Only these go through the function; of "k" and "v", key heads.

    Raises:
        InputError: There is no such site, or the function does not take two arguments.

    Example:
        >>> with model.intervene(probe.Edit(site="z", function=lambda z, _: 0 * z, heads=[0])):
        ...     logits = model("abcabc").logits
    """

    site: Site
    function: Callable[[Tensor, AttentionCall], Tensor | None]
    layers: Selector = None
    heads: Selector = None

    def __post_init__(self) -> None:
        if self.site not in SITES:
            raise InputError(f"site={self.site!r}. Choose from {', '.join(SITES)}.")
        require_function(self.function, "(value, call)", None, None)
        _keep(self, "layers", "heads")

    def edits(self, call: AttentionCall) -> Iterable[Change]:
        """The function, in the layers that are named."""
        if names(self.layers, call):
            function = partial(_edit, self.function, call)
            yield Change(self.site, function, f"the Edit of {self.site}", self.heads)


def _edit(
    function: Callable[[Tensor, AttentionCall], Tensor | None], call: AttentionCall, value: Tensor
) -> Tensor | None:
    return function(value, call)


def names(layers: Selector, call: AttentionCall) -> bool:
    """Whether a selection of layers names the layer of this call."""
    return layers is None or call.layer in selection.axis(layers, call.n_layers, "layers")


def where(call: AttentionCall) -> Positions:
    """The positions of a call.

    Raises:
        InputError: They are unknown.
    """
    if call.where is None:
        raise InputError(
            f"which tokens the rows and columns of layer {call.layer} are is not known, so that "
            "they cannot be chosen by position. Use an Edit, or a bias of your own."
        )
    return call.where


def lasting(selector: Selector) -> Selector:
    """A selection that can be read many times: what an iterator gives, it gives only once.

    Example:
        >>> lasting(iter([0, 1])), lasting("last:6")
        ([0, 1], 'last:6')
    """
    return list(selector) if isinstance(selector, Iterator) else selector


def _keep(one: object, *fields: str) -> None:
    for name in fields:
        object.__setattr__(one, name, lasting(getattr(one, name)))


def require_function(function: object, wanted: str, *args: None, **kwargs: None) -> None:
    """Refuse what cannot be called with such arguments, before a forward has begun.

    Raises:
        InputError: It is not callable, or takes other arguments.
    """
    if not callable(function):
        raise InputError(f"{function!r:.60} is not callable. Give a function of {wanted}.")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some that are written in C do not say what they take
        return
    try:
        signature.bind(*args, **kwargs)
    except TypeError:
        name = getattr(function, "__name__", type(function).__name__)
        raise InputError(f"{name} takes {signature}. Give a function of {wanted}.") from None


def require(one: object) -> None:
    """Refuse what is no intervention.

    Raises:
        InputError: It has no method `edits`, or is a class.
    """
    if isinstance(one, type) or not callable(getattr(one, "edits", None)):
        raise InputError(
            f"{one!r:.60} is not an intervention. Give objects with a method edits(call), such as "
            "probe.Bias(...) and probe.Edit(...)."
        )
