"""Hide each latent from all that comes after it, and see what becomes of the answer."""

import random
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import torch
import xarray as xr

from probe import latent as thinkers
from probe.answers import correct, expected, value
from probe.errors import InputError, WiringError
from probe.interventions import Intervention, of_items
from probe.latent import Reasoner
from probe.plans import Item, Plan
from probe.running import Reading
from probe.thinking import answer, ask, close, nll, reason, script
from recipes._jobs import Options, job, whole
from recipes._suppress import Knockout

ALL = "all"  # the label of all latents together

# What is measured with some latent hidden, and of the control that hides tokens of the question.
MEASURES = ("delta_loss", "correct", "kept")
CONTROL = "control_"
PER_PROBLEM = ("base_loss", "base_correct", "noop")
Numbers = dict[str, list[float]]


def knockout(
    reasoner: Reasoner,
    problems: object,
    store: str | Path | None = None,
    *,
    interventions: Sequence[Intervention] = (),
    max_new_tokens: int = 32,
    seed: int = 0,
    **options: Unpack[Options],
) -> xr.Dataset:
    """What each latent is worth as a key: the answer without it, and without as many other tokens.

    Latent k is hidden, in all layers and heads, from the later latents, from what closes and from
    the answer; what later latents are without it is what then follows. It still becomes the next
    latent: what goes that way, and not by attention, stays.

    Args:
        reasoner: From `probe.latent.load`.
        problems: Anything that `probe.problems` reads, with the field `answer`.
        store: Folder of the results, which resume; None for memory.
        interventions: What is changed throughout.
        max_new_tokens: Tokens of an answer at most; greedy.
        seed: Of the tokens that the controls hide.
        options: batch_size, on_error, overwrite, progress: see `recipes._jobs.Options`.

    Returns:
        Over problem and `hidden` ("z0", "z1", ... and "all", each latent from all after it):

        - `delta_loss`: what hiding adds to the loss of the expected answer, mean nats per token.
        - `correct`: 1 or 0; `kept`: 1 where the answer is the one given without hiding.
        - `control_delta_loss`, `control_correct`, `control_kept`: the same with as many random
          tokens of the question hidden from the same rows instead.

        Over problem: `base_loss`, `base_correct`, and `noop`, the loss of a second run less that
        of the first, which is 0. All float32; NaN where no answer is expected. A random token of
        the question may matter more than any latent: the control says how much hiding anything
        costs.

    Raises:
        InputError: Something cannot be used; nothing has run.
        WiringError: Two runs of the same differ.
    """
    if options.get("max_length") is not None:
        raise InputError("max_length would cut what opens the latents. Shorten the questions.")
    todo = thinkers.plan(
        reasoner,
        problems,
        interventions=interventions,
        batch_size=options.get("batch_size"),
        max_new_tokens=max_new_tokens,
    )
    todo = whole(todo)
    names = [*(f"z{k}" for k in range(reasoner.n_latents)), ALL]
    over = [*MEASURES, *(CONTROL + name for name in MEASURES)]
    return job(
        reasoner.model,
        todo,
        store,
        recipe={
            "name": "latent.knockout",
            "latent": reasoner.as_data(),
            "max_new_tokens": max_new_tokens,
            "seed": seed,
            "expected": [expected(item.problem) for item in todo.items],
        },
        arrays=dict.fromkeys(over, ("problem", "hidden"))
        | dict.fromkeys(PER_PROBLEM, ("problem",)),
        compute=partial(_compute, reasoner, todo, seed),
        coords={"hidden": names},
        options=options,
    )


def _compute(
    reasoner: Reasoner, todo: Plan, seed: int, batch: Sequence[int], *, proof: bool
) -> list[Reading]:
    items = [todo.items[i] for i in batch]
    around = [of_items(one, batch, len(todo.items)) for one in todo.interventions]
    think = partial(_thought, reasoner, items, todo.max_new_tokens, around)
    base, again = think(), think()
    _require_same(base, again, items)
    found: list[dict[str, Any]] = [
        {
            "base_loss": base["loss"][n],
            "base_correct": base["correct"][n],
            "noop": again["loss"][n] - base["loss"][n],
            **{CONTROL * control + name: [] for control in (0, 1) for name in MEASURES},
        }
        for n in range(len(items))
    ]
    hidden = [[k] for k in range(reasoner.n_latents)] + [list(range(reasoner.n_latents))]
    for latents in hidden:
        own = [Knockout(keys=f"segment:latent[{k}]", queries=_after(k)) for k in latents]
        other = _others(items, latents, seed)
        for prefix, ones in (("", own), (CONTROL, other)):
            said = think(*ones)
            for n, one in enumerate(found):
                one[f"{prefix}delta_loss"].append(said["loss"][n] - base["loss"][n])
                one[f"{prefix}correct"].append(said["correct"][n])
                one[f"{prefix}kept"].append(float(said["value"][n] == base["value"][n]))
    arrays = ({name: np.array(value, "float32") for name, value in one.items()} for one in found)
    return [Reading(one, float(one["base_loss"])) for one in arrays]


def _after(latent: int) -> str:
    """The rows after a latent."""
    return f"segment:latent[{latent + 1}:],eot,answer"


def _others(items: Sequence[Item], latents: Sequence[int], seed: int) -> list[Knockout]:
    """The control: for each latent another random token of the question, hidden from its rows."""
    drawn = []
    for item in items:
        rng = random.Random(f"{seed} {item.problem.id} {list(latents)}")
        question = [n for n, segment in enumerate(item.segments) if segment == "question"]
        drawn.append(rng.sample(question, min(len(latents), len(question))))
    return [
        Knockout(keys=[own[n : n + 1] for own in drawn], queries=_after(latent))
        for n, latent in enumerate(latents)
    ]


def _thought(
    reasoner: Reasoner,
    items: Sequence[Item],
    most: int,
    around: Iterable[Intervention],
    *interventions: Intervention,
) -> dict[str, list[Any]]:
    """The loss of the expected answers in nats per token, and the answers that are given."""
    wanted = [expected(item.problem) for item in items]
    targets = [
        reasoner.model.text.encode(reasoner.answer.format(text), special=False) if text else []
        for text in wanted
    ]
    lengths = torch.tensor([item.length for item in items])
    written = script(reasoner, items, max([most, *map(len, targets)]))
    watch = reasoner.model.tap.watch
    with watch.on(*around, *interventions, prompt=lengths, script=written):
        tape, first = ask(reasoner, items)
        reason(tape, first)
        logits = close(tape)
        losses = nll(tape, logits, targets)
        said = answer(tape, logits, most)
    values = [value(reasoner.model.text.joined(ids)) for ids in said]
    return {
        "loss": [a / max(1, len(b)) for a, b in zip(losses, targets, strict=True)],
        "correct": [correct(a, b) for a, b in zip(values, wanted, strict=True)],
        "value": values,
    }


def _require_same(base: Numbers, again: Numbers, items: Sequence[Item]) -> None:
    for before, after, item in zip(base["loss"], again["loss"], items, strict=True):
        if before != after and not (np.isnan(before) and np.isnan(after)):
            raise WiringError(
                f"two runs over problem {item.problem.id!r} differ by {abs(after - before):.2g} "
                "nats with nothing changed, so that no effect can be told from noise. Switch on "
                "deterministic kernels, or use another implementation."
            )
