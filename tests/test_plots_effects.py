"""Pictures of interventions' effects: their texts, colours, outlines, gaps and errors."""

import io
import warnings
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PatchCollection
from matplotlib.colors import SymLogNorm, to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Text

from recipes import _drawing, plots

MEAN = np.array([[0.5, -0.2, 0.0], [-0.4, np.nan, 0.1]])
CAPTION = "outlined: the 95 % interval over problems excludes 0"
GREY = "#e4e7eb"


def drawn(ax: Axes) -> Figure:
    """The figure, saved once: bad text, or a missing glyph, would raise or warn here."""
    figure = ax.get_figure(root=True)
    assert isinstance(figure, Figure)
    figure.savefig(io.BytesIO(), format="png", dpi=100)
    return figure


def clipped(ax: Axes) -> bool:
    """Whether anything sticks out of the figure."""
    figure = drawn(ax)
    box, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    return bool(min(box.x0, box.y0, width - box.x1, height - box.y1) < 0)


def texts(ax: Axes) -> list[str]:
    return [text.get_text() for text in ax.texts]


def x_labels(ax: Axes) -> list[str]:
    return [text.get_text() for text in ax.get_xticklabels()]


def outlined(ax: Axes) -> list[tuple[int, int]]:
    """The (row, column) of every frame."""
    frames = [patch for patch in ax.patches if isinstance(patch, Rectangle)]
    centres = [frame.get_center() for frame in frames]
    return [(round(y), round(x)) for x, y in centres]


def bar_label(ax: Axes) -> str:
    bar = (ax.images or ax.collections)[0].colorbar
    assert bar is not None
    return str(bar.ax.get_xlabel() or bar.ax.get_ylabel())


def boxes(ax: Axes) -> Any:
    (found,) = (each for each in ax.collections if isinstance(each, PatchCollection))
    return found


def lines_of(ax: Axes) -> list[list[str]]:
    """The tokens of a strip, line by line, left to right."""
    tokens = ax.texts[::2]
    rows = sorted({text.get_position()[1] for text in tokens}, reverse=True)
    return [[text.get_text() for text in tokens if text.get_position()[1] == y] for y in rows]


def error_bars(ax: Axes) -> Any:
    (bars,) = (each for each in ax.collections if isinstance(each, LineCollection))
    return np.array([segment[:, 1] for segment in bars.get_segments()])


def size_of(text: Text) -> float:
    """In points."""
    return float(text.get_fontsize())


def below(ax: Axes, lower: Text, upper: Text) -> bool:
    """Whether a text is smaller than another and below it."""
    drawn(ax)
    smaller = size_of(lower) < size_of(upper)
    return smaller and lower.get_window_extent().y1 <= upper.get_window_extent().y0


def overlap(ax: Axes) -> bool:
    """Whether any two texts of the axes cover each other."""
    drawn(ax)
    found = [text.get_window_extent() for text in ax.texts if text.get_text()]
    return any(a.overlaps(b) for i, a in enumerate(found) for b in found[:i])


# effect_map


def test_an_effect_map_centres_its_colours_on_0_and_writes_means_only() -> None:
    ax = plots.effect_map(MEAN, title="Ablation")
    shown = ax.images[0]
    assert (shown.get_clim(), shown.get_cmap().name) == ((-0.5, 0.5), "RdBu_r")
    assert texts(ax) == ["0.50", "-0.20", "0.00", "-0.40", "0.10"]
    assert (ax.get_title(), ax.get_xlabel(), ax.get_ylabel()) == ("Ablation", "Head", "Layer")
    assert bar_label(ax) == "Δ loss (nats)"
    np.testing.assert_allclose(shown.to_rgba(np.ma.masked_invalid(MEAN))[1, 1], to_rgba(GREY))
    assert not ax.patches
    assert not plots.effect_map(MEAN, numbers=False).texts


def test_intervals_stand_below_the_means_and_those_without_0_are_outlined() -> None:
    ax = plots.effect_map(MEAN, MEAN - 0.2, MEAN + 0.1)
    assert texts(ax)[:5] == texts(plots.effect_map(MEAN))
    assert texts(ax)[5:7] == ["[0.30, 0.60]", "[-0.40, -0.10]"]
    assert texts(ax)[-1] == CAPTION
    assert outlined(ax) == [(0, 0), (0, 1), (1, 0)]
    mean, interval = ax.texts[0], ax.texts[5]
    assert below(ax, interval, mean)
    assert not overlap(ax)
    plain = plots.effect_map(MEAN, MEAN - 0.2, MEAN + 0.1, numbers=False)
    assert texts(plain) == [CAPTION]
    assert outlined(plain) == outlined(ax)


def test_an_end_at_0_is_not_excluded_and_nan_is_never_outlined_or_written() -> None:
    low, high = np.array([[0.0, np.nan, 1.0]]), np.array([[1.0, 3.0, 2.0]])
    ax = plots.effect_map(np.array([[0.5, 2.0, np.nan]]), low, high)
    assert not ax.patches
    assert texts(ax) == ["0.50", "2.00", "[0.00, 1.00]", CAPTION]


def test_a_dataset_brings_mean_low_and_high_and_the_names_of_heads() -> None:
    coords = {"layer": [4, 9], "head": [0, 1, 5]}
    mean = xr.DataArray(MEAN, dims=("layer", "head"), coords=coords)
    ends = {"low": mean - 0.2, "high": mean + 0.1}
    ax = plots.effect_map(xr.Dataset({"mean": mean, **ends, "n": 7}).transpose("head", "layer"))
    assert texts(ax) == texts(plots.effect_map(MEAN, MEAN - 0.2, MEAN + 0.1))
    assert [text.get_text() for text in ax.get_yticklabels()] == ["4", "9"]
    assert x_labels(ax) == x_labels(plots.effect_map(mean.T)) == ["0", "1", "5"]
    np.testing.assert_array_equal(plots.effect_map(mean.T).images[0].get_array(), MEAN)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_tensors_are_drawn_whatever_their_dtype(dtype: torch.dtype) -> None:
    mean = torch.tensor([[0.5, -0.25]], dtype=dtype, requires_grad=True)
    effects = texts(plots.effect_map(mean, mean - 0.25, mean + 0.5))
    assert effects[::2] == ["0.50", "[0.25, 1.00]", CAPTION]
    assert texts(plots.token_strip(mean[0], ["a", "b"])) == ["a", "0.50", "b", "-0.25"]
    assert texts(plots.dose_response(mean[0], mean[0])) == ["-0.25", "0.50"]
    assert plots.cumulative(["a", "b"], mean[0]).lines[0].get_ydata()[1] == -0.25  # type: ignore[index]


def test_one_huge_head_does_not_pale_the_others() -> None:
    mean = np.full((4, 4), 0.05)
    mean[0, 0] = 0.05 * 20
    assert bar_label(plots.effect_map(mean)) == "Δ loss (nats)"
    mean[0, 0], mean[1] = -9, 0
    ax = plots.effect_map(mean, label="Δ logit")
    assert bar_label(ax) == "Δ logit, symmetric log scale"
    shown = ax.images[0]
    assert isinstance(shown.norm, SymLogNorm)
    assert shown.get_clim() == (-9, 9)
    middle, usual, most = shown.norm(np.array([0, 0.05, 9]))
    assert (middle, most) == (0.5, 1)
    assert usual > 0.6  # 0.503 on a linear scale
    assert drawn(ax)


@pytest.mark.parametrize("mean", [np.zeros((2, 2)), np.full((2, 2), np.nan), np.zeros((0, 2))])
def test_nothing_but_0_or_nan_is_drawn(mean: Any) -> None:
    if mean.size:
        assert drawn(plots.effect_map(mean, mean, mean))
    assert drawn(plots.token_strip(mean.ravel()))


@pytest.mark.parametrize(
    ("mean", "text"),
    [(0.0042, "0.0042"), (0.0123, "0.012"), (-3e-7, "-3.0e-07"), (12.34, "12.3"), (-2e5, "-2e+05")],
)
def test_numbers_have_about_two_digits_whatever_their_size(mean: float, text: str) -> None:
    assert texts(plots.effect_map(np.array([[mean]]))) == [text]


def test_what_rounds_to_0_has_no_sign() -> None:
    assert texts(plots.effect_map(np.array([[-0.001, 0.5, 0.5]])))[0] == "0.00"


@pytest.mark.parametrize("shape", [(1, 1), (2, 4), (12, 12), (12, 16), (16, 12), (32, 32), (2, 40)])
@pytest.mark.parametrize("huge", [1, 1000])
def test_maps_of_any_shape_fit_their_figure_and_numbers_their_cells(
    shape: tuple[int, int], huge: float
) -> None:
    mean = np.random.default_rng(0).normal(size=shape) / 10
    mean[0, 0] *= huge
    ax = plots.effect_map(mean, mean - 0.05, mean + 0.05, title="A title")
    assert not clipped(ax)
    assert not overlap(ax)
    assert len(ax.texts) == (2 * mean.size if mean.size <= 192 else 0) + 1


def test_effect_map_refuses_what_it_cannot_draw() -> None:
    for wrong in (np.zeros(3), np.zeros((2, 2, 2))):
        with pytest.raises(ValueError, match=r"effect_map draws dims \('layer', 'head'\), got an"):
            plots.effect_map(wrong)
    with pytest.raises(ValueError, match=r"got \('layer', 'key'\). Select or average"):
        plots.effect_map(xr.DataArray(MEAN, dims=("layer", "key")))
    with pytest.raises(ValueError, match="needs both ends of the intervals: high is missing"):
        plots.effect_map(MEAN, MEAN)
    with pytest.raises(ValueError, match="needs both ends of the intervals: low is missing"):
        plots.effect_map(MEAN, high=MEAN)
    with pytest.raises(ValueError, match=r"means of shape \(2, 3\), high of \(1, 3\)"):
        plots.effect_map(MEAN, MEAN, MEAN[:1])
    with pytest.raises(ValueError, match="effect_map got intervals whose low is above high"):
        plots.effect_map(MEAN, MEAN + 1, MEAN)


def test_a_dataset_must_have_the_three_variables_and_come_alone() -> None:
    whole = xr.Dataset(dict.fromkeys(("mean", "low", "high"), (("layer", "head"), MEAN)))
    with pytest.raises(ValueError, match=r"mean, low and high, .* this one has \['mean', 'low'\]"):
        plots.effect_map(whole.drop_vars("high"))
    with pytest.raises(ValueError, match="and nothing besides"):
        plots.effect_map(whole, MEAN, MEAN)


# token_strip


def test_a_strip_writes_every_token_and_its_number_on_colours_centred_on_0() -> None:
    ax = plots.token_strip(np.array([0.5, -0.25, np.nan]), ["The", " $5", " or"], title="Why")
    assert texts(ax) == ["The", "0.50", " $5", "-0.25", " or", ""]
    assert boxes(ax).get_clim() == (-0.5, 0.5)
    assert boxes(ax).get_cmap().name == "RdBu_r"
    assert bar_label(ax) == "relevance (nats)"
    assert ax.get_title() == "Why"
    drawn(ax)
    np.testing.assert_allclose(boxes(ax).get_facecolor()[2], to_rgba(GREY))
    assert ax.texts[0].get_color() == "white"
    assert ax.texts[4].get_color() != "white"
    token, n = ax.texts[:2]
    assert below(ax, n, token)


@pytest.mark.parametrize(
    ("n", "width", "lengths"),
    [(1, 16, [1]), (16, 16, [16]), (17, 16, [16, 1]), (7, 3, [3, 3, 1]), (200, 25, [25] * 8)],
)
def test_tokens_are_wrapped_and_never_touch(n: int, width: int, lengths: list[int]) -> None:
    tokens = [("i", "WWWWWWWWWWWWWWWW", " the", "")[i % 4] for i in range(n)]
    values = np.random.default_rng(0).normal(size=n)
    ax = plots.token_strip(values, tokens, width=width, title="A title longer than one token")
    assert [len(line) for line in lines_of(ax)] == lengths
    assert not overlap(ax)
    assert not clipped(ax)


def test_a_stored_array_brings_its_tokens_and_leaves_padding_out() -> None:
    coords = {
        "key_position": ("key", [0, 1, 2, -1]),
        "token": ("key", np.array(["a", " b", " c", ""], dtype=np.dtypes.StringDType())),
    }
    values = xr.DataArray([0.1, 0.2, 0.3, 9.0], dims="key", coords=coords)
    assert texts(plots.token_strip(values))[::2] == ["a", " b", " c"]
    assert boxes(plots.token_strip(values)).get_clim() == (-0.3, 0.3)
    assert texts(plots.token_strip(values, ["x", "y", "z"]))[::2] == ["x", "y", "z"]
    assert texts(plots.token_strip(values.drop_vars("token")))[::2] == ["0", "1", "2"]


def test_odd_tokens_stay_on_one_line_and_are_no_mathematics() -> None:
    odd = [r"$\frac{", "$x$", "a\nb", "\x00", "\t", "  ", "", "x" * 30]
    ax = plots.token_strip(np.ones(8), odd, title=r"$\broken{", label=r"$\broken{")
    shown = [r"$\frac{", "$x$", "a\\nb", "\\x00", "\\t", "␣␣", "", "x" * 13 + "…"]
    assert texts(ax)[::2] == shown
    assert not any(text.get_parse_math() for text in ax.texts)
    assert not overlap(ax)


def test_tokens_in_chinese_take_their_own_width_and_a_font_that_has_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_drawing, "get_font_names", lambda: ["Other", "Yu Gothic", "Hiragino Sans"])
    usual = matplotlib.rcParams["font.family"]
    assert _drawing.fonts() == [*usual, "Hiragino Sans", "Yu Gothic"]
    monkeypatch.setattr(_drawing, "get_font_names", lambda: [])
    ax = plots.token_strip(np.ones(3), ["日本語の長い長いテキスト", "中文", "zh"])
    assert texts(ax)[:3:2] == ["日本語の長い長いテキスト", "中文"]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # as on this machine
        assert not overlap(ax)


def test_one_huge_token_does_not_pale_the_others() -> None:
    ax = plots.token_strip(np.array([4, 0.03, -0.05, 0.04]))
    assert bar_label(ax) == "relevance (nats), symmetric log scale"
    assert isinstance(boxes(ax).norm, SymLogNorm)
    bar = boxes(ax).colorbar.ax
    assert [text.get_text() for text in bar.get_xticklabels()] == ["-4.00", "0.000", "4.00"]
    assert not clipped(ax)


def test_small_given_axes_get_smaller_letters() -> None:
    ax = Figure(figsize=(3, 2)).subplots()
    strip = plots.token_strip(np.ones(40), [" token"] * 40, ax=ax)
    assert strip is ax
    assert size_of(ax.texts[0]) < size_of(plots.token_strip(np.ones(40)).texts[0])
    assert not overlap(ax)


def test_token_strip_refuses_what_it_cannot_draw() -> None:
    with pytest.raises(ValueError, match=r"token_strip draws dims \('key',\), got an array of sha"):
        plots.token_strip(MEAN)
    with pytest.raises(ValueError, match=r"got \('query',\). Select or average"):
        plots.token_strip(xr.DataArray([1.0], dims="query"))
    with pytest.raises(ValueError, match="token_strip needs one token per key: 3 keys, 1 tokens"):
        plots.token_strip(np.ones(3), ["a"])
    with pytest.raises(ValueError, match="needs a width of 1 token or more, got 0"):
        plots.token_strip(np.ones(3), width=0)


# dose_response


def test_a_dose_response_sorts_its_factors_on_a_log_axis_that_has_0() -> None:
    ax = plots.dose_response([1, 0.25, 0.5, 0], [0.9, 0.7, 0.8, 0.3], title="Scaling L1H0")
    np.testing.assert_array_equal(ax.lines[0].get_xdata(), [0, 0.25, 0.5, 1])
    np.testing.assert_array_equal(ax.lines[0].get_ydata(), [0.3, 0.7, 0.8, 0.9])
    drawn(ax)
    assert x_labels(ax) == ["0", "0.25", "0.5", "1"]
    at = ax.transData.transform([[x, 0.5] for x in (0, 0.25, 0.5, 1)])[:, 0]
    np.testing.assert_allclose(np.diff(at), np.diff(at)[0])  # 0 is one halving further
    assert texts(ax) == ["0.30", "0.70", "0.80", "0.90"]
    assert (ax.get_title(), ax.get_ylabel()) == ("Scaling L1H0", "accuracy")
    assert ax.get_xlabel() == "Factor (log scale from 0.25)"
    assert not overlap(ax)


def test_error_bars_reach_from_low_to_high_even_where_the_mean_is_outside() -> None:
    ax = plots.dose_response([1, 0], [0.9, 0.5], [0.8, 0.1], [1.0, 0.4])
    np.testing.assert_allclose(error_bars(ax), [[0.1, 0.4], [0.8, 1.0]])
    data = xr.Dataset(dict.fromkeys(("mean", "low", "high"), ("factor", [0.5, 0.9])))
    np.testing.assert_allclose(error_bars(plots.dose_response([1, 0], data)).T, [[0.9, 0.5]] * 2)


def test_the_reference_is_a_dashed_labelled_line_inside_the_figure() -> None:
    ax = plots.dose_response([0, 1], [0.25, 0.9], reference=1 / 3)
    assert texts(ax)[0] == "chance\n0.333"
    (line,) = (line for line in ax.lines if line.get_linestyle() == "--")
    np.testing.assert_allclose(np.asarray(line.get_ydata()), 1 / 3)
    assert not clipped(ax)
    assert not overlap(ax)


def test_numbers_stand_where_the_line_is_not() -> None:
    for means, side in (([0, 1], "right"), ([1, 0], "left")):
        first = plots.dose_response([0, 1], means).texts[0]
        assert first.get_horizontalalignment() == side


def test_close_factors_are_thinned_but_both_ends_are_labelled() -> None:
    factors = [0, 0.5, 0.97, 0.98, 0.99, 1]
    ax = plots.dose_response(factors, np.linspace(0.2, 0.9, 6))
    assert x_labels(ax) == ["0", "0.5", "1"]
    assert texts(ax) == ["0.20", "0.34", "0.90"]
    assert np.shape(ax.lines[0].get_xydata()) == (6, 2)


def test_a_missing_dose_leaves_a_gap_and_negative_factors_and_one_alone_are_drawn() -> None:
    ax = plots.dose_response([-1, 0, 1, 2], [0.1, np.nan, 0.3, 0.4])
    assert x_labels(ax) == ["-1", "0", "1", "2"]
    assert texts(ax) == ["0.10", "0.30", "0.40"]
    assert not clipped(ax)
    assert x_labels(plots.dose_response([0], [0.5], [0.4], [0.6], reference=0.5)) == ["0"]


def test_dose_response_refuses_what_it_cannot_draw() -> None:
    with pytest.raises(ValueError, match=r"one number per factor: 2 of them, got .*\(3,\)"):
        plots.dose_response([0, 1], [1, 2, 3])
    with pytest.raises(ValueError, match=r"dose_response needs finite factors, got \[0.0, nan\]"):
        plots.dose_response([0, np.nan], [1, 2])
    with pytest.raises(ValueError, match="dose_response got intervals whose low is above high"):
        plots.dose_response([0, 1], [1, 2], [3, 3], [1, 1])


# cumulative


def test_a_cumulative_curve_names_the_head_that_each_step_adds() -> None:
    ax = plots.cumulative(["L1H0", "+L0H3"], [0.2, 0.9], [0.1, 0.7], [0.3, 1.0], title=r"$\x{")
    assert x_labels(ax) == ["+L1H0", "+L0H3"]
    np.testing.assert_allclose(error_bars(ax), [[0.1, 0.3], [0.7, 1.0]])
    assert ax.get_ylabel() == "Δ loss (nats)"
    assert len(ax.lines) == 3  # the curve, and the caps of its error bars
    assert drawn(ax)


def test_random_heads_are_a_dashed_grey_curve_labelled_at_its_last_point() -> None:
    ax = plots.cumulative(["a", "b", "c"], [1, 2, np.nan], baseline=torch.tensor([0, 0.5, np.nan]))
    curve, baseline = ax.lines
    assert (curve.get_linestyle(), baseline.get_linestyle()) == ("-", "--")
    assert baseline.get_color() == _drawing.MUTED
    assert texts(ax) == ["random heads"]
    assert ax.texts[0].xy == (1, 0.5)  # type: ignore[attr-defined]
    assert not texts(plots.cumulative(["a"], [1], baseline=[np.nan]))


@pytest.mark.parametrize(("n", "named"), [(1, 1), (12, 12), (144, 36)])
def test_many_heads_are_thinned_and_fit_the_figure(n: int, named: int) -> None:
    names = [f"L{i // 12}H{i % 12}" for i in range(n)]
    ax = plots.cumulative(names, np.arange(n), baseline=np.arange(n) / 2, title="Best first")
    assert x_labels(ax) == [f"+{name}" for name in names[:: n // named]]
    assert not clipped(ax)


def test_cumulative_refuses_what_it_cannot_draw() -> None:
    for mean, baseline in (([1, 2], None), ([1], [1, 2])):
        with pytest.raises(ValueError, match="cumulative draws one number per head: 1 of them"):
            plots.cumulative(["L0H0"], mean, baseline=baseline)
    with pytest.raises(ValueError, match="cumulative needs both ends of the intervals: low is mis"):
        plots.cumulative(["L0H0"], [1], high=[1])


def test_given_axes_are_drawn_into_and_returned() -> None:
    first, second, third = Figure().subplots(1, 3)
    assert plots.effect_map(MEAN, MEAN, MEAN, ax=first) is first
    assert plots.dose_response([0, 1], [0, 1], ax=second) is second
    assert plots.cumulative(["a"], [0], ax=third) is third
    assert drawn(first)
