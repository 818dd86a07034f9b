"""Where rows and columns sit, what is padding, which tokens they hold, and what is refused."""

from typing import Any

import numpy as np
import pytest
import xarray as xr

from recipes import heads
from tests.matrices import ALL, HEADS, TOKEN, arguments, causal, store


@pytest.mark.parametrize("name", HEADS)
def test_padding_and_failed_problems_change_nothing(name: str) -> None:
    lengths = [4, 0, 9, 1]
    p = store(lengths, n=11)
    got = HEADS[name](p)
    args, at = arguments(name, p)
    np.testing.assert_allclose(HEADS[name](p.values, *args, **at), got)
    for problem, length in enumerate(lengths):
        if length == 0:
            assert np.isnan(got[problem]).all()
            continue
        own = slice(length)
        tokens = [p["token_id"].values[problem, own]] if name in TOKEN else []
        alone = HEADS[name](p.values[problem, :, :, own, own], *tokens)
        np.testing.assert_allclose(got[problem], alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ALL)
def test_what_a_problem_that_is_not_done_holds_is_not_measured(name: str) -> None:
    whole = store([5, 5, 5], n=5)
    written_but_not_done = whole.assign_coords(status=("problem", np.array([1, 0, 1], np.uint8)))
    for p in (written_but_not_done, written_but_not_done.chunk(problem=1)):
        got = ALL[name](p).compute()
        assert (got[1] == -1 if name == "hub_position" else np.isnan(got[1])).all()
        np.testing.assert_array_equal(got[[0, 2]], ALL[name](whole)[[0, 2]])


@pytest.mark.parametrize("name", HEADS)
def test_nan_in_an_existing_row_shows(name: str) -> None:
    p = store([5], n=5).assign_coords(token_id=(("problem", "key"), np.zeros((1, 5), np.int32)))
    p[0, 0, 0, 4, :] = np.nan
    assert np.isnan(HEADS[name](p)[0, 0, 0])


def test_queries_are_the_last_of_the_keys_unless_told() -> None:
    p = causal(np.random.default_rng(1), 8, 8)
    last: dict[str, Any] = {"query_position": [5, 6, 7], "key_position": np.arange(8)}
    np.testing.assert_array_equal(heads.distance(p[-3:]), heads.distance(p[-3:], **last))
    shifted: dict[str, Any] = {"query_position": [15, 16, 17], "key_position": np.arange(10, 18)}
    np.testing.assert_array_equal(
        heads.distance(p[-3:], key_position=np.arange(10, 18)), heads.distance(p[-3:], **shifted)
    )
    labelled = xr.DataArray(p[-3:], dims=("query", "key"))
    np.testing.assert_array_equal(heads.distance(labelled), heads.distance(p[-3:]))
    np.testing.assert_array_equal(
        heads.distance(labelled, key_position=np.arange(10, 18)), heads.distance(p[-3:], **shifted)
    )


def test_arguments_go_before_the_coords_of_a_store() -> None:
    p = store([5, 5], n=5)
    key = p["key_position"] + 1
    bare = p.drop_vars(["query_position", "key_position"])
    got = heads.sink(p, 1, query_position=p["query_position"] + 1, key_position=key)
    xr.testing.assert_allclose(got, heads.sink(bare, 0))
    same = heads.sink(p, 1, query_position=p["query_position"].values + 1, key_position=key.values)
    xr.testing.assert_allclose(got, same)


def test_tokens_of_a_store_need_not_be_repeated() -> None:
    p = store([6, 4], n=6)
    for metric in TOKEN.values():
        xr.testing.assert_identical(metric(p), metric(p, p["token_id"]))
        bare = p.drop_vars("token_id")
        np.testing.assert_array_equal(metric(bare, p["token_id"].values), metric(p))


def test_one_row_of_tokens_serves_all_problems() -> None:
    p = store([6, 6], n=6).drop_vars("token_id")
    tokens = np.array([1, 2, 1, 2, 1, 2])
    for metric in TOKEN.values():
        expected = metric(p.values, np.stack([tokens, tokens]))
        np.testing.assert_allclose(metric(p.values, tokens), expected)
        np.testing.assert_allclose(metric(p, xr.DataArray(tokens, dims="key")), expected)


@pytest.mark.parametrize("name", HEADS)
def test_the_last_rows_of_a_store_equal_the_last_rows_of_its_matrices(name: str) -> None:
    p = store([9, 9], n=9)
    args, _ = arguments(name, p)
    np.testing.assert_allclose(
        HEADS[name](p.isel(query=slice(-6, None))), HEADS[name](p.values[..., -6:, :], *args)
    )


# ------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize("name", [name for name in ALL if name != "composite"])
def test_what_is_no_matrix_is_refused(name: str) -> None:
    tokens: list[Any] = [[1]] if name in TOKEN else []
    with pytest.raises(TypeError, match="takes a tensor, an array or a DataArray, got list"):
        ALL[name]([[1.0]], *tokens)
    with pytest.raises(ValueError, match=r"needs p as \(…, query, key\), got shape \(3,\)"):
        ALL[name](np.zeros(3), *tokens)
    with pytest.raises(ValueError, match=r"got \('query', 'source'\). Rename what stands for key"):
        ALL[name](xr.DataArray(np.eye(2), dims=("query", "source")), *tokens)


def test_more_queries_than_keys_must_say_where_they_are() -> None:
    message = "got 3 queries but only 2 keys, so the queries cannot be the last of the keys. Say"
    p = np.ones((3, 2))
    with pytest.raises(ValueError, match=message):
        heads.entropy(p)
    with pytest.raises(ValueError, match=message):
        heads.entropy(xr.DataArray(p, dims=("query", "key")))


def test_positions_of_another_shape_are_refused() -> None:
    p = np.ones((2, 3, 4, 4))
    with pytest.raises(
        ValueError, match=r"query_position must be \(4,\).* is \(2, 3, 4, 4\), q.* is \(3, 4\)"
    ):
        heads.entropy(p, query_position=np.zeros((3, 4)))
    with pytest.raises(
        ValueError, match=r"key_position must be \(4,\), or \(…, 4\) after p's first"
    ):
        heads.entropy(p, key_position=np.arange(5))


def test_labels_of_other_dims_or_other_problems_are_refused() -> None:
    p = store([5, 5], n=5)
    with pytest.raises(
        ValueError, match=r"token_id needs dims \('problem', 'key'\), got \('layer', 'key'\)"
    ):
        heads.induction(p, xr.DataArray(np.zeros((2, 5), int), dims=("layer", "key")))
    with pytest.raises(ValueError, match="problem"):
        heads.induction(p[:1], p["token_id"])
    with pytest.raises(ValueError, match="problem"):
        heads.induction(p, p["token_id"][::-1])


@pytest.mark.parametrize("name", ["entropy", "flow"])
def test_matrices_cut_into_chunks_are_refused(name: str) -> None:
    p = store([6, 6], n=6)
    message = rf"{name} needs whole matrices, but p is chunked along query. Use p.chunk"
    with pytest.raises(ValueError, match=message):
        ALL[name](p.chunk(query=3))
    with pytest.raises(ValueError, match="chunked along query and key"):
        ALL[name](p.chunk(query=3, key=2))


@pytest.mark.parametrize("lazy", [False, True])
def test_a_store_without_the_queries_own_keys_cannot_compare_tokens(lazy: bool) -> None:
    p = store([6, 6], n=6).isel(query=slice(4, None), key=slice(3))
    for metric in TOKEN.values():
        with pytest.raises(ValueError, match="no query position is among the key positions"):
            metric(p.chunk() if lazy else p)
