"""The same intervention in several strengths, and in a window that moves through the layers."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import xarray as xr

from probe import selection
from probe.describing import as_data
from probe.errors import InputError
from probe.interventions import lasting, of_items
from probe.model import Model
from probe.reading import logits
from probe.running import Reading
from probe.selection import Selector
from recipes._choosing import are_pairs, plain
from recipes._jobs import Options, job, planned, readings
from recipes._measures import of_target, over_problems
from recipes._placing import require_places
from recipes._suppress import Knockout, Steer, Suppress, window
from recipes.effects import Target, scored_tokens, targets, unchanged


def dose_response(
    model: Model,
    problems: object,
    one: Suppress | Steer,
    factors: Sequence[float],
    store: str | Path | None = None,
    *,
    tokens: Selector = None,
    **options: Unpack[Options],
) -> xr.Dataset:
    """Run a suppression with several factors.

    Args:
        model: The model.
        problems: An opened store or its folder, or whatever `probe.problems` reads.
        one: What to do; its own factor is replaced by each of these.
        factors: At least 0, each once.
        store: Folder for the results; the same call again resumes. Default: in memory.
        tokens: Which tokens' predictions count: see `effects.effect`.
        options: As for `effects.effect`.

    Returns:
        float32: `accuracy` and `delta_loss` (problem, factor), and `base_accuracy`, `base_loss`,
        `noop`, `named` (tokens that the keys name) (problem); nats, signed.

    Raises:
        InputError: Something cannot be used; nothing has run.

    Example:
        >>> ds = dose_response(model, ["abcabc"], Suppress(keys=1), [1, 0.1, 0], progress=False)
        >>> ds.delta_loss.sel(factor=1).item()
        0.0
    """
    if not isinstance(one, Suppress | Steer):
        raise InputError(f"{one!r:.60} has no dose. Give suppression.Suppress(...) or Steer(...).")
    doses = _doses(factors)
    each = [replace(one, factor=factor) for factor in doses]
    strongest = replace(one, factor=max(doses, key=lambda dose: abs(dose - 1)))
    tokens = lasting(tokens)
    todo = planned(model, problems, options, where=store)
    named = require_places(model, todo.items, one)
    scored = [scored_tokens(model, item, tokens) for item in todo.items]

    own = partial(of_items, n=len(todo.items))

    def compute(batch: Sequence[int], *, proof: bool) -> list[Reading]:
        items = [todo.items[i] for i in batch]
        base, idle = unchanged(model, items, own(strongest, batch))
        counted = [scored[i] for i in batch]
        before, right = over_problems(base, items, counted)
        runs = [
            over_problems(logits(model, items, own(dose, batch)), items, counted) for dose in each
        ]
        table = np.array(runs)  # (dose, loss and accuracy, problem)
        results = {
            "base_accuracy": right,
            "base_loss": before,
            "noop": over_problems(idle, items, counted)[0] - before,
            "named": named[list(batch)],
            "accuracy": table[:, 1].T,
            "delta_loss": (table[:, 0] - before).T,
        }
        return readings(results, base, items)

    arrays: dict[str, Sequence[str]] = dict.fromkeys(
        ("base_accuracy", "base_loss", "noop", "named"), ("problem",)
    )
    arrays |= dict.fromkeys(("accuracy", "delta_loss"), ("problem", "factor"))
    recipe = {
        "name": "dose_response",
        "intervention": as_data(replace(one, factor=1.0)),
        "factors": doses,
        "tokens": selection.as_data(tokens),
    }
    return job(
        model, todo, store, recipe=recipe, arrays=arrays, compute=compute,
        coords={"factor": doses}, options=options,
    )  # fmt: skip


def knockout_by_layer(
    model: Model,
    problems: object,
    one: Knockout,
    store: str | Path | None = None,
    *,
    width: int = 1,
    target: Target = None,
    **options: Unpack[Options],
) -> xr.Dataset:
    """Knock edges out in a window of layers around each layer (Geva et al. 2023, arXiv 2304.14767).

    Args:
        model: The model.
        problems: An opened store or its folder, or whatever `probe.problems` reads.
        one: The edges; its layers are replaced by those of each window.
        store: Folder for the results; the same call again resumes. Default: in memory.
        width: Layers in a window: see `suppression.window` (the paper: 9 of GPT-2 XL's 48).
        target: The token that may come next: see `effects.effect`.
        options: As for `effects.effect`.

    Returns:
        float32 (problem, layer), the layer being the middle of the window: `target_p`, the
        target's probability, and `relative`, 100 (p_blocked - p) / p in percent, as the paper draws
        it (NaN where p is 0); `delta_logit`; (problem): `target`, `target_base_p`, `named`
        (tokens that the keys name) and `noop` (of its logit).

    Raises:
        InputError: Something cannot be used; nothing has run.

    Example:
        >>> one = Knockout(queries="last:1", keys=slice(1, -1))
        >>> knockout_by_layer(model, ["abcabc"], one, progress=False).relative.dims
        ('problem', 'layer')
    """
    if not isinstance(one, Knockout):
        raise InputError(f"{one!r:.60} knocks nothing out. Give suppression.Knockout(...).")
    if are_pairs(one.heads):
        raise InputError(
            f"heads={one.heads!r:.60} name their layers, through which the window moves. Give "
            "heads of every layer, as heads=[0, 3]."
        )
    if type(width) is not int or width < 1:
        raise InputError(f"width={width!r}. It must be an int of at least 1.")
    todo = planned(model, problems, options, where=store)
    named = require_places(model, todo.items, replace(one, layers=None))
    wanted = targets(model, todo.items, target)
    each = [replace(one, layers=window(la, width, model.n_layers)) for la in model.layers]

    own = partial(of_items, n=len(todo.items))

    def compute(batch: Sequence[int], *, proof: bool) -> list[Reading]:
        items = [todo.items[i] for i in batch]
        base, idle = unchanged(model, items, own(each[0], batch))
        lasts = [item.length - 1 for item in items]
        chosen = [
            int(base[n, last].argmax()) if wanted[i] is None else wanted[i]
            for n, (i, last) in enumerate(zip(batch, lasts, strict=True))
        ]

        def followed(rows: Any) -> list[dict[str, float]]:
            return [of_target(base[n, last], rows[n, last], chosen[n])  # type: ignore[arg-type]
                    for n, last in enumerate(lasts)]  # fmt: skip

        runs = [followed(logits(model, items, own(some, batch))) for some in each]
        p, delta = (
            np.array([[x[name] for x in run] for run in runs]).T for name in ("p", "delta_logit")
        )
        before = np.array([x["base_p"] for x in runs[0]])
        of = np.where(before > 0, before, np.nan)[:, None]
        results: dict[str, Any] = {
            "target": np.array(chosen, float),
            "target_base_p": before,
            "noop": np.array([x["delta_logit"] for x in followed(idle)]),
            "named": named[list(batch)],
            "target_p": p,
            "relative": 100 * (p - of) / of,
            "delta_logit": delta,
        }
        return readings(results, base, items)

    arrays: dict[str, Sequence[str]] = dict.fromkeys(
        ("target", "target_base_p", "noop", "named"), ("problem",)
    )
    arrays |= dict.fromkeys(("target_p", "relative", "delta_logit"), ("problem", "layer"))
    recipe = {
        "name": "knockout_by_layer",
        "intervention": as_data(replace(one, layers=None)),
        "width": width,
        "target": wanted if target is not None else None,
    }
    return job(model, todo, store, recipe=recipe, arrays=arrays, compute=compute, options=options)


def _doses(factors: Any) -> list[float]:
    try:
        given = [] if isinstance(factors, str) else plain(factors)
        doses = [float(factor) for factor in given if not isinstance(factor, str)]
        doses = doses if len(doses) == len(given) else []
    except (TypeError, ValueError):
        doses = []
    if not doses or len(set(doses)) < len(doses):
        raise InputError(f"factors={factors!r:.80}. Give numbers, each once, as [1, 0.1, 0].")
    return doses


__all__ = ["dose_response", "knockout_by_layer"]
