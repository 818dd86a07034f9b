"""Heads out together: orders, the worst next one, and the redundancy of known induction heads."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from torch import Tensor
from transformers import AutoModelForCausalLM

import probe
from probe.errors import InputError, StoreError
from probe.model import Model
from recipes._choosing import Pairs
from recipes.ablation import cumulative, greedy, reference
from tests.ablated import logits_of, mean_nll, on_z, z_of
from tests.models import demo as demo
from tests.references import no_grad as no_grad

COUNT, N = 16, 20
PROBLEMS = probe.demos.repeated(n=N, count=COUNT)
REPEATED = slice(N + 2, None)  # what has been seen before after the same token
INDUCTION = [(1, h) for h in range(4)]
PREVIOUS = (0, 3)  # the one previous-token head below
quietly: Any = {"progress": False}


@pytest.fixture(scope="module")
def plain() -> Any:
    """The demonstration model as transformers reads it."""
    model: Any = AutoModelForCausalLM.from_pretrained(probe.demos.path("demo-llama"))
    model.train(mode=False)
    return model


def without(model: Any, ids: list[int], pairs: Pairs, new: Any = None) -> Tensor:
    """Logits with heads out: z is 0, or what is given for a layer, (head, head_dim)."""

    def put(layer: int, z: Tensor) -> Tensor:
        z = z.clone()
        for head in [h for la, h in pairs if la == layer]:
            z[:, :, head] = 0 if new is None else new[layer][head]
        return z

    with on_z(model, put):
        return logits_of(model, ids)


def measured(logits: Tensor, ids: list[int]) -> tuple[float, float]:
    """Mean loss and accuracy of the tokens that repeat."""
    scored = range(len(ids))[REPEATED]
    right = [int(logits[n - 1].argmax()) == ids[n] for n in scored]
    return mean_nll(logits, ids, scored), sum(right) / len(right)


ORDER = [*INDUCTION[::-1], PREVIOUS]


@pytest.mark.parametrize("mode", ["zero", "mean"])
def test_an_order_is_taken_out_head_by_head(demo: Model, plain: Any, mode: Any) -> None:
    some = PROBLEMS[:4]
    ds = cumulative(demo, some, ORDER, mode=mode, tokens=REPEATED, **quietly)
    new = None
    if mode == "mean":  # of these problems, by default
        each = [z_of(plain, ids) for ids in some]
        new = [torch.cat(zs).mean(0) for zs in zip(*each, strict=True)]
    base = [measured(logits_of(plain, ids), ids) for ids in some]
    np.testing.assert_allclose(ds.base_loss, [loss for loss, _ in base], rtol=1e-4)
    np.testing.assert_allclose(ds.base_accuracy, [right for _, right in base], rtol=1e-6)
    for size in range(1, 6):
        found = [measured(without(plain, ids, ORDER[:size], new), ids) for ids in some]
        wanted = [after - before for (after, _), (before, _) in zip(found, base, strict=True)]
        np.testing.assert_allclose(ds.delta_loss.sel(size=size), wanted, atol=1e-5)
        np.testing.assert_allclose(ds.accuracy.sel(size=size), [r for _, r in found], rtol=1e-6)
    np.testing.assert_array_equal(ds.noop, 0)
    assert ds.control.sizes == {"problem": 4, "draw": 3, "size": 5}


def test_random_orders_are_of_all_heads_and_end_where_all_are_out(demo: Model) -> None:
    every = [(la, h) for la in range(2) for h in range(4)]
    ds = cumulative(demo, PROBLEMS[:3], every, draws=4, **quietly)
    last = ds.isel(size=-1)
    np.testing.assert_allclose(last.control, last.delta_loss.expand_dims(draw=4, axis=1), atol=1e-5)
    assert len({round(float(x), 4) for x in ds.control.mean("problem").isel(size=0)}) > 1
    again = cumulative(demo, PROBLEMS[:3], every, draws=4, **quietly)
    np.testing.assert_array_equal(ds.control, again.control)
    other = cumulative(demo, PROBLEMS[:3], every, draws=4, seed=1, **quietly)
    assert not np.array_equal(ds.control, other.control)
    assert "control" not in cumulative(demo, PROBLEMS[:3], every, draws=0, **quietly)


def test_four_induction_heads_stand_in_for_each_other(demo: Model) -> None:
    run: Any = {"tokens": REPEATED, "draws": 0, **quietly}
    together = cumulative(demo, PROBLEMS, INDUCTION, **run)
    assert float(together.base_accuracy.mean()) == 1
    assert float(together.accuracy.isel(size=-1).mean()) == pytest.approx(0.02, abs=0.02)
    alone = [cumulative(demo, PROBLEMS, [pair], **run) for pair in INDUCTION]
    assert all(float(1 - one.accuracy.mean()) < 0.02 for one in alone)
    costs = [float(one.delta_loss.mean()) for one in alone]
    assert float(together.delta_loss.isel(size=-1).mean()) > 10 * sum(costs)
    assert float(cumulative(demo, PROBLEMS, [PREVIOUS], **run).accuracy.mean()) < 0.15


def test_with_induction_heads_at_their_mean_the_loss_is_that_of_chance(demo: Model) -> None:
    means = reference(demo, PROBLEMS)
    ds = cumulative(
        demo, PROBLEMS, INDUCTION, mode="mean", reference=means, tokens=REPEATED, draws=0, **quietly
    )
    loss = float((ds.base_loss + ds.delta_loss.isel(size=-1)).mean())
    assert loss == pytest.approx(math.log(63), abs=0.03)


def test_the_worst_next_head_is_found_by_trying_all(demo: Model, plain: Any) -> None:
    some = PROBLEMS[:4]

    def cost(pairs: list[tuple[int, int]]) -> float:
        return sum(measured(without(plain, i, pairs), i)[0] for i in some) / len(some)

    got = greedy(demo, some, 3, candidates=INDUCTION, tokens=REPEATED)
    taken: list[tuple[int, int]] = []
    for pair, delta in got:
        costs = {p: cost([*taken, p]) for p in INDUCTION if p not in taken}
        assert pair == max(costs, key=lambda p: costs[p])
        assert delta == pytest.approx(costs[pair] - cost([]), abs=1e-5)
        taken.append(pair)
    assert [pair for pair, _ in greedy(demo, some, 1, tokens=REPEATED)] == [PREVIOUS]


def test_greedy_sees_that_induction_heads_are_redundant(demo: Model) -> None:
    got = greedy(demo, PROBLEMS[:8], 4, candidates=INDUCTION, tokens=REPEATED)
    costs = [cost for _, cost in got]
    assert costs == sorted(costs)
    assert costs[3] > 10 * costs[0]  # and not four times at most
    assert {pair for pair, _ in got} == set(INDUCTION)


def test_the_mean_is_that_of_all_problems_however_they_are_batched(demo: Model) -> None:
    uneven = [PROBLEMS[0], PROBLEMS[1][:25], PROBLEMS[2][:30], PROBLEMS[3]]
    run: Any = {"mode": "mean", "draws": 1, **quietly}
    ds = cumulative(demo, uneven, INDUCTION[:2], **run)
    alone = cumulative(demo, uneven, INDUCTION[:2], batch_size=1, **run)
    xr.testing.assert_allclose(ds.delta_loss, alone.delta_loss, atol=1e-5)
    (pair, cost), (other, wanted) = (
        greedy(demo, uneven, 1, mode="mean", batch_size=size)[0] for size in (1, None)
    )
    assert pair == other
    assert cost == pytest.approx(wanted, abs=1e-5)


def test_an_order_resumes_and_another_does_not(demo: Model, tmp_path: Path) -> None:
    path = tmp_path / "order.zarr"
    run: Any = {"draws": 1, **quietly}
    ds = cumulative(demo, PROBLEMS[:3], INDUCTION[:2], path, **run)
    again = cumulative(demo, PROBLEMS[:3], INDUCTION[:2], path, **run)
    xr.testing.assert_equal(again.load(), ds.load())
    assert ds["size"].values.tolist() == [1, 2]
    others: list[Any] = [{"mode": "mean"}, {"draws": 2}, {"seed": 1}, {"tokens": REPEATED}]
    for options in others:
        with pytest.raises(StoreError):
            cumulative(demo, PROBLEMS[:3], INDUCTION[:2], path, **{**run, **options})
    with pytest.raises(StoreError):
        cumulative(demo, PROBLEMS[:3], INDUCTION[1::-1], path, **run)


order: Any = cumulative  # their types would refuse what is wrong
worst: Any = greedy
WRONG: list[tuple[Any, str]] = [
    (
        lambda m: order(m, PROBLEMS, [(1, 0), (1, -4)]),
        r"names no head, or one twice\. Name each once",
    ),
    (lambda m: order(m, PROBLEMS, []), r"names no head, or one twice"),
    (lambda m: order(m, PROBLEMS, [(2, 0)]), r"layers=2 is out of range"),
    (lambda m: order(m, PROBLEMS, [(1, 4)]), r"heads=4 is out of range"),
    (lambda m: order(m, PROBLEMS, [(1, 0)], draws=-1), r"draws=-1\. It must be an int of at"),
    (lambda m: order(m, PROBLEMS, [(1, 0)], draws=1.5), r"draws=1\.5\. It must be an int"),
    (lambda m: order(m, PROBLEMS, [(1, 0)], mode="frozen"), r"needs reference=a cache with"),
    (lambda m: order(m, PROBLEMS, [(1, 0)], size=3), r"no option 'size'\. Choose from batch"),
    (lambda m: worst(m, PROBLEMS, 0), r"n=0 heads cannot be taken: there are 8 candidates"),
    (lambda m: worst(m, PROBLEMS, 1.5), r"n=1\.5 heads cannot be taken"),
    (lambda m: worst(m, PROBLEMS, 2, candidates=[(1, 0), (-1, 0)]), r"there are 1 candidates"),
    (lambda m: worst(m, PROBLEMS, 1, tokens=0), r"chooses only the first token of problem '0'"),
]


@pytest.mark.parametrize(("call", "words"), WRONG, ids=[words for _, words in WRONG])
def test_what_cannot_be_is_refused_before_anything_runs(demo: Model, call: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        call(demo)
