"""Metrics stored while a capture runs, against the same metrics of what it would have stored."""

import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr

import probe
from probe import demos
from probe.errors import InputError, StoreError
from probe.model import Model
from recipes import calibrated, flow, heads
from recipes.ablation import Ablate

PROBLEMS = [ids[:n] for n in (5, 30, 1, 12) for ids in demos.repeated(20, 3, seed=n)]
quietly: dict[str, Any] = {"progress": False}
SEEN: set[torch.dtype] = set()


@pytest.fixture(scope="module")
def model() -> Any:
    with probe.load("demo-llama", device="cpu") as loaded:
        yield loaded


EACH: dict[str, Any] = {
    "entropy": heads.entropy,
    "relative": partial(heads.entropy, normalised=True),
    "induction": heads.induction,
    "duplicate": heads.duplicate_token,
    "far": heads.distance,
}
SQUARE: dict[str, Any] = {"flow": flow.flow, "hub_position": flow.hub_position, "hubs": flow.hub}
KEYED: dict[str, Any] = {"lift": calibrated.lift}


@pytest.mark.parametrize(
    ("metrics", "options"),
    [
        (EACH, {}),
        (EACH, {"queries": "last:6", "layers": [1, 0], "heads": [3, 0]}),
        (SQUARE, {}),
        (EACH | SQUARE, {"max_new_tokens": 3}),
        (EACH, {"interventions": [Ablate([(1, 2)])]}),
    ],
)
def test_they_are_those_of_the_stored_patterns(
    model: Model, tmp_path: Path, metrics: dict[str, Any], options: dict[str, Any]
) -> None:
    whole = probe.capture(model, PROBLEMS, tmp_path / "w", dtype="float32", **options, **quietly)
    ds = probe.capture(model, PROBLEMS, tmp_path / "r", reduce=metrics, **options, **quietly)
    assert set(ds.data_vars) == {"length", "loss", *metrics}
    for name, metric in metrics.items():
        told = {"token_id": whole.token_id} if name in ("induction", "duplicate") else {}
        known = metric(whole.pattern, **told)
        assert ds[name].dims == ("problem", "layer", "head")
        np.testing.assert_allclose(ds[name], known, rtol=2e-6, atol=1e-7, err_msg=name)
        assert ds[name].layer.values.tolist() == whole.layer.values.tolist()
    assert ds.hub_position.dtype == "int64" if "hub_position" in metrics else True
    np.testing.assert_allclose(ds.loss, whole.loss, rtol=1e-6)


def test_what_each_row_or_key_has_is_padded(model: Model, tmp_path: Path) -> None:
    def received(p: torch.Tensor) -> torch.Tensor:
        return p.sum(-2)

    def most(p: torch.Tensor) -> torch.Tensor:
        return p.amax(-1)

    metrics = KEYED | {"received": received, "most": most}
    whole = probe.capture(model, PROBLEMS, tmp_path / "w", dtype="float32", **quietly)
    ds = probe.capture(model, PROBLEMS, tmp_path / "r", reduce=metrics, **quietly)
    known = calibrated.lift(whole.pattern).transpose(*ds.lift.dims)
    np.testing.assert_allclose(ds.lift, known, rtol=2e-6, atol=1e-7)
    assert ds.received.dims[-1] == "key"
    assert ds.most.dims[-1] == "query"
    for n, ids in enumerate(PROBLEMS):
        own, p = ds.isel(problem=n), whole.pattern[n]
        np.testing.assert_allclose(
            own.received[..., : len(ids)], p.sum("query")[..., : len(ids)], 1e-6
        )
        np.testing.assert_allclose(own.most[..., : len(ids)], p.max("key")[..., : len(ids)])
        assert own.received[..., len(ids) :].isnull().all()
        assert own.most[..., len(ids) :].isnull().all()


def test_a_run_goes_on_and_is_told_apart(model: Model, tmp_path: Path) -> None:
    path = tmp_path / "r"

    def failing(p: torch.Tensor) -> torch.Tensor:
        if p.shape[2] == 12:
            raise RuntimeError("it cannot")
        return p.amax((-1, -2))

    ds = probe.capture(model, PROBLEMS, path, reduce={"most": failing}, **quietly)
    failed = ds.status.values == 2
    assert failed.tolist() == [len(ids) == 12 for ids in PROBLEMS]
    assert ds.error.values[failed].tolist() == ["RuntimeError: it cannot"] * int(failed.sum())
    assert ds.most.isel(problem=failed).isnull().all()
    assert not ds.most.isel(problem=~failed).isnull().any()
    again = probe.capture(model, PROBLEMS, path, reduce={"most": failing}, **quietly)
    xr.testing.assert_identical(again.load(), ds.load())
    with pytest.raises(StoreError, match="most"):
        probe.capture(model, PROBLEMS, path, reduce={"most": heads.entropy}, **quietly)
    with pytest.raises(StoreError, match="reduce"):
        probe.capture(model, PROBLEMS, path, dtype="float32", **quietly)
    assert probe.verify(path) == []


def test_the_plan_says_what_is_kept(model: Model) -> None:
    todo = probe.plan(model, PROBLEMS, reduce={"entropy": heads.entropy, "flow": flow.flow})
    assert todo.bytes == todo.stored == len(PROBLEMS) * 2 * 4 * 2 * 4
    assert "of which entropy, flow are kept: 768 B" in str(todo)
    todo = probe.plan(model, PROBLEMS, reduce="moments")
    assert todo.bytes == 2 * 4 * 30 * 30 * 8
    assert "of which mean and spread are kept: 57.6 kB, in memory too" in str(todo)


def test_half_precision_is_computed_wide(tmp_path: Path) -> None:
    def most(p: torch.Tensor) -> torch.Tensor:
        SEEN.add(p.dtype)
        return p.amax((-1, -2)).double()

    def brief(p: torch.Tensor) -> torch.Tensor:
        return p.amax((-1, -2)).bfloat16()

    with probe.load("demo-llama", device="cpu", dtype="bfloat16") as half:
        metrics = {"most": most, "brief": brief}
        ds = probe.capture(half, PROBLEMS, tmp_path / "r", reduce=metrics, **quietly)
    assert {torch.float32} == SEEN
    np.testing.assert_allclose(ds.brief, ds.most, rtol=2**-8)
    assert ds.most.dtype == "float64"


def test_nothing_but_what_was_tried_is_stored(model: Model, tmp_path: Path) -> None:
    def changing(p: torch.Tensor) -> torch.Tensor:
        return p.amax((-1, -2)) if p.shape[-1] < 9 else p.amax(-1)

    ds = probe.capture(model, PROBLEMS, tmp_path / "r", reduce={"most": changing}, **quietly)
    long = [len(ids) > 8 for ids in PROBLEMS]
    assert (ds.status.values == 2).tolist() == long
    assert "changing gave (1, 4, 30), not (1, 4)" in " ".join(ds.error.values.tolist())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"reduce": "mean"},
            "reduce='mean'. Give 'moments', metrics as {'entropy': heads.entropy}",
        ),
        ({"reduce": {}}, "reduce={}. Give 'moments', metrics as"),
        ({"reduce": {"an entropy": len}}, "names a metric 'an entropy'. Give a name like"),
        ({"reduce": {"pattern": len}}, "names a metric 'pattern'. Give a name like"),
        ({"reduce": {"token": heads.entropy}}, "names a metric 'token'. Give a name like"),
        ({"reduce": {"e": "heads.entropy"}}, "reduce={'e': 'heads.entropy'} is no function."),
        ({"reduce": {"n": np.cov}}, "the metric 'n' fails on a pattern of 8 tokens, a tensor"),
        (
            {"reduce": {"n": len}},
            "the metric 'n' makes int of a pattern (2, 3, 5, 8). It must give a tensor",
        ),
        ({"reduce": {"n": torch.isnan}}, "the metric 'n' makes (2, 3, 5, 8) of a pattern"),
        (
            {"reduce": {"n": lambda p: p.amax((-1, -2)).half()}, "sites": ("pattern", "z")},
            "reduce= is for the pattern, not for pattern, z.",
        ),
        ({"reduce": {"n": lambda p: p.amax((-1, -2)) > 0}}, "the metric 'n' gives torch.bool."),
        (
            {"reduce": {"c": flow.composite}},
            "the metric 'c' makes another number of a head when it is alone.",
        ),
        (
            {"reduce": {"share": lambda p: p.sum((-1, -2)) / p.sum((0, 1, 2, 3))}},
            "the metric 'share' makes another number of a head when it is alone.",
        ),
        (
            {"reduce": {"c": lambda p: p.clamp_(max=0.5).sum((-1, -2))}},
            "changes the pattern that it",
        ),
        (
            {"reduce": {"e": heads.entropy}, "dtype": "uint8"},
            "dtype='uint8' with reduce=: what is kept is float32. Leave it.",
        ),
        (
            {"reduce": {"d": heads.duplicate_token}, "queries": "last:1", "keys": "first:1"},
            "the metric 'd' compares tokens, and of problem '0' no row that is selected has its",
        ),
        (
            {"reduce": {"s": partial(np.sum, where=object())}},
            "the metric 's' fails on a pattern of 8 tokens",
        ),
        (
            {"reduce": {"flow": flow.flow}, "queries": "last:2"},
            "the metric 'flow' needs square blocks, and of problem '0' 2 rows and 5 columns are "
            "selected. Select the same queries and keys.",
        ),
    ],
)
def test_what_is_no_metric_is_refused(
    model: Model, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        probe.capture(model, PROBLEMS, tmp_path / "r", **options, **quietly)
    assert not (tmp_path / "r").exists()


def test_shards_of_metrics_are_whole_stores(model: Model, tmp_path: Path) -> None:
    for i in (1, 2):
        probe.capture(
            model, PROBLEMS, tmp_path / "p", reduce={"e": heads.entropy}, part=(i, 2), **quietly
        )
    once = probe.capture(model, PROBLEMS, tmp_path / "o", reduce={"e": heads.entropy}, **quietly)
    xr.testing.assert_equal(probe.open(tmp_path / "p").e.load(), once.e.load())


def test_metrics_are_told_apart_by_what_they_hold(model: Model, tmp_path: Path) -> None:
    def scaled(p: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
        return p.amax((-1, -2)) * by[2500]

    one, other = torch.ones(5000), torch.ones(5000)
    other[2500] = 2
    options: dict[str, Any] = {"progress": False}
    first = {"s": partial(scaled, by=one)}
    ds = probe.capture(model, PROBLEMS, tmp_path / "r", reduce=first, **options)
    with pytest.raises(StoreError, match="reduce"):
        probe.capture(
            model, PROBLEMS, tmp_path / "r", reduce={"s": partial(scaled, by=other)}, **options
        )
    again = probe.capture(model, PROBLEMS, tmp_path / "r", reduce=first, **options)
    xr.testing.assert_identical(again.load(), ds.load())


def test_what_a_partial_binds_is_kept(model: Model, tmp_path: Path) -> None:
    at = list(range(1, 41))
    bound = partial(heads.sink, key_position=at, query_position=at)
    one = [PROBLEMS[3][:5]]

    def sink(p: torch.Tensor, key_position: torch.Tensor) -> torch.Tensor:
        return p[..., key_position.argmin()].mean(-1)

    with pytest.raises(InputError, match="the metric 's' fails on"):
        probe.capture(model, one, tmp_path / "r", reduce={"s": bound}, **quietly)
    chosen = partial(sink, key_position=torch.tensor([1, 0, 2, 3, 4]))
    ds = probe.capture(model, one, tmp_path / "p", reduce={"s": chosen}, **quietly)
    whole = probe.capture(model, one, tmp_path / "w", dtype="float32", **quietly)
    np.testing.assert_allclose(ds.s, whole.pattern[..., 1].mean("query"), rtol=1e-6)


def test_rows_of_square_metrics_are_rows(model: Model, tmp_path: Path) -> None:
    def most(p: torch.Tensor) -> torch.Tensor:
        if p.shape[-1] != p.shape[-2]:
            raise ValueError("square blocks only")
        return p.amax(-1)

    ds = probe.capture(model, PROBLEMS, tmp_path / "r", reduce={"most": most}, **quietly)
    assert ds.most.dims == ("problem", "layer", "head", "query")


@pytest.mark.parametrize("how", ["removed", "emptied", "changed"])
def test_whole_numbers_that_are_lost_are_missed(model: Model, tmp_path: Path, how: str) -> None:
    path, metrics = tmp_path / "r", {"hub": flow.hub_position}
    known = probe.capture(model, PROBLEMS, path, reduce=metrics, **quietly).load()
    (shard,) = [file for file in (path / "hub" / "c").rglob("*") if file.is_file()]
    data = shard.read_bytes()
    if how == "removed":
        shard.unlink()
    else:
        shard.write_bytes(b"" if how == "emptied" else bytes([data[0] ^ 64]) + data[1:])
    with pytest.raises(StoreError, match="is damaged: hub/c/0"):
        probe.open(path).hub.load()
    (found,) = probe.verify(path, repair=True)
    assert len(found.problems) == len(PROBLEMS)
    again = probe.capture(model, PROBLEMS, path, reduce=metrics, **quietly)
    xr.testing.assert_identical(again.load(), known)
    lazy = probe.open(path, chunks="shards")
    assert lazy.hub.chunks is not None


def test_token_metrics_know_selected_keys(model: Model, tmp_path: Path) -> None:
    options: dict[str, Any] = {"queries": "last:2", "keys": slice(2, None), **quietly}
    some = [ids for ids in PROBLEMS if len(ids) > 4]
    whole = probe.capture(model, some, tmp_path / "w", dtype="float32", **options)
    metrics = {"induction": heads.induction, "duplicate": heads.duplicate_token}
    ds = probe.capture(model, some, tmp_path / "r", reduce=metrics, **options)
    for name, metric in metrics.items():
        known = metric(whole.pattern, token_id=whole.token_id)
        np.testing.assert_allclose(ds[name], known, rtol=2e-6, atol=1e-7)
        assert not ds[name].isnull().all()
