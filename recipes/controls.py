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

from probe.attention import AttentionCall
from probe.interventions import Add, Change, Intervention
from probe.model import Model
from probe.plans import Item
from recipes._choosing import are_per_item
from recipes._placing import every_head, heads_of, named_keys


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
        drawn = others(every_head(model), named, random.Random(seed))
        more = {"layers": None} if "layers" in names else {}
        return cast("Intervention", dataclasses.replace(one, heads=drawn, **more))
    if "keys" not in names:
        return None
    each = [_with_factors(one, model, item, n) for n, item in enumerate(items)]
    changes: dict[str, Any] = {
        "keys": [
            others(range(item.length), list(own), random.Random(f"{seed} {item.problem.id}"))
            for item, own in zip(items, each, strict=True)
        ]
    }
    if isinstance(getattr(one, "factor", None), Sequence):
        changes["factor"] = [list(own.values()) for own in each]
    return cast("Intervention", dataclasses.replace(one, **changes))


def _with_factors(one: Any, model: Model, item: Item, n: int) -> dict[int, float | None]:
    """The tokens that are named in a problem, each with its factor where each has one."""
    keys, factor = one.keys, getattr(one, "factor", None)
    if not isinstance(factor, Sequence):
        return dict.fromkeys(named_keys(keys, model, item, n))
    nested = are_per_item(keys)
    at = n if nested and len(keys) > 1 else 0
    own, its = (keys[at], factor[at]) if nested else (keys, factor)
    return {k % item.length: f for k, f in zip(own, its, strict=True) if k is not None}


def others(everything: Iterable[Any], named: Sequence[Any], rng: random.Random) -> list[Any]:
    """As many that are not named; where there are too few, all of these and some that are."""
    free = [one for one in everything if one not in set(named)]
    n = len(named)
    drawn = rng.sample(free, n) if len(free) >= n else free + rng.sample(named, n - len(free))
    return sorted(drawn)
