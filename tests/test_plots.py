"""Pictures: what is drawn, how it is labelled, and that nothing leaks."""

import io
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from recipes import plots

TOKENS = ["The", " price", " is", " $5", " or", " $6"]
P = np.tril(np.ones((6, 6))) / np.arange(1, 7)[:, None]


def drawn(picture: Axes | Figure) -> bytes:
    """The picture as a file: bad text, or a missing glyph, would raise or warn here."""
    figure = picture.get_figure(root=True)
    assert isinstance(figure, Figure)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=40)
    return out.getvalue()


def labels(ax: Axes) -> tuple[list[str], list[str]]:
    across, down = ax.get_xticklabels(), ax.get_yticklabels()
    return [text.get_text() for text in across], [text.get_text() for text in down]


def image(ax: Axes) -> Any:
    return np.asarray(ax.images[0].get_array())


def store_pattern() -> xr.DataArray:
    """One head of one problem with 4 of 6 positions, padded."""
    position = np.array([0, 1, 2, 3, -1, -1], np.int32)
    p = np.zeros((6, 6), np.float16)
    p[:4, :4] = P[:4, :4]
    coords = {
        "query_position": ("query", position),
        "key_position": ("key", position),
        "token": ("key", np.array([*TOKENS[:4], "", ""], dtype=np.dtypes.StringDType())),
    }
    return xr.DataArray(p, dims=("query", "key"), coords=coords)


def test_a_pattern_shows_its_values_from_white_to_dark_blue() -> None:
    ax = plots.pattern(P, TOKENS, title="L0H0")
    np.testing.assert_array_equal(image(ax), P)
    assert ax.images[0].get_clim() == (0.0, 1.0)
    assert ax.images[0].get_cmap().name == "Blues"
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("Key (attended to)", "Query (attending from)")
    assert labels(ax) == (TOKENS, TOKENS)
    assert ax.get_title() == "L0H0"


def test_a_dollar_in_a_token_or_title_is_text_and_not_mathematics() -> None:
    odd = [r"$\frac{", "$x^$", "$", r"\alpha $", "a_b", "$$"]
    ax = plots.pattern(P, odd, title=r"$\broken{")
    assert drawn(ax)
    texts = [*ax.get_xticklabels(), *ax.get_yticklabels(), ax.title]
    assert not any(text.get_parse_math() for text in texts)
    assert drawn(plots.head_map(np.eye(2), title=r"$\broken{", label=r"$\broken{"))
    assert drawn(plots.head_grid(P[None], odd, title=r"$\broken{"))


def test_tokens_stay_on_one_line_and_are_cut_when_long() -> None:
    ax = plots.pattern(P, ["\n", "  ", "\x00", "a\tb", "x" * 30, "ok"])
    assert labels(ax)[0] == ["\\n", "␣␣", "\\x00", "a\\tb", "x" * 13 + "…", "ok"]
    assert drawn(ax)


def test_the_last_queries_take_the_last_tokens() -> None:
    assert labels(plots.pattern(P[-2:], TOKENS)) == (TOKENS, TOKENS[-2:])
    assert labels(plots.pattern(P[-2:]))[1] == ["4", "5"]


def test_a_stored_pattern_brings_its_tokens_and_leaves_padding_out() -> None:
    ax = plots.pattern(store_pattern().transpose("key", "query"))
    assert labels(ax) == (TOKENS[:4], TOKENS[:4])
    np.testing.assert_allclose(image(ax), P[:4, :4], atol=1e-3)
    assert labels(plots.pattern(store_pattern(), list("abcd")))[0] == list("abcd")
    assert labels(plots.pattern(store_pattern(), list("abcdef")))[0] == list("abcd")
    last = plots.pattern(store_pattern().isel(query=slice(2, 4)))
    assert labels(last) == (TOKENS[:4], TOKENS[2:4])


@pytest.mark.parametrize("n", [41, 150])
def test_labels_are_thinned_past_forty(n: int) -> None:
    ax = plots.pattern(np.eye(n), [f"t{i}" for i in range(n)])
    across, down = labels(ax)
    step = -(-n // 40)
    assert across == down == [f"t{i}" for i in range(0, n, step)]


def test_labels_are_thinned_where_the_given_axes_are_small() -> None:
    ax = Figure(figsize=(2, 2)).subplots()
    across, _ = labels(plots.pattern(np.eye(36), ax=ax))
    assert 4 <= len(across) < 36


def test_torch_patterns_are_drawn_whatever_their_dtype() -> None:
    p = torch.tensor(P, dtype=torch.bfloat16, requires_grad=True)
    np.testing.assert_allclose(image(plots.pattern(p)), P, atol=4e-3)


def test_a_head_map_has_layers_down_and_heads_across() -> None:
    scores = xr.DataArray(
        np.arange(6.0).reshape(3, 2),
        dims=("head", "layer"),
        coords={"layer": [4, 9], "head": [0, 1, 5]},
        name="entropy",
    )
    ax = plots.head_map(scores)
    np.testing.assert_array_equal(image(ax), scores.values.T)
    assert labels(ax) == (["0", "1", "5"], ["4", "9"])
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("Head", "Layer")
    assert ax.images[0].colorbar is not None
    assert ax.images[0].colorbar.ax.get_ylabel() == "entropy"


def test_numbers_are_written_on_small_maps_only_and_contrast_with_their_cell() -> None:
    ax = plots.head_map(np.array([[0.0, 1.0], [0.5, np.nan]]))
    assert [text.get_text() for text in ax.texts] == ["0.00", "1.00", "0.50"]
    assert [text.get_color() for text in ax.texts][1] == "white"
    assert ax.texts[0].get_color() != "white"
    assert not plots.head_map(np.eye(3), annotate=False).texts
    assert not plots.head_map(np.eye(32)).texts
    assert [text.get_text() for text in plots.head_map(np.array([[1234.5]])).texts] == ["1.23e+03"]


def test_scores_below_zero_get_colours_that_diverge_around_it() -> None:
    shown = plots.head_map(np.array([[-2.0, 0.5]])).images[0]
    assert shown.get_clim() == (-2.0, 2.0)
    assert shown.get_cmap().name == "RdBu_r"
    fixed = plots.head_map(np.array([[-2.0, 0.5]]), vmin=-3, vmax=1).images[0]
    assert fixed.get_clim() == (-3, 1)


def test_a_map_of_nothing_but_nan_is_grey() -> None:
    ax = plots.head_map(np.full((2, 2), np.nan))
    assert not ax.texts
    assert drawn(ax)


@pytest.mark.parametrize("n_heads", [1, 4, 6])
def test_a_grid_draws_every_head_with_its_name(n_heads: int) -> None:
    figure = plots.head_grid(np.stack([P] * n_heads), TOKENS, layer=3, title="GPT-2")
    assert [ax.get_title() for ax in figure.axes[:n_heads]] == [f"L3H{i}" for i in range(n_heads)]
    assert sum(bool(ax.images) for ax in figure.axes) == n_heads
    assert labels(figure.axes[0])[1] == TOKENS
    assert labels(figure.axes[n_heads - 1])[0] == TOKENS
    assert drawn(figure)


def test_a_grid_selects_the_layer_that_is_named_and_reads_labels() -> None:
    values = np.stack([np.stack([np.eye(6)] * 2), np.stack([P] * 2)])
    labelled = xr.DataArray(
        values, dims=("layer", "head", "query", "key"), coords={"layer": [3, 7], "head": [1, 4]}
    )
    for figure in (
        plots.head_grid(labelled, layer=7),
        plots.head_grid(labelled.sel(layer=7)),
        plots.head_grid(labelled.sel(layer=7).drop_vars("layer"), layer=7),
    ):
        np.testing.assert_array_equal(image(figure.axes[1]), P)
        assert [ax.get_title() for ax in figure.axes[:2]] == ["L7H1", "L7H4"]
    plain = plots.head_grid(values, layer=1)
    np.testing.assert_array_equal(image(plain.axes[0]), P)
    assert plots.head_grid(values[1]).axes[1].get_title() == "Head 1"


def test_nothing_is_averaged_or_selected_silently() -> None:
    many = xr.DataArray(np.zeros((2, 3, 4)), dims=("problem", "layer", "head"))
    with pytest.raises(
        ValueError, match=r"head_map draws dims \('layer', 'head'\), got \('problem"
    ):
        plots.head_map(many)
    with pytest.raises(ValueError, match=r"got an array of shape \(2, 3, 4\)"):
        plots.head_map(many.values)
    with pytest.raises(ValueError, match=r"pattern draws dims \('query', 'key'\), got \('layer', "):
        plots.pattern(many[0].rename(head="key"))
    with pytest.raises(ValueError, match=r"head_grid draws dims \('head', 'query', 'key'\), got"):
        plots.head_grid(np.zeros((2, 3, 4, 4)))


@pytest.mark.parametrize("draw", [plots.pattern, lambda p, x: plots.head_grid(p[None], x)])
def test_tokens_must_be_one_per_key(draw: Any) -> None:
    with pytest.raises(ValueError, match="needs one token per key: 6 keys, 2 tokens"):
        draw(P, ["a", "b"])


def test_given_axes_are_drawn_into_and_returned() -> None:
    left, right = Figure().subplots(1, 2)
    assert plots.pattern(P, ax=left) is left
    assert plots.head_map(np.eye(2), ax=right) is right
    assert drawn(left)


def test_pyplot_is_never_touched_so_no_figure_leaks_and_no_display_is_needed() -> None:
    code = (
        "import sys, numpy as np; from recipes import plots; plots.pattern(np.eye(3)); "
        "plots.head_map(np.eye(3)); plots.head_grid(np.zeros((2, 3, 3))); "
        "print({'matplotlib.pyplot', 'torch'} & set(sys.modules))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "set()"
