"""What interventions change, problem by problem, beside their controls."""

from collections.abc import Mapping, Sequence
from functools import partial
from numbers import Integral
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from probe import selection
from probe.describing import as_data
from probe.errors import InputError, WiringError
from probe.interventions import Intervention, lasting, of_items, require
from probe.model import Model
from probe.plans import Item
from probe.reading import generated, logits
from probe.running import Reading
from probe.selection import Selector
from recipes._jobs import Options, job, planned, readings
from recipes._measures import PER_TOKEN, TARGET, accuracy, arrays_of, mean_nll, of_target, per_token
from recipes._placing import require_places
from recipes.controls import NoOp, elsewhere
from recipes.references import stated

__all__ = ["effect", "scored_tokens", "targets"]

Target = str | int | Mapping[str, str | int] | None


def effect(
    model: Model,
    problems: object,
    *interventions: Intervention,
    store: str | Path | None = None,
    tokens: Selector = None,
    target: Target = None,
    max_new_tokens: int = 0,
    draws: int = 1,
    seed: int = 0,
    **options: Unpack[Options],
) -> xr.Dataset:
    """Run problems with and without interventions, and say what became of every prediction.

    Each problem is read as it is, changed, under the no-op of the interventions (see
    `recipes.controls.NoOp`), and under the same interventions on random heads (where they name
    heads) or random tokens. Interventions around the call (`model.intervene`) are part of both.

    Args:
        model: The model.
        problems: An opened store or its folder, whose problems keep their ids; or whatever
            `probe.problems` reads.
        interventions: What to change, together. Where their keys are given for each item, the items
            are the problems.
        store: Folder for the results; the same call again resumes. Default: in memory.
        tokens: Which tokens' predictions make the loss and the accuracy, by position, "last:10",
            "segment:answer", "regex:[0-9]+"; default all that have a token before them.
        target: A token that may come next, of which the probability, logit and rank are followed:
            its id or its text, "field:answer" for a field of the problem, or a mapping from problem
            ids. Default: what the model itself has at the top, unchanged.
        max_new_tokens: Also let the model go on greedily, so far at most, before and after.
        draws: Random controls for each problem.
        seed: Of the draws.
        options: `batch_size`, `max_length`, `on_error`, `overwrite`, `progress`, as for
            `probe.capture`.

    Returns:
        float32, NaN where there is nothing to say; (problem): `base_loss` and `delta_loss` (changed
        - base, nats, signed, over the chosen tokens), `base_accuracy`, `accuracy`, `noop` (delta
        loss of the no-op: 0), `named` (how many tokens the keys name; a problem without any is as
        it was, and dilutes a mean), `target` (token id), `target_base_p`, `target_p`,
        `target_delta_logit`, `target_base_rank`, `target_rank`; texts `base_text` and `text`.
        (problem, draw): `control`, delta loss of the controls. (problem, query), of the prediction
        made at each token: `delta_nll`, `kl` (KL(base || changed), nats), `delta_logit`,
        `base_rank`, `rank` (0 is the top). `loss` is that of the whole problem, unchanged.

    Raises:
        InputError: Something cannot be used; nothing has run.
        WiringError: The no-op changed something.
        StoreError: The store is of another run, or cannot be written.

    Example:
        >>> from recipes.suppression import Knockout
        >>> ds = effect(model, ["abcabc"], Knockout(keys=1, queries="last:1"), progress=False)
        >>> ds.kl.dims, float(ds.noop[0])
        (('problem', 'query'), 0.0)
    """
    for one in interventions:
        require(one)
    if not interventions:
        raise InputError("effect of what? Give interventions, as suppression.Suppress(keys=1).")
    if type(draws) is not int or draws < 0:
        raise InputError(f"draws={draws!r}. It must be an int of at least 0.")
    tokens = lasting(tokens)
    todo = planned(model, problems, options, where=store, max_new_tokens=max_new_tokens)
    items = todo.items
    named = require_places(model, items, *interventions)
    interventions = tuple(stated(one, model, todo) for one in interventions)
    scored = [scored_tokens(model, item, tokens) for item in items]
    wanted = targets(model, items, target)
    recipe = {
        "name": "effect",
        "interventions": [as_data(one) for one in interventions],
        "tokens": selection.as_data(tokens),
        "target": wanted if target is not None else None,
        "max_new_tokens": max_new_tokens,
        "draws": draws,
        "seed": seed,
    }
    arrays = arrays_of(
        ("problem",),
        ("base_loss", "delta_loss", "base_accuracy", "accuracy", "noop", "named", "target"),
    )
    arrays |= arrays_of(("problem",), TARGET, "target_")
    arrays |= arrays_of(("problem", "query"), PER_TOKEN)
    controlled = draws and any(
        elsewhere(of_items(one, [0], len(items)), model, items[:1], "") for one in interventions
    )
    if controlled:
        arrays["control"] = ("problem", "draw")

    def compute(batch: Sequence[int], *, proof: bool) -> list[Reading]:
        some, counted = [items[i] for i in batch], [scored[i] for i in batch]
        ones = [of_items(one, batch, len(items)) for one in interventions]
        base, idle = unchanged(model, some, *ones)
        noop = _losses(idle, some, counted)
        del idle
        changed = logits(model, some, *ones)
        found = [
            _compared(items[i], base[n], changed[n], scored[i], wanted[i])
            for n, i in enumerate(batch)
        ]
        del changed
        for one, loss, i in zip(found, noop, batch, strict=True):
            one["noop"] = loss - one["base_loss"]
            one["named"] = named[i]
        if controlled:
            random = [
                _losses(
                    logits(model, some, *_elsewhere(ones, model, some, f"{seed} {n}")),
                    some,
                    counted,
                )
                for n in range(draws)
            ]
            for one, *losses in zip(found, *random, strict=True):
                one["control"] = np.array(losses) - one["base_loss"]
        if max_new_tokens:
            _add_texts(model, some, ones, max_new_tokens, found)
        return readings({name: [one[name] for one in found] for name in found[0]}, base, some)

    return job(
        model,
        todo,
        store,
        recipe=recipe,
        arrays=arrays,
        compute=compute,
        texts=("base_text", "text") if max_new_tokens else (),
        sizes={"draw": max(draws, 1)},
        options=options,
    )


def scored_tokens(model: Model, item: Item, tokens: Selector) -> list[int]:
    """The positions of the tokens whose predictions count, of those that have one before them.

    Raises:
        InputError: None is chosen.
    """
    chosen = selection.positions(
        tokens,
        item.length,
        item.segments,
        name="tokens",
        problem=item.problem.id,
        tokens=partial(model.text.said, item.token_ids),
    )
    found = [position for position in chosen if position > 0]
    if not found and tokens is not None:
        raise InputError(
            f"tokens={tokens!r} chooses only the first token of problem {item.problem.id!r}, which "
            "nothing predicts. Choose later ones."
        )
    return found


def targets(model: Model, items: Sequence[Item], target: Target) -> list[int | None]:
    """The token id that is followed in each problem; None for the model's own choice.

    Raises:
        InputError: There is none for a problem, or it is not one token.
    """
    return [_target(model, item, target) for item in items]


def _target(model: Model, item: Item, target: Target) -> int | None:
    found: Any = target
    if isinstance(target, Mapping):
        found = target.get(item.problem.id)
    elif isinstance(target, str) and target.startswith("field:"):
        field = item.problem.fields.get(target.removeprefix("field:"))
        found = field if field is None else str(field)  # a number in a file is a text here
    if found is None and target is None:
        return None
    whose = f"the target of problem {item.problem.id!r}"
    if isinstance(found, str):
        ids = model.text.encode(found, special=False)
        if len(ids) != 1:
            raise InputError(
                f"{whose}, {found!r}, is {len(ids)} tokens, and one is followed. Give a text that "
                "is one token (spaces count), or a token id."
            )
        (found,) = ids
    if not isinstance(found, Integral) or isinstance(found, bool):
        raise InputError(
            f"{whose} is {found!r}, from target={target!r:.60}. Give a token for every problem: a "
            "text, or an int."
        )
    model.text.check([int(found)], what=whose)
    return int(found)


def unchanged(
    model: Model, items: Sequence[Item], *interventions: Intervention
) -> tuple[Tensor, Tensor]:
    """Logits (problem, position, vocabulary) of a batch, and the same under a no-op.

    Raises:
        WiringError: They differ in a bit.
    """
    base = logits(model, items)
    idle = logits(model, items, *map(NoOp, interventions))
    require_same(base, idle, items)
    return base, idle


def require_same(base: Tensor, idle: Tensor, items: Sequence[Item]) -> None:
    """Refuse a no-op that is none.

    Raises:
        WiringError: Logits (problem, position, vocabulary) differ in a bit.
    """
    for before, after, item in zip(base, idle, items, strict=True):
        if not torch.equal(before[: item.length], after[: item.length]):
            apart = float((before - after)[: item.length].abs().max())
            raise WiringError(
                f"the no-op changed the logits of problem {item.problem.id!r} by {apart:.2g}: two "
                "forwards of this model over the same tokens differ, so that no effect can be told "
                "from noise. Switch on deterministic kernels, or use another implementation."
            )


def _compared(
    item: Item, base: Tensor, changed: Tensor, scored: Sequence[int], target: int | None
) -> dict[str, Any]:
    """All that is said of one problem, from logits (position, vocabulary)."""
    ids, n = torch.tensor(item.token_ids), item.length
    base, changed = base[:n], changed[:n]
    before, after = (mean_nll(x, ids, scored) for x in (base, changed))
    token = int(base[-1].argmax()) if target is None else target
    followed = of_target(base[-1], changed[-1], token)
    return {
        "base_loss": before,
        "delta_loss": after - before,
        "base_accuracy": accuracy(base, ids, scored),
        "accuracy": accuracy(changed, ids, scored),
        "target": token,
        **{f"target_{name}": value for name, value in followed.items()},
        **per_token(base, changed, ids),
    }


def _losses(rows: Tensor, items: Sequence[Item], scored: Sequence[Sequence[int]]) -> list[float]:
    return [
        mean_nll(row, torch.tensor(item.token_ids), own)
        for row, item, own in zip(rows, items, scored, strict=True)
    ]


def _elsewhere(
    interventions: Sequence[Intervention], model: Model, items: Sequence[Item], seed: str
) -> list[Intervention]:
    """The interventions at random places, each its own; those that have none stay as they are."""
    return [
        elsewhere(one, model, items, f"{seed} {n}") or one for n, one in enumerate(interventions)
    ]


def _add_texts(
    model: Model,
    items: Sequence[Item],
    interventions: Sequence[Intervention],
    most: int,
    found: Sequence[dict[str, Any]],
) -> None:
    for name, ones in (("base_text", ()), ("text", interventions)):
        for one, new in zip(found, generated(model, items, ones, most), strict=True):
            one[name] = model.text.joined(new)
