"""Which problems of several stores are compared, by which metrics, and what is refused."""

from typing import Any

import numpy as np
import pytest
import xarray as xr

from probe.errors import InputError
from recipes import heads
from recipes.compare import as_json, compare, summary
from tests.compared import FAST, NAN, fail, normal, of_values, reasoner, store, table
from tests.stores import says

# Problems


def test_problems_are_matched_by_id_whatever_their_order() -> None:
    a, b = store(), store(3, 1, seed=1)
    straight = compare({"a": a, "b": b}, **FAST)
    turned = compare({"a": a, "b": b.isel(problem=[3, 1, 7, 0, 2, 6, 5, 4])}, **FAST)
    xr.testing.assert_identical(straight, turned)


def test_failed_problems_never_count() -> None:
    a, b = store(), store(3, 1, seed=1)
    failing = {"a": fail(a, 1, 4), "b": fail(b, 4, 6)}
    with pytest.warns(
        UserWarning, match=says("3 of 8 problems are left out: a failed 2; b failed 2")
    ):
        tree = compare(failing, **FAST)
    kept = [0, 2, 3, 5, 7]
    without = compare({"a": a.isel(problem=kept), "b": b.isel(problem=kept)}, **FAST)
    assert tree.attrs == without.attrs | {"left_out": 3}
    assert tree.attrs["problems"] == 5
    xr.testing.assert_equal(tree, without)


def test_what_one_store_lacks_is_left_out_of_both_and_told() -> None:
    a, b = store(), store(3, 1, seed=1).isel(problem=slice(2, None))
    expected = says("2 of 8 problems are left out: b lacks 2")
    with pytest.warns(UserWarning, match=expected) as caught:
        tree = compare({"a": a, "b": b}, **FAST)
    assert caught[0].filename == __file__
    assert (
        table(tree, "a")["problem"].values.tolist() == table(tree, "b")["problem"].values.tolist()
    )
    assert table(tree, "a").sizes["problem"] == 6
    both = says("4 of 8 problems are left out: a failed 1; b lacks 2 and failed 1")
    with pytest.warns(UserWarning, match=both):
        compare({"a": fail(a, 3), "b": fail(b, 2)}, **FAST)


def test_stores_are_left_as_they_are() -> None:
    a, b = store(), store(3, 1, seed=1)
    before = a.copy(deep=True), b.copy(deep=True)
    compare({"a": a, "b": b}, **FAST)
    xr.testing.assert_identical(a, before[0])
    xr.testing.assert_identical(b, before[1])


def test_the_same_question_in_other_tokens_is_the_same() -> None:
    a, b = store(), store(seed=1)
    b["token"] = b["token"].str.strip().str.upper()  # another tokenizer
    compare({"a": a, "b": b}, **FAST)
    b["segment"][:, 0] = "bos"
    b["token"][:, 0] = "<s>"
    a["token"][:, 0] = " "
    compare({"a": a, "b": b}, **FAST)


def test_another_question_under_the_same_id_is_refused() -> None:
    a, b = store(), store(words="v")
    message = (
        "problem 'p0' asks 'w0_0 w0_1 w0_2 w0_3 w0_4 w0_5' in gpt2 and 'v0_0 v0_1 v0_2 v0_3 v0_4 "
        "v0_5' in llama. Capture the same file with each model."
    )
    with pytest.raises(InputError, match=says(message)):
        compare({"gpt2": a, "llama": b})
    one = store(lengths=[40] * 2)
    other = one.copy(deep=True)
    other["token"][1, 38] = " else"
    message = (
        "problem 'p1' asks '3 w1_34 w1_35 w1_36 w1_37 w1_38 w1_39' in a and "
        "'3 w1_34 w1_35 w1_36 w1_37 else w1_39' in b. Capture the same file with each model."
    )
    with pytest.raises(InputError) as caught:
        compare({"a": one, "b": other})
    assert "w1_37 w1_38 w1_39' in a and" in str(caught.value)
    assert "w1_37 else w1_39' in b." in str(caught.value)


@pytest.mark.parametrize(
    "why", ["hash", "some keys", "a hole", "broken", "no tokenizer", "cut", "bare"]
)
def test_questions_that_cannot_be_read_or_are_known_to_be_equal_are_not_compared(why: str) -> None:
    a, b = store(), store(words="v")
    if why == "hash":
        a.attrs["problems"] = b.attrs["problems"] = {"sha256": "1f"}
    elif why == "some keys":
        b = b.isel(key=slice(1, None))
    elif why == "a hole":
        b = b.isel(key=slice(1, None))
        b["length"] -= 1  # as if what it went on to say stood after it
    elif why == "broken":
        b["token"][:, 1] = "\ufffd"
    elif why == "no tokenizer":
        b["token"][:] = ""
    elif why == "cut":
        b["length"] += 1
    else:
        b = b.drop_vars(["token", "length"])
    compare({"a": a, "b": b}, **FAST)
    if why == "hash":
        b.attrs["problems"] = {"sha256": "2e"}
        with pytest.raises(InputError, match="asks"):
            compare({"a": a, "b": b}, **FAST)


def test_another_expected_answer_under_the_same_id_is_refused() -> None:
    a, b = store(), store(seed=1)
    a["expected"] = ("problem", np.array(["1", "2", "", "4", "5", "6", "7", "8"], object))
    b["expected"] = ("problem", np.array(["1", "2", "3", "4", "", "6", "70", "8"], object))
    message = "problem 'p6' expects '7' in a and '70' in b. Capture the same file with each model."
    with pytest.raises(InputError, match=says(message)):
        compare({"a": a, "b": b})


# Metrics


def test_metrics_are_functions_or_names() -> None:
    a, b = store(), store(3, 1, seed=1)
    tree = compare({"a": a, "b": b}, metrics=["heads.entropy", "heads.induction"], **FAST)
    np.testing.assert_array_equal(table(tree, "a")["heads.entropy"], heads.entropy(a["pattern"]))
    own = {"mine": lambda p: heads.entropy(p).transpose("head", "problem", "layer")}
    other = compare({"a": a, "b": b}, metrics=own, **FAST)
    np.testing.assert_array_equal(table(other, "a")["mine"], heads.entropy(a["pattern"]))
    full = compare({"a": a, "b": b}, metrics="recipes.heads.entropy", **FAST)
    np.testing.assert_array_equal(
        table(full, "b")["recipes.heads.entropy"], heads.entropy(b["pattern"])
    )


def test_a_metric_without_numbers_is_nan_throughout_and_null_in_json() -> None:
    a, b = store(), store(3, 1, seed=1)
    metrics = {"none": lambda p: heads.entropy(p) * NAN}
    tree = compare({"a": a, "b": b}, metrics=metrics, **FAST)
    for name in ("mean", "low", "high", "found", "share"):
        assert np.isnan(table(tree, "comparison/models")[name]).all()
    assert (table(tree, "comparison/models")["known"] == 0).all()
    for name in ("difference", "low", "high", "p", "p_family"):
        assert np.isnan(table(tree, "comparison/paired")[name]).all()
    data = as_json(tree)
    assert data["scores"]["a"]["none"]["mean"] is None
    assert data["differences"][0]["p"] is None
    lines = summary(tree).splitlines()
    assert lines[2] == "none: a -; b -"
    assert lines[3].startswith("There is one model per arm")


def test_a_metric_of_one_problem_is_no_estimate_and_hides_no_other() -> None:
    one, two = normal(5, 2, 2), normal(5, 2, 2, seed=1)
    a, metric = of_values(one)
    b, _ = of_values(two)

    def seldom(p: xr.DataArray) -> xr.DataArray:
        found: xr.DataArray = metric["value"](p)
        return found.where(p["problem"] == "p3")

    tree = compare({"a": a, "b": b}, metrics={**metric, "seldom": seldom}, **FAST)
    assert np.isnan(table(tree, "comparison/paired")["p"].sel(metric="seldom")).all()
    assert table(tree, "comparison/paired")["p"].sel(metric="value").notnull().all()
    alone = compare({"a": a, "b": b}, metrics={"seldom": seldom}, **FAST)
    assert np.isnan(table(alone, "comparison/models")["mean"]).all()


# Messages


def test_what_cannot_be_compared_is_said() -> None:
    a, b = store(), store(3, 1, seed=1)
    other = store(ids=[f"q{i}" for i in range(8)])
    few = store(lengths=[3, 3], ids=["r", "s"])
    selected = store(selection={"queries": "last:6", "keys": None})
    rest = store(selection={"queries": None, "keys": None})
    named = {"metrics": ["heads.entropy"]}
    cases: list[tuple[Any, dict[str, Any], str]] = [
        (
            {"a": a},
            {},
            "compare takes two stores or more by name, got 1. "
            "Give them as compare({'gpt2': ds, 'llama': other})",
        ),
        (
            [a, b],
            {},
            "compare takes two stores or more by name, got list. "
            "Give them as compare({'gpt2': ds, 'llama': other})",
        ),
        (
            {"openai/gpt2": a, "b": b},
            {},
            "'openai/gpt2' cannot name a model here. Give a text without '/', other than "
            "'comparison'.",
        ),
        (
            {"a": a, "comparison": b},
            {},
            "'comparison' cannot name a model here. Give a text without '/', other than "
            "'comparison'.",
        ),
        (
            {"a": a, "b": "b.zarr"},
            {},
            "b is no opened store with patterns, but str. Open one: probe.open(path)",
        ),
        (
            {"a": a, "b": b[["length", "status"]].reset_coords("status")},
            {},
            "b is no opened store with patterns, but length, status. Open one: probe.open(path)",
        ),
        (
            {"a": a, "b": xr.concat([b, b.isel(problem=[2])], "problem")},
            {},
            "b has the problem 'p2' twice. Give each an id of its own.",
        ),
        (
            {"a": other, "b": few},
            {},
            "the stores have no problem in common: a has 'q0', 'q1', 'q2', ... (8); b has 'r', "
            "'s' (2). Capture the same file with each model.",
        ),
        (
            {"a": fail(a, 0, 1, 2, 3), "b": fail(b, 4, 5, 6)},
            {},
            "of 8 common problems, 1 ran in all of a, b, and the spread over problems needs 2. "
            "Capture more; `error` says why problems failed.",
        ),
        (
            {"a": a, "b": reasoner(problems=8).assign_coords(problem=a["problem"])},
            {},
            "not all stores hold latents (a does not, b does), so that no scores are theirs by "
            "default. Name some, as metrics=['heads.entropy']",
        ),
        (
            {"a": selected, "b": rest},
            {},
            "the stores hold different queries: a 'last:6', b None. Capture the same of each "
            "model.",
        ),
        (
            {"a": a, "b": b},
            {"metrics": ["heads.entropi"]},
            "there is no metric 'heads.entropi'. Name one as heads.entropy, or give a mapping "
            "from names to functions of a pattern.",
        ),
        (
            {"a": a, "b": b},
            {"metrics": "entropy"},
            "there is no metric 'entropy'. Name one as heads.entropy, or give a mapping from "
            "names to functions of a pattern.",
        ),
        (
            {"a": a, "b": b},
            {"metrics": {"depth": heads.entropy}},
            "'depth' cannot name a metric. Choose another name.",
        ),
        (
            {"a": a, "b": b},
            {"metrics": {}},
            "metrics is empty. Name some, as heads.entropy, or leave it out.",
        ),
        (
            {"a": a, "b": b},
            {"metrics": {"flat": lambda p: heads.entropy(p).mean("head")}},
            "flat of a is ('problem', 'layer'). A metric takes a pattern and returns a DataArray "
            "with dims problem, layer and head.",
        ),
        (
            {"a": a, "b": b},
            {"metrics": {"none": lambda p: None}},
            "none of a is NoneType. A metric takes a pattern and returns a DataArray with dims "
            "problem, layer and head.",
        ),
        ({"a": a, "b": b}, {**named, "level": 95}, "level must lie between 0 and 1, got 95."),
        ({"a": a, "b": b}, {**named, "draws": 0}, "draws must be at least 1, got 0."),
    ]
    for stores, options, message in cases:
        with pytest.raises(InputError) as caught:
            compare(stores, **options)
        assert str(caught.value).startswith(message)
