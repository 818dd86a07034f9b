"""Latent reasoning: models that think in embeddings, CODI's and Coconut's, and their attention.

>>> reasoner = Reasoner(  # or load("zen-E/CODI-gpt2"); here one that was never trained to think
...     model=model, kind="mine", n_latents=3, opens=(1,), closes=(2,), words=64,
...     following=lambda hidden: hidden,
... )
>>> thought = think(reasoner, [{"question": "abc", "answer": "d"}], max_new_tokens=4)[0]
>>> len(thought.latents), len(thought.token_ids), thought.expected
(3, 4, 'd')
>>> ds = capture(reasoner, ["abc"], "latent.zarr", max_new_tokens=4, progress=False)
>>> ds.query_segment.values[0].tolist()
['latent', 'latent', 'latent', 'eot', 'answer', 'answer', 'answer', 'answer']
>>> ds.segment.values[0, :7].tolist()
['bos', 'question', 'question', 'question', 'bot', 'latent', 'latent']

"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
import xarray as xr
from torch import Tensor
from zarr.abc.store import Store

from probe import schema
from probe import store as stores
from probe.answers import correct, expected, value
from probe.errors import InputError
from probe.hearing import reading
from probe.interventions import Intervention, of_items
from probe.planning import Script, prepare
from probe.plans import Item, Plan
from probe.problems import Problem
from probe.problems import problems as read_problems
from probe.reasoners import Reasoner, load
from probe.running import OnError, Work, require, run
from probe.schema import PARTS, Site
from probe.selection import Selector
from probe.stitching import labels, read, steps
from probe.thinking import Padding, answer, ask, close, later, reason, script

__all__ = ["Reasoner", "Thought", "capture", "load", "plan", "rows", "stepwise", "think"]

# Rows that are read by default: all that the model does once the question is over.
ROWS = "segment:latent,eot,answer"

_TEXT = schema.Array(("problem",), "string", "")
_MORE: dict[str, Sequence[str] | schema.Array] = {
    "mass": ("problem", "layer", "head", "query", "part"),
    "correct": ("problem",),
    "answer": _TEXT,
    "expected": _TEXT,
    "query_segment": schema.Array(("problem", "query"), "string", ""),
}


@dataclass(frozen=True, slots=True, eq=False)
class Thought:
    """What a reasoner thought of one question.

    Attributes:
        id: Of the problem.
        latents: (n_latents, width) embeddings that it read, in the model's dtype.
        token_ids: Of its answer, without the token that ends it.
        text: The answer.
        value: What it says: its last number, else the text.
        expected: What the problem's field `answer` says; "" without one.
        correct: 1.0 or 0.0; NaN where no answer is expected.
    """

    id: str
    latents: Tensor
    token_ids: tuple[int, ...]
    text: str
    value: str
    expected: str
    correct: float


def plan(
    reasoner: Reasoner,
    problems: object,
    *,
    sites: Sequence[Site] | Site = ("pattern",),
    layers: Selector = None,
    heads: Selector = None,
    queries: Selector = ROWS,
    keys: Selector = None,
    interventions: Sequence[Intervention] = (),
    dtype: str = "float16",
    batch_size: int | None = None,
    max_new_tokens: int = 32,
) -> Plan:
    """Work out what `capture` with these arguments would compute and write; nothing is run.

    Args:
        reasoner: From `load`.
        problems: Anything that `probe.problems` reads; their texts are the questions.
        sites: As for `capture`, and so are all that follow.
        layers: Layers.
        heads: Heads.
        queries: Rows.
        keys: Columns.
        interventions: What is changed.
        dtype: Of the stored numbers.
        batch_size: Problems in a batch at most.
        max_new_tokens: Tokens of an answer at most.

    Raises:
        InputError: Something cannot be used; the message names the problem and the value.
    """
    if not isinstance(reasoner, Reasoner):
        raise InputError(
            f"reasoner is a {type(reasoner).__name__}. Give what probe.latent.load returns."
        )
    if type(max_new_tokens) is not int or max_new_tokens < 1:
        raise InputError(f"max_new_tokens={max_new_tokens!r}. An answer has at least 1 token.")
    found = read_problems(problems)
    return prepare(
        reasoner.model,
        found,
        partial(_script, reasoner, max_new_tokens),
        sites=sites,
        layers=layers,
        heads=heads,
        queries=queries,
        keys=keys,
        dtype=dtype,
        batch_size=batch_size,
        max_length=None,
        max_new_tokens=max_new_tokens,
        interventions=interventions,
        config={"latent": reasoner.as_data(), "expected": _digest(map(expected, found))},
    )


def _digest(texts: Iterable[str]) -> str:
    return hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()


def _script(reasoner: Reasoner, most: int, problem: Problem) -> Script:
    ids = reasoner.prompt(problem)
    bos = reasoner.model.text.segments(ids)[0] == "bos"
    segments = reasoner.segments(len(ids), bos=bos)
    return Script(ids, segments, later(reasoner, most))


def think(
    reasoner: Reasoner,
    problems: object,
    *interventions: Intervention,
    batch_size: int | None = None,
    max_new_tokens: int = 32,
    padding: Padding = "masked",
) -> list[Thought]:
    """Let a reasoner answer questions.

    Args:
        reasoner: From `load`.
        problems: Anything that `probe.problems` reads; their field `answer` is what is expected.
        interventions: What to change meanwhile: see `Model.intervene`. "segment:latent[2]" names a
            latent.
        batch_size: Problems in a batch at most.
        max_new_tokens: Tokens of an answer at most; greedy.
        padding: "masked": a problem's numbers do not depend on its batch. "original": as CODI's own
            evaluation, whose latents look at the padding of shorter questions.

    Returns:
        One for each problem, in order.

    Raises:
        InputError: Something cannot be used.
    """
    if padding not in get_args(Padding):
        raise InputError(f"padding={padding!r}. Choose from {', '.join(get_args(Padding))}.")
    todo = plan(
        reasoner,
        problems,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        interventions=interventions,
    )
    found: dict[int, Thought] = {}
    with reading(reasoner.model.module):
        for batch in todo.batches:
            found |= zip(batch, _thoughts(reasoner, todo, batch, padding), strict=True)
    return [found[n] for n in range(len(todo.items))]


def _thoughts(
    reasoner: Reasoner, todo: Plan, batch: Sequence[int], padding: Padding
) -> Iterator[Thought]:
    items = [todo.items[i] for i in batch]
    ones = [of_items(one, batch, len(todo.items)) for one in todo.interventions]
    lengths = torch.tensor([item.length for item in items])
    written = script(reasoner, items, todo.max_new_tokens)
    with reasoner.model.tap.watch.on(*ones, prompt=lengths, script=written):
        tape, first = ask(reasoner, items, padding)
        latents = reason(tape, first)
        said = answer(tape, close(tape), todo.max_new_tokens)
    for item, own, ids in zip(items, latents, said, strict=True):
        yield _thought(reasoner, item, own, ids)


def _thought(reasoner: Reasoner, item: Item, latents: Tensor, ids: Sequence[int]) -> Thought:
    text = reasoner.model.text.joined(ids)
    says, wanted = value(text), expected(item.problem)
    right = correct(says, wanted)
    return Thought(item.problem.id, latents, tuple(ids), text, says, wanted, right)


def capture(
    reasoner: Reasoner,
    problems: object,
    store: str | Path | Store,
    *,
    sites: Sequence[Site] | Site = ("pattern",),
    layers: Selector = None,
    heads: Selector = None,
    queries: Selector = ROWS,
    keys: Selector = None,
    interventions: Sequence[Intervention] = (),
    dtype: str = "float16",
    batch_size: int | None = None,
    max_new_tokens: int = 32,
    on_error: OnError = "record",
    overwrite: bool = False,
    progress: bool = True,
    part: tuple[int, int] = (1, 1),
    fsync: bool = False,
) -> xr.Dataset:
    """Let a reasoner answer questions, and store what its attention does meanwhile.

    Once the latents are known, one forward over question, latents, what closes and the answer gives
    all rows; `stepwise` is the check. Resumable like `probe.capture`, with its proofs.

    Args:
        reasoner: From `load`; it runs in eval mode.
        problems: Anything that `probe.problems` reads; their texts are the questions, their field
            `answer` what is expected.
        store: Folder of the store, or a zarr store object.
        sites: Of "pattern", "scores" and "z".
        layers: int, negative int, slice or list; default all.
        heads: Query heads, likewise.
        queries: Rows; default all latents, what closes, and the answer. "segment:latent" for
            latents alone. Rows of the question cost a second reading of it.
        keys: Columns; default all. "segment:latent" makes blocks of latents: small, for many
            problems; `mass` still counts all keys.
        interventions: What to change, also in the thinking: see `think`.
        dtype: "float16" or "float32".
        batch_size: Problems in a batch at most.
        max_new_tokens: Tokens of an answer at most; greedy.
        on_error: As for `probe.capture`.
        overwrite: Replace a store that is there.
        progress: Show a progress bar on stderr.
        part: (i, n): run the i-th of n parts: see `probe.capture`.
        fsync: Force each shard to the disk: see `probe.capture`.

    Returns:
        The store, opened. Beside what `probe.capture` stores (segments bos, question, bot, latent,
        eot, answer; latents are the tokens z0, z1, ... with id -1; no loss), it has

        - `mass` (problem, layer, head, query, part) float32: what each row gives to each part, over
          all keys; "self" is its own place, "latent" the others. It sums to 1 (less what an
          attention sink takes); NaN for a row that is not there.
        - `query_segment` (problem, query): what each row is; "" for none.
        - `answer`, `expected` (problem): texts; `correct` (problem) float32: 1, 0, or NaN where no
          answer is expected.

    Raises:
        InputError: A problem, selection or option cannot be used; nothing has run.
        StoreError: The store is of another run, foreign, in use, or the disk is full.
        WiringError: What was read is not what the model computed; nothing wrong is stored.
    """
    require(store, on_error, part, overwrite)
    todo = plan(
        reasoner,
        problems,
        sites=sites,
        layers=layers,
        heads=heads,
        queries=queries,
        keys=keys,
        interventions=interventions,
        dtype=dtype,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
    )
    work = Work(
        items=todo.items,
        batches=todo.batches,
        config=todo.config,
        size=todo.stored,
        create=partial(_create, reasoner, todo),
        compute=partial(read, reasoner, todo),
    )
    return run(
        reasoner.model,
        work,
        store,
        on_error=on_error,
        overwrite=overwrite,
        progress=progress,
        part=part,
        fsync=fsync,
    )


def _create(reasoner: Reasoner, todo: Plan, where: object, **options: Any) -> stores.Writer:
    return stores.create(
        where,
        labels=[labels(reasoner, item) for item in todo.items],
        layers=todo.layers,
        heads=todo.heads,
        config=todo.config,
        sites=todo.sites,
        reduced=_MORE,
        sizes=todo.sizes | {"head_dim": todo.z_width, "part": len(PARTS)},
        coords={"part": PARTS},
        dtype=todo.dtype,
        loss=False,
        attrs={**todo.attrs, "latent": todo.config["latent"]},
        **options,
    )


def stepwise(reasoner: Reasoner, problem: object, *interventions: Intervention) -> xr.DataArray:
    """The rows of one problem's latents, read step by step as they are computed.

    Slower than `capture`, which they check: its rows are equal within the model's rounding.

    Args:
        reasoner: From `load`.
        problem: What `probe.problems` reads as one problem.
        interventions: What to change meanwhile.

    Returns:
        (layer, head, query, key) float32: rows are the latents, columns all positions up to the
        last latent; 0 for those that a latent cannot see.

    Raises:
        InputError: It is not one problem.
    """
    todo = plan(reasoner, problem, interventions=interventions)
    _require_one(todo)
    with reading(reasoner.model.module):
        found = steps(reasoner, todo.items, interventions)[0]
    return _labelled(reasoner, found.numpy(force=True))


def rows(reasoner: Reasoner, problem: object, *interventions: Intervention) -> xr.DataArray:
    """The rows of one problem's latents, read in one forward as `capture` does, and not stored.

    Args:
        reasoner: From `load`.
        problem: What `probe.problems` reads as one problem.
        interventions: What to change meanwhile.

    Returns:
        As `stepwise`.

    Raises:
        InputError: It is not one problem.
        WiringError: What was read is not what the model computed.
    """
    todo = plan(
        reasoner,
        problem,
        queries="segment:latent",
        interventions=interventions,
        dtype="float32",
        max_new_tokens=1,
    )
    _require_one(todo)
    with reading(reasoner.model.module):
        found = read(reasoner, todo, [0], proof=True)[0].arrays["pattern"]
    return _labelled(reasoner, found[..., : todo.items[0].length + reasoner.n_latents])


def _require_one(todo: Plan) -> None:
    if len(todo.items) != 1:
        raise InputError(f"{len(todo.items)} problems, where one is read. Give one at a time.")


def _labelled(reasoner: Reasoner, found: Any) -> xr.DataArray:
    coords = {"layer": list(reasoner.model.layers)}
    return xr.DataArray(found, coords, ("layer", "head", "query", "key"))
