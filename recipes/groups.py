"""Heads ablated together: in a given order one more at a time, or the worst next one each time.

Heads that stand in for each other cost little alone and much together, which no sweep shows.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Unpack

import numpy as np
import xarray as xr

from probe import selection
from probe.describing import described
from probe.errors import InputError
from probe.hearing import reading
from probe.interventions import lasting
from probe.model import Model
from probe.reading import logits
from probe.running import Reading
from probe.selection import Selector
from recipes._ablate import Ablate, Mode
from recipes._choosing import Pairs
from recipes._jobs import Options, job, planned, readings
from recipes._measures import arrays_of, over_problems
from recipes._placing import absolute, every_head
from recipes.effects import scored_tokens, unchanged
from recipes.references import Reference, stated


def cumulative(
    model: Model,
    problems: object,
    order: Pairs,
    store: str | Path | None = None,
    *,
    mode: Mode = "zero",
    reference: Reference | None = None,
    tokens: Selector = None,
    draws: int = 3,
    seed: int = 0,
    **options: Unpack[Options],
) -> xr.Dataset:
    """Ablate the first head of an order, the first two, and so on, beside random orders.

    Args:
        model: The model.
        problems: An opened store or its folder, or whatever `probe.problems` reads.
        order: (layer, head) pairs, as from `heads.rank`.
        store: Folder for the results; the same call again resumes. Default: in memory.
        mode: As for `Ablate`, without "frozen".
        reference: For "mean", from `ablation.reference`; default that of these problems.
        tokens: Which tokens' predictions count: see `effects.effect`.
        draws: Random orders of as many heads, of the whole model.
        seed: Of the orders.
        options: As for `effects.effect`.

    Returns:
        float32: `delta_loss` and `accuracy` (problem, size), size counting from 1, and `control`
        (problem, draw, size), delta loss in random orders; `base_loss`, `base_accuracy` and `noop`
        (problem). nats, signed.

    Raises:
        InputError: Something cannot be used; nothing has run.

    Example:
        >>> ds = cumulative(model, probe.demos.repeated(count=2), [(1, 0), (1, 1)], progress=False)
        >>> ds.delta_loss.dims, ds.control.sizes["draw"]
        (('problem', 'size'), 3)
    """
    pairs, tokens = absolute(order, model), lasting(tokens)
    if not pairs or len(set(pairs)) < len(pairs):
        raise InputError(f"order={order!r:.80} names no head, or one twice. Name each once.")
    if type(draws) is not int or draws < 0:
        raise InputError(f"draws={draws!r}. It must be an int of at least 0.")
    todo = planned(model, problems, options, where=store)
    scored = [scored_tokens(model, item, tokens) for item in todo.items]
    whole = stated(Ablate(pairs, mode=mode, reference=reference, seed=seed), model, todo)
    everything, n = every_head(model), len(pairs)
    orders = [pairs, *(Random(f"{seed} {draw}").sample(everything, n) for draw in range(draws))]

    def compute(batch: Sequence[int], *, proof: bool) -> list[Reading]:
        items, counted = [todo.items[i] for i in batch], [scored[i] for i in batch]
        base, idle = unchanged(model, items, whole)
        before, right = over_problems(base, items, counted)
        noop = over_problems(idle, items, counted)[0] - before
        del idle
        runs = np.empty((len(orders), len(pairs), 2, len(items)))
        for n, some in enumerate(orders):
            for size in range(len(pairs)):
                one = replace(whole, heads=some[: size + 1])
                runs[n, size] = over_problems(logits(model, items, one), items, counted)
        results = {
            "base_loss": before,
            "base_accuracy": right,
            "noop": noop,
            "delta_loss": runs[0, :, 0].T - before[:, None],
            "accuracy": runs[0, :, 1].T,
        }
        if draws:
            results["control"] = runs[1:, :, 0].transpose(2, 0, 1) - before[:, None, None]
        return readings(results, base, items)

    arrays = arrays_of(("problem",), ("base_loss", "base_accuracy", "noop"))
    arrays |= arrays_of(("problem", "size"), ("delta_loss", "accuracy"))
    if draws:
        arrays["control"] = ("problem", "draw", "size")
    recipe = {
        "name": "cumulative",
        "order": [list(pair) for pair in pairs],
        "mode": mode,
        "reference": described(whole.reference, "reference"),
        "tokens": selection.as_data(tokens),
        "draws": draws,
        "seed": seed,
    }
    coords = {"size": list(range(1, len(pairs) + 1))}
    return job(
        model, todo, store, recipe=recipe, arrays=arrays, compute=compute,
        sizes={"draw": max(draws, 1)}, coords=coords, options=options,
    )  # fmt: skip


def greedy(
    model: Model,
    problems: object,
    n: int,
    *,
    candidates: Pairs | None = None,
    mode: Mode = "zero",
    reference: Reference | None = None,
    tokens: Selector = None,
    **options: Unpack[Options],
) -> list[tuple[tuple[int, int], float]]:
    """Ablate, one after the other, the head that costs most beside those that are out already.

    Args:
        model: The model.
        problems: As for `cumulative`.
        n: Heads to take out.
        candidates: (layer, head) pairs to choose from; default all. Each step runs all of them.
        mode: As for `Ablate`.
        reference: Likewise.
        tokens: As for `cumulative`.
        options: `batch_size` and `max_length`.

    Returns:
        The heads in the order in which they were taken, each with the mean delta loss of all taken
        so far, nats.

    Raises:
        InputError: There are fewer candidates.

    Example:
        >>> [pair for pair, _ in greedy(model, probe.demos.repeated(count=4), 1)]
        [(0, 3)]
    """
    free = list(dict.fromkeys(absolute(candidates or [], model)))
    free = every_head(model) if candidates is None else free
    if type(n) is not int or not 1 <= n <= len(free):
        raise InputError(f"n={n!r} heads cannot be taken: there are {len(free)} candidates.")
    todo, tokens = planned(model, problems, options), lasting(tokens)
    whole = stated(Ablate(free, mode=mode, reference=reference), model, todo)
    scored = [scored_tokens(model, item, tokens) for item in todo.items]

    def loss(pairs: Pairs) -> float:
        ones = [replace(whole, heads=pairs)] if pairs else []
        each = []
        for batch in todo.batches:
            items, counted = [todo.items[i] for i in batch], [scored[i] for i in batch]
            each.append(over_problems(logits(model, items, *ones), items, counted)[0])
        return float(np.nanmean(np.concatenate(each)))

    taken: list[tuple[int, int]] = []
    out = []
    with reading(model.module):
        base = loss([])
        for _ in range(n):
            costs = {pair: loss([*taken, pair]) for pair in free if pair not in taken}
            worst = max(costs, key=lambda pair: costs[pair])
            taken.append(worst)
            out.append((worst, costs[worst] - base))
    return out


__all__ = ["cumulative", "greedy"]
