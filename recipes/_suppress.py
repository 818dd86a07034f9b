"""The interventions that scale what is looked at, by key."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Literal, Self, cast, get_args

import torch
from torch import nn

from probe import selection
from probe.attention import AttentionCall
from probe.errors import InputError
from probe.interventions import Add, Change, where
from probe.selection import Selector
from recipes._choosing import (
    Heads,
    Keys,
    are_per_item,
    columns,
    heads_in,
    items_of,
    plain,
    require_heads,
    require_keys,
)
from recipes._scaling import (
    bias_of,
    multiplied,
    of_columns,
    require_factors,
    scaled,
    shifted,
    spread,
)

PUBLIC = "recipes.suppression"  # by which a record names them

Mode = Literal["log_add", "logit_mul", "logit_mul_shifted", "prob_zero_no_renorm"]


@dataclass(frozen=True, kw_only=True)
class Suppress:
    """Scale the attention that chosen keys get.

    With a the factor, s the scores after scaling and p the pattern, for each named key j:

    - "log_add": s_j + ln a; p_j is multiplied by a and the row renormalised, exactly (PASTA, Zhang
      et al. 2023, arXiv 2311.02262). a = 0 hides the key. The model stays on its own kernel.
    - "logit_mul": a s_j, as in document 004 and ports of AtMan. With a below 1 it *raises*
      attention wherever s_j is negative, and a warning says how often that was.
    - "logit_mul_shifted": m + a (s_j - m), where m is the least score of the keys that the row may
      see (AtMan, Deiseroth et al. 2023, arXiv 2301.08110, whose own minimum also looks at the
      future). Monotone; a = 0 still leaves the weight of the least score.
    - "prob_zero_no_renorm": a p_j and no renormalisation: the head's output gets smaller.

    The last three compute scores and pattern, float32, in the layers that they name.

    Attributes:
        keys: Tokens by position, negative ones from the end of the prompt; or "last:6",
            "text: not", "regex:[0-9]+", "segment:bos" (see `probe.selection.named`); or a list for
            each batch item, in which None names nothing.
        factor: Of each key, at least 0; above 1 amplifies, 1 does nothing. One for all, or as many
            as there are keys, in the same nesting. Default 0.1, and 0 for "prob_zero_no_renorm".
        mode: See above.
        layers: int, negative int, slice or list; default all.
        heads: Query heads, likewise; or pairs (layer, head) without layers.
        queries: Rows in which it acts, as keys; default all that see the key, also while more
            tokens are generated.
        after_scaling: Accepted as in document 004, and without effect: multiplying before or
            after the scores are scaled is the same, and ln a is always added after.

    A row of which nothing would be left keeps its own token; if several interventions together
    leave it nothing, that is an error when it runs.

    Raises:
        InputError: An unknown mode, a factor that is negative or no number, as many factors as
            there are not keys; when it runs, a position outside the prompt.

    Example:
        >>> with model.intervene(Suppress(keys=[1, 2], factor=[0.1, 0.2], layers=[0, 1])):
        ...     text = model.generate("abc", max_new_tokens=2)
    """

    __module__ = PUBLIC
    moves: ClassVar = True  # a control may put it elsewhere: see `recipes.controls`
    keys: Keys
    factor: float | Sequence[float] | Sequence[Sequence[float]] | None = None
    mode: Mode = "log_add"
    layers: Selector = None
    heads: Heads = None
    queries: Selector = None
    after_scaling: bool = False
    _warned: list[bool] = field(default_factory=list, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise InputError(f"mode={self.mode!r}. Choose from {', '.join(get_args(Mode))}.")
        for name in ("keys", "factor", "layers", "heads", "queries"):
            object.__setattr__(self, name, plain(getattr(self, name)))
        if self.factor is None:
            default = 0.0 if self.mode == "prob_zero_no_renorm" else 0.1
            object.__setattr__(self, "factor", default)
        require_keys(self.keys)
        require_factors(self.factor, self.keys)
        selection.require(self.queries, "queries")
        require_heads(self.layers, self.heads)

    def of_items(self, items: Sequence[int], n: int) -> Self:
        """The same for some of n problems: see `probe.interventions.of_items`."""
        return cast("Self", items_of(self, items, n))

    def edits(self, call: AttentionCall) -> Iterable[Add | Change]:
        """A bias, or a function of scores or pattern, in the layers that are named."""
        heads = heads_in(call, self.layers, self.heads)
        if not heads or self.keys == []:
            return
        at = where(call)
        factor = of_columns(call, self.keys, self.factor)
        if bool((factor == 1).all()):
            return
        edges = torch.where(at.rows(self.queries)[:, :, None], factor[:, None, :], 1.0)
        if self.mode == "log_add":
            yield Add(bias_of(call, edges.log(), heads))
            return
        edges, name = edges[:, None].to(call.dtype), f"Suppress(mode={self.mode!r})"
        if self.mode == "logit_mul":
            yield Change(
                "scores", partial(multiplied, edges, self._warned, call.layer), name, heads
            )
        elif self.mode == "logit_mul_shifted":
            yield Change("scores", partial(shifted, edges), name, heads)
        else:
            yield Change("pattern", partial(scaled, edges), name, heads)


@dataclass(frozen=True, kw_only=True)
class Knockout:
    """Hide chosen keys from chosen queries (Geva et al. 2023, arXiv 2304.14767).

    The score is -inf: the probability of the edge is 0 and its row renormalised. The paper blocks
    all heads in a window of layers (see `window`).

    Attributes:
        keys: Who is not seen: see `Suppress`.
        queries: By whom; default every row.
        layers: int, negative int, slice or list; default all.
        heads: Query heads, likewise; or pairs (layer, head).

    A row of which nothing would be left keeps its own token.

    Raises:
        InputError: As for `Suppress`.

    Example:
        >>> with model.intervene(Knockout(queries="last:1", keys=[1, 2], layers=window(1, 3, 2))):
        ...     logits = model("abcabc").logits
    """

    __module__ = PUBLIC
    moves: ClassVar = True  # a control may put it elsewhere: see `recipes.controls`
    keys: Keys
    queries: Selector = None
    layers: Selector = None
    heads: Heads = None

    def __post_init__(self) -> None:
        for name in ("keys", "layers", "heads", "queries"):
            object.__setattr__(self, name, plain(getattr(self, name)))
        self._suppress()

    def of_items(self, items: Sequence[int], n: int) -> Self:
        """The same for some of n problems: see `probe.interventions.of_items`."""
        return cast("Self", items_of(self, items, n))

    def _suppress(self) -> Suppress:
        chosen = {"layers": self.layers, "heads": self.heads, "queries": self.queries}
        return Suppress(keys=self.keys, factor=0.0, **chosen)  # type: ignore[arg-type]

    def edits(self, call: AttentionCall) -> Iterable[Add | Change]:
        """A bias of -inf on the edges that this call has."""
        return self._suppress().edits(call)


@dataclass(frozen=True, kw_only=True)
class Steer:
    """Make chosen heads look at a part of the prompt (PASTA, Zhang et al. 2023, arXiv 2311.02262).

    Attributes:
        keys: The part: see `Suppress`; or a list of such selections, of which the union counts.
            (The published code takes several one after the other, so that they weaken each other.)
        factor: At least 0, 0.01 as published.
        mode: "exclude" scales every other token of the prompt by the factor, "include" the part
            itself. Tokens that are generated are never scaled.
        layers: int, negative int, slice or list; default all.
        heads: Query heads, likewise; or pairs (layer, head), as those that were found to help.

    Raises:
        InputError: As for `Suppress`.

    Example:
        >>> with model.intervene(Steer(keys=slice(1, 3), heads=[(1, 0), (1, 2)])):
        ...     text = model.generate("abcabc", max_new_tokens=2)
    """

    __module__ = PUBLIC
    moves: ClassVar = True  # a control may put it elsewhere: see `recipes.controls`
    keys: Keys | Sequence[slice | str]
    factor: float = 0.01
    mode: Literal["exclude", "include"] = "exclude"
    layers: Selector = None
    heads: Heads = None

    def __post_init__(self) -> None:
        if self.mode not in ("exclude", "include"):
            raise InputError(f"mode={self.mode!r}. Choose exclude or include.")
        for name in ("keys", "factor", "layers", "heads"):
            object.__setattr__(self, name, plain(getattr(self, name)))
        require_factors(self.factor, None)
        for part in self._parts():
            require_keys(part)
        require_heads(self.layers, self.heads)

    def of_items(self, items: Sequence[int], n: int) -> Self:
        """The same for some of n problems: see `probe.interventions.of_items`."""
        return cast("Self", items_of(self, items, n))

    def _parts(self) -> Sequence[Keys]:
        several = isinstance(self.keys, list | tuple) and any(
            isinstance(part, slice | str) for part in self.keys
        )
        return self.keys if several else [self.keys]  # type: ignore[return-value, list-item]

    def edits(self, call: AttentionCall) -> Iterable[Add]:
        """A bias on the keys of the prompt that are scaled."""
        heads = heads_in(call, self.layers, self.heads)
        if not heads or self.factor == 1:
            return
        at = where(call)
        scaled = torch.zeros_like(at.key, dtype=torch.bool)
        for part in self._parts():
            scaled = scaled | columns(at, part)
        scaled = ~scaled if self.mode == "exclude" else scaled
        scaled = scaled & (at.key >= 0) & (at.key < at.prompt[:, None])
        edges = spread(scaled, self.factor)[:, None, :].expand(-1, call.n_queries, -1)
        yield Add(bias_of(call, edges.log(), heads))


def window(layer: int, width: int, n_layers: int) -> list[int]:
    """The layers of a window around one (Geva et al. 2023: width 9 in GPT-2 XL, 5 in GPT-J).

    Args:
        layer: Its middle, absolute.
        width: Layers, at least 1; an even window has its extra layer below.
        n_layers: Layers of the model; the window is cut off at its ends.

    Raises:
        InputError: A layer that does not exist, or an empty window.

    Example:
        >>> window(1, 3, 12), window(11, 5, 12)
        ([0, 1, 2], [9, 10, 11])
    """
    if type(width) is not int or width < 1:
        raise InputError(f"width={width!r}. A window has at least 1 layer.")
    middle = selection.axis(layer, n_layers, "layers")[0]
    first = middle - width // 2
    return list(range(max(0, first), min(n_layers, first + width)))


def from_attributes(holder: object = None, *, mode: Mode = "logit_mul", **given: Any) -> Suppress:
    """What document 004 sets as attributes of its modified Llama, as an intervention.

    Args:
        holder: What has the attributes, as a model; or give them by name.
        mode: "logit_mul" multiplies the scores, as there; `Suppress` says why "log_add" is better.
        given: `suppression_token_indices` (a list, or one for each batch item; -1 and None name
            nothing), `suppression_factors` (likewise), `layers` (None or [] for all) and
            `manipulate_attn_scores_after_scaling` (without effect: see `Suppress`).

    Returns:
        An intervention; it does nothing where indices or factors are None, as there.

    Raises:
        InputError: An unknown name, or lists that do not fit.

    Example:
        >>> from_attributes(suppression_token_indices=[1, -1], suppression_factors=[0.1, 1.0]).keys
        [[1, None]]
    """
    names = (
        "suppression_token_indices",
        "suppression_factors",
        "layers",
        "manipulate_attn_scores_after_scaling",
    )
    if unknown := [name for name in given if name not in names]:
        raise InputError(f"there is no attribute {unknown[0]!r}. Choose from {', '.join(names)}.")
    found: Mapping[str, Any] = {name: getattr(holder, name, None) for name in names} | given
    indices, factor, layers, after = (plain(found[name]) for name in names)
    if isinstance(found["layers"], nn.Module):  # of a model that has its blocks under this name
        layers = None
    indices = [indices] if isinstance(indices, int) else indices
    if not isinstance(indices, list | tuple | None):
        raise InputError(f"suppression_token_indices={indices!r:.60}. Give a list of positions.")
    if indices is None or factor is None:
        return Suppress(keys=[], factor=1.0, mode=mode)
    nested: Any = indices if are_per_item(indices) else [indices]
    keys = [[None if k in (None, -1) else k for k in own] for own in nested]
    single = not isinstance(factor, Sequence) or are_per_item(factor)
    each: Any = factor if single else [factor]
    layers = None if layers in (None, []) else layers
    return Suppress(keys=keys, factor=each, mode=mode, layers=layers, after_scaling=bool(after))
