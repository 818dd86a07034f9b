"""What a reasoner's attention does, read in one forward over the whole sequence, once it is known.

The latents are embeddings like any others: a forward over question, latents, what closes and the
answer gives every row at once, equal to those of the steps that made them. Where only rows behind
the question are asked, its keys and values are taken from the first reading of it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from probe.answers import correct, expected, value
from probe.envoys import AttentionEnvoy
from probe.indexing import take
from probe.interventions import Intervention, of_items
from probe.matrices import Readable
from probe.planning import continued
from probe.plans import Item, Plan
from probe.reading import computed
from probe.reasoners import Reasoner
from probe.running import Reading
from probe.schema import PARTS, Labels
from probe.tap import run
from probe.thinking import Tape, answer, ask, close, later, reason, script


def read(reasoner: Reasoner, todo: Plan, batch: Sequence[int], *, proof: bool) -> list[Reading]:
    """Think about some problems of a plan, and read what the attention did; nothing is written.

    Args:
        reasoner: Who thinks, in eval mode, without gradients.
        todo: The plan.
        batch: Indices of its problems.
        proof: Whether to prove each layer: see `probe.proof`.

    Returns:
        What was read, one for each problem.

    Raises:
        WiringError: The proof failed.
        FloatingPointError: A latent is not finite.
    """
    model = reasoner.model
    prompts = [todo.items[i] for i in batch]
    ones = [of_items(one, batch, len(todo.items)) for one in todo.interventions]
    lengths = torch.tensor([item.length for item in prompts])
    written = script(reasoner, prompts, todo.max_new_tokens)
    with model.tap.watch.on(*ones, prompt=lengths, script=written):
        tape, first = ask(reasoner, prompts)
        asked = tape.fork()
        latents = reason(tape, first)
        _require_finite(latents)
        said = answer(tape, close(tape), todo.max_new_tokens)
        del tape
        items = [_whole(reasoner, todo, item, own) for item, own in zip(prompts, said, strict=True)]
        arrays = _arrays(reasoner, todo, items, asked, latents, proof)
    return [
        _reading(reasoner, item, own, one)
        for item, own, one in zip(items, said, arrays, strict=True)
    ]


def _require_finite(latents: Tensor) -> None:
    if not bool(latents.isfinite().all()):
        raise FloatingPointError(
            "the latents are not finite: the model's dtype may overflow. Load it in float32"
        )


def _whole(reasoner: Reasoner, todo: Plan, item: Item, said: Sequence[int]) -> Item:
    new = [*[-1] * reasoner.n_latents, *reasoner.closes, *said]
    return continued(reasoner.model, todo, item, new, later(reasoner, len(said)))


def labels(reasoner: Reasoner, item: Item) -> Labels:
    """What a store says about a problem's rows and columns; latents are called z0, z1, ..."""
    found = item.labels(reasoner.model)
    first = item.segments.index("latent") if "latent" in item.segments else item.length
    token = [
        f"z{at - first}" if segment == "latent" else text
        for at, segment, text in zip(found.key_position, found.segment, found.token, strict=True)
    ]
    return replace(found, token=token)


def _reading(
    reasoner: Reasoner, item: Item, said: Sequence[int], arrays: Mapping[str, Any]
) -> Reading:
    text = reasoner.model.text.joined(said)
    wanted, found = expected(item.problem), value(text)
    texts = {"answer": text, "expected": wanted}
    more: dict[str, Any] = {name: np.array(text, dtype=object) for name, text in texts.items()}
    more["correct"] = np.array(correct(found, wanted), "float32")
    more["query_segment"] = np.array([item.segments[q] for q in item.queries], dtype=object)
    return Reading({**arrays, **more}, float("nan"), labels(reasoner, item))


def _arrays(
    reasoner: Reasoner,
    todo: Plan,
    items: Sequence[Item],
    asked: Tape,
    latents: Tensor,
    proof: bool,
) -> list[dict[str, Any]]:
    """One forward over the stitched sequences, of which the rows of a plan are read."""
    pads = (~asked.real).sum(1).tolist()
    # what comes after the last row that is read is seen by none of them
    longest = max(_rows(items, pads)[1], asked.real.shape[1] + reasoner.n_latents)
    past = asked.real.shape[1]
    if any(q + pad < past for item, pad in zip(items, pads, strict=True) for q in item.queries):
        tape = Tape(reasoner, asked.real[:, :0])
        start = 0
    else:
        tape, start = asked, past
    embeds = _stitched(reasoner, items, latents, pads, longest)[:, start:]
    tape.real = torch.stack([_real(i, pad, longest) for i, pad in zip(items, pads, strict=True)])
    tape.real = tape.real.to(embeds.device)
    if not any(pads):  # what is behind an answer is seen by nobody before it
        tape.real = torch.ones_like(tape.real)
    out = [_space(todo, item) for item in items]
    parts = [_parts(item).to(embeds.device) for item in items]
    heads = todo.some_heads(reasoner.model.tap.shape(todo.layers).heads)

    def visit(layer: int, attention: AttentionEnvoy) -> None:
        place, seen = todo.layers.index(layer), attention.seen
        lost = longest - seen.shape[3]  # columns that a sliding cache has dropped
        first, stop = _rows(items, pads)
        rows = range(first - start, stop - start)
        found = {"pattern": seen.pattern(queries=rows, heads=heads)}
        if "scores" in todo.sites:
            found["scores"] = seen.scores(queries=rows, heads=heads)
        z = attention.z[:, rows] if "z" in todo.sites else None
        each = zip(items, pads, parts, out, strict=True)
        for n, (item, pad, part, arrays) in enumerate(each):
            own = [q + pad - first for q in item.queries]
            weights = _columns(found["pattern"][n][:, own], pad - lost, item.length, 0.0)
            arrays["mass"][place] = torch.einsum("hqk,qkp->hqp", weights, part.to(weights))
            for site in todo.matrices:
                empty = 0.0 if site == "pattern" else -torch.inf
                cells = _columns(found[site][n][:, own], pad - lost, item.length, empty)
                arrays[site][place] = cells[..., list(item.keys)]
            if z is not None:
                arrays["z"][place] = take(z[n, own], heads, 1)

    inputs = tape.inputs(embeds) | {"logits_to_keep": 1, "use_cache": start > 0}
    run(reasoner.model.tap, visit, inputs, layers=tuple(sorted(todo.layers)), proof=proof)
    return [{name: array.numpy() for name, array in arrays.items()} for arrays in out]


def _stitched(
    reasoner: Reasoner,
    items: Sequence[Item],
    latents: Tensor,
    pads: Sequence[int],
    longest: int,
) -> Tensor:
    """(batch, position, width): what was read as tokens or as latents, padded on both sides."""
    ids = torch.zeros(len(items), longest, dtype=torch.long)
    for row, item, pad in zip(ids, items, pads, strict=True):
        known = torch.tensor(item.token_ids)[: longest - pad]
        row[pad : pad + len(known)] = known
    embeds: Tensor = reasoner.embed(ids.clamp_min(0).to(latents.device))
    for row, item, pad, own in zip(embeds, items, pads, latents, strict=True):
        first = pad + item.segments.index("latent")
        row[first : first + reasoner.n_latents] = own
    return embeds


def _real(item: Item, pad: int, longest: int) -> Tensor:
    at = torch.arange(longest)
    return (at >= pad) & (at < pad + item.length)


def _rows(items: Sequence[Item], pads: Sequence[int]) -> tuple[int, int]:
    """The first of all rows that are read, in the padded batch, and the one behind the last."""
    pairs = list(zip(items, pads, strict=True))
    first = min(min(item.queries) + pad for item, pad in pairs)
    return first, 1 + max(max(item.queries) + pad for item, pad in pairs)


def _space(todo: Plan, item: Item) -> dict[str, Tensor]:
    layers, heads, rows = len(todo.layers), len(todo.heads), len(item.queries)
    dtype = computed(todo)
    shapes: dict[str, tuple[int, ...]] = {
        site: (layers, heads, rows, len(item.keys)) for site in todo.matrices
    }
    if "z" in todo.sites:
        shapes["z"] = (layers, rows, heads, todo.z_width)
    out = {name: torch.empty(shape, dtype=dtype) for name, shape in shapes.items()}
    return out | {"mass": torch.empty(layers, heads, rows, len(PARTS))}


def _columns(rows: Tensor, start: int, length: int, empty: float) -> Tensor:
    """A problem's own columns; empty where a sliding cache has dropped them, or nobody reads."""
    own = rows[..., max(start, 0) : start + length]
    later = max(start + length - rows.shape[-1], 0)
    return functional.pad(own, (length - own.shape[-1] - later, later), value=empty)


def _parts(item: Item) -> Tensor:
    """(row, key, part) float32: 1 for the part that a key is to a row."""
    known = {name: n for n, name in enumerate(PARTS)}
    part = torch.tensor([known[segment] for segment in item.segments])
    parts = part.expand(len(item.queries), -1).clone()  # (row, key)
    parts[range(len(item.queries)), list(item.queries)] = known["self"]
    return functional.one_hot(parts, len(PARTS)).float()


def steps(
    reasoner: Reasoner, items: Sequence[Item], interventions: Sequence[Intervention] = ()
) -> Tensor:
    """The rows of the latents as they were computed, step by step: what `read` is checked against.

    Returns:
        (item, layer, head, latent, key) float32, over the columns of the padded batch; 0 for those
        that were still to come.
    """
    model = reasoner.model
    lengths = torch.tensor([item.length for item in items])
    found = []
    with model.tap.watch.on(*interventions, prompt=lengths, script=script(reasoner, items, 1)):
        tape, latent = ask(reasoner, items)
        for _ in range(reasoner.n_latents):
            rows: list[Tensor] = []

            def visit(_: int, attention: AttentionEnvoy) -> None:
                rows.append(_last_row(attention.seen, tape.real.shape[1]))  # noqa: B023

            latent = tape.next(latent, partial(run, model.tap, visit, layers=model.layers))
            found.append(torch.stack(rows, 1))
    total = tape.real.shape[1]
    return torch.stack([functional.pad(row, (0, total - row.shape[-1])) for row in found], 3)


def _last_row(seen: Readable, read: int) -> Tensor:
    """(batch, head, key) over all that is read, also what a sliding cache has dropped."""
    row = seen.pattern(queries=[seen.shape[2] - 1])[:, :, 0]
    return functional.pad(row, (read - row.shape[-1], 0))
