"""Interventions as data: what a store records of them."""

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from probe.describing import as_data
from probe.errors import InputError
from probe.hooks import hooks
from probe.interventions import Bias, Edit

Function = Callable[..., Any]


def said(function: Any) -> str:
    return json.dumps(as_data(Edit(site="z", function=function)), sort_keys=True)


def test_fields_are_recorded_as_json() -> None:
    bias = Bias(value=-math.inf, queries="last:6", keys=slice(2, None), layers=[0, -1], heads=3)
    data = as_data(bias)
    assert json.loads(json.dumps(data, allow_nan=False)) == {
        "kind": "probe.interventions.Bias",
        "value": "-inf",
        "queries": "last:6",
        "keys": "2:",
        "layers": [0, -1],
        "heads": 3,
    }
    edit = as_data(Edit(site="z", function=halve))
    assert edit["function"]["function"].endswith("test_interventions_data.halve")
    assert edit["function"]["holds"] == []


def halve(x: Tensor, _: object) -> Tensor:
    return 0.5 * x


def scale(factor: Any) -> Function:
    return lambda x, _: x * factor


def times(z: Tensor, call: Any, factor: float) -> Tensor:
    return factor * z


def given(factor: float = 2.0) -> Function:
    def function(x: Tensor, _: object, by: float = factor) -> Tensor:
        return x * by

    return function


def named(*, factor: float) -> Function:
    def function(x: Tensor, _: object, *, by: float = factor) -> Tensor:
        return x * by

    return function


@dataclass(frozen=True)
class Twice:
    factor: float

    def __call__(self, x: Tensor, _: object) -> Tensor:
        return 2 * x * self.factor


@dataclass(frozen=True)
class Half:
    factor: float

    def __call__(self, x: Tensor, _: object) -> Tensor:
        return x * self.factor / 2


DIFFERENT: dict[str, tuple[Any, Any]] = {
    "constants": (lambda x, _: x * 2, lambda x, _: x * 3),
    "operations": (lambda x, _: x * 2, lambda x, _: x + 2),
    "names": (lambda x, _: x.exp(), lambda x, _: x.abs()),
    "inner functions": (lambda x, _: (lambda: x * 2)(), lambda x, _: (lambda: x * 3)()),
    "closures": (scale(2.0), scale(3.0)),
    "closures of another type": (scale(2.0), scale(2)),
    "defaults": (given(2.0), given(3.0)),
    "keyword defaults": (named(factor=2.0), named(factor=3.0)),
    "tensors": (scale(torch.tensor([1.0, 2.0])), scale(torch.tensor([1.0, 3.0]))),
    "dtypes": (scale(torch.zeros(2)), scale(torch.zeros(2).int())),
    "shapes": (scale(torch.zeros(2, 3)), scale(torch.zeros(3, 2))),
    "numbers beyond float32": (
        scale(torch.tensor(1.0, dtype=torch.float64)),
        scale(torch.tensor(1 + 1e-12, dtype=torch.float64)),
    ),
    "large ints": (scale(torch.tensor(2**24)), scale(torch.tensor(2**24 + 1))),
    "arrays": (scale(np.arange(3.0)), scale(np.arange(3.0)[::-1])),
    "functions in closures": (scale(halve), scale(given())),
    "classes": (Twice(1.0), Half(1.0)),
    "fields": (Twice(1.0), Twice(2.0)),
    "partials": (partial(times, factor=1), partial(times, factor=2)),
    "mappings": (scale({"a": 1}), scale({"a": 2})),
    "sets": (scale({1, 2}), scale({1, 3})),
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_what_differs_is_recorded_differently(what: str) -> None:
    one, other = DIFFERENT[what]
    assert said(one) != said(other)


def test_what_is_the_same_is_recorded_the_same() -> None:
    for make in (scale, given):
        assert said(make(2.0)) == said(make(2.0))
    assert said(scale(torch.ones(2, 3).T)) == said(scale(torch.ones(3, 2)))
    assert said(scale(torch.ones(2, requires_grad=True))) == said(scale(torch.ones(2)))
    assert said(scale(np.float64(2.0))) == said(scale(2.0))
    assert said(scale({"a", "b"})) == said(scale({"b", "a"}))


def test_every_dtype_of_torch_can_be_recorded() -> None:
    dtypes = (torch.bfloat16, torch.float16, torch.bool, torch.complex64, torch.uint8)
    records = {said(scale(torch.ones(2, dtype=dtype))) for dtype in dtypes}
    assert len(records) == len(dtypes)
    assert said(scale(torch.tensor(1.0))) != said(scale(torch.tensor([1.0])))


def test_the_record_is_the_same_in_every_process() -> None:
    code = """if True:
        import json
        from probe.describing import as_data
        from probe.interventions import Edit
        words = {"alpha", "beta", "gamma", "delta"}
        def function(x, call):
            return x if call.layer in {"alpha", "beta", "gamma", "delta"} else words
        def make(words):
            return lambda x, call: x if str(call) in words else None
        print(json.dumps([as_data(Edit(site="z", function=f)) for f in (function, make(words))]))
    """
    out = {
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
        ).stdout
        for seed in "12"
    }
    assert len(out) == 1
    assert b"sha256" in out.pop()


def test_hooks_are_recorded_by_name_and_function_and_not_by_what_they_gathered() -> None:
    def gather(pattern: Tensor, hook: Any) -> None:
        hook.ctx["seen"] = object()

    one = hooks([(("pattern", 0), gather)], [], (0, 1))
    before = as_data(one)
    gather(torch.zeros(1), one.forward[0][0])
    assert as_data(one) == before
    assert before["forward"][0][0]["name"] == "blocks.0.attn.hook_pattern"
    assert before != as_data(hooks([(("pattern", 1), gather)], [], (0, 1)))
    assert before != as_data(hooks([], [(("pattern", 0), gather)], (0, 1)))


class Plain:
    def edits(self, call: object) -> list[Any]:
        return []


@dataclass(frozen=True)
class Holder:
    what: Any
    seen: list[Any] = field(default_factory=list, compare=False)

    def edits(self, call: object) -> list[Any]:
        return []


def test_fields_that_are_not_compared_are_state_and_not_recorded() -> None:
    assert as_data(Holder(1, [object()])) == as_data(Holder(1))


def recursive() -> Function:
    def function(x: Tensor, call: object) -> Any:
        return function

    return function


REFUSED: dict[str, tuple[Any, str]] = {
    "no intervention": (3, r"3 is not an intervention\. Give objects with a method edits"),
    "no dataclass": (Plain(), r"a Plain cannot be recorded with a store\. Make it a frozen data"),
    "an object": (Holder(object()), r"Holder\.what holds a object, which cannot be recorded"),
    "an object in a list": (Holder([object()]), r"Holder\.what holds a object"),
    "an object in a dict": (Holder({"a": object()}), r"Holder\.what\['a'\] holds a object"),
    "a builtin": (Holder(torch.relu), r"Holder\.what holds a builtin_function_or_method"),
    "objects in an array": (Holder(np.array([object()])), r"Holder\.what holds a ndarray"),
    "a class": (Holder(Twice), r"Holder\.what holds a type"),
    "itself": (Holder(recursive()), r"a Holder holds something that holds itself.*Use functions"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_recorded_is_said(what: str) -> None:
    one, message = REFUSED[what]
    with pytest.raises(InputError, match=message):
        as_data(one)


def test_a_message_says_where_the_matter_is() -> None:
    message = re.escape("Edit.function holds a object, which cannot be recorded with a store.")
    with pytest.raises(InputError, match=message):
        as_data(Edit(site="z", function=scale(object())))
