"""Which tokens of a prompt an answer depends on: each suppressed in turn (AtMan)."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn

from probe import selection
from probe.describing import as_data
from probe.errors import InputError, first_line
from probe.interventions import lasting
from probe.model import Model
from probe.plans import Item
from probe.reading import generated, logits
from probe.running import Reading
from probe.selection import Selector
from recipes._choosing import Heads, chunks
from recipes._jobs import Options, job, planned, readings
from recipes._measures import mean_of, nll_of
from recipes._placing import heads_of
from recipes._suppress import Mode, Suppress
from recipes.effects import unchanged

__all__ = ["relevance"]

_TOKENS = 2048  # of variants that run together

Groups = list[tuple[list[int], list[float]]]  # positions and their factors, for each token


def relevance(
    model: Model,
    problems: object,
    store: str | Path | None = None,
    *,
    target: str | None = None,
    max_new_tokens: int = 1,
    factor: float = 0.1,
    mode: Mode = "log_add",
    similarity: float | None = 0.6,
    keys: Selector = None,
    layers: Selector = None,
    heads: Heads = None,
    **options: Unpack[Options],
) -> xr.Dataset:
    """Suppress each token of a prompt in turn, and see what that does to the answer.

        relevance_j = NLL(target | token j suppressed) - NLL(target)        (nats a token)

    (AtMan, Deiseroth et al. 2023, arXiv 2301.08110; its code keeps the difference with the other
    sign.) Positive: the target gets less likely without the token.

    Args:
        model: The model.
        problems: An opened store or its folder, whose problems keep their ids; or whatever
            `probe.problems` reads.
        store: Folder for the results; the same call again resumes. Default: in memory.
        target: What the model should say after each prompt: a text, or "field:answer" for a field
            of the problem. Default: what it says itself, greedily.
        max_new_tokens: How many tokens of it, at most, without a target.
        factor: Of the suppression: see `suppression.Suppress`.
        mode: Likewise.
        similarity: Tokens whose embeddings have at least this cosine with the token are suppressed
            with it, by (1 - factor)(1 - cosine) + factor each, as AtMan does for words of several
            tokens and their repetitions. None: the token alone.
        keys: Which tokens; default all of the prompt.
        layers: Where; default all layers.
        heads: Likewise all heads.
        options: As for `effects.effect`.

    Returns:
        float32: `relevance` (problem, key), nats, NaN for tokens that were not suppressed;
        `target_loss` and `noop` (problem); text `target` (problem). `loss` is that of the prompt.

    Raises:
        InputError: Something cannot be used; nothing has run.

    Example:
        >>> ds = relevance(model, ["abcabcab"], progress=False)
        >>> ds.relevance.dims, int(ds.relevance[0].argmax("key"))
        (('problem', 'key'), 2)
    """
    _require_cosine(similarity)
    if type(max_new_tokens) is not int or max_new_tokens < 1:
        raise InputError(f"max_new_tokens={max_new_tokens!r}. It must be an int of at least 1.")
    one = Suppress(keys=0, factor=factor, mode=mode, layers=layers, heads=heads)
    keys = lasting(keys)
    new = max_new_tokens if target is None else 0
    todo = planned(model, problems, options, where=store, max_new_tokens=new)
    heads_of(one, model)  # those that do not exist show before anything runs
    wanted = [None if target is None else _encoded(model, item, target) for item in todo.items]
    asked = [
        selection.positions(keys, i.length, i.segments, name="keys", problem=i.problem.id,
                            tokens=partial(model.text.said, i.token_ids))
        for i in todo.items
    ]  # fmt: skip
    table = None if similarity is None else _embedding(model)

    def compute(batch: Sequence[int], *, proof: bool) -> list[Reading]:
        (i,) = batch
        item, answer = todo.items[i], wanted[i]
        if answer is None:
            (answer,) = generated(model, [item], (), new)
        together = _together(item.token_ids, float(one.factor), table, similarity)  # type: ignore[arg-type]
        return [_of_problem(model, item, answer, one, asked[i], together)]

    recipe = {
        "name": "relevance",
        "target": target,
        "target_ids": None if target is None else wanted,  # fields may change under their name
        "max_new_tokens": new or None,
        "intervention": as_data(one),
        "similarity": similarity,
        "keys": selection.as_data(keys),
    }
    arrays = {"relevance": ("problem", "key"), "target_loss": ("problem",), "noop": ("problem",)}
    return job(
        model, todo, store, recipe=recipe, arrays=arrays, compute=compute, texts=("target",),
        alone=True, options=options,
    )  # fmt: skip


def _of_problem(
    model: Model,
    item: Item,
    answer: Sequence[int],
    one: Suppress,
    keys: Sequence[int],
    together: Groups,
) -> Reading:
    whole = replace(item, token_ids=(*item.token_ids, *answer))
    ids = torch.tensor(whole.token_ids)
    counted = range(item.length, whole.length)
    base, idle = unchanged(model, [whole], one)
    before = mean_of(nll_of(base[0], ids), counted)
    # In 16 bits rounding depends on the batch, so there the unchanged one is part of it.
    paired = model.dtype.itemsize < 4
    relevance = np.full(item.length, np.nan)
    for some in chunks(range(len(keys)), max(1, _TOKENS // whole.length)):
        groups = [together[keys[k]] for k in some] + [([0], [1.0])] * paired
        each = replace(one, keys=[g[0] for g in groups], factor=[g[1] for g in groups])
        rows = logits(model, [whole] * len(groups), each)
        after = [mean_of(nll_of(row, ids), counted) for row in rows]
        without = after.pop() if paired else before
        for k, loss in zip(some, after, strict=True):
            relevance[keys[k]] = loss - without
    results: dict[str, Sequence[Any]] = {
        "relevance": [relevance],
        "target_loss": [before],
        "noop": [mean_of(nll_of(idle[0], ids), counted) - before],
        "target": [model.text.joined(answer)],
    }
    return readings(results, base, [item])[0]


def _together(
    ids: Sequence[int], factor: float, table: nn.Module | None, similarity: float | None
) -> Groups:
    """For each token, the positions that are suppressed with it, and their factors."""
    if table is None or similarity is None:
        return [([j], [factor]) for j in range(len(ids))]
    cosine = _cosines(table, ids)
    weights = (1 - factor) * (1 - cosine) + factor
    weights = weights.clamp(min(factor, 1.0), max(factor, 1.0))
    near = cosine >= similarity - 1e-9  # that of a token with itself is 1 up to rounding
    near.fill_diagonal_(True)
    weights.fill_diagonal_(factor)
    return [
        (some.nonzero()[:, 0].tolist(), each[some].tolist())
        for some, each in zip(near, weights, strict=True)
    ]


def _cosines(table: nn.Module, ids: Sequence[int]) -> Tensor:
    """Cosines of the tokens' embeddings, (position, position) float64."""
    device = next(table.parameters()).device
    rows = table(torch.tensor(ids, device=device)).double().cpu()
    rows = nn.functional.normalize(rows, dim=-1)
    return rows @ rows.T


def _embedding(model: Model) -> nn.Module:
    table = getattr(model.base, "get_input_embeddings", lambda: None)()
    if table is None:
        raise InputError(
            f"{type(model.base).__name__} has no method get_input_embeddings, by which similar "
            "tokens are found. Use similarity=None."
        )
    return table  # type: ignore[no-any-return]


def _require_cosine(similarity: object) -> None:
    if similarity is None:
        return
    number = isinstance(similarity, int | float) and not isinstance(similarity, bool)
    if not number or not -1 <= similarity <= 1:  # type: ignore[operator]
        raise InputError(f"similarity={similarity!r}. Give a cosine, from -1 to 1, or None.")


def _encoded(model: Model, item: Item, target: str) -> list[int]:
    """The token ids of a target text."""
    name, text = f"problem {item.problem.id!r}", target
    if isinstance(target, str) and target.startswith("field:"):
        text = item.problem.fields.get(target.removeprefix("field:"))  # type: ignore[assignment]
    if not isinstance(text, str) or not text or model.tokenizer is None:
        raise InputError(
            f"target={target!r} gives no text for {name}, or there is no tokenizer to read it. "
            "Give a text, or a field that every problem has."
        )
    try:
        ids = [int(i) for i in model.tokenizer(text, add_special_tokens=False)["input_ids"]]
    except Exception as error:  # each tokenizer has its own
        raise InputError(
            f"the tokenizer of {model.name} cannot encode {text[:40]!r}, the target of {name}: "
            f"{first_line(error)}. Give another text."
        ) from error
    if not ids:
        raise InputError(f"the target {text[:40]!r} of {name} is no token. Give another text.")
    model.text.check((*item.token_ids, *ids), what=f"{name} with its target")
    return ids
