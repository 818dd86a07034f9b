"""What suppression takes, what document 004 sets, and what is refused before a model has run."""

import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import probe
from probe.describing import as_data
from probe.errors import InputError
from probe.model import Model
from recipes.suppression import Knockout, Steer, Suppress, from_attributes, window
from tests.edited import watched
from tests.models import demo as demo
from tests.references import no_grad as no_grad

IDS = [[3, 17, 40, 8, 22], [9, 1, 30, 5, 6]]


def logits(model: Model, *some: Any) -> torch.Tensor:
    with model.intervene(*some):
        found: torch.Tensor = model(IDS).logits
    return found


def test_the_attributes_of_the_document_act_as_it_says() -> None:
    holder = SimpleNamespace(
        suppression_factors=[0.5, 2.0],
        suppression_token_indices=[1, 2],
        manipulate_attn_scores_after_scaling=False,
        layers=[0, 1],
    )
    model = watched("llama")
    wanted = Suppress(keys=[1, 2], factor=[0.5, 2.0], mode="logit_mul", layers=[0, 1])
    with pytest.warns(UserWarning, match="raised attention"):
        assert torch.equal(logits(model, from_attributes(holder)), logits(model, wanted))


def test_they_are_lists_for_each_item_too_in_which_minus_one_names_nothing() -> None:
    model = watched("llama")
    one = from_attributes(
        suppression_token_indices=[[1, 2], [3, -1]],
        suppression_factors=[[0.5, 2.0], [0.1, 0.7]],
        layers=[],
        manipulate_attn_scores_after_scaling=True,
        mode="log_add",
    )
    assert one.after_scaling
    assert one.layers is None
    both = logits(model, one)
    first = logits(model, Suppress(keys=[1, 2], factor=[0.5, 2.0]))
    second = logits(model, Suppress(keys=3, factor=0.1))
    torch.testing.assert_close(both[0], first[0])
    torch.testing.assert_close(both[1], second[1])


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"suppression_token_indices": [1], "suppression_factors": None},
        {"suppression_token_indices": [-1, None], "suppression_factors": [0.1, 0.2]},
        {"suppression_token_indices": [1, 2], "suppression_factors": 1.0},
    ],
)
def test_switched_off_the_model_is_as_it_was_bit_for_bit(given: dict[str, Any]) -> None:
    model = watched("llama")
    assert torch.equal(logits(model, from_attributes(**given)), logits(model))


def test_an_unknown_attribute_is_refused() -> None:
    with pytest.raises(InputError, match=r"no attribute 'suppression_factor'\. Choose from supp"):
        from_attributes(suppression_factor=[0.1])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Suppress(keys=1, mode="mul"), "mode='mul'. Choose from log_add, logit_mul, "),  # type: ignore[arg-type]
        (lambda: Suppress(keys=1, factor=-0.1), "factor holds -0.1. Give numbers of at least 0"),
        (lambda: Suppress(keys=1, factor=float("nan")), "factor holds nan. Give numbers"),
        (lambda: Suppress(keys=1, factor=float("inf")), "factor holds inf."),
        (lambda: Suppress(keys=1, factor="half"), "factor holds 'half'."),  # type: ignore[arg-type]
        (lambda: Suppress(keys=1, factor=True), "factor holds True."),
        (lambda: Suppress(keys=[1, 2], factor=[0.1]), "factor=[0.1] does not fit keys=[1, 2]."),
        (lambda: Suppress(keys="last:2", factor=[0.1, 1]), "does not fit keys='last:2'. Give one"),
        (
            lambda: Suppress(keys=[[1], [2]], factor=[[0.1], [0.1, 0.2]]),
            "factor=[[0.1], [0.1, 0.2]] does not fit keys=[[1], [2]].",
        ),
        (lambda: Suppress(keys="not"), "keys='not' is not a selection. Give an int, a slice"),
        (lambda: Suppress(keys="text:"), "keys='text:' names no text. Write one behind the colon"),
        (lambda: Suppress(keys="regex:("), "keys='regex:(' is not a regular expression (missing )"),
        (lambda: Suppress(keys=[1.5]), "keys holds 1.5, which is not an int."),  # type: ignore[arg-type]
        (lambda: Suppress(keys=1, queries="end"), "queries='end' is not a selection."),
        (lambda: Suppress(keys=1, heads=[(0, 1, 2)]), "heads hold (0, 1, 2). Give pairs (layer, h"),  # type: ignore[arg-type]
        (lambda: Suppress(keys=1, heads=[(0, 1)], layers=0), "heads=[(0, 1)] name their layers, a"),
        (lambda: Knockout(keys="text:"), "keys='text:' names no text."),
        (lambda: Knockout(keys=1, queries="x"), "queries='x' is not a selection."),
        (lambda: Steer(keys=1, mode="only"), "mode='only'. Choose exclude or include."),  # type: ignore[arg-type]
        (lambda: Steer(keys=1, factor=-1), "factor holds -1."),
        (lambda: Steer(keys=["last:x"]), "keys='last:x' is not a selection."),
        (lambda: window(5, 3, 4), "layers=5 is out of range: the model has 4 layers"),
        (lambda: window(0, 0, 4), "width=0. A window has at least 1 layer."),
    ],
)
def test_a_mistake_is_refused_when_it_is_written(make: Any, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        make()


@pytest.mark.parametrize(
    ("one", "message"),
    [
        (Suppress(keys=[[1], [2], [3]]), "keys are given for 3 inputs, and this batch has 2."),
        (Suppress(keys=[[1], [5]]), "keys hold 5, and a prompt of this batch has 5 tokens. Use 0"),
        (Suppress(keys=[[1], [-6]]), "keys hold -6, and a prompt of this batch has 5 tokens."),
        (Suppress(keys=[[1], [2, -3]]), "keys=[2, -3] name a token twice. Name each once."),
        (Suppress(keys=5), "keys=5 is out of range: a prompt of this batch has 5 tokens."),
        (Suppress(keys=1, layers=3), "layers=3 is out of range: the model has 3 layers"),
        (Suppress(keys=1, heads=[(0, 4)]), "heads=4 is out of range: the model has 4 heads"),
        (Suppress(keys=1, heads=[(3, 0)]), "layers=3 is out of range"),
        (Suppress(keys="text: not"), "names tokens by their text, which is not known here: the mo"),
        (Steer(keys="regex:a"), "names tokens by their text"),
    ],
)
def test_what_does_not_fit_the_model_or_the_batch_is_refused(one: Any, message: str) -> None:
    model = watched("llama")
    plain = model(IDS).logits
    with model.intervene(one), pytest.raises(InputError, match=re.escape(message)):
        model(IDS)
    assert torch.equal(model(IDS).logits, plain)


def test_what_is_given_as_tensors_and_iterators_is_what_lists_are() -> None:
    model = watched("qwen3")
    wanted = logits(model, Suppress(keys=[1, 3], factor=[0.2, 0.4], layers=[0, 2], heads=[1]))
    keys, factor = np.array([1, 3]), torch.tensor([0.2, 0.4], dtype=torch.float64)
    layers: Any = iter([0, 2])
    one = Suppress(keys=keys, factor=factor, layers=layers, heads=torch.tensor([1]))  # type: ignore[arg-type]
    for _ in range(2):
        assert torch.equal(logits(model, one), wanted)


def test_a_factor_of_one_and_no_keys_leave_the_model_on_its_kernel_bit_for_bit(
    family: str,
) -> None:
    model = watched(family)
    plain = model(IDS).logits
    for mode in ("log_add", "logit_mul", "logit_mul_shifted", "prob_zero_no_renorm"):
        one = Suppress(keys=[1, 2], factor=1.0, mode=mode)
        assert torch.equal(logits(model, one), plain)
    assert torch.equal(logits(model, Suppress(keys=[])), plain)
    assert torch.equal(logits(model, Steer(keys=1, factor=1)), plain)


def test_two_suppressions_of_one_key_multiply() -> None:
    model = watched("mistral")
    both = logits(model, Suppress(keys=1, factor=0.5), Suppress(keys=1, factor=0.2))
    torch.testing.assert_close(both, logits(model, Suppress(keys=1, factor=0.1)))


def test_half_precision_is_as_close_as_its_bits_allow(family: str) -> None:
    one = Suppress(keys=[1, 2], factor=[0.1, 0.0])
    exact = logits(watched(family), one)
    with torch.no_grad():
        rough = logits(watched(family, "sdpa", torch.bfloat16), one)
    plain = watched(family, "sdpa", torch.bfloat16)(IDS).logits
    noise = (plain.float() - watched(family)(IDS).logits).abs().max()
    assert float((rough.float() - exact).abs().max()) < 3 * float(noise) + 0.05
    assert bool(rough.isfinite().all())


def test_they_are_recorded_as_data_and_stored_with_a_capture(demo: Model, tmp_path: Any) -> None:
    one = Suppress(keys="text:b", factor=0.25, heads=[(1, 0)])
    ds = probe.capture(demo, ["abcab"], tmp_path / "s.zarr", interventions=[one], progress=False)
    assert ds.attrs["interventions"] == [as_data(one)]
    assert as_data(one) == {
        "kind": "recipes.suppression.Suppress",
        "keys": "text:b",
        "factor": 0.25,
        "mode": "log_add",
        "layers": None,
        "heads": [[1, 0]],
        "queries": None,
        "after_scaling": False,
    }
    assert as_data(Knockout(keys=1))["kind"] == "recipes.suppression.Knockout"


def test_a_capture_chooses_rows_and_keys_by_what_they_say(demo: Model, tmp_path: Any) -> None:
    ds = probe.capture(
        demo, ["abcab", "xbb"], tmp_path / "s.zarr", queries="text:b", keys="regex:[ab]",
        progress=False,
    )  # fmt: skip
    assert ds.query_position.values.tolist() == [[2, 5], [2, 3]]
    assert ds.key_position.values.tolist() == [[1, 2, 4, 5], [2, 3, -1, -1]]
    with pytest.raises(InputError, match=r"problem '1' has no token that carries it \(spaces coun"):
        probe.plan(demo, ["abcab", "xxx"], queries="text:b")
    _, cache = demo.run_with_cache(["abcab", "xbyb"], sites="pattern", queries="text:b")
    assert cache["pattern", 0].shape == (2, 4, 2, 6)
