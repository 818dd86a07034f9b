"""Figures 1 to 8: they can be read at both sizes, and show the numbers that they are given."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import xarray as xr
from matplotlib.figure import Figure

from probe.errors import InputError
from recipes import latent, plots
from recipes.plots_latent import critical_head_detail, hub_analysis, ranking, top_heads
from tests import structured
from tests.drawn import labels, texts, troubles

Tables = tuple[xr.Dataset, xr.Dataset]
SIZES = {"2 x 4": (2, 4), "16 x 32": (16, 32)}


def measured(ds: xr.Dataset) -> Tables:
    return latent.aggregate(ds), latent.findings(latent.scores(ds), draws=100)


@pytest.fixture(scope="module", params=SIZES)
def tables(request: pytest.FixtureRequest) -> Tables:
    layers, heads = SIZES[request.param]
    return measured(structured.structured(layers=layers, heads=heads))


@pytest.fixture(scope="module")
def small() -> Tables:
    return measured(structured.structured())


def both(tables: Tables) -> dict[str, Tables]:
    return {"structured $x$": tables, "noise": measured(latent.noise(20, 3, 4))}


FIGURES: dict[str, Callable[[Tables], Figure]] = {
    "1": lambda t: plots.top_heads(*t),
    "1, the document's": lambda t: plots.top_heads(t[0], latent.published(t[0])),
    "2": lambda t: plots.by_layer(t[0]),
    "3": lambda t: plots.hub_analysis(*t),
    "4": lambda t: plots.ranking(t[1], latent.published(t[0])),
    "5": lambda t: plots.critical_head_detail(*t, 0, 1),
    "6": lambda t: plots.model_comparison_hubs(both(t), nulls={"noise": t[1]}),
    "7": lambda t: plots.model_comparison_flow(both(t)),
    "8": lambda t: plots.model_comparison_critical_heads(both(t)),
}


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_can_be_read(name: str, tables: Tables) -> None:
    assert troubles(FIGURES[name](tables)) == []


@pytest.mark.parametrize("n", [2, 13, 24])
def test_few_and_many_latents_can_be_read(n: int) -> None:
    tables = measured(structured.structured(n_latents=n) if n >= 4 else latent.noise(9, 2, 4, n))
    for figure in (plots.by_layer(tables[0]), plots.hub_analysis(*tables)):
        assert troubles(figure) == []


@pytest.mark.parametrize(
    "figure",
    [
        lambda: plots.latent_masses(structured.masses()),
        lambda: plots.latent_readout(structured.readout()),
        lambda: plots.latent_readout(structured.readout(layers=24)),
        lambda: plots.latent_knockout(structured.knocked()),
    ],
)
def test_what_latents_read_and_are_worth_can_be_read(figure: Callable[[], Figure]) -> None:
    assert troubles(figure()) == []


def test_the_heads_that_do_something_are_shown_first_with_their_blocks(small: Tables) -> None:
    figure = top_heads(*small, top=3)
    first = [re.match(r"L(\d+)H(\d+)", ax.get_title()) for ax in figure.axes[:3]]
    at = {(int(m[1]), int(m[2])) for m in first if m}
    assert at == {structured.PREVIOUS, structured.HUB, structured.FAR}
    for ax, match in zip(figure.axes, first, strict=False):
        assert match
        mean = small[0]["mean"].sel(layer=int(match[1]), head=int(match[2]))
        shown = np.array([float(text) for text in texts(ax)])
        wanted = mean.transpose("query", "key").values[np.tril_indices(6)]
        np.testing.assert_allclose(shown, wanted, atol=0.0051)
        mass = float(mean.sum() / 6)
        assert f"block mass {mass:.2f}" in ax.get_title()


def test_counts_of_hubs_are_those_of_the_intervals(small: Tables) -> None:
    aggregated, findings = small
    left, right = hub_analysis(aggregated, findings).axes
    largest = aggregated["mean"].transpose("layer", "head", "query", "key").values.sum(-2)
    counts = np.bincount(largest.argmax(-1).ravel(), minlength=6).astype(str).tolist()
    assert texts(left)[:6] == counts
    low = [findings["low"].sel(score=f"hub_{j}").values for j in range(4)]
    found = [str(int((x > 0.3).sum())) for x in low]
    assert [text for text in texts(right) if re.fullmatch(r"\d+", text)] == found
    assert found[0] == "1"


def test_a_ranking_says_how_sure_it_is(small: Tables) -> None:
    published = latent.published(small[0])
    figure = ranking(small[1], published, top=2)
    names = [label.split(" ")[0] for label in labels(figure.axes[0])[1]]
    at = [tuple(map(int, re.findall(r"\d+", name))) for name in names]
    assert at == latent.best(small[1], top=2)
    one = small[1].sel(score="composite", layer=at[0][0], head=at[0][1])
    low, high = (int(one[name].round()) for name in ("rank_low", "rank_high"))
    assert texts(figure.axes[1])[0] == f"{float(one['p_top']):.2f}   ({low}-{high})"
    x = published["composite"]
    rank = int((x > x.sel(layer=at[0][0], head=at[0][1])).sum()) + 1
    assert texts(figure.axes[2])[0] == str(rank)


def test_the_published_reading_is_said_and_not_held_against_even_rows(small: Tables) -> None:
    shifted = latent.aggregate(structured.structured(), convention="published")
    assert "one off" in plots.by_layer(shifted).get_suptitle()
    with pytest.raises(ValueError, match="Aggregate with convention='document'"):
        hub_analysis(shifted, small[1])


def test_masses_and_readout_leave_failed_problems_out() -> None:
    shown = texts(plots.latent_readout(structured.readout()).axes[0])
    assert shown[:6] == ["0.01"] * 5 + ["0.50"]
    cells = texts(plots.latent_masses(structured.masses()).axes[0])
    assert cells[:2] == ["0.50", "0.00"]


def test_a_control_stands_beside_each_latent() -> None:
    ds = structured.knocked()
    left, right = plots.latent_knockout(ds).axes
    drawn = {line.get_label(): np.asarray(line.get_ydata()) for line in left.lines}
    np.testing.assert_allclose(drawn["the latent"], ds["delta_loss"].mean("problem"))
    control = ds["control_delta_loss"].mean("problem")
    np.testing.assert_allclose(drawn["as many tokens of the question"], control)
    assert "hidden:\n1.00" in texts(right)[0]


WRONG: dict[str, tuple[Callable[[Tables], Any], str]] = {
    "another table": (lambda t: plots.top_heads(t[1], t[1]), "top_heads draws what recipes"),
    "no head": (lambda t: top_heads(*t, top=0), "top=0, and 8 of 8 heads have one"),
    "another head": (
        lambda t: critical_head_detail(*t, 0, 9),
        "finds no L0H9: there are layers 0 to 1 and heads 0 to 3",
    ),
    "no models": (lambda t: plots.model_comparison_flow({}), "draws 1 to 6 models by name, got 0"),
    "one table": (
        lambda t: plots.model_comparison_hubs({"a": t[0]}),  # type: ignore[dict-item]
        "takes two tables of each model, and 'a' has Dataset",
    ),
    "no rank": (
        lambda t: plots.model_comparison_critical_heads({"a": t}, top=0),
        "draws the first heads, got top=0",
    ),
    "other dims": (
        lambda t: plots.latent_readout(t[0]["mean"]),
        "draws a DataArray with dims row, layer, key",
    ),
    "no answers": (
        lambda t: plots.latent_knockout(structured.knocked() * np.nan),
        "no problem has an expected answer",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_drawn_is_said(name: str, small: Tables) -> None:
    call, message = WRONG[name]
    with pytest.raises((ValueError, InputError), match=re.escape(message)):
        call(small)
