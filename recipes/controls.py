"""Controls of an intervention: itself with nothing changed, and the same elsewhere at random.

A result that the no-op also gives is a fault of the wiring; a result that random heads or random
tokens also give says nothing about those that were chosen.
"""

import dataclasses
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

from torch import Tensor

from probe import selection
from probe.attention import AttentionCall
from probe.interventions import Add, Change, Intervention
from probe.model import Model
from probe.plans import Item
from recipes._choosing import Pairs, are_pairs, are_per_item


@dataclass(frozen=True)
class NoOp:
    """An intervention with its strength taken away: everything is worked out, nothing changes.

    Biases are worked out and left away; functions are called, and what they were given is written
    back (q, k, v and z, through the same path) or left (scores and pattern, so that the model stays
    on its kernel). Logits must be the same, bit for bit.

    Attributes:
        one: The intervention.

    Example:
        >>> from recipes.ablation import Ablate
        >>> with model.intervene(NoOp(Ablate([(1, 0)]))):
        ...     idle = model("abcabc").logits
        >>> bool((idle == model("abcabc").logits).all())
        True
    """

    one: Intervention

    def edits(self, call: AttentionCall) -> Iterable[Add | Change]:
        """The same functions, whose results are dropped."""
        for edit in self.one.edits(call):
            if isinstance(edit, Change):
                idle = partial(_idle, edit.function, edit.site in ("scores", "pattern"))
                yield Change(edit.site, idle, f"the no-op of {edit.name}", edit.heads)


def _idle(function: Callable[[Tensor], Tensor | None], stay: bool, value: Tensor) -> Tensor | None:
    function(value.clone())
    return None if stay else value.clone()


def elsewhere(one: Any, model: Model, items: Sequence[Item], seed: str) -> Intervention | None:
    """The same intervention on random heads, or where it names no heads on random tokens.

    As many others are drawn as were named, and some of the same where there are not enough.

    Args:
        one: Something that says by an attribute `moves` that it takes other `heads` as pairs, and
            other `keys` for each item, as the interventions of the recipes do.
        model: The model.
        items: The problems of a batch.
        seed: Of the draw: the same heads for all problems, other tokens for each.

    Returns:
        None where nothing says what to draw.
    """
    if not getattr(one, "moves", False):
        return None
    names = {field.name for field in dataclasses.fields(one)}
    if "heads" in names and one.heads is not None:
        named = heads_of(one, model)
        everything = [(la, h) for la in model.layers for h in range(model.tap.shapes[la].heads)]
        drawn = others(everything, named, random.Random(seed))
        more = {"layers": None} if "layers" in names else {}
        return cast("Intervention", dataclasses.replace(one, heads=drawn, **more))
    if "keys" not in names:
        return None
    chosen = [named_keys(one.keys, model, item, n) for n, item in enumerate(items)]
    changes: dict[str, Any] = {
        "keys": [
            others(range(item.length), own, random.Random(f"{seed} {item.problem.id}"))
            for item, own in zip(items, chosen, strict=True)
        ]
    }
    factor = getattr(one, "factor", None)
    if isinstance(factor, Sequence):
        changes["factor"] = list(factor) if are_per_item(factor) else [factor] * len(items)
    return cast("Intervention", dataclasses.replace(one, **changes))


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
        own = keys[n if len(keys) > 1 else 0]
        return [k % item.length for k in own if k is not None]
    several = isinstance(keys, list | tuple) and any(isinstance(k, slice | str) for k in keys)
    found: set[int] = set()
    for part in keys if several else [keys]:
        if isinstance(part, str) and selection.is_name(part):
            said = partial(model.text.decode, item.token_ids)
            found |= set(selection.named(part, item.segments, said))
        elif part != []:
            found |= set(
                selection.positions(part, item.length, name="keys", problem=item.problem.id)
            )
    return sorted(found)


def others(everything: Iterable[Any], named: Sequence[Any], rng: random.Random) -> list[Any]:
    """As many that are not named; where there are too few, all of these and some that are."""
    free = [one for one in everything if one not in set(named)]
    n = len(named)
    drawn = rng.sample(free, n) if len(free) >= n else free + rng.sample(named, n - len(free))
    return sorted(drawn)
