"""`heads.classify`: types by intervals over problems, of heads that are known."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr

import probe
from probe.errors import InputError
from recipes import heads, latent
from tests.structured import HUB, PREVIOUS, structured

N = 8
IDS = [0, 5, 6, 7, 5, 6, 7, 5]  # the second copy begins at 4
UNIFORM = np.tril(np.ones((N, N))) / np.arange(1, N + 1)[:, None]
INDUCTION = np.eye(N)[[0, 0, 0, 0, 2, 3, 4, 2]]
DUPLICATE = np.eye(N)[[0, 1, 2, 3, 1, 2, 3, 4]]
KNOWN = {
    "sink": np.eye(N)[[0] * N],
    "previous": np.eye(N)[[0, 0, 1, 2, 3, 4, 5, 6]],
    "duplicate": DUPLICATE,
    "induction": INDUCTION,
    "uniform": UNIFORM,
    "mixed": (DUPLICATE + INDUCTION) / 2,
    "untyped": np.eye(N),
}


def store(problems: int = 3) -> xr.Dataset:
    blocks = np.broadcast_to(np.stack(list(KNOWN.values())), (problems, 1, len(KNOWN), N, N))
    at = np.broadcast_to(np.arange(N), (problems, N))
    coords: dict[str, Any] = {
        "problem": [f"p{n}" for n in range(problems)],
        "layer": [3],
        "head": list(range(len(KNOWN))),
        "token_id": (("problem", "key"), np.broadcast_to(IDS, (problems, N))),
        "query_position": (("problem", "query"), at),
        "key_position": (("problem", "key"), at),
    }
    dims = ("problem", "layer", "head", "query", "key")
    return xr.Dataset({"pattern": (dims, blocks.astype("float32"))}, coords)


def test_pure_heads_have_their_types() -> None:
    found = heads.classify(store(), draws=50)
    assert found["type"].values.tolist() == [list(KNOWN)]
    assert found["score"].values.tolist() == [
        "sink",
        "previous",
        "duplicate",
        "induction",
        "uniform",
    ]
    assert float(found["mean"].sel(score="induction", head=3, layer=3)) == 1.0


def test_a_score_that_few_problems_have_is_no_type() -> None:
    ds = store(20)
    ds["pattern"][5:, 0, 1] = ds["pattern"][5:, 0, 6].values  # previous in 5 of 20
    found = heads.classify(ds, draws=200)
    assert found["type"].values[0, 1] == "untyped"
    assert 0 < float(found["low"].sel(score="previous", head=1, layer=3)) < 0.3


def test_a_latent_store_is_answered_by_its_own_findings() -> None:
    ds = structured()
    found = heads.classify(ds, draws=100)
    assert found["type"].values[HUB] == "hub(0)"
    assert found["type"].values[PREVIOUS] == "previous"
    xr.testing.assert_identical(found, latent.findings(latent.scores(ds), draws=100))


def test_the_heads_of_the_demonstration_model(tmp_path: Path) -> None:
    with probe.load("demo-llama", device="cpu") as model:
        ds = probe.capture(
            model, probe.demos.repeated(count=8), tmp_path / "a.zarr", progress=False
        )
    found = heads.classify(ds, draws=100)
    assert found["type"].sel(layer=1).values.tolist() == ["induction"] * 4
    assert found["type"].sel(layer=0, head=3) == "previous"


def test_what_cannot_be_classified_is_named() -> None:
    with pytest.raises(InputError, match=re.escape("has no pattern (it has: z)")):
        heads.classify(store().rename(pattern="z"))
    with pytest.raises(InputError, match="2"):
        heads.classify(store(1))
