"""Which heads and which tokens an intervention names, in one attention call."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeGuard

import torch
from torch import Tensor

from probe import selection
from probe.attention import AttentionCall
from probe.errors import InputError
from probe.interventions import names
from probe.positions import Positions
from probe.selection import Selector

Pairs = Sequence[tuple[int, int]]  # (layer, head)
Heads = Selector | Pairs
PerItem = Sequence[Sequence[int | None]]  # token positions of each batch item; None names nothing
Keys = Selector | PerItem


def plain(value: Any) -> Any:
    """What tensors and arrays hold, as numbers and lists; iterators as lists; the rest as it is."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, list | tuple):
        return type(value)(plain(part) for part in value)
    single = value is None or isinstance(value, str | slice | int | float)
    return value if single or not hasattr(value, "__iter__") else list(value)


def are_pairs(heads: object) -> TypeGuard[Pairs]:
    """Whether heads are given as (layer, head) pairs."""
    return isinstance(heads, list | tuple) and any(isinstance(h, list | tuple) for h in heads)


def are_per_item(keys: object) -> TypeGuard[PerItem]:
    """Whether keys are given for each batch item on its own."""
    return isinstance(keys, list | tuple) and any(isinstance(k, list | tuple) for k in keys)


def require_keys(keys: Any, name: str = "keys") -> None:
    """Refuse what names no tokens, before a model has run.

    Raises:
        InputError: It is no selection, or lists and numbers are mixed.
    """
    if keys == []:
        return
    if not are_per_item(keys):
        selection.require(keys, name)
        return
    for own in keys:
        if not isinstance(own, list | tuple):
            raise InputError(
                f"{name}={keys!r:.60} mix numbers and lists. Give a list for each input."
            )
        for key in own:
            if key is not None and type(key) is not int:
                raise InputError(f"{name} hold {key!r:.60}. Give ints, or None for nothing.")


def items_of(one: Any, items: Sequence[int], n: int) -> Any:
    """An intervention with the keys, and factors, of some of n problems: see `probe.of_items`.

    Raises:
        InputError: Its keys are given for another number.
    """
    keys, factor = one.keys, getattr(one, "factor", None)
    if not are_per_item(keys) or len(keys) == 1:
        return one
    if len(keys) != n:
        raise InputError(
            f"keys are given for {len(keys)} items, and there are {n} problems. Give one list for "
            "each problem, or one for all."
        )
    changes: dict[str, Any] = {"keys": [keys[i] for i in items]}
    if are_per_item(factor):
        changes["factor"] = [factor[i] for i in items]
    return replace(one, **changes)


def require_heads(layers: Selector, heads: Heads) -> None:
    """Refuse what names no heads, before a model has run.

    Raises:
        InputError: Pairs that are none, or beside layers.
    """
    if not are_pairs(heads):
        return
    for pair in heads:
        two = isinstance(pair, list | tuple) and len(pair) == 2
        if not two or not all(type(n) is int for n in pair):
            raise InputError(f"heads hold {pair!r:.60}. Give pairs (layer, head), as (1, 3).")
    if layers is not None:
        raise InputError(
            f"heads={heads!r:.60} name their layers, and layers={layers!r:.60} too. Give one."
        )


def heads_in(
    call: AttentionCall, layers: Selector, heads: Any, *, size: int | None = None
) -> tuple[int, ...]:
    """The absolute heads that are named in the layer of a call; none if it is not named.

    Args:
        call: The attention call.
        layers: Which layers, where heads are no pairs.
        heads: Which heads.
        size: How many there are; default the query heads.
    """
    size = call.n_heads if size is None else size
    if are_pairs(heads):
        own = [h for layer, h in heads if _layer(layer, call) == call.layer]
        return selection.axis(own, size, "heads") if own else ()
    return selection.axis(heads, size, "heads") if names(layers, call) else ()


def _layer(layer: int, call: AttentionCall) -> int:
    return selection.axis(layer, call.n_layers, "layers")[0]


def columns(at: Positions, keys: Any) -> Tensor:
    """Which columns are named: bool (batch or 1, key)."""
    if are_per_item(keys):
        return factors(at, keys, [[0.0] * len(own) for own in keys]) == 0
    return at.columns(keys)


def factors(at: Positions, keys: PerItem, each: Sequence[Sequence[float]]) -> Tensor:
    """A factor for every column, from positions and factors of each batch item; 1 elsewhere.

    One item stands for all of a batch.

    Returns:
        (batch or 1, key) float64.

    Raises:
        InputError: The batch has another size, or a position is not in its prompt.
    """
    batch = max(len(at.key), len(at.prompt))
    if len(keys) not in (1, batch // at.copies):
        raise InputError(
            f"keys are given for {len(keys)} inputs, and this batch has {batch // at.copies}. Give "
            "one list for each input, or one list for all."
        )
    widest = max(1, *map(len, keys))
    where = torch.full((batch, widest), -2)  # no column is at -2
    factor = torch.ones(batch, widest, dtype=torch.float64)
    for item, prompt in enumerate(at.prompt.expand(batch).tolist()):
        own = item // at.copies if len(keys) > 1 else 0
        named = {n: _absolute(k, prompt) for n, k in enumerate(keys[own]) if k is not None}
        _require_once(list(named.values()), keys[own])
        for n, key in named.items():
            where[item, n], factor[item, n] = key, each[own][n]
    hit = at.key[:, None, :] == where.to(at.key.device)[:, :, None]
    return torch.where(hit, factor.to(at.key.device)[:, :, None], 1.0).prod(1)


def _absolute(key: int, prompt: int) -> int:
    if type(key) is not int or not -prompt <= key < prompt:
        raise InputError(
            f"keys hold {key!r}, and a prompt of this batch has {prompt} tokens. Use 0 to "
            f"{prompt - 1}, negative numbers from its end, or None for nothing."
        )
    return key % prompt


def _require_once(found: Sequence[int], own: Sequence[int | None]) -> None:
    if len(set(found)) < len(found):
        raise InputError(f"keys={list(own)!r:.80} name a token twice. Name each once.")


def chunks(values: range, size: int) -> Iterator[range]:
    """A range in pieces of at most so many."""
    return (values[start : start + size] for start in range(0, len(values), size))
