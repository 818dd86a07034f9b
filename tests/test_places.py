"""What experiments know before they run, and what a store tells when it is opened again."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import probe
from probe.errors import InputError
from probe.model import Model
from recipes.ablation import Ablate, cumulative, effect, importance, reference, sweep
from recipes.architectures_tiny import tiny as tiny_of
from recipes.suppression import Suppress, dose_response
from tests.models import Bare
from tests.models import bare as bare
from tests.models import demo as demo

QUIET: dict[str, Any] = {"progress": False}
TEXTS = ["abcabc", "xyzx", "bb"]


def test_factors_and_sizes_label_their_stores_when_they_are_opened_again(
    demo: Model, tmp_path: Path
) -> None:
    one = Suppress(keys=1)
    made = dose_response(demo, TEXTS, one, [1, 0.1, 0], tmp_path / "d.zarr", **QUIET)
    again = probe.open(tmp_path / "d.zarr")
    assert again.factor.values.tolist() == [1.0, 0.1, 0.0]
    np.testing.assert_array_equal(again.delta_loss.sel(factor=0), made.delta_loss[:, 2])
    assert float(abs(again.delta_loss.sel(factor=1)).max()) == 0
    cumulative(demo, TEXTS, [(1, 0), (0, 3)], tmp_path / "c.zarr", **QUIET)
    assert probe.open(tmp_path / "c.zarr")["size"].values.tolist() == [1, 2]


@pytest.mark.parametrize("keys", ["segment:bos", "text:b"])
def test_a_problem_without_the_tokens_is_as_it_was_whatever_its_batch(
    demo: Model, keys: str
) -> None:
    problems = [[0, 4, 5, 2], [3, 4, 5, 6]]  # a first token and a b, and neither
    one = Suppress(keys=keys, factor=0.1)
    together = effect(demo, problems, one, **QUIET)
    with pytest.warns(UserWarning, match="selects nothing: no input of this batch"):
        alone = effect(demo, problems, one, batch_size=1, **QUIET)
    assert together.status.values.tolist() == alone.status.values.tolist() == [1, 1]
    assert float(together.delta_loss[1]) == float(alone.delta_loss[1]) == 0
    np.testing.assert_allclose(together.delta_loss, alone.delta_loss, atol=2e-6)


def test_a_mean_is_that_of_all_problems_and_not_of_a_batch(demo: Model) -> None:
    one = Ablate([(1, 0), (0, 3)], mode="mean")
    stated = Ablate([(1, 0), (0, 3)], mode="mean", reference=reference(demo, TEXTS))
    wanted = effect(demo, TEXTS, stated, **QUIET).delta_loss
    for size in (1, 3):
        got = effect(demo, TEXTS, one, batch_size=size, **QUIET)
        np.testing.assert_allclose(got.delta_loss, wanted, atol=2e-6)
        kept = got.attrs["recipe"]["interventions"][0]["reference"]
        assert kept["source"] == "mean over all tokens of 3 problems of list"


def test_a_store_of_another_tokenizer_is_refused(demo: Model, tmp_path: Path) -> None:
    ds = probe.capture(demo, ["abcabc"], tmp_path / "s.zarr", **QUIET)
    with (
        probe.load("demo-instruct", device="cpu") as other,
        pytest.raises(InputError, match=r"it was captured with another tokenizer\. Give the probl"),
    ):
        effect(other, ds, Ablate([(0, 0)]), **QUIET)


def test_layers_that_differ_in_their_heads_have_nan_where_there_is_none() -> None:
    module = tiny_of("dots3_note")
    with probe.load(module) as model:
        counts = {layer: shape.heads for layer, shape in model.tap.shapes.items()}
        assert len(set(counts.values())) > 1
        problems = [[3, 4, 5, 6, 7], [8, 9, 10]]
        for found in (sweep(model, problems, **QUIET).delta_loss, importance(model, problems)):
            there = np.isfinite(found.values).all(0).sum(-1)
            assert there.tolist() == [counts[layer] for layer in model.layers]


def test_an_option_that_cannot_be_is_refused_before_means_are_taken(
    demo: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("recipes.references.logits", lambda *_: pytest.fail("the model ran"))
    with pytest.raises(InputError, match=r"on_error='x'\. Choose 'record' or 'raise'"):
        sweep(demo, TEXTS, mode="mean", on_error="x", **QUIET)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"store=5\. Give the folder of the store"):
        sweep(demo, TEXTS, 5, mode="mean", **QUIET)  # type: ignore[arg-type]


def test_half_precision_no_ops_are_exact_too(bare: Bare) -> None:
    model = bare("llama", "sdpa", torch.bfloat16)
    problems = [[3, 17, 40, 8, 22], [9, 1, 30]]
    ds = effect(model, problems, Suppress(keys=0, factor=0.5), **QUIET)
    assert ds.noop.values.tolist() == [0.0, 0.0]
    costs = sweep(model, problems, **QUIET)
    assert costs.noop.values.tolist() == [0.0, 0.0]
    assert bool(np.isfinite(costs.delta_loss).all())
