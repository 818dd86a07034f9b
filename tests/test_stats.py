"""Paired statistics: loops over all flips, scipy on one cell at a time, and simulations."""

import itertools
import math
import tracemalloc
from typing import Any

import numpy as np
import pytest
import scipy.stats
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

from probe.errors import InputError
from recipes import stats
from recipes.stats import Method, agreement, bootstrap, sign_flip

BOTH = [bootstrap, sign_flip]
METHODS: list[Method] = ["percentile", "BCa", "basic"]
NAN = math.nan


def normal(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).normal(size=shape)


def by_head(values: Any) -> xr.DataArray:
    return xr.DataArray(values, dims=("problem", "head"))


def gappy() -> Any:
    """6 problems of 4 cells; cells 1 and 2 lack some. Sums are exact, so that ties are."""
    values = np.round(normal(6, 4) * 64) / 64 + np.array([1.0, 1.5, 0.0, 0.25])
    values[2, 1] = values[0, 2] = values[5, 2] = NAN
    return values


GAPS = np.where(np.arange(60) % 3 == 1, NAN, normal(2, 60)).T  # enough for an unstable sort


# References


def loop_t(column: Any) -> float:
    known = [float(value) for value in column if not math.isnan(value)]
    n, mean = len(known), sum(known) / len(known)
    variance = sum((value - mean) ** 2 for value in known) / (n - 1)
    return mean / math.sqrt(variance / n)


def loop_flips(values: Any) -> tuple[list[float], list[float]]:
    """p and p_family by all 2**n sign patterns, one at a time."""
    seen = [abs(loop_t(column)) for column in values.T]
    flips = [
        [abs(loop_t(column * signs)) for column in values.T]
        for signs in itertools.product([1.0, -1.0], repeat=len(values))
    ]
    alone = [[row[cell] >= t - 1e-9 for row in flips] for cell, t in enumerate(seen)]
    family = [[max(row) >= t - 1e-9 for row in flips] for t in seen]
    return [sum(hits) / len(hits) for hits in alone], [sum(hits) / len(hits) for hits in family]


def loop_bh(p: list[float]) -> list[float]:
    """Of each p, the least p_(k) m / k over all ranks k from its own on."""
    ranked = sorted(p)
    return [
        min(1.0, *(q * len(p) / (k + 1) for k, q in enumerate(ranked) if q >= value)) for value in p
    ]


# sign_flip


@pytest.mark.parametrize("values", [normal(6, 3) + 0.5, gappy()])
def test_flips_are_those_of_a_loop_over_all_patterns(values: Any) -> None:
    ds = sign_flip(by_head(values))
    p, p_family = loop_flips(values)
    np.testing.assert_allclose(ds.t, [loop_t(column) for column in values.T])
    np.testing.assert_allclose(ds.p, p)
    np.testing.assert_allclose(ds.p_family, p_family)
    np.testing.assert_allclose(ds.p_bh, loop_bh(p))
    np.testing.assert_allclose(ds["mean"], np.nanmean(values, axis=0))


def test_few_problems_give_the_p_of_scipys_exact_test() -> None:
    values = normal(9, 5) + 0.4
    values /= np.sqrt(np.sum(values**2, axis=0))  # so that the order of |mean| is that of |t|
    ds = sign_flip(by_head(values))
    theirs = scipy.stats.permutation_test(
        (values,),
        lambda sample, axis: np.abs(sample.mean(axis=axis)),
        permutation_type="samples",
        alternative="greater",
        n_resamples=math.inf,
    )
    np.testing.assert_allclose(ds.p, theirs.pvalue)
    largest = theirs.null_distribution.max(axis=-1)[:, None]  # as scipy flips all cells alike
    family = np.mean(largest >= theirs.statistic - 1e-9, axis=0)
    np.testing.assert_allclose(ds.p_family, family)
    np.testing.assert_allclose(ds.t, scipy.stats.ttest_1samp(values, 0.0).statistic)


def test_a_clear_effect_has_the_least_p_that_the_patterns_allow() -> None:
    for n in (2, 5, 12):  # all alike, all turned
        assert float(sign_flip(by_head(normal(n, 1) + 9.0)).p[0]) == 2 / 2**n
    many = sign_flip(by_head(normal(40, 2) + 9.0), draws=99)
    np.testing.assert_array_equal(many.p, [1 / 100] * 2)  # what was seen is one more
    np.testing.assert_array_equal(many.p_family, [1 / 100] * 2)


def test_random_flips_come_near_all_flips() -> None:
    values = normal(13, 4, seed=3) + np.array([0.0, 0.2, 0.4, 0.6])  # the first n with random ones
    signs = np.array(list(itertools.product([1.0, -1.0], repeat=13)))
    sums = np.abs(signs @ values)
    exact = np.mean(sums >= sums[0] - 1e-9, axis=0)
    ds = sign_flip(by_head(values), draws=20_000)
    np.testing.assert_allclose(ds.p, exact, atol=0.015)
    assert not np.array_equal(ds.p, exact)


def test_p_is_uniform_under_the_null() -> None:
    p = sign_flip(by_head(normal(11, 4000, seed=1))).p.values
    for level in (0.05, 0.25, 0.5, 0.75):
        assert np.mean(p <= level) == pytest.approx(level, abs=0.03)


def test_the_family_wise_error_is_as_promised() -> None:
    false = [
        bool((sign_flip(by_head(normal(20, 8, seed=seed)), draws=999).p_family < 0.05).any())
        for seed in range(200)
    ]
    assert 0.01 < np.mean(false) < 0.10


def test_the_family_counts_all_dims() -> None:
    x = xr.DataArray(normal(8, 2, 3, 2) + 0.5, dims=("problem", "layer", "head", "query"))
    flat = sign_flip(by_head(x.values.reshape(8, 12)))
    ds = sign_flip(x)
    assert ds.p.dims == ("layer", "head", "query")
    np.testing.assert_array_equal(ds.p_family.values.ravel(), flat.p_family)
    np.testing.assert_array_equal(ds.p_bh.values.ravel(), flat.p_bh)


def test_heads_that_always_agree_cost_nothing_and_others_do() -> None:
    column = normal(30, 1) + 0.3
    alike = sign_flip(by_head(np.repeat(column, 5, axis=1)))
    np.testing.assert_array_equal(alike.p_family, alike.p)
    turned = sign_flip(by_head(column * [1.0, -2.0, 3.0]))
    np.testing.assert_array_equal(turned.p_family, turned.p)
    mixed = sign_flip(by_head(np.hstack([column, normal(30, 7, seed=1)])))
    assert (mixed.p_family >= mixed.p).all()
    assert float(mixed.p_family[0]) > 2 * float(mixed.p[0])
    assert float(mixed.p[0]) == float(alike.p[0])  # the same flips, whatever the cells


def test_constant_cells_are_judged_by_their_signs_alone() -> None:
    values = np.tile([0.0, 0.1, -0.3], (10, 1))
    ds = sign_flip(by_head(values))
    np.testing.assert_array_equal(ds.t, [0.0, math.inf, -math.inf])
    np.testing.assert_array_equal(ds.p, [1.0, 2 / 1024, 2 / 1024])
    np.testing.assert_array_equal(ds.p_family, ds.p)
    assert float(sign_flip(by_head([[0.1], [0.2], [-0.3]])).p[0]) == 1.0  # 0, but for rounding


@settings(max_examples=60, deadline=None)
@given(
    st.integers(2, 15).flatmap(
        lambda n: st.lists(
            st.lists(st.floats(-100, 100, width=32), min_size=3, max_size=3),
            min_size=n,
            max_size=n,
        )
    )
)
def test_p_does_not_hang_on_the_sign_or_the_unit_of_x(rows: list[list[float]]) -> None:
    x = by_head(np.array(rows))
    ours, turned, doubled = (sign_flip(y, draws=200) for y in (x, -x, 2 * x))
    for name in ("p", "p_family", "p_bh"):
        np.testing.assert_array_equal(ours[name], turned[name])
        np.testing.assert_array_equal(ours[name], doubled[name])
    np.testing.assert_allclose(ours.t, -turned.t, rtol=1e-9)
    assert (ours.p_family >= ours.p).all()
    assert (ours.p > 0).all()
    assert (ours.p_family <= 1).all()


def test_memory_does_not_grow_with_draws_times_cells() -> None:
    x = by_head(normal(200, 8192).astype(np.float32))  # 5000 draws of all cells are 328 MB
    tracemalloc.start()
    sign_flip(x, draws=5000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 250e6


# bootstrap


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("values", [normal(15, 3), np.round(normal(15, 3)), gappy(), GAPS])
def test_intervals_are_those_of_scipy_for_each_cell_alone(method: Method, values: Any) -> None:
    ds = bootstrap(by_head(values), level=0.9, draws=500, seed=7, method=method)
    for cell, column in enumerate(values.T):
        known = column[~np.isnan(column)]
        theirs = scipy.stats.bootstrap(
            (known,), np.mean, n_resamples=500, confidence_level=0.9, method=method, rng=7
        ).confidence_interval
        np.testing.assert_allclose([ds.low[cell], ds.high[cell]], theirs)
        assert float(ds["mean"][cell]) == pytest.approx(known.mean())
        assert int(ds.n[cell]) == len(known)


def test_percentiles_are_those_of_a_loop_over_resamples() -> None:
    values = normal(8, 2)
    drawn = np.random.default_rng(0).integers(0, 8, (2000, 8))
    means = [[sum(values[i, cell] for i in row) / 8 for row in drawn] for cell in range(2)]
    ds = bootstrap(by_head(values))
    np.testing.assert_allclose([ds.low, ds.high], np.quantile(means, [0.025, 0.975], axis=1))


@pytest.mark.parametrize("method", METHODS)
def test_intervals_hold_a_normal_mean_about_as_often_as_they_say(method: Method) -> None:
    ds = bootstrap(by_head(normal(40, 1000, seed=2) + 3.0), draws=999, method=method)
    assert 0.91 < float(((ds.low <= 3.0) & (ds.high >= 3.0)).mean()) < 0.97
    narrow = bootstrap(by_head(normal(40, 1000, seed=2)), draws=999, level=0.5, method=method)
    assert 0.44 < float(((narrow.low <= 0.0) & (narrow.high >= 0.0)).mean()) < 0.55
    width = 2 * 1.96 / math.sqrt(40)
    assert float((ds.high - ds.low).mean()) == pytest.approx(width, rel=0.05)


@pytest.mark.parametrize("method", METHODS)
def test_constant_cells_have_an_interval_of_one_point(method: Method) -> None:
    ds = bootstrap(by_head(np.tile([0.0, 0.1, -3.0], (7, 1))), method=method)
    np.testing.assert_array_equal(ds.low, ds["mean"])
    np.testing.assert_array_equal(ds.high, ds["mean"])
    np.testing.assert_allclose(ds["mean"], [0.0, 0.1, -3.0])


@pytest.mark.parametrize("method", METHODS)
def test_a_single_draw_is_no_error(method: Method) -> None:
    ds = bootstrap(by_head(normal(5, 2)), draws=1, method=method)
    assert bool(np.isnan(ds.low).all()) == (method == "BCa")


# Both


@pytest.mark.parametrize("test", BOTH)
def test_failed_problems_are_left_out(test: Any) -> None:
    values = normal(9, 3)
    failed = np.insert(values, [0, 4, 9], NAN, axis=0)
    xr.testing.assert_identical(test(by_head(failed)), test(by_head(values)))


@pytest.mark.parametrize("test", BOTH)
def test_a_cell_uses_the_problems_that_it_has(test: Any) -> None:
    values = gappy()
    ds = test(by_head(values))
    for cell in range(4):
        alone = test(by_head(values[:, [cell]]))
        for name in set(ds.data_vars) - {"p_family", "p_bh"}:
            np.testing.assert_allclose(ds[name][cell], alone[name][0], err_msg=name)


@pytest.mark.parametrize("test", BOTH)
def test_cells_with_fewer_than_two_problems_are_nan(test: Any) -> None:
    values = normal(7, 4)
    values[1:, 1] = values[:, 3] = NAN
    ds = test(by_head(values))
    fewer = test(by_head(values[:, [0, 2]]))
    for name in set(ds.data_vars) - {"n"}:
        assert np.isnan(ds[name][[1, 3]]).all()
        np.testing.assert_allclose(ds[name][[0, 2]], fewer[name])
    empty = test(by_head([[1.0, NAN], [NAN, 1.0]]))
    assert all(np.isnan(empty[name]).all() for name in set(ds.data_vars) - {"n"})


def test_n_counts_the_problems_of_each_cell() -> None:
    np.testing.assert_array_equal(bootstrap(by_head([*gappy(), [NAN] * 4])).n, [6, 5, 4, 6])


@pytest.mark.parametrize("test", BOTH)
@pytest.mark.parametrize("n", [9, 30])
def test_seeds_reproduce(test: Any, n: int) -> None:
    x = by_head(normal(n, 4) + 0.2)
    xr.testing.assert_identical(test(x, seed=5, draws=300), test(x, seed=5, draws=300))
    other = test(x, seed=6, draws=300)
    exact = test is sign_flip and n == 9
    assert other.identical(test(x, seed=5, draws=300)) == exact


@pytest.mark.parametrize("test", BOTH)
@pytest.mark.parametrize("n", [9, 30])
def test_blocks_do_not_change_the_answer(
    test: Any, n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = by_head(normal(n, 5) + 0.2)
    whole = test(x, draws=300)
    monkeypatch.setattr(stats, "NUMBERS", 64)
    xr.testing.assert_allclose(test(x, draws=300), whole, rtol=1e-12)


@pytest.mark.parametrize("test", BOTH)
@pytest.mark.parametrize("dtype", ["float16", "float32", "int64"])
def test_any_dtype_is_read_as_float64(test: Any, dtype: str) -> None:
    x = by_head((300 * normal(300, 3)).astype(dtype))  # whose sum of squares float16 cannot hold
    ds = test(x, draws=200)
    xr.testing.assert_identical(ds, test(x.astype(np.float64), draws=200))
    assert {str(ds[name].dtype) for name in set(ds.data_vars) - {"n"}} == {"float64"}


@pytest.mark.parametrize("test", BOTH)
def test_labels_of_cells_are_kept_and_those_of_problems_are_not(test: Any) -> None:
    x = xr.DataArray(
        normal(2, 5, 3),
        dims=("layer", "item", "head"),
        coords={
            "layer": [4, 7],
            "item": list("abcde"),
            "length": ("item", range(5)),
            "kind": ("head", ["a", "b", "c"]),
            "model": "gpt2",
        },
        name="loss",
        attrs={"units": "nats"},
    )
    ds = test(x, dim="item")
    assert dict(ds.sizes) == {"layer": 2, "head": 3}
    assert set(ds.coords) == {"layer", "kind", "model"}
    assert all(ds[name].dims == ("layer", "head") and not ds[name].attrs for name in ds.data_vars)
    moved = test(x.transpose("item", "head", "layer"), dim="item")
    xr.testing.assert_allclose(moved.transpose("layer", "head"), ds)
    xr.testing.assert_identical(test(x.chunk(item=2), dim="item"), ds)


@pytest.mark.parametrize("test", BOTH)
def test_problems_may_be_the_only_dim(test: Any) -> None:
    values = np.array([0.3, NAN, 0.1, 0.6, -0.2])
    ds = test(xr.DataArray(values, dims="problem"))
    assert dict(ds.sizes) == {}
    xr.testing.assert_identical(ds, test(by_head(values[:, None])).isel(head=0))


@pytest.mark.parametrize("test", BOTH)
def test_what_cannot_be_tested_is_refused(test: Any) -> None:
    x = by_head(normal(5, 2))
    with pytest.raises(InputError, match=r"must be a DataArray, got ndarray\. Name its dims"):
        test(x.values)
    with pytest.raises(InputError, match=r"no dim 'item', only \('problem', 'head'\)\. Name"):
        test(x, dim="item")
    with pytest.raises(InputError, match=r"1 problems that are not all NaN, of 5, .* Give more"):
        test(x.where(x.problem == 2))
    with pytest.raises(InputError, match=r"infinite in 1 of 10 places\. Make these NaN"):
        test(x.where((x.problem != 2) | (x["head"] != 1), -math.inf))
    for draws in (0, -3):
        with pytest.raises(InputError, match=f"draws must be at least 1, got {draws}. Give"):
            test(x, draws=draws)


@pytest.mark.parametrize("level", [0.0, 1.0, 95.0, -0.5, NAN])
def test_levels_are_shares(level: float) -> None:
    with pytest.raises(InputError, match=f"between 0 and 1, got {level}. Give 0.95"):
        bootstrap(by_head(normal(5, 2)), level=level)


def test_methods_are_named() -> None:
    unknown: Any = "bca"
    with pytest.raises(InputError, match=r"no method 'bca'. Choose one of \('percentile', 'BCa'"):
        bootstrap(by_head(normal(5, 2)), method=unknown)


# agreement


def scores(values: Any, **coords: Any) -> xr.DataArray:
    return xr.DataArray(values, dims=("layer", "head"), coords=coords)


def loop_spearman(a: list[float], b: list[float]) -> float:
    ranks = [[sum((w < v) + (w == v) / 2 for w in side) for v in side] for side in (a, b)]
    return float(scipy.stats.pearsonr(*ranks).statistic)


def test_agreement_is_the_correlation_of_ranks() -> None:
    a, b = np.round(normal(4, 5), 1), normal(4, 5, seed=1) + normal(4, 5)
    assert agreement(scores(a), scores(b)) == pytest.approx(
        loop_spearman(a.ravel().tolist(), b.ravel().tolist())
    )
    assert agreement(scores(a), scores(np.exp(a))) == pytest.approx(1.0)
    assert agreement(scores(a), scores(b)) == pytest.approx(agreement(scores(b), scores(a)))


def test_agreement_goes_by_label_not_by_place() -> None:
    a = scores(normal(2, 3), layer=[0, 1])
    assert agreement(a, a.T) == pytest.approx(1.0)
    assert agreement(a, scores(a.values)) == pytest.approx(1.0)  # without labels, from 0
    for other in (a.isel(layer=[1, 0]), a.assign_coords(layer=[4, 5])):
        labels = other.layer.values.tolist()
        with pytest.raises(
            InputError, match=r"differ in layer: \[0, 1\] and .*join='inner'"
        ) as seen:
            agreement(a, other)
        assert str(labels) in str(seen.value)
    with pytest.raises(InputError, match=r"differ in head: \[0, 1, 2\] and \[0, 1\]\. Take"):
        agreement(a, a.isel(head=[0, 1]))


def test_agreement_leaves_out_heads_that_lack_a_score() -> None:
    a, b = normal(3, 4), normal(3, 4, seed=1)
    kept = agreement(scores(a.reshape(-1, 1)[2:]), scores(b.reshape(-1, 1)[2:]))
    a[0, 0] = b[0, 1] = NAN
    assert agreement(scores(a), scores(b)) == pytest.approx(kept)


def test_agreement_is_nan_where_ranks_say_nothing() -> None:
    a = scores([[1.0, 2.0, 3.0]])
    assert math.isnan(agreement(a, scores([[1.0, NAN, 2.0]])))
    assert math.isnan(agreement(a, scores([[2.0, 2.0, 2.0]])))
    assert math.isnan(agreement(scores([[2.0, 2.0, 2.0]]), a))
    assert math.isnan(agreement(a, scores([[NAN, NAN, NAN]])))


def test_agreement_reads_any_dtype() -> None:
    a, b = (scores(normal(3, 4, seed=seed).astype(np.float16)) for seed in (0, 1))
    assert agreement(a, b) == agreement(a.astype(np.float64), b.astype(np.float64))


def test_agreement_takes_scores_of_heads_only() -> None:
    a = scores(normal(2, 3))
    with pytest.raises(InputError, match=r"dims layer and head, got \('problem', 'layer', 'head'"):
        agreement(a, a.expand_dims(problem=2))
    array: Any = a.values
    with pytest.raises(InputError, match=r"layer and head, got ndarray\. Reduce"):
        agreement(array, a)
