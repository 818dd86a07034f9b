"""What is told of a comparison: JSON, a summary, files."""

import itertools
import json
import subprocess
import sys
import warnings
from typing import Any

import numpy as np
import pytest
import xarray as xr

from recipes.compare import as_json, compare, summary
from tests.compared import (
    FAST,
    NAN,
    of_values,
    store,
    table,
)


def test_json_holds_every_number_of_the_tables() -> None:
    a, b = store(), store(3, 1, seed=1)
    a["correct"] = b["correct"] = ("problem", np.ones(8, "float32"))
    tree = compare({"a": a, "b": b}, seed=3, **FAST)
    data = json.loads(json.dumps(as_json(tree), allow_nan=False))
    models, depth, pairs = (
        table(tree, f"comparison/{name}") for name in ("models", "depth", "paired")
    )
    for name, metric in itertools.product("ab", models["metric"].values):
        one = models.sel(model=name, metric=metric)
        for key, value in data["scores"][name][metric].items():
            assert (NAN if value is None else value) == pytest.approx(float(one[key]), nan_ok=True)
    for name, metric in itertools.product("ab", depth["metric"].values):
        for key, values in data["by_depth"]["scores"][name][metric].items():
            assert values == depth[key].sel(model=name, metric=metric).values.tolist()
    assert data["by_depth"]["end"] == [0.5, 1.0]
    assert [one["metric"] for one in data["differences"]] == pairs["metric"].values.tolist()
    for one in data["differences"]:
        assert (one["a"], one["b"]) == ("a", "b")
        for key in ("difference", "low", "high", "p", "p_family", "p_bh", "n"):
            assert one[key] == float(pairs[key].sel(metric=one["metric"])[0])
    assert data["models"]["b"] == {"checkpoint": "random 3x1", "layers": 3, "heads": 3}
    assert data["hub_positions"] is data["critical_heads"] is None
    assert set(data["attention_concentration"]) == {"a", "b"}
    assert data["problems"] == {"compared": 8, "left_out": 0}
    assert (data["level"], data["draws"], data["seed"]) == (0.95, 200, 3)
    assert data["caution"] == tree.attrs["caution"]


def test_the_summary_says_what_was_found_and_what_it_does_not_mean() -> None:
    a, metric = of_values(np.full((6, 2, 3), 0.5))
    b, _ = of_values(np.full((6, 1, 2), 0.25))
    tree = compare({"gpt2": a, "llama": b}, metrics=metric, level=0.9, **FAST)
    assert summary(tree) == (
        "6 problems compared, 0 left out; intervals of 90 % are over problems.\n"
        "gpt2: random 2x3, 2 layers x 3 heads. llama: random 1x2, 1 layers x 2 heads.\n"
        "value: gpt2 0.500 [0.500, 0.500], above 0.3 in 6 of 6 heads; "
        "llama 0.250 [0.250, 0.250], above 0.3 in 0 of 2 heads\n"
        "  llama - gpt2: -0.250 [-0.250, -0.250], p = 0.031, 0.031 over the family\n"
        "There is one model per arm (n = 1): differences describe these checkpoints, not "
        "architectures, sizes or capacity. Intervals and p are over problems alone, and tokens "
        "are each model's own."
    )


def test_the_seed_and_the_level_are_those_asked_for() -> None:
    lengths = [4] * 14  # too many for all flips
    pair = {"a": store(lengths=lengths), "b": store(3, 1, lengths, seed=1)}
    one, same, other = (compare(pair, seed=seed, **FAST) for seed in (1, 1, 2))
    xr.testing.assert_identical(one, same)
    for name in ("low", "p"):
        ours, theirs = (table(tree, "comparison/paired")[name] for tree in (one, other))
        assert not np.array_equal(ours, theirs)
    narrow = compare(pair, seed=1, level=0.5, **FAST)
    assert (
        table(narrow, "comparison/models")["low"] > table(one, "comparison/models")["low"]
    ).all()


def test_a_comparison_can_be_written(tmp_path: Any) -> None:
    tree = compare({"a": store(), "b": store(3, 1, seed=1)}, **FAST)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of how texts are kept
        tree.to_zarr(tmp_path / "tree.zarr")
        back = xr.open_datatree(tmp_path / "tree.zarr", engine="zarr")
    np.testing.assert_array_equal(
        table(back, "comparison/paired")["p"], table(tree, "comparison/paired")["p"]
    )
    assert back.attrs["caution"] == tree.attrs["caution"]


def test_comparing_needs_no_torch() -> None:
    code = "import sys; from recipes import compare; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
