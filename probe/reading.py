"""One batch of a run: a forward that reads what a plan asks for. Nothing is written here."""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from functools import cache, partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from probe.envoys import AttentionEnvoy
from probe.errors import InputError
from probe.filling import fill, hides_future, laid
from probe.indexing import Index, slices, take
from probe.interventions import Intervention, of_items
from probe.landing import Landing
from probe.loss import logits_of, next_token_nll
from probe.model import Model
from probe.planning import continued
from probe.plans import Item, Plan
from probe.reducing import apply
from probe.running import Into, Reading
from probe.selection import neighbours
from probe.tap import run


def read(
    model: Model, todo: Plan, batch: Sequence[int], *, proof: bool, into: Into
) -> list[Reading]:
    """One forward over some problems of a plan; each layer is put away as it is read.

    Args:
        model: The model, in eval mode, without gradients.
        todo: The plan.
        batch: Indices of its problems.
        proof: Whether to prove each layer: see `probe.proof`.
        into: Where the arrays go.

    Returns:
        The loss of each problem.

    Raises:
        WiringError: The proof failed.
        FloatingPointError: The model's loss is not finite.
        RuntimeError: What was generated for several problems depends on their padding.
    """
    items = [todo.items[i] for i in batch]
    ones = [of_items(one, batch, len(todo.items)) for one in todo.interventions]
    prompts = torch.tensor([item.length for item in items])
    if todo.max_new_tokens:
        new = generated(model, items, ones, todo.max_new_tokens)
        items = [continued(model, todo, *pair) for pair in zip(items, new, strict=True)]
    lengths = torch.tensor([item.length for item in items])
    # Their pieces are the same in every layer.
    groups = [(*group, cache(partial(_pieces, group[1][0]))) for group in _alike(items)]
    for n, item in enumerate(items):
        into.begin(n, item.labels(model) if todo.max_new_tokens else None)
    heads = todo.some_heads(model.tap.shape(todo.layers).heads)
    dtype = computed(todo)

    landing = Landing()

    def visit(layer: int, attention: AttentionEnvoy) -> None:
        whole, place = attention.seen, todo.layers.index(layer)
        for which, alike, pieces in groups:
            part = whole.cut(which, alike[0].length)
            own = range(which.start, which.stop)
            for site in todo.matrices:
                tall = None if todo.reduce else into.tall(site)
                cut = pieces(tall, tall is not None and hides_future(part, site))
                seen = laid(part) if len(cut) > 1 else part
                for row, rows, keys, cells in cut:
                    shape = (len(alike), len(todo.heads), *cells)
                    out = torch.empty(shape, dtype=dtype, device=part.device)
                    fill(seen, out, site, queries=rows, keys=keys, heads=heads)
                    if isinstance(todo.reduce, Mapping):
                        for name, metric in todo.reduce.items():
                            into.put(own, name, apply(metric, out, alike), place)
                    else:
                        then = partial(into.put, own, site, layer=place, row=row)
                        landing.bring(out, then)
        if "z" in todo.sites:
            z = attention.z
            for which, alike, _ in groups:
                some = take(take(z[which], alike[0].queries, 1), heads, 2)
                some = some.to(dtype, copy=True)  # the model goes on with its own
                own = range(which.start, which.stop)
                landing.bring(some, partial(into.put, own, "z", layer=place))

    with model.tap.watch.on(*ones, prompt=prompts, length=lengths):
        layers = tuple(sorted(todo.layers))
        output = run(model.tap, visit, inputs(model, items), layers=layers, proof=proof)
    landing.finish()
    logits = logits_of(output)
    if todo.max_new_tokens and len(items) > 1:
        _require_greedy(logits, items, prompts.tolist())
    return [Reading({}, loss) for loss in _losses(logits, items, prompts.tolist())]


def computed(todo: Plan) -> torch.dtype:
    """In what numbers leave the model: codes are made where they are written."""
    return torch.float16 if todo.dtype == "float16" else torch.float32


def generated(
    model: Model, items: Sequence[Item], interventions: Sequence[Intervention], most: int
) -> list[list[int]]:
    """What the model says after each problem, greedily, under interventions.

    Problems run together where padding cannot be felt, else with those of the same length.

    Args:
        model: The model.
        items: The problems.
        interventions: What is changed.
        most: Tokens at most; a token that ends the text is the last.
    """
    safe = _ignores_padding(model)
    numbered = list(enumerate(items))
    groups = [list(g) for _, g in groupby(numbered, key=lambda pair: safe or pair[1].length)]
    out: list[list[int]] = []
    for group in groups:
        places, some = zip(*group, strict=True)
        ones = [of_items(one, places, len(items)) for one in interventions]
        out += _together(model, some, ones, most)
    return out


def _together(
    model: Model, items: Sequence[Item], interventions: Sequence[Intervention], most: int
) -> Iterator[list[int]]:
    with model.intervene(*interventions):
        ids = model.generate(
            [list(item.token_ids) for item in items],
            max_new_tokens=most,
            do_sample=False,
            num_beams=1,
            return_dict_in_generate=False,
        )
    longest = max(item.length for item in items)  # padded on the left
    stop = _stop_tokens(model)
    for row in ids[:, longest:].tolist():
        yield row[: next((n + 1 for n, token in enumerate(row) if token in stop), len(row))]


def _require_greedy(logits: Tensor | None, items: Sequence[Item], prompts: Sequence[int]) -> None:
    """Check that what was generated together, padded, is what this forward would say next.

    Raises:
        RuntimeError: Padding was felt after all (in the model's cache, or in what it selects).
    """
    if logits is None:
        return
    for row, item, n in zip(logits, items, prompts, strict=True):
        said = row[n - 1 : item.length - 1].float()
        best = said.amax(-1)
        new = torch.tensor(item.token_ids[n:], device=row.device)
        short = best - said.gather(-1, new[:, None])[:, 0]
        if bool((short > 16 * torch.finfo(row.dtype).eps * best.abs().clamp_min(1)).any()):
            raise RuntimeError(f"problem {item.problem.id!r} is continued otherwise when padded")


def _ignores_padding(model: Model) -> bool:
    """Whether a model that is padded on the left counts and mixes only real tokens.

    It must be told their positions, and have no layer that carries padding along, as recurrent and
    convolutional ones do.
    """
    text = getattr(model.config, "get_text_config", lambda: None)()
    layers = getattr(text, "num_hidden_layers", None)
    takes = "position_ids" in inspect.signature(type(model.base).forward).parameters
    return takes and layers == len(model.layers)


def _stop_tokens(model: Model) -> frozenset[int]:
    """Token ids that end what is generated."""
    config = getattr(model.base, "generation_config", None) or model.config
    stop = getattr(config, "eos_token_id", None)
    return frozenset([stop] if isinstance(stop, int) else stop or ())


def _alike(items: Sequence[Item]) -> Iterator[tuple[slice, list[Item]]]:
    """Neighbours in a batch with the same length, rows and columns: they are read as one."""
    start = 0
    for _, group in groupby(items, key=lambda item: (item.length, item.queries, item.keys)):
        alike = list(group)
        yield slice(start, start + len(alike)), alike
        start += len(alike)


# First of the stored rows, rows, keys, and how many.
Piece = tuple[int | None, Index, Index, tuple[int, int]]


def _pieces(item: Item, tall: int | None, causal: bool) -> list[Piece]:
    """A layer's matrices, cut into so many rows that are computed and brought home together.

    Without the keys that none of these rows can see, since stores hold nothing there; or whole.
    """
    rows, keys = item.queries, item.keys
    everything = keys == tuple(range(item.length))
    pieces: list[Piece] = []
    for some in slices(len(rows), tall or len(rows) or 1) or [slice(0, 0)]:
        n = max(rows[some], default=-1) + 1 if causal and everything else len(keys)
        columns = slice(0, n) if everything else neighbours([*keys])
        first = None if tall is None else some.start
        pieces.append((first, neighbours([*rows[some]]), columns, (len(rows[some]), n)))
    return pieces


def logits(model: Model, items: Sequence[Item], *interventions: Intervention) -> Tensor:
    """One forward over some problems, changed by interventions.

    Returns:
        (problem, position, vocabulary), of which only the positions that a problem has count.

    Raises:
        InputError: The model returns none.
        FloatingPointError: They are not finite.
    """
    lengths = torch.tensor([item.length for item in items])
    with model.tap.watch.on(*interventions, prompt=lengths, length=lengths):
        found = output_logits(model, inputs(model, items))
    for row, item in zip(found, items, strict=True):
        _require_finite(row[: item.length])
    return found


def output_logits(model: Model, batch: Mapping[str, Any]) -> Tensor:
    """Logits of every token of a batch as the model takes it.

    Raises:
        InputError: The model returns none.
    """
    found = logits_of(model.tap.call(batch))
    if found is None or found.shape[1] < batch["input_ids"].shape[1]:
        raise InputError(
            f"{type(model.base).__name__} returns no logits of every token, so what a change does "
            "cannot be measured. Load it with its language-model head."
        )
    return found


def inputs(model: Model, items: Sequence[Item]) -> dict[str, Any]:
    """A right-padded batch.

    A causal model needs no mask for it, since no token sees the padding after it, and without a
    mask its kernel keeps the fast causal path. Each row is padded with its own last token.
    """
    longest = max(item.length for item in items)
    rows = [[*i.token_ids, *[i.token_ids[-1]] * (longest - i.length)] for i in items]
    batch: dict[str, Any] = {"input_ids": torch.tensor(rows, device=model.device)}
    if not model.tap.causal:
        lengths = torch.tensor([item.length for item in items], device=model.device)
        batch["attention_mask"] = (
            torch.arange(longest, device=model.device) < lengths[:, None]
        ).long()
    return batch | {"use_cache": False}


def _losses(logits: Tensor | None, items: Sequence[Item], prompts: Sequence[int]) -> list[float]:
    """Mean next-token loss of each prompt in nats, summed in float32 or wider."""
    if logits is None or logits.shape[1] < max(prompts):  # some give only those of the last token
        return [float("nan")] * len(items)
    losses = []
    for row, item, n in zip(logits, items, prompts, strict=True):
        _require_finite(row[: item.length])
        nll = next_token_nll(row[:n], torch.tensor(item.token_ids[:n]))
        losses.append(float(nll.double().mean()))
    return losses


def _require_finite(rows: Tensor) -> None:
    # a twentieth of the time that rows.isfinite() takes, and NaN is in both
    if not all(bool(one.isfinite()) for one in rows.aminmax()):
        raise FloatingPointError(
            "the model's logits are not finite: its dtype may overflow. Load it in float32"
        )
