"""How the edits of interventions are carried out on one attention call."""

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from probe import selection
from probe.attention import AttentionCall
from probe.errors import InputError
from probe.interventions import Add, Change, Site, where

INPUTS: dict[Site, str] = {"q": "query", "k": "key", "v": "value"}


def edited(call: AttentionCall, edits: Sequence[Add | Change]) -> AttentionCall:
    """The call with its q, k and v changed, and the sum of all biases on its scores.

    What was given is never written to: keys and values belong to the cache.
    """
    if not edits:
        return call
    for site, name in INPUTS.items():
        given = getattr(call, name)
        value, cut = changed(site, given.transpose(1, 2), edits)
        if cut:
            call = replace(call, **{name: value.transpose(1, 2)})  # type: ignore[arg-type]
    added = [edit for edit in edits if isinstance(edit, Add)]
    if any(edit.opens for edit in added):
        call = replace(call, mask=(where(call).key >= 0)[:, None, None, :])
    biases = [edit.bias for edit in added]
    return call.biased(cast(Tensor, sum(biases))) if biases else call


def changed(site: Site, value: Tensor, edits: Sequence[Add | Change]) -> tuple[Tensor, bool]:
    """A value after all functions on its site: (the value itself or a new one, was it edited).

    Raises:
        InputError: A function returned something else than a tensor of that shape.
    """
    functions = [edit for edit in edits if isinstance(edit, Change) and edit.site == site]
    if not functions:
        return value, False
    # Scores and patterns are fresh, but autograd may have saved them.
    own = site in ("scores", "pattern") and not value.requires_grad
    new, cut = value if own else value.clone(), False
    for change in functions:
        if change.heads is None:
            new, fresh = _changed(change, new)
        else:
            dim = 1 if site in ("scores", "pattern") else 2
            heads = selection.axis(change.heads, new.shape[dim], "heads")
            index = torch.tensor(heads, device=new.device)
            some, fresh = _changed(change, new.index_select(dim, index))
            new = new.index_copy(dim, index, some) if fresh else new
        cut |= fresh
    return (new, True) if cut else (value, False)


def _changed(change: Change, value: Tensor) -> tuple[Tensor, bool]:
    """A value after one function on it, and whether that did anything."""
    # Inference tensors do not count their in-place edits.
    before = value.clone() if value.is_inference() else None
    version = None if before is not None else value._version
    try:
        result = change.function(value)
    except Exception as error:
        error.add_note(f"This happened in {change.name}.")
        raise
    new = value if result is None else _checked(change, result, value)
    if new is not value:
        return new, True
    return new, not torch.equal(new, before) if before is not None else new._version != version


def _checked(change: Change, result: object, value: Tensor) -> Tensor:
    if not isinstance(result, Tensor) or result.shape != value.shape:
        found = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
        raise InputError(
            f"{change.name} returned {found}. Return a tensor of shape {tuple(value.shape)}, or "
            "None to leave it."
        )
    if result.dtype.is_complex or (result.dtype == torch.bool and value.dtype != torch.bool):
        raise InputError(f"{change.name} returned {result.dtype}. Return {value.dtype}.")
    return result.to(value.device, value.dtype)
