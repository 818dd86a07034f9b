"""The ticks of colour bars: never on top of each other, whatever the shape of the map."""

import io
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from recipes import plots

SWEPT = np.array([[-0.001, -0.002, 0.001, 4.78], [0.045, 0.285, 0.058, 0.121]])
SHAPES = [(1, 1), (2, 4), (12, 12), (16, 12), (2, 40), (40, 2), (1, 12)]


def drawn(ax: Axes) -> list[str]:
    """The labels of its colour bar, which do not overlap."""
    ax.get_figure(root=True).savefig(io.BytesIO(), format="png", dpi=100)  # type: ignore[union-attr]
    bar: Any = ax.images[0].colorbar
    labels = [label for label in bar.ax.get_yticklabels() if label.get_text()]
    boxes = [label.get_window_extent() for label in labels]
    assert not any(a.overlaps(b) for n, a in enumerate(boxes) for b in boxes[:n])
    return [label.get_text() for label in labels]


def test_a_symmetric_log_bar_names_its_ends_0_and_powers_that_have_room() -> None:
    assert drawn(plots.effect_map(SWEPT)) == ["-4.78", "-0.1", "0", "0.1", "4.78"]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("huge", [1, 30, 1000, 1e6])
@pytest.mark.parametrize("own", [True, False], ids=["small axes", "a figure of its own"])
def test_ticks_never_overlap(shape: tuple[int, int], huge: float, own: bool) -> None:
    mean = np.random.default_rng(0).normal(size=shape) / 10
    mean[0, 0] *= huge
    ax = Figure(figsize=(3, 2)).subplots() if own else None
    labels = drawn(plots.effect_map(mean, mean - 0.05, mean + 0.05, ax=ax))
    assert len(labels) >= 2
    assert labels[0].lstrip("-\u2212") == labels[-1]


@pytest.mark.parametrize("scores", [np.zeros((1, 12)), np.full((1, 12), np.nan)])
def test_a_flat_map_of_nothing_is_drawn(scores: Any) -> None:
    drawn(plots.head_map(scores, ax=Figure(figsize=(3, 2)).subplots()))


def test_numbers_far_below_1_are_written_with_a_plain_0() -> None:
    ax = plots.token_strip(np.array([2e-7, -1e-7, 0]), ["a", "b", "c"])
    assert [text.get_text() for text in ax.texts][1::2] == ["2.0e-07", "-1.0e-07", "0"]
