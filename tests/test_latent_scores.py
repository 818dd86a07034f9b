import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr

import probe
from probe import schema, store
from probe.errors import InputError
from probe.schema import PARTS, Labels
from recipes import flow, latent
from recipes.latent_blocks import shifted
from recipes.latent_findings import Estimate, kind
from recipes.latent_scores import _permuted

N = 6
UNIFORM = np.tril(np.ones((N, N))) / np.arange(1, N + 1)[:, None]
PREVIOUS = np.eye(N)[[0, 0, 1, 2, 3, 4]]
HUB = np.eye(N)[[0] * N]
LATE = np.where(np.arange(N)[:, None] > 3, np.eye(N)[[3] * N], UNIFORM)


def of(*heads: np.ndarray, problems: int = 3) -> xr.Dataset:
    """A latent store of one layer whose heads have these blocks in every problem."""
    ds = latent.noise(problems=problems, layers=1, heads=len(heads))
    p = np.broadcast_to(np.stack(heads)[None, None], ds.pattern.shape)
    return ds.assign(pattern=(ds.pattern.dims, p.astype("float32")))


def test_closed_forms_of_the_documents_scores() -> None:
    found = latent.published(latent.aggregate(of(UNIFORM, PREVIOUS, HUB))).isel(layer=0)
    np.testing.assert_allclose(found.flow, [0.59166667, 5 / 6, 5 / 6], atol=1e-6)
    np.testing.assert_allclose(found.hub[[0, 2]], [0.59166667, 5.0], atol=1e-3)
    np.testing.assert_allclose(found.skip, [1 / 6, 0.0, 1 / 3], atol=1e-6)
    assert found.hub_position[2] == 0


def test_calibrated_scores_are_0_under_uniform_attention_and_1_at_best() -> None:
    scores = latent.scores(of(UNIFORM, PREVIOUS, HUB)).isel(layer=0, problem=0)
    np.testing.assert_allclose(scores.sequential, [0.0, 1.0, -0.472393], atol=1e-6)
    np.testing.assert_allclose(scores.long_range, [0.0, -1.5, 1.0], atol=1e-6)
    np.testing.assert_allclose(scores.hub[0, :4], 0.0, atol=1e-6)
    np.testing.assert_allclose(scores.hub[2, 0], 1.0, atol=1e-6)
    assert scores.hub[:, 4:].isnull().all()


def test_the_published_reading_is_the_artefact() -> None:
    ds = latent.noise(problems=20, layers=3, heads=5)
    moved = latent.block(ds, "published").values
    right = latent.block(ds).values
    for k in range(1, N):
        np.testing.assert_array_equal(moved[..., k, :k], right[..., k - 1, :k])
    assert (moved[..., 0, :] == 0).all()
    assert (moved[..., -1] == 0).all()
    found = latent.published(latent.aggregate(ds, "published"))
    assert (found.flow == 1.0).all()
    assert found.composite.max() <= 0.6
    assert (np.triu(shifted(right)) == 0).all()


@pytest.mark.parametrize("seed", range(3))
def test_on_noise_the_criteria_pass_and_no_calibrated_finding_survives(seed: int) -> None:
    ds = latent.noise(seed=seed)
    mean = latent.aggregate(ds)
    passed = [one.passed for one in latent.criteria(mean, latent.published(mean))]
    assert passed[:4] == [True] * 4
    found = latent.findings(latent.scores(ds), draws=300)
    assert not found.found.any()
    assert set(np.unique(found.type.values.astype(str))) <= {"uniform", "untyped"}
    assert float((found.p_hub < 0.05).mean()) < 0.1


def test_a_head_that_does_something_is_found_and_named() -> None:
    rng = np.random.default_rng(0)
    ds = latent.noise(problems=30, layers=1, heads=5)
    p = ds.pattern.values.astype("float64")
    for head, block in enumerate((PREVIOUS, HUB, LATE)):
        p[:, 0, head] = 0.7 * block + 0.3 * p[:, 0, head]
    p[..., 0, 0] = 1 - 1e-3 * rng.random(p.shape[:3])
    found = latent.findings(latent.scores(ds.assign(pattern=(ds.pattern.dims, p))), draws=300)
    assert found.type.values[0, :3].tolist()[:2] == ["previous", "mixed"]
    assert found.type.values[0, 2] == "hub(3)"
    assert found.found.values[0].tolist() == [True, True, True, False, False]
    assert found.hub_position.values[0, 1:3].tolist() == [0, 3]
    assert (found.p_hub_family.values[0, 1:3] < 1e-6).all()
    top = found.sel(score="hub").isel(layer=0)
    assert sorted(top["rank"].values[1:3].tolist()) == [1.0, 2.0]
    assert (found.low <= found["mean"] + 1e-6).where(found["mean"].notnull(), True).all()
    assert (found["mean"] <= found.high + 1e-6).where(found["mean"].notnull(), True).all()


def test_bootstrapped_means_and_ranks_are_those_of_a_plain_loop() -> None:
    scores = latent.scores(latent.noise(problems=7, layers=2, heads=3))
    found = latent.findings(scores, draws=200, top=2, seed=5)
    rng = np.random.default_rng(5)
    picked = rng.integers(0, 7, (200, 7))
    x = scores.sequential.values.reshape(7, -1)
    drawn = np.array([x[rows].mean(0) for rows in picked])
    ranks = np.array([[1 + sum(o > v for o in row) for v in row] for row in drawn])
    one = found.sel(score="sequential")
    np.testing.assert_allclose(one["mean"].values.ravel(), x.mean(0), atol=1e-6)
    low = np.quantile(drawn, 0.025, axis=0, method="nearest")
    np.testing.assert_allclose(one.low.values.ravel(), low, atol=1e-5)
    np.testing.assert_allclose(one.p_top.values.ravel(), (ranks <= 2).mean(0), atol=1e-9)
    parts = {name: found["mean"].sel(score=name) for name in ("sequential", "hub", "long_range")}
    wanted = 0.4 * parts["sequential"] + 0.4 * parts["hub"] + 0.2 * parts["long_range"]
    np.testing.assert_allclose(found["mean"].sel(score="composite"), wanted, atol=1e-6)


def test_moments_of_the_permuted_lift_are_those_of_permuting() -> None:
    p = latent.block(latent.noise(problems=1, layers=1, heads=1, n_latents=5, seed=3)).values
    rng = np.random.default_rng(0)
    lower = np.tril(p[0, 0, 0].astype(float), -1)
    drawn = np.zeros((20000, 5))
    for row in range(1, 5):
        shares = lower[row, :row] / lower[row, :row].sum()
        drawn[:, :row] += row * rng.permuted(np.tile(shares, (20000, 1)), axis=1) - 1
    drawn /= np.maximum(np.arange(4, -1, -1), 1)
    seen, variance, third = _permuted(p)[:, 0, 0]
    np.testing.assert_allclose(drawn.var(0)[:3], variance[:3], rtol=0.05)
    np.testing.assert_allclose((drawn**3).mean(0)[:3], third[:3], rtol=0.25, atol=2e-3)
    wanted = flow.lift(p[0, 0, 0].astype(float)) - 1
    np.testing.assert_allclose(seen[:3], wanted[:3], atol=1e-6)


def test_failed_problems_and_ragged_columns_do_not_count() -> None:
    plain = latent.noise(problems=5, layers=2, heads=3, n_latents=4, seed=1)
    p, starts = plain.pattern.values, [3, 1, 0, 5, 2]
    wide = np.zeros((*p.shape[:-1], 9), "float16")
    names = np.full((5, 9), "", dtype=object)
    for i, start in enumerate(starts):
        wide[i, ..., start : start + 4] = p[i]
        names[i, :start], names[i, start : start + 4] = "question", "latent"
    status = plain.status.values.copy()
    status[2] = 2
    ds = plain.drop_vars(["key_position", "segment", "pattern"]).assign(
        pattern=(plain.pattern.dims, wide)
    )
    ds = ds.assign_coords(segment=(("problem", "key"), names), status=("problem", status))
    kept = plain.isel(problem=[0, 1, 3, 4])
    for of_ragged, of_plain in (
        (latent.aggregate(ds), latent.aggregate(kept)),
        (latent.scores(ds), latent.scores(kept)),
    ):
        xr.testing.assert_allclose(of_ragged, of_plain, rtol=1e-6)
    assert latent.block(ds).isel(problem=2).isnull().all()


def test_a_store_on_disk_gives_the_numbers_of_memory(tmp_path: Path) -> None:
    ds = latent.noise(problems=5, layers=2, heads=3, n_latents=4)
    at = list(range(4))
    labels = [
        Labels(
            id=f"p{i}", length=4, query_position=at, key_position=at,
            token=["z"] * 4, token_id=[-1] * 4, segment=["latent"] * 4,
        )
        for i in range(5)
    ]  # fmt: skip
    more: dict[str, Any] = {
        "mass": ("problem", "layer", "head", "query", "part"),
        "query_segment": schema.Array(("problem", "query"), "string", ""),
    }
    with store.create(
        tmp_path / "a.zarr", labels=labels, layers=[0, 1], heads=[0, 1, 2], config={},
        reduced=more, sizes={"part": len(PARTS)}, coords={"part": PARTS}, loss=False,
        attrs=ds.attrs,
    ) as writer:  # fmt: skip
        arrays = {name: list(ds[name].values) for name in ("pattern", "mass", "query_segment")}
        writer.append(range(5), arrays)
    stored = probe.open(tmp_path / "a.zarr")
    xr.testing.assert_allclose(latent.aggregate(stored), latent.aggregate(ds))


@pytest.mark.parametrize(
    ("scores", "name"),
    [
        ({"sequential": Estimate(0.8, 0.7, 0.9)}, "previous"),
        ({"hub_2": Estimate(0.5, 0.4, 0.6), "self": Estimate(0.9, 0.8, 1.0)}, "self"),
        ({"hub_2": Estimate(0.5, 0.4, 0.6)}, "hub(2)"),
        ({"hub_2": Estimate(0.5, 0.4, 0.6), "long_range": Estimate(0.45, 0.4, 0.5)}, "mixed"),
        ({"question": Estimate(0.9, 0.8, 1.0)}, "question_reader"),
        ({"sink": Estimate(0.9, 0.4, 1.0)}, "untyped"),
        ({"sequential": Estimate(0.0, -0.05, 0.05), "hub_0": Estimate(0, -0.09, 0.09)}, "uniform"),
        ({"sequential": Estimate(math.nan, math.nan, math.nan)}, "untyped"),
    ],
)
def test_the_rule_of_types(scores: dict[str, Estimate], name: str) -> None:
    assert kind(scores) == name


def test_what_is_no_latent_store_is_refused() -> None:
    ds = latent.noise(problems=2, layers=1, heads=1)
    for wrong, message in (
        (ds.drop_vars("mass"), r"it lacks mass\. Make one with probe\.latent\.capture"),
        (ds.drop_attrs(), r"it lacks the attribute `latent`"),
        (ds.isel(problem=0), r"one problem without its dim"),
        (ds.isel(query=slice(3)), r"problem 'noise_0' has 3 latents among its rows, and 6 were re"),
        (ds.assign_coords(status=("problem", [2, 2])), r"has no finished problem"),
    ):
        with pytest.raises(InputError, match=message):
            latent.aggregate(wrong)
    with pytest.raises(InputError, match=r"convention='ours'\. Choose from document, published"):
        latent.block(ds, "ours")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"needs 2, and there are 1"):
        latent.findings(latent.scores(ds.isel(problem=[0])))
    with pytest.raises(InputError, match=r"draws=0, top=10 and level=0\.95 must be above 0"):
        latent.findings(latent.scores(ds), draws=0)
    with pytest.raises(InputError, match=r"k=0 gives no tokens"):
        latent.top_tokens(ds, k=0)
    with pytest.raises(InputError, match=r"no columns of the question"):
        latent.top_tokens(ds)


def test_reading_latent_stores_needs_no_torch() -> None:
    code = "import sys; from recipes import latent; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        latent.nothing  # noqa: B018
