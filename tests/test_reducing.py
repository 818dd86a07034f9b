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
    seen = []

    def most(p: torch.Tensor) -> torch.Tensor:
        seen.append(p.dtype)
        return p.amax((-1, -2)).double()

    with probe.load("demo-llama", device="cpu", dtype="bfloat16") as half:
        ds = probe.capture(half, PROBLEMS, tmp_path / "r", reduce={"most": most}, **quietly)
    assert set(seen) == {torch.float32}
    assert ds.most.dtype == "float64"


def test_nothing_but_what_was_tried_is_stored(model: Model, tmp_path: Path) -> None:
    def changing(p: torch.Tensor) -> torch.Tensor:
        return p.amax((-1, -2)) if p.shape[-1] < 6 else p.amax(-1)

    ds = probe.capture(model, PROBLEMS, tmp_path / "r", reduce={"most": changing}, **quietly)
    long = [len(ids) > 5 for ids in PROBLEMS]
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
        ({"reduce": {"an entropy": len}}, "names a metric 'an entropy'. Name it like 'entropy'."),
        ({"reduce": {"pattern": len}}, "names a metric 'pattern'. Name it like"),
        ({"reduce": {"token": heads.entropy}}, "an array 'token' over"),
        ({"reduce": {"e": "heads.entropy"}}, "reduce={'e': 'heads.entropy'} is no function."),
        ({"reduce": {"n": np.cov}}, "the metric 'n' fails on a pattern of 5 tokens, a tensor"),
        (
            {"reduce": {"n": len}},
            "the metric 'n' makes int of a pattern (2, 3, 3, 5). It must give a tensor",
        ),
        ({"reduce": {"n": torch.isnan}}, "the metric 'n' makes (2, 3, 3, 5) of a pattern"),
        (
            {"reduce": {"n": lambda p: p.amax((-1, -2)).half()}, "sites": ("pattern", "z")},
            "reduce= is for the pattern, not for pattern, z.",
        ),
        ({"reduce": {"n": lambda p: p.amax((-1, -2)) > 0}}, "the metric 'n' gives torch.bool."),
        (
            {"reduce": {"c": flow.composite}},
            "the metric 'c' makes another number of a head when others are there.",
        ),
        (
            {"reduce": {"share": lambda p: p.sum((-1, -2)) / p.sum((0, 1, 2, 3))}},
            "the metric 'share' makes another number of a head when others are there.",
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
