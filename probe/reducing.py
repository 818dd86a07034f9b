"""Runs that store no matrices: metrics of each pattern, or its moments over problems."""

import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from probe import schema
from probe.describing import described
from probe.disk import size
from probe.errors import InputError
from probe.plans import Item, Plan, Reduce, Reduction

POSITIONS = ("query_position", "key_position", "token_id")

_SHAPES = ((5, 8), (8, 8))  # of what metrics are tried on; some want square blocks


def reduced(todo: Plan, reduce: Reduce | None) -> Plan:
    """The plan of a run that stores what is made of the patterns instead of them.

    Args:
        todo: What stores the patterns.
        reduce: See `probe.capture`.

    Raises:
        InputError: It cannot be made of these patterns, or a metric does not do what it must.
    """
    if reduce is None:
        return todo
    if isinstance(reduce, Mapping) and reduce:
        made: Any = {name: tried(name, function) for name, function in reduce.items()}
        for name, one in made.items():
            _require_measurable(name, one, todo.items)
        shaping: Any = {n: described(one.function, f"reduce.{n}") for n, one in made.items()}
        told: Any = {name: _named(one.function) for name, one in made.items()}
    elif reduce == "moments":
        made = told = shaping = reduce
    else:
        raise InputError(
            f"reduce={reduce!r:.40}. Give 'moments', metrics as {{'entropy': heads.entropy}}, or "
            "None to store matrices."
        )
    if todo.sites != ("pattern",):
        raise InputError(f"reduce= is for the pattern, not for {', '.join(todo.sites)}.")
    if todo.dtype not in ("float16", "float32"):
        raise InputError(f"dtype={todo.dtype!r} with reduce=: what is kept is float32. Leave it.")
    config = {**todo.config, "reduce": shaping, "dtype": "float32"}
    attrs = {**todo.attrs, "reduce": told}
    todo = replace(todo, reduce=made, dtype="float32", config=config, attrs=attrs)
    if made == "moments":
        _require_moments(todo)
    return todo


def _require_moments(todo: Plan) -> None:
    if todo.max_new_tokens:
        raise InputError(
            f"reduce='moments' with max_new_tokens={todo.max_new_tokens}: rows of one number would "
            "be of other tokens in each problem. Generate first, and capture the whole texts."
        )
    have = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if todo.stored > have:
        raise InputError(
            f"the moments need {size(todo.stored)} of memory, and this machine has {size(have)}. "
            "Select fewer layers, heads, queries or keys."
        )


def apply(one: Reduction, p: Tensor, items: Sequence[Item]) -> npt.NDArray[Any]:
    """A metric of one layer of problems that are alike in rows and columns.

    Args:
        one: The metric.
        p: (problem, head, query, key) float32, where the model is.
        items: The problems.

    Returns:
        (problem, head) and what else it keeps, as it is stored.

    Raises:
        RuntimeError: It gave another shape than when it was tried.
    """
    where: dict[str, Any] = {
        "query_position": items[0].queries,
        "key_position": items[0].keys,
        "token_id": [[item.token_ids[k] for k in item.keys] for item in items],
    }
    given = {name: torch.tensor(where[name], device=p.device) for name in one.takes}
    found = one.function(p, **given)
    sizes = dict(zip(("query", "key"), p.shape[2:], strict=True))
    expected = (*p.shape[:2], *(sizes[dim] for dim in one.array.dims[3:]))
    if tuple(found.shape) != expected:
        raise RuntimeError(f"{_named(one.function)} gave {tuple(found.shape)}, not {expected}")
    if found.is_floating_point() and found.dtype != torch.float64:
        found = found.float()
    numbers: npt.NDArray[Any] = found.to("cpu").numpy()
    return numbers


def tried(name: str, function: Callable[..., Any]) -> Reduction:
    """A metric, after trying it on small patterns: which dims it keeps, what it must be told.

    Raises:
        InputError: It is no metric, or what it says of a head depends on others.
    """
    taken = (*schema.SITES, *schema.COLUMNS, *schema.INDEXES)
    if not isinstance(name, str) or not name.isidentifier() or name in taken:
        raise InputError(
            f"reduce= names a metric {name!r:.40}. Give a name like 'entropy', which stores do not "
            "use themselves."
        )
    if not callable(function):
        raise InputError(f"reduce={{{name!r}: {function!r:.40}}} is no function.")
    takes = _takes(function)
    error: Exception | None = None
    for n_query, n_key in _SHAPES:
        noise = torch.rand(2, 3, n_query, n_key, generator=torch.Generator().manual_seed(0))
        p = torch.tril(noise, n_key - n_query)
        p = p / p.sum(-1, keepdim=True)
        keys = torch.arange(n_key)
        told = {"query_position": keys[-n_query:], "key_position": keys}
        told["token_id"] = torch.stack([keys % 3, keys % 2])
        told = {at: told[at] for at in takes}
        measure, before = partial(function, **told), p.clone()
        try:
            found = measure(p)
        except Exception as raised:  # each function has kinds of its own
            error = raised
            continue
        if not torch.equal(p, before):
            raise InputError(
                f"the metric {name!r} changes the pattern that it is given, which other metrics "
                "read too. Have it work on a copy."
            )
        array = _array(name, p, found, measure)
        _require_local(name, function, p, told, found)
        return Reduction(function, takes, array, square=n_query == n_key)
    raise InputError(
        f"the metric {name!r} fails on a pattern of {_SHAPES[-1][0]} tokens, a tensor (problem, "
        f"head, query, key): {error}. Give one that takes it, as recipes.heads.entropy."
    )


def _takes(function: Callable[..., Any]) -> tuple[str, ...]:
    """What it wants to be told of rows and columns."""
    try:
        known = inspect.signature(function).parameters
    except ValueError:  # some of torch's own have none
        return ()
    bound = function.keywords if isinstance(function, partial) else {}
    return tuple(name for name in POSITIONS if name in known and name not in bound)


def _array(
    name: str, p: Tensor, found: object, function: Callable[[Tensor], Tensor]
) -> schema.Array:
    """How an answer is stored."""
    *lead, n_query, n_key = p.shape
    shape = tuple(found.shape) if isinstance(found, Tensor) else ()
    known = [(*lead,), (*lead, n_query), (*lead, n_key)]
    if not isinstance(found, Tensor) or shape not in known:
        raise InputError(
            f"the metric {name!r} makes {shape or type(found).__name__} of a pattern "
            f"{tuple(p.shape)}. It must give a tensor (problem, head), or one with query or key "
            "after them."
        )
    dims: tuple[str, ...] = schema.MATRIX[:3]
    if len(shape) > len(lead):
        rows = shape[-1] == n_query and (n_query != n_key or _of_rows(p, found, function))
        dims = (*dims, "query" if rows else "key")
    if found.dtype.is_floating_point:
        return schema.Array(dims, "float64" if found.dtype == torch.float64 else "float32", np.nan)
    if found.dtype == torch.int64:
        return schema.Array(dims, "int64", -1)
    raise InputError(f"the metric {name!r} gives {found.dtype}. It must give floats or int64.")


def _of_rows(p: Tensor, found: Tensor, function: Callable[[Tensor], Tensor]) -> bool:
    """Whether each number is of a row: those before a row that is changed stay as they are."""
    changed = p.clone()
    changed[..., -1, :] = p[..., -1, :].flip(-1)
    return torch.allclose(function(changed)[..., :-1], found[..., :-1], equal_nan=True)


def _require_local(
    name: str, function: Callable[..., Any], p: Tensor, told: Mapping[str, Any], found: Tensor
) -> None:
    """Refuse what compares heads or problems: a run shows it some of them at a time."""
    own = {at: value[1:] if at == "token_id" else value for at, value in told.items()}
    try:
        alone = function(p[1:, 2:], **own)
    except Exception:  # as what needs several heads does
        alone = None
    if alone is None or not torch.allclose(alone, found[1:, 2:], equal_nan=True):
        raise InputError(
            f"the metric {name!r} makes another number of a head when it is alone. A run "
            "shows it one layer of a batch at a time: reduce to what is of each head, and compare "
            "heads over the store."
        )


def _require_measurable(name: str, one: Reduction, items: Sequence[Item]) -> None:
    """Refuse rows and columns of which a metric cannot be made, before anything runs."""
    for item in items:
        if one.square and item.queries != item.keys:
            raise InputError(
                f"the metric {name!r} needs square blocks, and of problem {item.problem.id!r} "
                f"{len(item.queries)} rows and {len(item.keys)} columns are selected. Select the "
                "same queries and keys."
            )
        if "token_id" in one.takes and not set(item.queries) & set(item.keys):
            raise InputError(
                f"the metric {name!r} compares tokens, and of problem {item.problem.id!r} no row "
                "that is selected has its own token among the columns. Select those keys too."
            )


def _named(function: Callable[..., Any]) -> str:
    """A function for people; `described` tells one from another."""
    if isinstance(function, partial):
        given = [f"{value!r:.40}" for value in function.args]
        given += [f"{name}={value!r:.40}" for name, value in function.keywords.items()]
        return f"{_named(function.func)}({', '.join(given)})"
    kind = function if hasattr(function, "__qualname__") else type(function)
    return f"{kind.__module__}.{kind.__qualname__}"
