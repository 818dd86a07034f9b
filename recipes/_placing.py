"""Which heads and which tokens of each problem an intervention names, known before a model runs."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from probe import selection
from probe.errors import InputError
from probe.interventions import of_items
from probe.model import Model
from probe.plans import Item
from recipes._choosing import Pairs, are_pairs, are_per_item


def require_places(
    model: Model, items: Sequence[Item], *interventions: Any
) -> npt.NDArray[np.float32]:
    """Refuse layers, heads and tokens that do not exist, before any problem has run.

    Args:
        model: The model.
        items: All problems.
        interventions: Checked where they have `layers` and `heads`, or `keys`, as those of the
            recipes do.

    Returns:
        (problem) how many tokens are named, NaN where the interventions name none by themselves.

    Raises:
        InputError: A layer, a head or a position does not exist, no problem has a token that is
            named, or something is given for another number of problems.
    """
    counts = np.full(len(items), np.nan, "float32")
    for one in interventions:
        of_items(one, range(len(items)), len(items))
        if not hasattr(one, "moves"):
            continue
        heads_of(one, model)
        keys = getattr(one, "keys", None)
        if keys is None:
            continue
        found = [named_keys(keys, model, item, n) for n, item in enumerate(items)]
        if keys != [] and not are_per_item(keys) and not any(found):
            raise InputError(
                f"keys={keys!r:.80} select nothing: no problem has such a token (spaces count)."
            )
        counts = np.nan_to_num(counts) + np.array([len(own) for own in found], "float32")
    return counts


def every_head(model: Model) -> list[tuple[int, int]]:
    """All (layer, head) pairs."""
    return [(la, h) for la in model.layers for h in range(model.tap.shapes[la].heads)]


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
    """The token positions that keys name in a problem, the n-th of its batch.

    Raises:
        InputError: It has no such position.
    """
    if are_per_item(keys):
        keys = [k for k in keys[n if len(keys) > 1 else 0] if k is not None]
    several = isinstance(keys, list | tuple)
    found: set[int] = set()
    for part in keys if several else [keys]:
        found |= set(_positions(part, model, item))
    return sorted(found)


def _positions(part: Any, model: Model, item: Item) -> Sequence[int]:
    """Of a slice or a name perhaps none."""
    if isinstance(part, slice) or part is None:
        return range(item.length)[part or slice(None)]
    if isinstance(part, str) and selection.is_name(part):
        return selection.named(part, item.segments, partial(model.text.said, item.token_ids))
    return selection.positions(part, item.length, name="keys", problem=item.problem.id)
