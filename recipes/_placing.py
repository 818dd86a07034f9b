"""Which heads and which tokens of each problem an intervention names, known before a model runs."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from probe import selection
from probe.errors import InputError
from probe.model import Model
from probe.plans import Item
from recipes._choosing import Pairs, are_pairs, are_per_item


def require_places(model: Model, items: Sequence[Item], *interventions: Any) -> None:
    """Refuse layers, heads and tokens that do not exist, before any problem has run.

    Args:
        model: The model.
        items: All problems.
        interventions: Checked where they have `layers` and `heads`, or `keys`, as those of the
            recipes do.

    Raises:
        InputError: A layer, a head or a position does not exist, no problem has a token that is
            named, or keys are given for another number of problems.
    """
    for one in interventions:
        if not hasattr(one, "moves"):
            continue
        heads_of(one, model)
        keys = getattr(one, "keys", None)
        if keys is None:
            continue
        if are_per_item(keys) and len(keys) not in (1, len(items)):
            raise InputError(
                f"keys are given for {len(keys)} items, and there are {len(items)} problems. Give "
                "one list for each problem, or one for all."
            )
        found = [named_keys(keys, model, item, n) for n, item in enumerate(items)]
        if keys != [] and not are_per_item(keys) and not any(found):
            raise InputError(
                f"keys={keys!r:.80} select nothing: no problem has such a token (spaces count)."
            )


def of_batch(one: Any, batch: Sequence[int]) -> Any:
    """An intervention with the keys of the problems of a batch, where each has its own."""
    keys = getattr(one, "keys", None)
    if keys is None or not are_per_item(keys) or len(keys) == 1:
        return one
    changes: dict[str, Any] = {"keys": [keys[i] for i in batch]}
    factor = getattr(one, "factor", None)
    if are_per_item(factor):
        changes["factor"] = [factor[i] for i in batch]
    return replace(one, **changes)


def heads_of(one: Any, model: Model) -> list[tuple[int, int]]:
    """The (layer, head) pairs that an intervention names."""
    if are_pairs(one.heads):
        return absolute(one.heads, model)
    layers = selection.axis(getattr(one, "layers", None), model.n_layers, "layers")
    return [
        (layer, head)
        for layer in layers
        if layer in model.layers
        for head in selection.axis(one.heads, model.tap.shapes[layer].heads, "heads")
    ]


def absolute(heads: Pairs, model: Model) -> list[tuple[int, int]]:
    """Pairs (layer, head) that exist, negative numbers counted from the end.

    Raises:
        InputError: One does not exist.
    """
    found = []
    for layer, head in heads:
        at = selection.axis(layer, model.n_layers, "layers")[0]
        n = model.tap.shapes[at].heads if at in model.layers else 0
        found.append((at, selection.axis(head, n, "heads")[0]))
    return found


def named_keys(keys: Any, model: Model, item: Item, n: int) -> list[int]:
    """The token positions that keys name in a problem, the n-th of its batch."""
    if are_per_item(keys):
        own = [k for k in keys[n if len(keys) > 1 else 0] if k is not None]
        return list(_positions(own, item)) if own else []
    several = isinstance(keys, list | tuple) and any(isinstance(k, slice | str) for k in keys)
    found: set[int] = set()
    for part in keys if several else [keys]:
        if isinstance(part, str) and selection.is_name(part):
            said = partial(model.text.decode, item.token_ids)
            found |= set(selection.named(part, item.segments, said))
        elif part != []:
            found |= set(_positions(part, item))
    return sorted(found)


def _positions(keys: Any, item: Item) -> tuple[int, ...]:
    return selection.positions(keys, item.length, name="keys", problem=item.problem.id)
