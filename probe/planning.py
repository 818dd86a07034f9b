"""What a capture will do, worked out before anything runs."""

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from typing import Any, NamedTuple, TypeVar, get_args

import torch

from probe import selection
from probe.batching import batches, length_matters
from probe.describing import as_data
from probe.errors import InputError
from probe.interventions import Intervention, lasting, of_items, require
from probe.model import Model
from probe.plans import Item, Plan, Reduce
from probe.problems import Problem, Problems
from probe.problems import problems as read_problems
from probe.reducing import reduced
from probe.schema import DType, Site
from probe.selection import Selector

SITES: tuple[Site, ...] = ("pattern", "scores", "z")

_One = TypeVar("_One")


def plan(
    model: Model,
    problems: object,
    *,
    sites: Sequence[Site] | Site = ("pattern",),
    layers: Selector = None,
    heads: Selector = None,
    queries: Selector = None,
    keys: Selector = None,
    dtype: str = "float16",
    batch_size: int | None = None,
    max_length: int | None = None,
    max_new_tokens: int = 0,
    interventions: Sequence[Intervention] = (),
    reduce: Reduce | None = None,
) -> Plan:
    """Work out what `capture` with these arguments would compute and write; nothing is run.

    Every problem is tokenised and every selection resolved, so that a mistake shows now.

    Args:
        model: The model.
        problems: Anything that `probe.problems` reads.
        sites: Of "pattern", "scores" and "z".
        layers: int, negative int, slice or list; default all.
        heads: Query heads, likewise.
        queries: Rows, likewise, or "last:6", "first:6", "segment:text".
        keys: Columns, likewise.
        dtype: "float16" or "float32"; or codes, for patterns alone: see `capture`.
        batch_size: Problems in a batch at most; default as many as keep a batch small.
        max_length: Longer problems are cut to so many tokens.
        max_new_tokens: The model goes on greedily, so many tokens at most.
        interventions: What is changed: see `Model.intervene`.
        reduce: What is stored instead of the patterns: see `capture`.

    Raises:
        InputError: Something cannot be used; the message names the problem and the value.

    Example:
        >>> print(probe.plan(model, "train.jsonl", queries="last:6"))
        2 problems, 17 tokens (longest 10), 1 batches
        pattern: 2 layers x 4 heads x up to 6 rows, float16: 96 rows, ... expected on disk)
        files of 2 problem x 2 layer x 4 head x 6 query x 10 key, in tiles of ...
        at least ... s of model time on this machine
    """
    if not isinstance(model, Model):
        raise InputError(f"model is a {type(model).__name__}. Give what probe.load returns.")
    _check_new(model, max_new_tokens)
    todo = prepare(
        model,
        problems,
        partial(_script, model, max_new_tokens),
        sites=sites,
        layers=layers,
        heads=heads,
        queries=queries,
        keys=keys,
        dtype=dtype,
        batch_size=batch_size,
        max_length=max_length,
        max_new_tokens=max_new_tokens,
        interventions=interventions,
    )
    return reduced(todo, reduce)


class Script(NamedTuple):
    """What a problem is to a model.

    Attributes:
        token_ids: What it reads first.
        segments: What each of them is.
        later: What comes after them at most, by segment.
    """

    token_ids: Sequence[int]
    segments: Sequence[str]
    later: Sequence[str]


def prepare(
    model: Model,
    problems: object,
    script: Callable[[Problem], Script],
    *,
    sites: Sequence[Site] | Site,
    layers: Selector,
    heads: Selector,
    queries: Selector,
    keys: Selector,
    dtype: str,
    batch_size: int | None,
    max_length: int | None,
    max_new_tokens: int,
    interventions: Sequence[Intervention],
    config: Mapping[str, Any] | None = None,
) -> Plan:
    """A plan for problems that a script writes: see `plan`.

    Args:
        model: As for `plan`, and so are all that follow but two.
        problems: Problems.
        script: How a problem becomes tokens, and what comes after them.
        sites: Sites.
        layers: Layers.
        heads: Heads.
        queries: Rows.
        keys: Columns.
        dtype: Of the stored numbers.
        batch_size: Problems in a batch at most.
        max_length: Longer problems are cut.
        max_new_tokens: Tokens that are generated at most.
        interventions: What is changed.
        config: What else shapes the numbers, as JSON data.
    """
    model.tap.check()
    with model.tap.watch.lock:  # not those of another thread
        around = model.tap.watch.interventions
    sites = (sites,) if isinstance(sites, str) else _all("sites", sites)
    interventions = _all("interventions", interventions)
    queries, keys = lasting(queries), lasting(keys)
    _check(sites, dtype, batch_size, max_length)
    source = read_problems(problems)
    _check_interventions(around, interventions, len(source), max_new_tokens)
    items = tuple(
        _item(model, problem, script(problem), queries, keys, max_length, max_new_tokens)
        for problem in source
    )
    chosen_layers = _layers(model, layers)
    shape = model.tap.shape(chosen_layers)
    chosen_heads = selection.axis(heads, shape.heads, "heads")
    shaping = {
        "model": {
            "class": type(model.base).__name__,
            "fingerprint": model.fingerprint(),
            "dtype": str(model.dtype).removeprefix("torch."),
            "attn_implementation": model.tap.implementation,
        },
        # Those of a `with model.intervene(...)` around the run shape its numbers too.
        "interventions": [as_data(i) for i in (*around, *interventions)],
        "tokens_sha256": _digest([[i.problem.id, list(i.token_ids)] for i in items]),
        "sites": list(sites),
        "layers": list(chosen_layers),
        "heads": list(chosen_heads),
        "queries": selection.as_data(queries),
        "keys": selection.as_data(keys),
        "max_length": max_length,
        "max_new_tokens": max_new_tokens,
        "dtype": dtype,
        # In 16 bits a kernel rounds visibly differently in another batch.
        "batch_size": batch_size if model.dtype.itemsize < 4 else None,
        **(config or {}),
    }
    equal = length_matters(model.config)
    size = 1 if equal and max_new_tokens else batch_size  # how long they will get is not known
    cell_bytes = len(chosen_layers) * len(chosen_heads) * len(sites) * 4
    return Plan(
        items=items,
        sites=sites,
        layers=chosen_layers,
        heads=chosen_heads,
        dtype=dtype,
        interventions=interventions,
        max_new_tokens=max_new_tokens,
        queries=queries,
        keys=keys,
        z_width=shape.width,
        config=shaping,
        attrs=_story(model, source, shaping),
        batches=tuple(batches(items, size, cell_bytes, equal=equal)),
        estimate=partial(_seconds, model, items),
    )


def _all(name: str, values: Iterable[_One]) -> tuple[_One, ...]:
    """A list that a user gave, as one that can be read many times."""
    if not isinstance(values, Iterable):
        raise InputError(f"{name}={values!r:.60} is no list. Give one, as {name}=[...].")
    return tuple(values)


def _check(sites: Sequence[str], dtype: str, batch: int | None, length: int | None) -> None:
    unknown = [site for site in sites if site not in SITES]
    if unknown or not sites or len(set(sites)) < len(sites):
        raise InputError(f"sites={tuple(sites)!r}. Choose from {', '.join(SITES)}, each once.")
    if dtype not in get_args(DType):
        raise InputError(
            f"dtype={dtype!r}. Choose 'float16' or 'float32'. "
            "'uint16' and 'uint8' are codes of patterns."
        )
    if dtype.startswith("uint") and tuple(sites) != ("pattern",):
        raise InputError(f"dtype={dtype!r} holds patterns, not {', '.join(sites)}. Use 'float16'.")
    for name, value in (("batch_size", batch), ("max_length", length)):
        if value is not None and (type(value) is not int or value < 1):
            raise InputError(f"{name}={value!r}. It must be an int of at least 1.")


def _check_interventions(
    around: Sequence[Intervention], interventions: Sequence[Intervention], n: int, new: int
) -> None:
    for one in interventions:
        require(one)
        of_items(one, range(n), n)
    for one in around:
        if of_items(one, range(n), n) is not one:
            raise InputError(
                f"{one!r:.60} says something else of each input, and a capture puts its problems "
                "into batches of its own. Give it as interventions= and not around the call."
            )
    if new and any(getattr(one, "allow_future", False) for one in (*around, *interventions)):
        raise InputError(
            f"max_new_tokens={new}: with allow_future the rows of the prompt would see tokens that "
            "did not exist when they ran. Capture the whole texts instead."
        )


def _check_new(model: Model, max_new_tokens: object) -> None:
    if type(max_new_tokens) is not int or max_new_tokens < 0:
        raise InputError(f"max_new_tokens={max_new_tokens!r}. It must be an int of at least 0.")
    if max_new_tokens and not hasattr(model.module, "generate"):
        raise InputError(
            f"max_new_tokens={max_new_tokens}, and {type(model.module).__name__} has no method "
            "generate. Generate yourself, and capture the whole sequences."
        )


def _script(model: Model, max_new_tokens: int, problem: Problem) -> Script:
    ids = problem.token_ids or model.text.encode(problem.text or "")
    segments = model.text.segments(ids) if ids else ()
    return Script(ids, segments, ["generated"] * max_new_tokens)


def _item(
    model: Model,
    problem: Problem,
    script: Script,
    queries: Selector,
    keys: Selector,
    max_length: int | None,
    max_new_tokens: int,
) -> Item:
    ids = tuple(script.token_ids[:max_length])
    segments = tuple(script.segments[:max_length])
    if not ids:
        raise InputError(
            f"problem {problem.id!r} has no tokens: its text is {problem.text!r}. Remove it."
        )
    model.text.check(ids, what=f"problem {problem.id!r}")
    if model.context is not None and len(ids) + len(script.later) > model.context:
        more = len(script.later) - max_new_tokens
        thinking = f" and {more} between them" if more else ""
        raise InputError(
            f"problem {problem.id!r} has {len(ids)} tokens, and with {max_new_tokens=}{thinking} "
            f"it would pass the context of {model.name}, {model.context}. Take fewer."
        )
    chosen = _selected(model, problem, ids, (*segments, *script.later), queries, keys)
    return Item(problem, ids, segments, *chosen)


def _selected(
    model: Model,
    problem: Problem,
    prompt: Sequence[int],
    segments: Sequence[str],
    queries: Selector,
    keys: Selector,
) -> Iterator[tuple[int, ...]]:
    """The rows and the columns that are stored of a sequence."""
    said = partial(model.text.said, prompt)
    for name, which in (("queries", queries), ("keys", keys)):
        yield selection.positions(
            which, len(segments), segments, name=name, problem=problem.id, tokens=said
        )


def continued(
    model: Model, todo: Plan, item: Item, new: Sequence[int], what: Sequence[str] | None = None
) -> Item:
    """A problem with the tokens that the model generated after it, by segment."""
    segments = (*item.segments, *(what or ["generated"] * len(new)))
    chosen = _selected(model, item.problem, item.token_ids, segments, todo.queries, todo.keys)
    return Item(item.problem, (*item.token_ids, *new), segments, *chosen)


def _layers(model: Model, layers: Selector) -> tuple[int, ...]:
    if layers is None:
        return model.layers
    chosen = selection.axis(layers, model.n_layers, "layers")
    for layer in chosen:
        if layer not in model.layers:
            raise InputError(
                f"layer {layer} of {model.name} has no attention. It has attention in layers "
                f"{', '.join(map(str, model.layers))}."
            )
    return chosen


def _story(model: Model, problems: Problems, config: Mapping[str, Any]) -> dict[str, Any]:
    packages = {"probe": "attn-probe"} | {n: n for n in ("nnsight", "transformers", "torch")}
    return {
        "model": model.name,
        "revision": getattr(model.config, "_commit_hash", None),
        "model_class": config["model"]["class"],
        "dtype": config["model"]["dtype"],
        "attn_implementation": config["model"]["attn_implementation"],
        "device": str(model.device),
        "n_layers": model.n_layers,
        "n_heads": model.n_heads,
        "n_kv_heads": model.n_kv_heads,
        "causal": model.tap.causal,
        "interventions": config["interventions"],
        "selection": {name: config[name] for name in ("layers", "heads", "queries", "keys")},
        "problems": {
            "source": problems.source,
            "sha256": problems.sha256,
            "n": len(problems),
        },
        "versions": {name: version(package) for name, package in packages.items()},
    }


def _seconds(model: Model, items: Sequence[Item]) -> float:
    weights = sum(p.numel() for p in model.module.parameters())
    width = getattr(model.config, "hidden_size", 0)
    operations = sum(
        2 * weights * item.length + 2 * len(model.layers) * width * item.length**2 for item in items
    )
    with torch.no_grad():
        x = torch.ones(512, 512, dtype=model.dtype, device=model.device)
        float((x @ x)[0, 0])
        start = time.perf_counter()
        for _ in range(8):
            y = x @ x
        float(y[0, 0])  # waits for a GPU
    return operations / (8 * 2 * 512**3 / (time.perf_counter() - start))


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
