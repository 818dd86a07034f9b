"""Interventions as JSON data, for the record that a store keeps of what shaped its numbers."""

import dataclasses
import hashlib
import types
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from probe import selection
from probe.errors import InputError
from probe.interventions import Intervention, require


def as_data(intervention: Intervention) -> dict[str, Any]:
    """An intervention as JSON data: its class, and its fields.

    Tensors and arrays become their dtype, shape and sha256; functions their name, a sha256 of their
    code, and what they hold in their closure and defaults. What a function reads from its module
    is not seen.

    Raises:
        InputError: It cannot be recorded.

    Example:
        >>> as_data(probe.Bias(value=-1.0, keys=slice(2, None)))["keys"]
        '2:'
    """
    require(intervention)
    kind = type(intervention)
    if not dataclasses.is_dataclass(intervention):
        raise InputError(
            f"a {kind.__name__} cannot be recorded with a store. Make it a frozen dataclass."
        )
    try:
        return _fields(intervention, kind.__name__)
    except RecursionError:
        raise InputError(
            f"a {kind.__name__} holds something that holds itself, which cannot be recorded with a "
            "store. Use functions that do not refer to themselves."
        ) from None


def described(value: Any, name: str) -> Any:
    """A value that shapes numbers, as JSON data: see `as_data`.

    Args:
        value: Numbers, texts, tensors, functions, dataclasses, and lists and dicts of these.
        name: For messages.

    Raises:
        InputError: It cannot be recorded.

    Example:
        >>> described({"heads": [(0, 1)], "factor": 0.5}, "options")
        {'heads': [[0, 1]], 'factor': 0.5}
    """
    return _plain(value, name)


def _fields(one: Any, name: str) -> dict[str, Any]:
    """A dataclass as its class and the fields by which it is compared: others are its state."""
    kind = type(one)
    compared = [f.name for f in dataclasses.fields(one) if f.compare]
    fields = {field: _plain(getattr(one, field), f"{name}.{field}") for field in compared}
    return {"kind": f"{kind.__module__}.{kind.__qualname__}", **fields}


def _plain(value: Any, name: str) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if np.isfinite(value) else str(value)  # JSON knows no infinity
    if isinstance(value, slice):
        return selection.as_data(value)
    if isinstance(value, Tensor):
        data = value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes()
        return _array(value, data)
    if isinstance(value, np.ndarray) and value.dtype != object:
        return _array(value, value.tobytes())
    if isinstance(value, Mapping):
        return {str(k): _plain(v, f"{name}[{k!r}]") for k, v in value.items()}
    if isinstance(value, Sequence):
        return [_plain(v, name) for v in value]
    if isinstance(value, set | frozenset):
        return sorted((_plain(v, name) for v in value), key=repr)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _fields(value, name)
    if isinstance(value, partial):
        parts = {"args": value.args, "keywords": value.keywords}
        return {"partial": _plain(value.func, name), **_plain(parts, name)}
    if isinstance(value, types.FunctionType):
        code, held = value.__code__, [c.cell_contents for c in value.__closure__ or ()]
        held += [*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
        return {
            "function": f"{value.__module__}.{value.__qualname__}",
            "sha256": _digest(_said(code).encode()),
            "holds": [_plain(v, name) for v in held],
        }
    raise InputError(
        f"{name} holds a {type(value).__name__}, which cannot be recorded with a store. Use "
        "numbers, texts, tensors, and Python functions of these."
    )


def _array(value: Any, data: bytes) -> dict[str, Any]:
    return {"dtype": str(value.dtype), "shape": list(value.shape), "sha256": _digest(data)}


def _said(code: types.CodeType) -> str:
    """What a function does, as text that is the same in every process."""

    def one(const: Any) -> str:
        if isinstance(const, frozenset):  # as in `x in {"a", "b"}`; its order is the process's own
            return repr(sorted(map(repr, const)))
        return _said(const) if isinstance(const, types.CodeType) else repr(const)

    return repr((code.co_code, code.co_names, [one(const) for const in code.co_consts]))


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
