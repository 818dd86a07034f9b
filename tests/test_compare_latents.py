"""Comparisons of stores of latents, with the scores, hubs and counts of their own recipes."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import xarray as xr

from recipes import latent
from recipes.compare import as_json, compare, summary
from tests.compared import (
    DIMS,
    FAST,
    NAN,
    fail,
    reasoner,
    table,
)


def loop_concentration(block: Any) -> float:
    """1 - normalised entropy of the attention of each latent to earlier ones."""
    each = []
    for i in range(2, len(block)):
        mass = sum(block[i][:i])
        if mass >= 0.01:
            shares = [a / mass for a in block[i][:i]]
            each.append(1 + sum(a * math.log(a) for a in shares if a > 0) / math.log(i))
    return sum(each) / len(each) if each else NAN


def with_hub(ds: xr.Dataset, layer: int, head: int, at: int) -> xr.Dataset:
    """One head's later latents all look at one."""
    ds = ds.copy(deep=True)
    n = ds.sizes["key"]
    hub = np.eye(n)[[min(i, at) for i in range(n)]]
    weak = 0.1 * ds["pattern"].values[:, layer, head].astype(float)
    ds["pattern"][:, layer, head] = weak + 0.9 * hub
    return ds


def test_scores_of_latents_are_those_of_their_recipe() -> None:
    a, b = reasoner(), reasoner(4, 2, seed=1)
    tree = compare({"a": a, "b": b}, **FAST)
    for name, ds in (("a", a), ("b", b)):
        raw = latent.scores(ds)
        for metric in ("sequential", "long_range", "self", "question", "sink"):
            np.testing.assert_array_equal(table(tree, name)[metric], raw[metric].transpose(*DIMS))
        for j in range(4):
            hub = raw["hub"].isel(key=j).transpose(*DIMS)
            np.testing.assert_array_equal(table(tree, name)[f"hub_{j}"], hub)
        assert "hub_4" not in table(tree, name)  # no two latents come after it
        blocks = latent.block(ds).transpose(*DIMS, "query", "key").values.astype(float)
        for at in itertools.product(range(3), range(2), range(2)):
            expected = loop_concentration(blocks[at])
            assert float(table(tree, name)["concentration"][at]) == pytest.approx(
                expected, abs=1e-5
            )
        found = latent.findings(raw, level=0.95, draws=200, seed=0)
        by_head = table(tree, f"{name}/heads")
        for metric in ("sequential", "hub", "composite", "hub_2"):
            for estimate in ("mean", "low", "high"):
                np.testing.assert_array_equal(
                    by_head[estimate].sel(metric=metric), found[estimate].sel(score=metric)
                )
        np.testing.assert_array_equal(by_head["hub_position"], found["hub_position"])


def test_a_block_almost_without_attention_says_nothing_of_concentration() -> None:
    a = reasoner(problems=4)
    a["pattern"][:, 0, 0] = 0.001 * a["pattern"][:, 0, 0]
    a["pattern"][2, 1, 1, 4, :4] = 0.0
    a["pattern"][2, 1, 1, 4, 4] = 1.0
    got = table(compare({"a": a, "b": reasoner(problems=4, seed=1)}, **FAST), "a")["concentration"]
    assert np.isnan(got[:, 0, 0]).all()
    block = latent.block(a).transpose(*DIMS, "query", "key").values[2, 1, 1].astype(float)
    assert float(got[2, 1, 1]) == pytest.approx(loop_concentration(block), abs=1e-5)


def test_hubs_are_counted_against_each_models_own_null() -> None:
    a = with_hub(with_hub(reasoner(), 0, 1, at=1), 1, 2, at=1)
    b = with_hub(reasoner(4, 2, seed=1), 3, 0, at=2)
    tree = compare({"a": a, "b": b}, **FAST)
    models = table(tree, "comparison/models")
    assert models["hubs_beyond_chance"].sel(model="a").values.tolist() == [0, 2, 0, 0, 0, 0]
    assert models["hubs_beyond_chance"].sel(model="b").values.tolist() == [0, 0, 1, 0, 0, 0]
    assert models["hubs"].sum("latent").values.tolist() == [6, 8]
    found = models["found"].sel(metric="hub")
    assert found.values.tolist() == [2, 1]
    np.testing.assert_allclose(models["share"].sel(metric="hub"), [2 / 6, 1 / 8])
    assert models["found_any"].values.tolist() == [2, 1]
    for metric in ("self", "question", "sink", "concentration"):
        assert np.isnan(models["found"].sel(metric=metric)).all()
    for name, ds in (("a", a), ("b", b)):
        published = latent.published(latent.aggregate(ds))
        one = models.sel(model=name)
        counts = np.bincount(published["hub_position"].values.ravel(), minlength=6)
        assert one["document_hubs"].values.tolist() == counts.tolist()
        assert int(one["critical"]) == int((published["composite"] > 0.7).sum())
    text = summary(tree)
    assert "beyond chance in 2 of 6 heads (z1 2); b " in text
    assert "beyond chance in 1 of 8 heads (z2 1)\n" in text
    data = as_json(tree)
    assert data["hub_positions"]["a"]["beyond_chance"]["z1"] == 2
    assert data["critical_heads"]["b"]["found"] == 1
    assert data["critical_heads"]["b"]["of"] == 8
    assert sum(data["hub_positions"]["b"]["document"].values()) == 8
    assert (
        data["attention_concentration"]["a"]["low"] < data["attention_concentration"]["a"]["mean"]
    )


def test_two_reasoners_of_noise_seldom_differ_and_have_no_hubs() -> None:
    false, hubs = [], 0
    for seed in range(12):
        tree = compare(
            {"a": reasoner(seed=2 * seed), "b": reasoner(3, 2, seed=1 + 2 * seed)}, **FAST
        )
        false.append(bool((table(tree, "comparison/paired")["p_family"] < 0.05).any()))
        hubs += int(table(tree, "comparison/models")["hubs_beyond_chance"].sum())
        assert (table(tree, "comparison/models")["found_any"] == 0).all()
    assert sum(false) <= 3
    assert hubs <= 4


def test_reasoners_with_other_numbers_of_latents_share_what_both_have() -> None:
    a, b = reasoner(n=4), reasoner(seed=1)
    a["correct"] = b["correct"] = ("problem", np.tile([0.0, 1.0, 1.0], 10))
    tree = compare({"a": a, "b": b}, **FAST)
    models, pairs = (table(tree, f"comparison/{name}") for name in ("models", "paired"))
    assert models["latent"].values.tolist() == list(range(6))
    assert models["hubs"].sum("latent").values.tolist() == [6, 6]
    assert models["hubs"].sel(model="a").values[4:].tolist() == [0, 0]
    assert np.isnan(pairs["difference"].sel(metric="hub_3")).all()
    assert pairs["difference"].sel(metric="hub_1").notnull().all()
    assert pairs["metric"].values[-1] == models["metric"].values[-1] == "accuracy"
    assert "beyond chance in 0 of 6 heads; b" in summary(tree)


def test_failed_reasoning_never_counts() -> None:
    a, b = reasoner(problems=8), reasoner(4, 2, problems=8, seed=1)
    with pytest.warns(UserWarning, match="2 of 8 problems are left out"):
        tree = compare({"a": fail(a, 3), "b": fail(b, 0)}, **FAST)
    kept = [1, 2, 4, 5, 6, 7]
    without = compare({"a": a.isel(problem=kept), "b": b.isel(problem=kept)}, **FAST)
    assert tree.attrs == without.attrs | {"left_out": 2}
    xr.testing.assert_equal(tree, without)
