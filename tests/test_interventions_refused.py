"""Interventions of the user's own, and what is refused with which words."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from probe.attention import AttentionCall
from probe.errors import InputError
from probe.interventions import Add, Bias, Change, Edit
from tests.edited import watched
from tests.references import no_grad as no_grad

IDS = [5, 6, 7, 8, 9, 1, 2, 3]


@dataclass(frozen=True)
class Own:
    """An intervention of the user's own."""

    given: Any

    def edits(self, call: AttentionCall) -> Iterator[Any]:
        yield self.given


def test_an_intervention_is_any_object_that_says_what_to_change() -> None:
    model = watched("llama")
    bias = torch.zeros(1, 1, 1, 8)
    bias[..., 0] = -2.0
    with model.intervene(Own(Add(bias))):
        got = model(IDS).logits
    with model.intervene(Bias(value=-2.0, keys=0)):
        assert torch.equal(got, model(IDS).logits)
    with model.intervene(Own(Change("z", lambda z: 0 * z, "off", heads=-1))):
        got = model(IDS).logits
    with model.intervene(Edit(site="z", function=lambda z, _: 0 * z, heads=3)):
        assert torch.equal(got, model(IDS).logits)


SHAPE = r"Return a tensor of shape \(1, 8, 4, 8\), or None to leave it\."
REFUSED: dict[str, tuple[Any, str]] = {
    "another shape": (
        Edit(site="z", function=lambda z, _: z[:, :1]),
        rf"the Edit of z returned \(1, 1, 4, 8\)\. {SHAPE}",
    ),
    "no tensor": (
        Edit(site="z", function=lambda z, _: 3),  # type: ignore[return-value, arg-type]
        rf"the Edit of z returned int\. {SHAPE}",
    ),
    "another shape of some heads": (
        Edit(site="z", function=lambda z, _: z[:, :1], heads=[2]),
        r"the Edit of z returned \(1, 1, 1, 8\)\. Return a tensor of shape \(1, 8, 1, 8\)",
    ),
    "a mask": (
        Edit(site="pattern", function=lambda p, _: p > 0),
        r"the Edit of pattern returned torch\.bool\. Return torch\.float32\.",
    ),
    "a head too many": (Bias(value=1.0, heads=4), r"heads=4 is out of range: the model has 4"),
    "a key head too many": (
        Edit(site="k", function=lambda k, _: k, heads=2),
        r"heads=2 is out of range: the model has 2 heads",
    ),
    "a layer too many": (Bias(value=1.0, layers=3), r"layers=3 is out of range: the model has 3"),
    "every key of a row": (
        Bias(value=-torch.inf, keys=0),
        r"in layer 0 a bias of -inf hides every key of row 0 \(batch item 0, head 0\).*Keep at "
        "least one",
    ),
    "a key beyond the prompt": (
        Bias(value=1.0, keys=8),
        r"keys=8 is out of range: a prompt of this batch has 8 tokens\. Use 0 to 7, or an open",
    ),
    "a row before the prompt": (Bias(value=1.0, queries=-9), r"queries=-9 is out of range"),
    "a word": (Bias(value=1.0, keys="last"), r"keys='last' is not a selection"),
    "a slice that counts backwards": (
        Bias(value=1.0, keys=slice(None, None, -1)),
        r"slice\(None, None, -1\) counts backwards, which has no meaning here\. Use a step above",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_done_is_said_and_the_model_is_left_as_it_was(what: str) -> None:
    one, message = REFUSED[what]
    model = watched("llama")
    plain = model(IDS).logits
    with model.intervene(one), pytest.raises(InputError, match=message):
        model(IDS)
    assert torch.equal(model(IDS).logits, plain)


@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
def test_a_bias_is_a_number(value: float) -> None:
    with pytest.raises(InputError, match=rf"value={value}\. Give a number, or -inf to hide"):
        Bias(value=value)


def test_an_edit_names_a_site() -> None:
    with pytest.raises(InputError, match=r"site='heads'\. Choose from q, k, v, scores, pattern, z"):
        Edit(site="heads", function=lambda x, _: x)  # type: ignore[arg-type]


@pytest.mark.parametrize("odd", [3, Bias, "Bias"], ids=str)
def test_something_else_is_no_intervention(odd: Any) -> None:
    model = watched("llama")
    message = r" is not an intervention\. Give objects with a method edits\(call\), such as probe"
    with pytest.raises(InputError, match=message), model.intervene(odd):
        pass


def test_positions_that_nobody_knows_are_refused_and_edits_work_all_the_same() -> None:
    model = watched("llama")
    embeds = torch.randn(1, 5, 32)
    first, rotary = (
        model.base.get_submodule(f"model.{name}") for name in ("layers.0.self_attn", "rotary_emb")
    )
    inputs: Any = {
        "position_embeddings": rotary(embeds, torch.arange(5)[None]),
        "attention_mask": None,
    }
    with model.intervene(Bias(value=1.0, keys=0)):
        message = re.escape("which tokens the rows and columns of layer 0 are is not known")
        with pytest.raises(InputError, match=message):
            first(embeds, **inputs)
    plain, _ = first(embeds, **inputs)
    with model.intervene(Edit(site="z", function=lambda z, _: 2 * z)):
        twice, _ = first(embeds, **inputs)
    torch.testing.assert_close(twice, 2 * plain)


@pytest.mark.parametrize(
    "value", ["1", None, 1j, torch.ones(2), 10**400, float("nan"), float("inf"), [1.0]], ids=str
)
def test_a_value_that_is_no_number_is_refused(value: Any) -> None:
    with pytest.raises(InputError, match=r"value=.*\. Give a number, or -inf to hide an edge"):
        Bias(value=value)


@pytest.mark.parametrize("value", [torch.tensor(-1.0), -1, np.float32(-1)], ids=str)
def test_a_value_may_be_any_number(value: Any) -> None:
    model = watched("llama")
    with model.intervene(Bias(value=value, keys=0)):
        got = model(IDS).logits
    with model.intervene(Bias(value=-1.0, keys=0)):
        assert torch.equal(got, model(IDS).logits)


@pytest.mark.parametrize("function", [3, None, "z", [print]], ids=str)
def test_an_edit_without_a_function_is_refused(function: Any) -> None:
    with pytest.raises(InputError, match=r"is not callable\. Give a function of \(value, call\)"):
        Edit(site="z", function=function)


def test_an_edit_by_a_function_of_other_arguments_is_refused() -> None:
    odd: Any = lambda z: z  # noqa: E731
    with pytest.raises(
        InputError, match=r"<lambda> takes \(z\)\. Give a function of \(value, call"
    ):
        Edit(site="z", function=odd)
    unknown: Any
    for unknown in (torch.mul, print):  # what is written in C need not say what it takes
        Edit(site="z", function=unknown)


def test_selections_that_can_be_read_only_once_act_in_every_layer_and_forward() -> None:
    model = watched("llama")
    iterators: Any = {"keys": iter([0, 3]), "layers": iter([0, 2]), "heads": iter([1])}
    once = Bias(value=-2.0, **iterators)
    iterators = {"layers": iter([0, 1]), "heads": iter([0])}
    edit = Edit(site="z", function=lambda z, _: 2 * z, **iterators)
    with model.intervene(
        Bias(value=-2.0, keys=[0, 3], layers=[0, 2], heads=[1]),
        Edit(site="z", function=lambda z, _: 2 * z, layers=[0, 1], heads=[0]),
    ):
        wanted = model(IDS).logits
    with model.intervene(once, edit):
        for _ in range(2):
            assert torch.equal(model(IDS).logits, wanted)
