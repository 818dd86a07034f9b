"""Comparisons of stores: loops over problems, layers and heads, planted differences, and noise."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import xarray as xr

from recipes import stats
from recipes.compare import compare
from tests.compared import (
    DIMS,
    FAST,
    LENGTHS,
    NAN,
    loop_flips,
    loop_means,
    normal,
    of_values,
    store,
    table,
)


def loop_scores(p: Any) -> dict[str, float]:
    """The default scores of one square matrix, beyond those of even attention."""
    n = len(p)
    even = [[1 / (i + 1) if j <= i else 0.0 for j in range(n)] for i in range(n)]

    def previous(m: Any) -> Any:
        return sum(m[i][i - 1] for i in range(1, n)) / (n - 1)

    def first(m: Any) -> Any:
        return sum(m[i][0] for i in range(n)) / n

    def beyond(metric: Any) -> float:
        return float((metric(p) - metric(even)) / (1 - metric(even)))

    entropy = [-sum(a * math.log(a) for a in row if a > 0) for row in p]
    reach = [sum(p[i][j] * (i - j) for j in range(n)) for i in range(n)]
    return {
        "previous_token": beyond(previous),
        "sink": beyond(first),
        "distance": sum(reach[i] / (i / 2) - 1 for i in range(1, n)) / (n - 1),
        "concentration": sum(1 - entropy[i] / math.log(i + 1) for i in range(1, n)) / (n - 1),
    }


def test_default_scores_are_those_of_loops_over_ragged_problems() -> None:
    a, b = store(2, 3), store(3, 2, seed=1)
    tree = compare({"a": a, "b": b}, **FAST)
    for name, ds in (("a", a), ("b", b)):
        scores = table(tree, name)
        assert list(scores) == ["previous_token", "sink", "distance", "concentration"]
        for metric in scores:
            assert scores[metric].dims == DIMS
            assert scores[metric].dtype == np.float32
        for i, layer, head in itertools.product(*(range(ds.sizes[dim]) for dim in DIMS)):
            n = LENGTHS[i]
            expected = loop_scores(ds["pattern"].values[i, layer, head, :n, :n].astype(float))
            got = {name: float(scores[name][i, layer, head]) for name in expected}
            assert got == pytest.approx(expected, abs=1e-5)


def test_even_attention_scores_0_and_each_score_is_1_at_best() -> None:
    ds = store(1, 1, [5, 5])
    even, previous, first = (xr.zeros_like(ds["pattern"]) for _ in range(3))
    even[:] = np.tril(np.ones((5, 5))) / np.arange(1, 6)[:, None]
    previous[:] = np.eye(5)[[0, 0, 1, 2, 3]]
    first[:] = np.eye(5)[[0] * 5]
    of = {
        name: ds.assign(pattern=p)
        for name, p in {"even": even, "previous": previous, "first": first}.items()
    }
    tree = compare(of, **FAST)
    means = table(tree, "comparison/models")["mean"]
    np.testing.assert_allclose(means.sel(model="even"), 0.0, atol=1e-6)
    best = [("previous", "previous_token"), ("first", "sink"), ("first", "distance")]
    for name, metric in best:
        assert float(means.sel(model=name, metric=metric)) == pytest.approx(1.0)
    np.testing.assert_allclose(means.sel(metric="concentration"), [0, 1, 1], atol=1e-6)


def test_a_problem_of_one_token_says_nothing_and_dilutes_nothing() -> None:
    a, b = store(1, 2, [4, 1, 5]), store(2, 1, [4, 1, 5], seed=1)
    b["pattern"][1, :, :, 0, 0] = 0.9995  # as float16 and bfloat16 round
    tree = compare({"a": a, "b": b}, **FAST)
    assert np.isnan(table(tree, "a")["sink"][1]).all()
    assert np.isnan(table(tree, "b")["sink"][1]).all()
    np.testing.assert_allclose(table(tree, "comparison/models")["known"], 2 / 3)
    assert (table(tree, "comparison/paired")["n"] == 2).all()


def test_means_differences_and_p_are_those_of_loops() -> None:
    one, two = normal(8, 2, 3) + 0.4, normal(8, 4, 2, seed=1)
    one[2, 1, 0] = one[5] = two[6, 0, 1] = NAN  # a head, a problem, a head
    a, metric = of_values(one)
    b, _ = of_values(two, seed=1)
    tree = compare({"a": a, "b": b}, metrics=metric, **FAST)
    models = table(tree, "comparison/models").sel(metric="value")
    left, right = loop_means(one), loop_means(two)
    np.testing.assert_allclose(models["mean"], [np.nanmean(left), np.nanmean(right)], rtol=1e-6)
    np.testing.assert_allclose(models["known"], [1 - 7 / 48, 1 - 1 / 64])
    apart = [y - x for x, y in zip(left, right, strict=True)]
    known = [x for x in apart if not math.isnan(x)]
    pair = table(tree, "comparison/paired").isel(pair=0, metric=0)
    assert float(pair["difference"]) == pytest.approx(sum(known) / 7, rel=1e-5)
    assert int(pair["n"]) == 7
    assert float(pair["p"]) == pytest.approx(loop_flips(known))
    expected = stats.bootstrap(xr.DataArray(apart, dims="problem"), **FAST)
    assert float(pair["low"]) == pytest.approx(float(expected.low), rel=1e-5)
    assert float(pair["high"]) == pytest.approx(float(expected.high), rel=1e-5)
    assert float(pair["low"]) < float(pair["difference"]) < float(pair["high"])


def test_heads_are_found_where_their_interval_lies_above_the_threshold() -> None:
    one = 0.05 * normal(20, 2, 3) + np.array([[0.5, 0.31, 0.0], [0.29, 0.9, NAN]])
    a, metric = of_values(one)
    b, _ = of_values(np.full((20, 1, 2), 0.25))
    tree = compare({"a": a, "b": b}, metrics=metric, **FAST)
    low = stats.bootstrap(xr.DataArray(one, dims=DIMS), **FAST).low
    np.testing.assert_allclose(table(tree, "a/heads")["low"][0], low, rtol=1e-4)
    models = table(tree, "comparison/models").sel(metric="value")
    assert models["found"].values.tolist() == [int((low > 0.3).sum()), 0]
    assert models["found"].values[0] in (2, 3)
    assert models["heads"].values.tolist() == [6, 2]
    assert models["layers"].values.tolist() == [2, 1]
    np.testing.assert_allclose(models["share"], models["found"] / [6, 2])


def test_concentration_which_noise_has_too_is_found_nowhere() -> None:
    tree = compare({"a": store(), "b": store(seed=1)}, **FAST)
    found = table(tree, "comparison/models")["found"]
    assert np.isnan(found.sel(metric="concentration")).all()
    assert found.drop_sel(metric="concentration").notnull().all()


def test_the_same_store_twice_differs_by_exactly_nothing() -> None:
    a = store()
    pairs = table(compare({"a": a, "b": a}), "comparison/paired")
    for name in ("difference", "low", "high", "t"):
        np.testing.assert_array_equal(pairs[name], 0.0)
    for name in ("p", "p_family", "p_bh"):
        np.testing.assert_array_equal(pairs[name], 1.0)
    np.testing.assert_array_equal(pairs["n"], len(LENGTHS))


def test_a_planted_difference_is_found_and_the_others_are_not() -> None:
    lengths = [8] * 30
    a, b = store(3, 4, lengths), store(6, 2, lengths, seed=1)
    previous = np.eye(8)[[0, 0, 1, 2, 3, 4, 5, 6]]
    b["pattern"][:, 4, 0] = 0.1 * b["pattern"][:, 4, 0] + 0.9 * previous
    tree = compare({"a": a, "b": b}, **FAST)
    pair = table(tree, "comparison/paired").sel(pair="b - a", metric="previous_token")
    assert float(pair["difference"]) > 0.04
    assert float(pair["low"]) > 0
    assert float(pair["p_family"]) < 0.01
    found = table(tree, "comparison/models")["found"].sel(metric="previous_token")
    assert found.values.tolist() == [0, 1]
    depth = table(tree, "comparison/depth")["mean"].sel(model="b", metric="previous_token")
    assert int(depth.values.argmax()) == 2  # of 3 ranges; layer 4 of 0 … 5 is in the last
    other = table(compare({"a": a, "b": store(6, 2, lengths, seed=1)}, **FAST), "comparison/paired")
    assert (other["p_family"] > 0.05).all()


def test_noise_beside_noise_seldom_differs() -> None:
    lengths = [6] * 20
    false = []
    for seed in range(40):
        pair = {
            "a": store(2, 2, lengths, seed=2 * seed),
            "b": store(3, 2, lengths, seed=1 + 2 * seed),
        }
        false.append(
            bool((table(compare(pair, **FAST), "comparison/paired")["p_family"] < 0.05).any())
        )
    assert np.mean(false) <= 0.15


def test_three_models_are_three_pairs_and_one_family() -> None:
    values = [normal(9, 2, 2, seed=seed) + shift for seed, shift in enumerate((0, 0.3, 1.5))]
    of = [of_values(one) for one in values]
    tree = compare({"a": of[0][0], "b": of[1][0], "c": of[2][0]}, metrics=of[0][1], **FAST)
    pairs = table(tree, "comparison/paired")
    assert pairs["pair"].values.tolist() == ["b - a", "c - a", "c - b"]
    assert pairs["a"].values.tolist() == ["a", "a", "b"]
    assert pairs["b"].values.tolist() == ["b", "c", "c"]
    a, b, c = (loop_means(one) for one in values)
    apart = [np.subtract(b, a), np.subtract(c, a), np.subtract(c, b)]
    np.testing.assert_allclose(pairs["difference"][:, 0], np.mean(apart, axis=1), rtol=1e-5)
    family = stats.sign_flip(xr.DataArray(apart, dims=("pair", "problem"))).p_family
    np.testing.assert_allclose(pairs["p_family"][:, 0], family)


def test_accuracy_is_compared_like_a_score() -> None:
    a, b, c = store(), store(seed=1), store(seed=2)
    right = np.array([1, 0, 1, 1, 1, NAN, 1, 1], "float32")
    wrong = np.array([0, 0, 1, 0, 0, 1, 0, 0], "float32")
    a["correct"], b["correct"] = ("problem", right), ("problem", wrong)
    c["correct"] = ("problem", np.full(8, NAN, "float32"))
    tree = compare({"a": a, "b": b, "c": c}, metrics=["heads.sink"], **FAST)
    models, pairs = (table(tree, f"comparison/{name}") for name in ("models", "paired"))
    np.testing.assert_allclose(models["mean"].sel(metric="accuracy"), [6 / 7, 2 / 8, NAN])
    one = pairs.sel(pair="b - a", metric="accuracy")
    assert float(one["difference"]) == pytest.approx(-5 / 7)
    assert int(one["n"]) == 7
    assert float(one["p"]) == pytest.approx(loop_flips([-1, 0, 0, -1, -1, -1, -1]))
    assert np.isnan(pairs["difference"].sel(pair="c - a", metric="accuracy"))
    assert np.isnan(models["found"].sel(metric="accuracy")).all()
    assert "accuracy" not in table(tree, "comparison/depth")["metric"]
    np.testing.assert_array_equal(table(tree, "a")["correct"], right)
    assert "correct" not in table(tree, "c").coords
    none = compare({"a": c, "b": c}, metrics="heads.sink", **FAST)
    assert table(none, "comparison/models")["metric"].values.tolist() == ["heads.sink"]


# Depth


def test_depth_runs_from_the_first_layer_to_the_last() -> None:
    tree = compare({"a": store(1, 2), "b": store(5, 1)}, **FAST)
    assert table(tree, "a")["depth"].values.tolist() == [0.0]
    assert table(tree, "b")["depth"].values.tolist() == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert table(tree, "b")["depth"].dims == ("layer",)


def test_depth_is_that_in_the_model_where_only_some_layers_are_stored() -> None:
    some = store(5, 1, n_layers=9).isel(layer=[0, 2, 4])
    tree = compare({"a": some, "b": store(5, 1).isel(layer=[0, 2])}, **FAST)
    assert table(tree, "a")["depth"].values.tolist() == [0.0, 0.25, 0.5]
    assert table(tree, "b")["depth"].values.tolist() == [0.0, 1.0]


@pytest.mark.parametrize(
    ("shallow", "deep", "bins"), [(3, 7, 3), (12, 24, 10), (1, 4, 1), (8, 8, 8)]
)
def test_means_by_depth_are_those_of_a_loop(shallow: int, deep: int, bins: int) -> None:
    of = {"a": normal(6, shallow, 2), "b": normal(6, deep, 3, seed=1)}
    of["b"][3, 0, 1] = NAN
    made = {name: of_values(values) for name, values in of.items()}
    metric = made["a"][1]
    tree = compare({name: ds for name, (ds, _) in made.items()}, metrics=metric, **FAST)
    depth = table(tree, "comparison/depth").sel(metric="value")
    assert depth.sizes["depth"] == bins
    np.testing.assert_allclose(depth["start"], [k / bins for k in range(bins)])
    np.testing.assert_allclose(depth["end"], [(k + 1) / bins for k in range(bins)])
    for name, values in of.items():
        layers = values.shape[1]
        for k in range(bins):
            # In whole numbers: layer l is in range k where k / bins <= l / (layers - 1).
            inside = [
                layer
                for layer in range(layers)
                if min(layer * bins // max(layers - 1, 1), bins - 1) == k
            ]
            assert inside
            x = xr.DataArray(loop_means(values[:, inside]), dims="problem")
            expected, got = stats.bootstrap(x, **FAST), depth.sel(model=name).isel(depth=k)
            for estimate in ("mean", "low", "high"):
                assert float(got[estimate]) == pytest.approx(float(expected[estimate]), rel=1e-4)


def test_a_range_of_depth_without_layers_has_no_number() -> None:
    a, b = store(4, 1).isel(layer=[2, 3]), store(6, 1).isel(layer=[0, 5])
    a.attrs["n_layers"], b.attrs["n_layers"] = 4, 6
    mean = table(compare({"a": a, "b": b}, **FAST), "comparison/depth")["mean"]
    assert mean.sel(model="a").isnull().sum("depth").values.tolist() == [1] * 4
    assert mean.sel(model="b").notnull().all()
