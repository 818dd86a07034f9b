"""Sentences that say no more than was measured, and the tables that carry them."""

from typing import Any

import numpy as np
import pytest
import xarray as xr

import probe
from probe import demos
from recipes import _cli, _telling, stats
from recipes.ablation import cumulative, importance, pruning_score, sweep
from recipes.ranking import rank
from recipes.summaries import estimate, interval, missed, together

DIMS = ("problem", "layer", "head")


def heads(costs: Any, problems: int = 6, noise: float = 0.0) -> xr.DataArray:
    """(problem, layer, head) costs that alternate around these by `noise`."""
    sign = np.where(np.arange(problems) % 2, 1.0, -1.0)[:, None, None]
    values = np.asarray(costs, float) + noise * sign
    return xr.DataArray(values, dims=DIMS, coords={"layer": [0, 1], "head": [0, 1]})


def test_on_the_demonstration_gradient_importance_misses_its_previous_token_head() -> None:
    problems, tokens = demos.repeated(count=12), slice(22, None)
    with probe.load("demo-llama", device="cpu") as model:
        costs = sweep(model, problems, tokens=tokens, progress=False).delta_loss
        local = importance(model, problems, tokens=tokens)
        lines = missed(costs, local)
        (line,) = (one for one in lines if one.startswith("gradient importance misses L0H3"))
        cost = float(costs.sel(layer=0, head=3).mean())
        said = float(abs(local.sel(layer=0, head=3)).mean())
        assert f"it says {said:.2g} nats, and ablating it costs {cost:.2f}" in line
        assert cost > 4
        assert said < cost / 10
        by_cost = [row.label for row in rank(costs, top=None)]
        by_gradient = [row.label for row in rank(abs(local), top=None)]
        places = [1 + names.index("L0H3") for names in (by_gradient, by_cost)]
        assert f"(rank {places[0]} by gradient, {places[1]} by ablation)" in line
        assert places[1] == 1
        # The induction heads stand in for each other, and L0H3 for nobody.
        order = [(1, head) for head in range(4)]
        group = cumulative(model, problems, order, tokens=tokens, draws=0, progress=False)
    alone = costs.sel(layer=1).mean("problem").values.tolist()
    cost = float(group.delta_loss.isel(size=-1).mean())
    assert cost > 2 * sum(alone)
    assert together(["L1H0", "L1H1", "L1H2", "L1H3"], alone, cost) == (
        f"L1H0, L1H1, L1H2, L1H3 stand in for each other: together they cost {cost:.2f} nats, "
        f"each alone {sum(alone):.2f} in all."
    )


def test_the_costliest_missed_head_comes_first() -> None:
    lines = missed(heads([[1, 3], [2, 0.05]]), heads([[0.01, 0.02], [1.9, 0.0]]))
    assert [line.split(":")[0][-4:] for line in lines] == ["L0H1", "L0H0"]
    assert "it says 0.02 nats, and ablating it costs 3.00 (rank 2 by gradient, 1 by" in lines[0]


@pytest.mark.parametrize(
    ("cost", "gradient", "noise"),
    [
        (0.1, 0.0, 0.0),  # not worth it
        (2.0, 0.21, 0.0),  # more than a tenth
        (2.0, -0.3, 0.0),  # of either sign
        (0.5, 0.0, 5.0),  # the interval holds 0
        (-2.0, 0.0, 0.0),  # ablating it helps
        (2.0, np.nan, 0.0),  # nobody knows
    ],
)
def test_a_head_that_is_cheap_unsure_or_seen_by_its_gradient_is_not_missed(
    cost: float, gradient: float, noise: float
) -> None:
    none = [[cost, np.nan], [np.nan, np.nan]]
    assert missed(heads(none, noise=noise), heads([[gradient, 9], [9, 9]])) == []


def test_a_gradient_of_mixed_signs_counts_by_its_size_and_heads_by_their_names() -> None:
    cost, local = heads([[2, 2], [2, 2]]), heads([[0, 0], [0, 0]], noise=0.5)
    assert missed(cost, local) == []
    assert len(missed(cost, local * 0.1)) == 4
    second = cost.isel(layer=[1])
    assert all("L1H" in line for line in missed(second, local * 0.1))
    zero = local.where(local.layer == 1, 0.0)
    assert missed(second, zero) == []
    (first, other) = missed(cost, zero)
    assert "L0H0" in first
    assert "L0H1" in other


@pytest.mark.parametrize(
    ("alone", "group"),
    [([0.5, 0.5], 2.0), ([0.01, 0.01], 0.1), ([1, 1], np.nan), ([np.nan, 1], 9), ([-1, -1], -0.5)],
)
def test_heads_that_cost_as_much_alone_do_not_stand_in_for_each_other(
    alone: list[float], group: float
) -> None:
    assert together(["L1H0", "L1H1"], alone, group) is None


def test_one_head_stands_in_for_nobody() -> None:
    assert together(["L1H0"], [0.1], 5.0) is None
    assert together([], [], 5.0) is None
    assert together(["a", "b"], [0.1, 0.1], 0.5) is not None


def test_an_interval_is_the_bootstrap_of_the_problems_that_have_a_number() -> None:
    x = xr.DataArray([0.1, 0.4, np.nan, 0.2, 0.9], dims="problem")
    found = stats.bootstrap(x.dropna("problem"))
    low, high = float(found.low), float(found.high)
    assert interval(x) == f"0.4000 [{low:.4f}, {high:.4f}]"
    assert low < 0.4 < high
    assert interval(x, ".1f").startswith("0.4 [")
    assert interval(x[:1], ".2f") == "0.10"
    assert interval(x[2:4]) == "0.2000"
    assert interval(x[2:3]) == "-"


def failed(x: xr.DataArray, *which: int) -> xr.DataArray:
    """Without the numbers of some problems."""
    kept = xr.DataArray([n not in which for n in range(x.sizes["problem"])], dims="problem")
    return x.where(kept)


def test_a_picture_shows_intervals_where_two_problems_have_numbers() -> None:
    costs = heads([[1, 2], [3, 4]], problems=3)
    found = estimate(failed(costs, 1))
    assert isinstance(found, xr.Dataset)
    assert found["mean"].values.tolist() == [[1, 2], [3, 4]]
    for some in (costs.isel(problem=[0]), failed(costs, 0, 2)):
        one = estimate(some)
        assert isinstance(one, xr.DataArray)
        assert one.values.tolist() == [[1, 2], [3, 4]]
    assert np.isnan(np.asarray(estimate(failed(costs, 0, 1, 2)))).all()


def test_a_table_shows_what_is_in_it_and_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    _cli.table(("run[red].zarr", ":fire:"), [("[bold]x[/bold]", ":smile:"), ("日本", "\\")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["run[red].zarr", ":fire:"]
    assert lines[1].split() == ["[bold]x[/bold]", ":smile:"]
    assert lines[2].split() == ["日本", "\\"]


def test_a_sweep_with_failed_problems_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    costs = failed(heads([[1, 2], [3, 4]], problems=2), 1)
    one = xr.zeros_like(costs.isel(layer=0, head=0))
    ds = xr.Dataset({"delta_loss": costs, "noop": one, "random_head": one})
    _telling.sweep(ds, costs, 10)
    out = capsys.readouterr().out
    assert "95 % interval" not in out
    assert out.splitlines()[1].split() == ["L1H1", "4.0000", "4.0000"]
    assert float(pruning_score(costs, normalised=False).max()) == 4
