"""The dataset of a cache against a store of the same texts, and what recipes make of both."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import probe
from probe import demos
from probe.errors import InputError
from probe.interventions import Bias
from probe.model import Model
from recipes import heads


@pytest.fixture(scope="module")
def llama() -> Any:
    with probe.load("demo-llama") as model:
        yield model


CUTS: list[dict[str, Any]] = [
    {},
    {"queries": "last:2", "heads": [3, 0]},
    {"layers": -1, "keys": [1, 0]},
]


@pytest.mark.parametrize("selection", CUTS, ids=str)
@pytest.mark.parametrize("under", [[], [Bias(value=-2.0, keys=1)]], ids=["plain", "biased"])
def test_its_dataset_is_what_a_capture_of_the_same_texts_stores(
    llama: Model, selection: dict[str, Any], under: list[Any], tmp_path: Path
) -> None:
    texts = ["abcabc", "z.", "hellohello"]
    sites: Any = ("pattern", "scores", "z")
    stored = probe.capture(
        llama, texts, tmp_path / "s", sites=sites, interventions=under, progress=False, **selection
    ).load()
    with torch.no_grad(), llama.intervene(*under):
        loss, cache = llama.run_with_cache(texts, sites, return_type="loss", **selection)
    ds = cache.to_xarray()
    assert dict(ds.sizes) == dict(stored.sizes)
    for site in sites:
        assert ds[site].dims == stored[site].dims
        # A batch padded on the other side is rounded otherwise, and float16 keeps three digits.
        np.testing.assert_allclose(
            ds[site].values.astype(np.float16), stored[site].values, atol=2e-3, rtol=2e-3
        )
    assert set(ds.coords) == set(stored.coords)
    for name in (*ds.coords, "length"):
        np.testing.assert_array_equal(ds[name].values, stored[name].values, err_msg=name)
        assert ds[name].dims == stored[name].dims
    np.testing.assert_array_equal(probe.valid(ds).values, probe.valid(stored).values)
    counts = stored.length.values - 1
    assert float(loss) == pytest.approx(
        float((stored.loss * counts).sum() / counts.sum()), rel=1e-5
    )


@pytest.mark.parametrize("metric", [heads.entropy, heads.distance, heads.sink, heads.concentration])
def test_recipes_measure_a_cache_like_a_store(llama: Model, metric: Any, tmp_path: Path) -> None:
    texts = [demos.repeated(6, 1)[0], demos.repeated(9, 1)[0]]
    stored = probe.capture(llama, texts, tmp_path / "s", dtype="float32", progress=False)
    with torch.no_grad():
        _, cache = llama.run_with_cache(texts, "pattern")
    got, wanted = metric(cache.to_xarray().pattern), metric(stored.pattern)
    assert got.dims == wanted.dims
    np.testing.assert_allclose(got.values, wanted.values, atol=1e-4)


def test_keys_and_values_have_axes_of_their_own(llama: Model) -> None:
    _, cache = llama.run_with_cache(["abcabc", "z."], ("k", "v"))
    ds = cache.to_xarray()
    assert ds.k.dims == ("problem", "layer", "key", "kv_head", "head_dim")
    assert "query_position" not in ds
    assert not ds.k.isel(problem=1, key=slice(3, None)).any()


def test_sites_of_different_layers_are_no_dataset(llama: Model) -> None:
    names = ["blocks.0.attn.hook_z", "blocks.1.attn.hook_z", "blocks.1.attn.hook_pattern"]
    _, cache = llama.run_with_cache("abc", names_filter=names)
    message = r"pattern was kept in other layers than the rest \(not in \[0\]\).*Keep the same"
    with pytest.raises(InputError, match=message):
        cache.to_xarray()
