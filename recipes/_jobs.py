"""Experiments as runs over problems: planned, resumed and stored like captures."""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import numpy.typing as npt
import torch
import xarray as xr
from torch import Tensor

import probe
from probe import schema, store
from probe.errors import InputError
from probe.model import Model
from probe.plans import Item, Plan
from probe.running import OnError, Reading, Work, require, run
from recipes._measures import mean_nll

_TEXTS = schema.Array(("problem",), "string", "")

Labels = Sequence[float] | Sequence[str]


class Options(TypedDict, total=False):
    """How an experiment runs, as `probe.capture` has it.

    Attributes:
        batch_size: Problems in a batch at most.
        max_length: Longer problems are cut to so many tokens.
        on_error: "record" a problem that fails with its reason and go on, or "raise".
        overwrite: Replace a store that is there.
        progress: Show a progress bar on stderr.
    """

    batch_size: int | None
    max_length: int | None
    on_error: OnError
    overwrite: bool
    progress: bool


def planned(
    model: Model,
    problems: object,
    options: Options,
    *,
    where: object = None,
    max_new_tokens: int = 0,
) -> Plan:
    """The problems made ready: of a store or its folder, or whatever `probe.problems` reads.

    All their tokens are rows and columns of the results, and none that would be generated.

    Raises:
        InputError: Something cannot be used; nothing has run.
    """
    if unknown := set(options) - set(Options.__annotations__):
        known = ", ".join(Options.__annotations__)
        raise InputError(f"there is no option {min(unknown)!r}. Choose from {known}.")
    if where is not None or "on_error" in options:
        require("" if where is None else where, options.get("on_error", "record"))
    if not model.tap.causal:
        raise InputError(
            f"the rows of {model.name} see the tokens behind them, so what it says of a next token "
            "is no prediction. Experiments need a causal model."
        )
    source = opened(problems)
    limits: dict[str, Any] = {n: options.get(n) for n in ("batch_size", "max_length")}
    # Of one layer: those of others may have other heads, and nothing of a plan but its problems
    # and its batches counts here.
    todo = probe.plan(
        model, source, layers=model.layers[0], max_new_tokens=max_new_tokens, **limits
    )
    _require_same_words(model, source, todo.items)
    return whole(todo)


def _require_same_words(model: Model, source: Any, items: Sequence[Item]) -> None:
    """Refuse a store whose token ids say something else to this model."""
    if not hasattr(source, "data_vars") or model.tokenizer is None or not items:
        return
    wanted = [str(text) for text in source.token.sel(problem=items[0].problem.id).values]
    found = model.text.decode(items[0].token_ids)
    if any(wanted) and wanted[: len(found)] != found:
        raise InputError(
            f"the store's problem {items[0].problem.id!r} begins {''.join(wanted)[:40]!r}, and to "
            f"{model.name} its token ids say {''.join(found)[:40]!r}: it was captured with another "
            "tokenizer. Give the problems themselves."
        )


def whole(todo: Plan) -> Plan:
    """A plan whose rows and columns are all tokens of each problem, and none that would follow."""
    items = []
    for item in todo.items:
        everything = tuple(range(item.length))
        items.append(replace(item, queries=everything, keys=everything))
    attrs = {name: value for name, value in todo.attrs.items() if name != "selection"}
    return replace(todo, items=tuple(items), attrs=attrs)


def opened(problems: object) -> object:
    """A store that is given by its folder, opened; whatever else as it is.

    Raises:
        StoreError: There is none under such a name, or it cannot be read.
    """
    named = isinstance(problems, str | Path) and _names_a_store(Path(problems))
    return probe.open(problems) if named else problems


def _names_a_store(path: Path) -> bool:
    try:
        return path.suffix == ".zarr" or (path.expanduser() / "zarr.json").is_file()
    except (OSError, ValueError, RuntimeError):  # a text: no name is so long, nobody's home
        return False


def readings(
    results: Mapping[str, Sequence[Any]], base: Tensor, items: Sequence[Item]
) -> list[Reading]:
    """What was computed of each problem of a batch.

    Args:
        results: By name, one for each problem: numbers, arrays, or texts.
        base: (problem, position, vocabulary) logits of the unchanged model, for the loss.
        items: The problems.
    """
    out = []
    for n, item in enumerate(items):
        arrays = {name: _array(values[n]) for name, values in results.items()}
        loss = mean_nll(base[n], torch.tensor(item.token_ids), range(1, item.length))
        out.append(Reading(arrays, loss))
    return out


def _array(value: Any) -> npt.NDArray[Any]:
    return np.array(value, dtype=object if isinstance(value, str) else "float32")


def job(
    model: Model,
    todo: Plan,
    where: str | Path | None,
    *,
    recipe: Mapping[str, Any],
    arrays: Mapping[str, Sequence[str]],
    compute: Callable[..., Sequence[Reading]],
    texts: Sequence[str] = (),
    sizes: Mapping[str, int] | None = None,
    coords: Mapping[str, Labels] | None = None,
    alone: bool = False,
    options: Options,
) -> xr.Dataset:
    """Run an experiment into a store, or into memory.

    Args:
        model: The model.
        todo: The problems.
        where: Folder of the store; None for memory.
        recipe: Its name and all that shapes its numbers, as JSON data.
        arrays: float32 results by name, each with its dims, "problem" first; empty is NaN.
        compute: See `probe.running.Work`.
        texts: Results that are texts, one for each problem.
        sizes: Lengths of dims that a store does not have by itself.
        coords: Dims that are labelled with numbers or texts.
        alone: Whether each problem is a batch of its own.
        options: How to run.

    Returns:
        The results, labelled as captures are: (problem, layer, head, query, key).
    """
    if where is None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "results.zarr"
            inner = partial(job, model, todo, path, recipe=recipe, arrays=arrays, compute=compute)
            return inner(
                texts=texts, sizes=sizes, coords=coords, alone=alone, options=options
            ).load()
    config = {name: todo.config[name] for name in _SHAPING} | {"recipe": dict(recipe)}
    specs = {name: schema.Array(tuple(dims), "float32", np.nan) for name, dims in arrays.items()}
    specs |= dict.fromkeys(texts, _TEXTS)
    coords = dict(coords or {})
    lengths = todo.sizes | dict(sizes or {}) | {name: len(x) for name, x in coords.items()}
    work = Work(
        items=todo.items,
        batches=[(i,) for i in range(len(todo.items))] if alone else todo.batches,
        config=config,
        size=_bytes(model, todo, specs, lengths),
        create=partial(_create, model, todo, config, specs, lengths, coords),
        compute=compute,
    )
    return run(
        model,
        work,
        where,
        on_error=options.get("on_error", "record"),
        overwrite=options.get("overwrite", False),
        progress=options.get("progress", True),
    )


_SHAPING = ("model", "interventions", "tokens_sha256", "max_length", "batch_size")


def _create(
    model: Model,
    todo: Plan,
    config: Mapping[str, object],
    arrays: Mapping[str, schema.Array],
    sizes: Mapping[str, int],
    coords: Mapping[str, Labels],
    where: object,
    **how: Any,
) -> store.Writer:
    return store.create(
        where,
        labels=[item.labels(model) for item in todo.items],
        layers=model.layers,
        heads=range(model.n_heads),
        config=config,
        sites=(),
        reduced=arrays,
        sizes=sizes,
        coords=coords,
        attrs={**todo.attrs, "recipe": config["recipe"]},
        **how,
    )


def _bytes(
    model: Model, todo: Plan, arrays: Mapping[str, schema.Array], sizes: Mapping[str, int]
) -> int:
    known = dict(sizes) | {"layer": len(model.layers), "head": model.n_heads}
    known |= {"problem": len(todo.items)}
    return sum(4 * int(np.prod([known[dim] for dim in a.dims])) for a in arrays.values())
