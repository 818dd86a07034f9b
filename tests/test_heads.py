"""Head statistics: known values, and naive loops that read like the definitions."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

from recipes import heads

N = 6
IDENTITY = np.eye(N)
PREVIOUS = np.eye(N)[[0, 0, 1, 2, 3, 4]]
TO_FIRST = np.eye(N)[[0] * N]
UNIFORM = np.tril(np.ones((N, N))) / np.arange(1, N + 1)[:, None]
SHAPES = {"identity": IDENTITY, "previous": PREVIOUS, "first": TO_FIRST, "uniform": UNIFORM}

HARMONIC = sum(1 / i for i in range(1, N + 1)) / N  # mean of 1/i, i = 1 … 6
KNOWN: list[tuple[Callable[..., Any], dict[str, Any], dict[str, float]]] = [
    (heads.entropy, {}, {"identity": 0, "previous": 0, "uniform": math.log(720) / 6}),
    (heads.entropy, {"normalised": True}, {"identity": 0, "first": 0, "uniform": 1}),
    (heads.effective_keys, {}, {"identity": 1, "first": 1, "uniform": 3.5}),
    (heads.concentration, {}, {"identity": 1, "previous": 1, "uniform": HARMONIC}),
    (heads.concentration, {"kind": "hhi"}, {"identity": 1, "first": 1, "uniform": HARMONIC}),
    (heads.distance, {}, {"identity": 0, "previous": 5 / 6, "first": 2.5, "uniform": 1.25}),
    (heads.distance, {"relative": True}, {"identity": 0, "first": 2, "uniform": 1}),
    (heads.sink, {}, {"identity": 1 / 6, "first": 1, "previous": 2 / 6, "uniform": HARMONIC}),
    (heads.sink, {"position": 4}, {"identity": 1 / 2, "previous": 1 / 2, "first": 0}),
    (heads.previous_token, {}, {"identity": 0, "previous": 1, "first": 1 / 5}),
    (
        heads.previous_token,
        {"convention": "transformerlens"},
        {"identity": 0, "previous": 5 / 6, "first": 1 / 6},
    ),
]


@pytest.mark.parametrize(("metric", "options", "expected"), KNOWN)
def test_known_matrices_have_their_closed_forms(
    metric: Callable[..., Any], options: dict[str, Any], expected: dict[str, float]
) -> None:
    got = {shape: float(metric(SHAPES[shape], **options)) for shape in expected}
    assert got == pytest.approx(expected)


def test_a_perfect_induction_head_scores_one_here_and_under_a_half_in_transformerlens() -> None:
    n = 20
    tokens = [0, *range(1, n + 1), *range(1, n + 1)]  # BOS, then n tokens twice
    p = np.eye(2 * n + 1)
    for i in range(n + 1, 2 * n + 1):
        p[i] = np.eye(2 * n + 1)[i - n + 1]
    assert float(heads.induction(p, tokens)) == 1.0
    assert float(heads.induction(p, tokens, convention="transformerlens")) == n / (2 * n + 1)
    assert float(heads.duplicate_token(p, tokens)) == 0.0


def test_induction_sums_over_all_earlier_copies() -> None:
    p = np.eye(7)
    p[6] = [0, 0.5, 0, 0.5, 0, 0, 0]  # 9 came at 0, 2 and 6: half of it after each
    assert float(heads.induction(p, [9, 1, 9, 2, 3, 4, 9])) == pytest.approx((0 + 1.0) / 2)
    assert float(heads.duplicate_token(p, [1, 9, 2, 9, 3, 4, 9])) == pytest.approx((0 + 1.0) / 2)


def test_only_transformerlens_counts_the_query_itself_as_an_induction_target() -> None:
    p, tokens = np.eye(3), [5, 7, 7]  # the second 7 follows its earlier copy: j + 1 = i
    assert math.isnan(float(heads.induction(p, tokens)))
    assert float(heads.induction(p, tokens, convention="transformerlens")) == pytest.approx(1 / 3)


def test_a_text_without_repeats_has_no_induction_or_duplicate_score() -> None:
    assert math.isnan(float(heads.induction(UNIFORM, range(N))))
    assert math.isnan(float(heads.duplicate_token(UNIFORM, range(N))))


def test_one_token_problems_are_nan_where_nothing_can_be_asked() -> None:
    p = np.ones((1, 1))
    undefined = [
        heads.entropy(p, normalised=True),
        heads.distance(p, relative=True),
        heads.previous_token(p),
        heads.induction(p, [3]),
        heads.duplicate_token(p, [3]),
        heads.sink(p, 1),
    ]
    assert np.isnan(undefined).all()
    assert float(heads.entropy(p)) == 0.0
    assert float(heads.effective_keys(p)) == 1.0
    assert float(heads.sink(p)) == 1.0


# The definitions, as loops over one matrix p with rows at q, columns at k holding tokens x.


def rows_of(p: Any, q: Any) -> list[int]:
    return [r for r in range(len(q)) if q[r] >= 0 and any(p[r] != 0)]


def mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def loop_entropy(p: Any, q: Any, k: Any, x: Any) -> list[float]:
    return [-sum(a * math.log(a) for a in p[r] if a > 0) for r in rows_of(p, q)]


def seen(r: int, q: Any, k: Any) -> list[int]:
    return [c for c in range(len(k)) if 0 <= k[c] <= q[r]]


def loop_normalised(p: Any, q: Any, k: Any, x: Any) -> list[float]:
    rows = rows_of(p, q)
    each = zip(rows, loop_entropy(p, q, k, x), strict=True)
    return [h / math.log(len(seen(r, q, k))) for r, h in each if len(seen(r, q, k)) > 1]


def loop_distance(p: Any, q: Any, k: Any, x: Any) -> list[float]:
    return [sum(p[r, c] * (q[r] - k[c]) for c in seen(r, q, k)) for r in rows_of(p, q)]


def loop_relative(p: Any, q: Any, k: Any, x: Any) -> list[float]:
    even = [mean([q[r] - k[c] for c in seen(r, q, k)]) for r in rows_of(p, q)]
    return [d / e for d, e in zip(loop_distance(p, q, k, x), even, strict=True) if e > 0]


def loop_sink(p: Any, q: Any, k: Any, x: Any) -> list[float]:
    column = list(k).index(2) if 2 in k else None
    return [] if column is None else [p[r, column] for r in rows_of(p, q) if q[r] >= 2]


def loop_previous(p: Any, q: Any, k: Any, x: Any) -> list[float]:
    at = {position: c for c, position in enumerate(k) if position >= 0}
    return [p[r, at[q[r] - 1]] for r in rows_of(p, q) if q[r] - 1 in at]


def targets(r: int, q: Any, k: Any, x: Any, step: int) -> list[int]:
    """Columns `step` after an earlier copy of row r's token, before row r itself."""
    at = {position: c for c, position in enumerate(k) if position >= 0}
    copies = [j for j in at if j < q[r] and q[r] in at and x[at[j]] == x[at[q[r]]]]
    return [at[j + step] for j in copies if j + step in at and j + step != q[r]]


def loop_duplicate(p: Any, q: Any, k: Any, x: Any, step: int = 0) -> list[float]:
    found = [(r, targets(r, q, k, x, step)) for r in rows_of(p, q)]
    return [sum(p[r, c] for c in columns) for r, columns in found if columns]


def loop_induction(p: Any, q: Any, k: Any, x: Any) -> list[float]:
    return loop_duplicate(p, q, k, x, step=1)


def tl_induction(p: Any, q: Any, k: Any, x: Any) -> list[float]:
    """TransformerLens' detect_head "mul" on a whole matrix, with its own index arithmetic."""
    n = int((k >= 0).sum())
    duplicate = np.tril(np.equal.outer(x[:n], x[:n]), -1)
    shifted = np.roll(duplicate, 1, axis=1)
    shifted[:, 0] = 0
    return [float((p[:n, :n] * np.tril(shifted)).sum() / p[:n, :n].sum())]


LOOPS: list[tuple[str, Callable[..., Any], Callable[..., list[float]]]] = [
    ("entropy", lambda p, x, **at: heads.entropy(p, **at), loop_entropy),
    ("normalised", lambda p, x, **at: heads.entropy(p, normalised=True, **at), loop_normalised),
    (
        "effective",
        lambda p, x, **at: heads.effective_keys(p, **at),
        lambda *a: [math.exp(h) for h in loop_entropy(*a)],
    ),
    (
        "max",
        lambda p, x, **at: heads.concentration(p, **at),
        lambda p, q, k, x: [max(p[r]) for r in rows_of(p, q)],
    ),
    (
        "hhi",
        lambda p, x, **at: heads.concentration(p, kind="hhi", **at),
        lambda p, q, k, x: [sum(a * a for a in p[r]) for r in rows_of(p, q)],
    ),
    ("distance", lambda p, x, **at: heads.distance(p, **at), loop_distance),
    ("relative", lambda p, x, **at: heads.distance(p, relative=True, **at), loop_relative),
    ("sink", lambda p, x, **at: heads.sink(p, 2, **at), loop_sink),
    ("previous", lambda p, x, **at: heads.previous_token(p, **at), loop_previous),
    ("duplicate", heads.duplicate_token, loop_duplicate),
    ("induction", heads.induction, loop_induction),
]


def random_case(seed: int, lengths: list[int], pad: int) -> dict[str, Any]:
    """Ragged problems (problem, head, query, key) padded at the end, tokens from a small set."""
    rng = np.random.default_rng(seed)
    size = max(lengths) + pad
    shape = (len(lengths), 2, size, size)
    p = np.tril(rng.exponential(size=shape) ** 3)
    position = np.tile(np.arange(size), (len(lengths), 1))
    position[position >= np.array(lengths)[:, None]] = -1
    real = (position >= 0)[:, None, :, None] & (position >= 0)[:, None, None, :]
    p = np.where(real, p / p.sum(-1, keepdims=True), 0.0)
    p[rng.random(shape[:3]) < 0.1] = 0.0  # rows that hold no attention at all
    return {"p": p, "position": position, "token": rng.integers(0, 3, (len(lengths), size))}


CASES = st.builds(
    random_case,
    st.integers(0, 2**32 - 1),
    st.lists(st.integers(1, 7), min_size=1, max_size=3),
    st.integers(0, 2),
)


@pytest.mark.parametrize(("name", "metric", "loop"), LOOPS, ids=[row[0] for row in LOOPS])
@settings(max_examples=40, deadline=None)
@given(case=CASES, last=st.integers(0, 5))
def test_metrics_equal_naive_loops_on_ragged_problems_and_on_their_last_rows(
    name: str, metric: Callable[..., Any], loop: Callable[..., Any], case: dict[str, Any], last: int
) -> None:
    rows = slice(-last, None) if 0 < last < case["p"].shape[-1] else slice(None)
    p, query, key, token = (
        case["p"][..., rows, :],
        case["position"][:, rows],
        *list(case.values())[1:],
    )
    own = [set(q[q >= 0]) & set(k) for q, k in zip(query, key, strict=True)]
    if (query >= 0).any() and not any(own):
        return
    got = metric(p, token, query_position=query, key_position=key)
    expected = [
        [mean(loop(p[b, h], query[b], key[b], token[b])) for h in range(2)] for b in range(len(p))
    ]
    np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(case=CASES)
def test_the_transformerlens_convention_equals_its_own_arithmetic(case: dict[str, Any]) -> None:
    at = {"query_position": case["position"], "key_position": case["position"]}
    got = heads.induction(case["p"], case["token"], convention="transformerlens", **at)
    for b, h in np.ndindex(got.shape):
        p = case["p"][b, h]
        if p.any():
            expected = tl_induction(
                p, at["query_position"][b], at["key_position"][b], case["token"][b]
            )
            assert got[b, h] == pytest.approx(expected[0])
        else:
            assert math.isnan(got[b, h])


def test_selected_rows_score_as_the_same_rows_of_the_whole_matrix() -> None:
    rng = np.random.default_rng(3)
    p = np.tril(rng.random((9, 9)))
    tokens = [0, 1, 2, 0, 1, 2, 0, 1, 2]
    for name, metric, loop in LOOPS:
        every_row = loop(p, range(9), range(9), tokens)
        last_four = every_row[-4:]  # each of the last four rows has an answer under every metric
        assert float(metric(p[-4:], tokens)) == pytest.approx(mean(last_four)), name


def test_a_row_whose_own_token_is_not_stored_is_left_out() -> None:
    p = np.array([[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]])  # rows 5 and 2, keys 0, 1, 2
    at: dict[str, Any] = {"query_position": [5, 2], "key_position": [0, 1, 2]}
    assert float(heads.duplicate_token(p, [4, 6, 4], **at)) == 0.0
    assert float(heads.duplicate_token(p[:, ::-1], [4, 6, 4], **at)) == 1.0


def test_keys_need_not_be_stored_in_order() -> None:
    case = random_case(5, [8], 0)
    mixed = np.random.default_rng(0).permutation(8)
    at: dict[str, Any] = {"query_position": np.arange(8), "key_position": mixed}
    for metric in (heads.induction, heads.duplicate_token):
        shuffled = metric(case["p"][..., mixed], case["token"][:, mixed], **at)
        np.testing.assert_allclose(shuffled, metric(case["p"], case["token"]))


@pytest.mark.parametrize("metric", [heads.duplicate_token, heads.induction])
def test_token_metrics_say_what_they_miss(metric: Callable[..., Any]) -> None:
    name = metric.__name__
    with pytest.raises(ValueError, match=rf"{name} needs token_id: \(…, key\) ids"):
        metric(UNIFORM)
    with pytest.raises(ValueError, match="or a DataArray with that coord"):
        metric(xr.DataArray(UNIFORM, dims=("query", "key")))
    with pytest.raises(ValueError, match="metrics need the keys of the query positions"):
        metric(UNIFORM[-2:, :3], [1, 2, 1], query_position=[4, 5])
    with pytest.raises(ValueError, match=r"p is \(6, 6\), token_id is \(2,\)"):
        metric(UNIFORM, [1, 2])


def test_options_outside_their_choices_are_refused() -> None:
    with pytest.raises(ValueError, match="kind is 'max' or 'hhi', got 'gini'"):
        heads.concentration(UNIFORM, kind="gini")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="counted from 0, got -1"):
        heads.sink(UNIFORM, -1)
    for metric in (heads.previous_token, heads.duplicate_token, heads.induction):
        with pytest.raises(ValueError, match="'targets' or 'transformerlens', got 'abs'"):
            metric(UNIFORM, convention="abs")  # type: ignore[arg-type]


def test_rank_orders_heads_and_leaves_out_nan() -> None:
    rows = heads.rank(np.array([[0.1, np.nan], [0.7, 0.1]]))
    assert rows == [(1, 0, 0.7, "L1H0"), (0, 0, 0.1, "L0H0"), (1, 1, 0.1, "L1H1")]
    assert [row.label for row in heads.rank(np.eye(2), descending=False)][:2] == ["L0H1", "L1H0"]
    assert len(heads.rank(np.zeros((5, 8)))) == 10
    assert len(heads.rank(np.zeros((5, 8)), top=None)) == 40


def test_rank_averages_problems_without_nan_and_reads_labels() -> None:
    values = np.array([[[1.0, 0.0]], [[np.nan, 0.5]]])
    labelled = xr.DataArray(
        values, dims=("problem", "layer", "head"), coords={"layer": [7], "head": [2, 5]}
    ).transpose("head", "problem", "layer")
    expected = [(7, 2, 1.0, "L7H2"), (7, 5, 0.25, "L7H5")]
    assert heads.rank(labelled) == expected
    assert [row.score for row in heads.rank(values)] == [1.0, 0.25]


def test_rank_averages_half_precision_in_float32() -> None:
    scores = np.full((7473, 1, 1), 0.7, dtype=np.float16)
    assert heads.rank(scores)[0].score == pytest.approx(float(np.float16(0.7)), rel=1e-5)


def test_rank_says_which_dims_it_takes() -> None:
    with pytest.raises(ValueError, match=r"perhaps problem, got \('layer', 'head', 'key'\)"):
        heads.rank(xr.DataArray(np.zeros((1, 1, 2)), dims=("layer", "head", "key")))
    with pytest.raises(ValueError, match=r"\(…, layer, head\) scores, got shape \(3,\)"):
        heads.rank(np.zeros(3))
