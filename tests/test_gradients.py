"""Gradient importance against gates by hand on plain models, and against finite differences."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import probe
from probe.errors import InputError
from probe.model import Model
from recipes.ablation import finite_difference, importance, pruning_score, reference, sweep
from tests.ablated import logits_of, mean_nll, on_z
from tests.edited import watched
from tests.models import Bare
from tests.models import bare as bare
from tests.models import demo as demo
from tests.references import each_kernel, untouched

LENGTHS = (9, 4, 6)
RANDOM = torch.Generator().manual_seed(2)
PROBLEMS = [torch.randint(1, 64, (n,), generator=RANDOM).tolist() for n in LENGTHS]
Numbers = npt.NDArray[np.float64]


def exact(family: str) -> tuple[Model, Any]:
    """A model and its untapped copy, in float64."""
    return watched(family, "sdpa", torch.float64), untouched(family, "sdpa", torch.float64)


def gated(
    plain: Any, ids: Sequence[int], scored: Sequence[int] | None = None, reference: Any = None
) -> Tensor:
    """d loss / d gate at 1, (layer, head): z becomes gone + gate * (z - gone)."""
    gates = torch.ones(3, 4, dtype=torch.float64, requires_grad=True)

    def gate(layer: int, z: Tensor) -> Tensor:
        gone = 0.0 if reference is None else reference[layer][: z.shape[1]]
        # Held at its value, as z is where it stands in the formula.
        return z + (gates[layer][:, None] - 1) * (z.detach() - gone)

    with on_z(plain, gate):
        nll = F.cross_entropy(logits_of(plain, ids)[:-1], torch.tensor(ids[1:]), reduction="none")
    some = range(1, len(ids)) if scored is None else scored
    (found,) = torch.autograd.grad(nll[torch.tensor(some) - 1].mean(), gates)
    return found


def by_hand(plain: Any, problems: Sequence[Sequence[int]], *args: Any) -> Numbers:
    return torch.stack([gated(plain, ids, *args) for ids in problems]).numpy()


@each_kernel
def test_importance_is_the_derivative_for_a_gate_on_each_head(family: str, kernel: str) -> None:
    got = importance(watched(family, kernel, torch.float64), PROBLEMS)
    wanted = by_hand(untouched(family, "sdpa", torch.float64), PROBLEMS)
    assert got.dims == ("problem", "layer", "head")
    # Some norms of a float64 model are computed in float32.
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-7)
    assert float(abs(got).max()) > 0.01


def test_in_float32_it_is_the_same_and_in_bfloat16_near(family: str) -> None:
    wanted = by_hand(untouched(family), PROBLEMS)
    np.testing.assert_allclose(importance(watched(family), PROBLEMS), wanted, atol=1e-6)
    got = importance(watched(family, "sdpa", torch.bfloat16), PROBLEMS)
    assert float(abs(got - wanted).mean()) < 0.1 * float(np.abs(wanted).mean())


def test_it_is_the_slope_of_the_loss_when_a_head_is_scaled() -> None:
    pairs = [(layer, head) for layer in range(3) for head in range(4)]
    model, plain = exact("gpt2")
    got = importance(model, PROBLEMS, tokens="last:3")
    slopes = finite_difference(model, PROBLEMS, pairs, step=1e-4, tokens="last:3")
    assert slopes.dims == ("problem", "pair")
    assert slopes.pair.values.tolist()[:5] == ["L0H0", "L0H1", "L0H2", "L0H3", "L1H0"]
    np.testing.assert_allclose(got.values.reshape(3, 12), slopes, rtol=1e-5, atol=1e-9)

    def scaled(ids: list[int], pair: tuple[int, int], factor: float) -> float:
        factors = torch.ones(4, 1, dtype=torch.float64)
        factors[pair[1]] = factor
        with torch.no_grad(), on_z(plain, lambda la, z: z * factors if la == pair[0] else None):
            return mean_nll(logits_of(plain, ids), ids, range(len(ids))[-3:])

    wanted = [
        [(scaled(ids, pair, 1.25) - scaled(ids, pair, 0.75)) / 0.5 for pair in pairs]
        for ids in PROBLEMS
    ]
    coarse = finite_difference(model, PROBLEMS, pairs, step=0.25, tokens="last:3")
    np.testing.assert_allclose(coarse, wanted, rtol=1e-9)


def test_the_absolute_value_is_of_each_problem_so_that_signs_do_not_cancel() -> None:
    model, plain = exact("gpt2")
    scores, wanted = importance(model, PROBLEMS), by_hand(plain, PROBLEMS)
    mean = pruning_score(scores, normalised=False)
    np.testing.assert_allclose(mean, np.abs(wanted).mean(0), rtol=1e-6)
    batch = np.abs(wanted.mean(0))  # as the published script has it
    assert (batch <= np.abs(wanted).mean(0)).all()
    assert (batch < 0.9 * mean.values).any()
    lengths = np.sqrt((np.abs(wanted).mean(0) ** 2).sum(-1, keepdims=True))
    np.testing.assert_allclose(pruning_score(scores), np.abs(wanted).mean(0) / lengths, rtol=1e-6)
    nothing = pruning_score(0 * scores)
    assert nothing.isnull().all()


@pytest.mark.parametrize(
    ("name", "per"), [("gpt2", "all"), ("gpt2", "position"), ("mistral", "all")]
)
def test_with_a_reference_it_is_the_score_of_hisp(name: str, per: Any) -> None:
    model, plain = exact(name)
    means = reference(model, [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3], [2, 7, 1, 8]], per=per)
    got = importance(model, PROBLEMS, reference=means)
    gone = [means.z[la].double() for la in range(3)]  # (position, head, head_dim)
    gone = [z if per == "position" else z.expand(10, -1, -1) for z in gone]
    wanted = by_hand(plain, PROBLEMS, None, gone)
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-7)
    assert float(abs(got - importance(model, PROBLEMS)).max()) > 1e-3


def test_padded_batches_are_as_each_problem_alone_even_of_one_token(family: str) -> None:
    model, problems = watched(family), [*PROBLEMS, [7]]
    got = importance(model, problems)
    alone = [importance(model, [ids])[0] for ids in problems]
    np.testing.assert_allclose(got, alone, atol=1e-6)
    np.testing.assert_array_equal(got, importance(model, problems))
    assert got.isnull().sum(("layer", "head")).values.tolist() == [0, 0, 0, 12]
    np.testing.assert_allclose(  # what has no predictions does not dilute the mean
        pruning_score(got, normalised=False), abs(got[:3]).mean("problem"), rtol=1e-6
    )
    slopes = finite_difference(model, problems, [(0, 1)])
    assert slopes.isnull().values[:, 0].tolist() == [False, False, False, True]


def test_weights_may_want_gradients_or_not_and_get_none(bare: Bare) -> None:
    model = bare("qwen3")
    found = []
    for wanted in (True, False):
        model.module.requires_grad_(wanted).train()
        with torch.no_grad():
            found.append(importance(model, PROBLEMS))
        assert model.module.training
        for weight in model.module.parameters():
            assert weight.grad is None
            assert weight.requires_grad == wanted
    np.testing.assert_array_equal(found[0], found[1])


def test_interventions_around_it_are_part_of_the_loss() -> None:
    model, plain = watched("gpt2"), untouched("gpt2")
    with model.intervene(probe.Edit(site="z", function=lambda z, _: 0.5 * z, layers=1)):
        got = importance(model, PROBLEMS[:1])
        slopes = finite_difference(model, PROBLEMS[:1], [(0, 0), (1, 1), (2, 2)], step=1e-2)
    np.testing.assert_allclose(got.values[0, range(3), range(3)], slopes[0], atol=2e-4)
    assert float(np.abs(got - by_hand(plain, PROBLEMS[:1])).max()) > 1e-3


def test_a_gradient_says_little_of_a_head_that_everything_depends_on(demo: Model) -> None:
    problems = probe.demos.repeated(count=8)
    local = pruning_score(importance(demo, problems), normalised=False)
    cost = sweep(demo, problems, progress=False).delta_loss.mean("problem")
    worst = cost.argmax(...)
    assert {dim: int(n) for dim, n in worst.items()} == {"layer": 0, "head": 3}
    assert float(cost[0, 3]) > 100 * float(local[0, 3])
    assert float(local[0, 3]) < float(local[1].max())


slope: Any = finite_difference  # their types would refuse what is wrong
local: Any = importance
WRONG: list[tuple[Any, str]] = [
    (lambda m: slope(m, PROBLEMS, [(0, 0)], step=0), r"step=0\. Give a number between 0 and 1"),
    (lambda m: slope(m, PROBLEMS, [(0, 0)], step=1), r"step=1\. Give a number between 0 and 1"),
    (lambda m: slope(m, PROBLEMS, [(3, 0)]), r"layers=3 is out of range"),
    (lambda m: slope(m, PROBLEMS, [(0, 4)]), r"heads=4 is out of range"),
    (lambda m: local(m, PROBLEMS, tokens=0), r"chooses only the first token of problem '0'"),
    (lambda m: local(m, PROBLEMS, size=2), r"there is no option 'size'"),
    (
        lambda m: local(m, PROBLEMS, reference=reference(m, [[1, 2]], per="position")),
        r"has means for 2 positions, and a token is at 8",
    ),
]


@pytest.mark.parametrize(("call", "words"), WRONG, ids=[words for _, words in WRONG])
def test_what_cannot_be_is_refused(call: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        call(watched("llama"))
