"""Doses and windows of layers against plain transformers models under hand-made masks."""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import probe
from probe import demos
from probe.errors import InputError
from probe.model import Model
from recipes.ablation import Ablate
from recipes.suppression import Knockout, Steer, Suppress, dose_response, effect, knockout_by_layer
from tests.references import no_grad as no_grad

FACTORS = [1, 0.5, 0.1, 0.01, 0]
COPY = demos.instructed("copy")
# Of several lengths, so that no batch has the order of the problems.
RAGGED = [COPY[0][:14], COPY[1], COPY[2][:9], COPY[3][:20]]
LOWEST = torch.finfo(torch.float32).min
QUIET: Any = {"progress": False}

Factor = Callable[[int, int], float]  # of the edge from a row to a key


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    with probe.load(demos.INSTRUCT, device="cpu") as found:
        yield found


@pytest.fixture(scope="module")
def eager() -> PreTrainedModel:
    found: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        demos.path(demos.INSTRUCT), attn_implementation="eager", local_files_only=True
    )
    found.train(mode=False)
    return found


@pytest.fixture
def still(model: Model) -> Iterator[None]:
    """A model that must not run."""

    def refuse(*_: Any) -> None:
        raise AssertionError("the model ran")

    hook = model.module.register_forward_pre_hook(refuse)
    yield
    hook.remove()


def masked(
    eager: PreTrainedModel,
    ids: Sequence[int],
    factor: Factor,
    layers: Sequence[int] = (0, 1, 2),
) -> Tensor:
    """Logits (position, vocabulary), with ln factor(row, key) on the mask of these layers."""
    n = len(ids)
    plain = torch.full((n, n), LOWEST).triu(1)
    mask = plain.clone()
    for row in range(n):
        for key in range(row + 1):
            f = factor(row, key)
            mask[row, key] = math.log(f) if f else LOWEST
        if bool((mask[row] == LOWEST).all()):
            mask[row, row] = 0.0

    def put(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        own = mask if module.layer_idx in layers else plain
        return args, kwargs | {"attention_mask": own[None, None]}

    attentions = [layer.self_attn for layer in eager.model.layers]
    hooks = [a.register_forward_pre_hook(put, with_kwargs=True) for a in attentions]
    try:
        found: Tensor = eager(torch.tensor([ids]), use_cache=False).logits[0].double()
    finally:
        for hook in hooks:
            hook.remove()
    return found


def at(rows: Sequence[int], keys: Sequence[int], factor: float) -> Factor:
    """The factor on the edges from these rows to these keys."""
    return lambda row, key: factor if row in rows and key in keys else 1.0


def nowhere(row: int, key: int) -> float:
    return 1.0


def scored(logits: Tensor, ids: Sequence[int], first: int = 1) -> tuple[float, float]:
    """Accuracy and mean loss of the tokens from `first` on."""
    rows, wanted = logits[first - 1 : -1], torch.tensor(ids[first:])
    right = (rows.argmax(-1) == wanted).double().mean()
    return float(right), float(torch.nn.functional.cross_entropy(rows, wanted))


def test_the_less_the_instruction_is_seen_the_worse_the_copy(model: Model) -> None:
    ds = dose_response(model, COPY, Suppress(keys=1), FACTORS, tokens=slice(13, None), **QUIET)
    assert ds.accuracy.dims == ("problem", "factor")
    assert ds.factor.values.tolist() == FACTORS
    curve = ds.accuracy.mean("problem").values
    assert curve == pytest.approx([0.998, 0.973, 0.670, 0.255, 0.226], abs=0.02)
    assert float(ds.base_accuracy.mean()) == curve[0]
    assert bool((ds.delta_loss.sel(factor=1) == 0).all())
    assert bool((np.diff(ds.delta_loss.mean("problem").values) > 0).all())
    assert not ds.noop.values.any()


def test_a_dose_is_what_a_hand_made_mask_does(model: Model, eager: PreTrainedModel) -> None:
    ds = dose_response(model, RAGGED, Suppress(keys=[1, 3]), [0.3, 0, 2], **QUIET)
    for n, ids in enumerate(RAGGED):
        right, base = scored(masked(eager, ids, nowhere), ids)
        assert float(ds.base_accuracy[n]) == pytest.approx(right)
        assert float(ds.base_loss[n]) == pytest.approx(base, abs=2e-5)
        assert float(ds.loss[n]) == pytest.approx(base, abs=2e-5)
        for factor in (0.3, 0.0, 2.0):
            changed = masked(eager, ids, at(range(len(ids)), (1, 3), factor))
            right, loss = scored(changed, ids)
            one = ds.isel(problem=n).sel(factor=factor)
            assert float(one.accuracy) == pytest.approx(right)
            assert float(one.delta_loss) == pytest.approx(loss - base, abs=5e-5)


@pytest.mark.parametrize(
    "one",
    [
        Suppress(keys="segment:bos", layers=[0, 2], heads=[1, 3], queries=slice(2, None)),
        Suppress(keys=1, mode="logit_mul_shifted"),
        Suppress(keys=1, mode="prob_zero_no_renorm"),
        Suppress(keys=1, heads=[(0, 1), (2, 3)]),
        Steer(keys=slice(0, 3)),
        Steer(keys=1, mode="include", layers=1),
    ],
    ids=lambda one: f"{type(one).__name__} {one.mode} {one.heads or one.layers}",
)
def test_doses_are_a_loop_of_effects(model: Model, one: Any) -> None:
    options: Any = {"tokens": "last:4", **QUIET}
    ds = dose_response(model, RAGGED, one, [0.2, 1, 0], **options)
    assert not ds.delta_loss.sel(factor=1).values.any()
    for factor in (0.2, 0):
        fields = {name: x for name, x in vars(one).items() if not name.startswith("_")}
        dosed = type(one)(**{**fields, "factor": factor})
        alone = effect(model, RAGGED, dosed, draws=0, **options)
        for name in ("accuracy", "delta_loss"):
            wanted = alone[name].values
            np.testing.assert_array_equal(ds[name].sel(factor=factor).values, wanted)
        for name in ("base_loss", "base_accuracy", "loss", "noop"):
            np.testing.assert_array_equal(ds[name].values, alone[name].values)


def test_keys_and_factors_of_each_problem_stay_with_their_problem(model: Model) -> None:
    keys: list[list[int | None]] = [[2], [1, 5], [3], [None]]
    ds = dose_response(model, RAGGED, Suppress(keys=keys), [0.1, 0], **QUIET)
    shares = knockout_by_layer(model, RAGGED, Knockout(keys=keys), **QUIET)
    for n, (ids, own) in enumerate(zip(RAGGED, keys, strict=True)):
        alone = dose_response(model, [ids], Suppress(keys=[own]), [0.1, 0], **QUIET)
        np.testing.assert_allclose(ds.delta_loss[n], alone.delta_loss[0], atol=2e-5)
        share = knockout_by_layer(model, [ids], Knockout(keys=[own]), **QUIET)
        np.testing.assert_allclose(shares.target_p[n], share.target_p[0], atol=2e-5)
    assert not ds.delta_loss[3].values.any()
    assert abs(ds.delta_loss[:3].values).min() > 1e-4


def test_a_problem_of_one_token_has_no_loss_and_harms_nobody(model: Model) -> None:
    ds = dose_response(model, [[0], COPY[0]], Suppress(keys=0), [1, 0], **QUIET)
    assert np.isnan(ds.delta_loss.values[0]).all()
    assert np.isnan(ds.accuracy.values[0]).all()
    assert np.isfinite(ds.delta_loss.values[1]).all()
    assert ds.status.values.tolist() == [1, 1]


def test_factors_may_be_an_array_or_an_iterator_and_their_order_is_kept(model: Model) -> None:
    array: Any = np.array([0.0, 1.5, 0.25])
    once: Any = iter([0.25, 0.0])
    ds = dose_response(model, RAGGED[:1], Suppress(keys=1), array, **QUIET)
    assert ds.factor.values.tolist() == [0.0, 1.5, 0.25]
    again = dose_response(model, RAGGED[:1], Suppress(keys=1), once, **QUIET)
    for factor in (0.25, 0.0):
        assert ds.delta_loss.sel(factor=factor).item() == again.delta_loss.sel(factor=factor).item()


# A window of 2 has its extra layer below; all are cut off at the ends.
WINDOWS = {1: [[0], [1], [2]], 2: [[0], [0, 1], [1, 2]], 3: [[0, 1], [0, 1, 2], [1, 2]]}
WINDOWS |= {7: [[0, 1, 2]] * 3}


@pytest.mark.parametrize("width", WINDOWS)
def test_a_window_of_layers_is_knocked_out_as_by_hand(
    model: Model, eager: PreTrainedModel, width: int
) -> None:
    one = Knockout(keys=slice(1, 4), queries="last:2")
    ds = knockout_by_layer(model, RAGGED, one, width=width, target=7, **QUIET)
    own = knockout_by_layer(model, RAGGED, one, width=width, **QUIET)
    assert ds.relative.dims == ("problem", "layer")
    assert ds.layer.values.tolist() == [0, 1, 2]
    for n, ids in enumerate(RAGGED):
        base = masked(eager, ids, nowhere)[-1]
        p = base.softmax(-1)
        assert float(own.target[n]) == int(base.argmax())
        assert float(ds.target[n]) == 7
        assert float(ds.target_base_p[n]) == pytest.approx(float(p[7]), abs=1e-5)
        for layer, layers in enumerate(WINDOWS[width]):
            edges = at(range(len(ids) - 2, len(ids)), range(1, 4), 0.0)
            changed = masked(eager, ids, edges, layers)[-1]
            for found, token in ((ds, 7), (own, int(base.argmax()))):
                one_of = found.isel(problem=n, layer=layer)
                q = float(changed.softmax(-1)[token])
                assert float(one_of.target_p) == pytest.approx(q, abs=1e-5)
                moved = float(changed[token] - base[token])
                assert float(one_of.delta_logit) == pytest.approx(moved, abs=2e-4)
                percent = 100 * (q - float(p[token])) / float(p[token])
                assert float(one_of.relative) == pytest.approx(percent, rel=1e-3, abs=2e-3)
    assert not ds.noop.values.any()


def test_half_of_a_probability_is_50_percent_less(model: Model) -> None:
    ds = knockout_by_layer(model, COPY[:8], Knockout(keys=1), width=3, **QUIET)
    wanted = 100 * (ds.target_p / ds.target_base_p - 1)
    np.testing.assert_allclose(ds.relative, wanted, rtol=1e-4, atol=1e-3)
    assert float(ds.relative.min()) >= -100


def test_nothing_is_relative_to_a_probability_of_0(model: Model) -> None:
    def sink(_: Any, __: Any, output: Any) -> Any:
        output.logits[..., 9] = -1e4
        return output

    hook = model.module.register_forward_hook(sink)
    try:
        ds = knockout_by_layer(model, RAGGED[:1], Knockout(keys=1), target=9, **QUIET)
    finally:
        hook.remove()
    assert float(ds.target_base_p[0]) == 0
    assert np.isnan(ds.relative.values).all()


ONE, OUT = Suppress(keys=1), Knockout(keys=1)
REFUSED: dict[str, tuple[Callable[..., Any], list[Any], dict[str, Any], str]] = {
    "a factor alone": (dose_response, [ONE, 0.5], {}, "factors=0.5. Give numbers, each once"),
    "no number": (dose_response, [ONE, ["a"]], {}, "factors=['a']. Give numbers"),
    "a text": (dose_response, [ONE, "10"], {}, "factors='10'. Give numbers"),
    "none": (dose_response, [ONE, []], {}, "factors=[]. Give numbers"),
    "twice": (dose_response, [ONE, [1, 1.0]], {}, "factors=[1, 1.0]. Give numbers, each once"),
    "negative": (dose_response, [ONE, [1, -0.5]], {}, "factor holds -0.5. Give numbers of at l"),
    "nan": (dose_response, [ONE, [math.nan]], {}, "factor holds nan"),
    "no dose": (dose_response, [OUT, [1]], {}, "has no dose. Give suppression.Suppress(...) or S"),
    "a class": (dose_response, [Suppress, [1]], {}, "has no dose"),
    "a layer": (dose_response, [Suppress(keys=1, layers=7), [1]], {}, "layers=7 is out of range"),
    "a head": (dose_response, [Suppress(keys=1, heads=4), [1]], {}, "heads=4 is out of range"),
    "a pair": (dose_response, [Suppress(keys=1, heads=[(0, 9)]), [0]], {}, "heads=9 is out of"),
    "keys of others": (
        dose_response,
        [Suppress(keys=[[1], [2]]), [0]],
        {},
        "keys are given for 2 items, and there are 4 problems",
    ),
    "tokens": (dose_response, [ONE, [1]], {"tokens": 99}, "tokens=99 is out of range"),
    "width 0": (knockout_by_layer, [OUT], {"width": 0}, "width=0. It must be an int of at least 1"),
    "width 2.5": (knockout_by_layer, [OUT], {"width": 2.5}, "width=2.5. It must be an int"),
    "width text": (knockout_by_layer, [OUT], {"width": "3"}, "width='3'. It must be an int"),
    "no knockout": (knockout_by_layer, [ONE], {}, "knocks nothing out. Give suppression.Knockout"),
    "an ablation": (knockout_by_layer, [Ablate([(0, 1)])], {}, "knocks nothing out"),
    "pairs": (
        knockout_by_layer,
        [Knockout(keys=1, heads=[(0, 1)])],
        {},
        "heads=[(0, 1)] name their layers, through which the window moves. Give heads of every",
    ),
    "no such head": (knockout_by_layer, [Knockout(keys=1, heads=9)], {}, "heads=9 is out of range"),
    "target": (knockout_by_layer, [OUT], {"target": 40}, "holds token id 40, and the vocabulary"),
    "keys of some": (
        knockout_by_layer,
        [Knockout(keys=[[1], [2]])],
        {},
        "keys are given for 2 items, and there are 4 problems",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_makes_no_sense_is_refused_before_the_model_runs(
    model: Model, still: None, what: str
) -> None:
    run, arguments, options, message = REFUSED[what]
    with pytest.raises(InputError, match=re.escape(message)):
        run(model, RAGGED, *arguments, **options, **QUIET)
