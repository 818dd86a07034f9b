"""Patterns kept as codes, which opening decodes: how exact they are, and what is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr

import probe
from probe import demos, schema, store
from probe.errors import InputError
from tests.stores import CONFIG, FULL, TINY, create, fill, labels, result, says

EXACT = {"uint16": 1.6e-5, "uint8": 4e-3}  # half a step of the root, twice


@pytest.mark.parametrize("dtype", EXACT)
@pytest.mark.parametrize("some", [TINY, FULL], ids=["tiny", "full"])
def test_codes_are_read_as_probabilities(tmp_path: Path, some: Any, dtype: str) -> None:
    fill(tmp_path / "s", some, dtype=dtype)
    ds = store.open(tmp_path / "s")
    assert ds.pattern.dtype == np.float32
    for i, one in enumerate(some):
        known = result("pattern", one, i)
        found = probe.trimmed(ds, i).pattern.values
        assert np.abs(found - known).max() <= EXACT[dtype]
        np.testing.assert_array_equal(found[known == 0], 0)
        assert np.abs(found.sum(-1) - 1).max() < {"uint16": 2e-4, "uint8": 6e-2}[dtype]
    assert store.verify(tmp_path / "s") == []
    raw = xr.open_zarr(tmp_path / "s", consolidated=False)["pattern"]
    assert raw.dtype == dtype
    scale = np.iinfo(np.dtype(dtype)).max
    assert raw.attrs["code"] == f"probability = (value / {scale}) ** 2"
    np.testing.assert_allclose((raw.values / scale) ** 2, ds.pattern.values, rtol=1e-6)
    assert ds.attrs["schema"] == "probe/1+codes"  # a reader that knows no codes refuses it


def test_every_code_is_read_as_what_it_stands_for() -> None:
    for dtype in ("uint8", "uint16"):
        codes = np.arange(np.iinfo(dtype).max + 1, dtype=dtype)
        np.testing.assert_array_equal(schema.coded(schema.decoded(codes), dtype), codes)
    assert schema.coded(np.array([1 + 1e-6, 0.0], "float32"), "uint16").tolist() == [65535, 0]


def test_a_capture_keeps_codes_and_resumes(tmp_path: Path) -> None:
    problems = [ids[:n] for n in (70, 5) for ids in demos.repeated(40, 2, seed=n)]
    with probe.load("demo-llama", device="cpu") as model:
        whole = probe.capture(model, problems, tmp_path / "f", dtype="float32", progress=False)
        plan = probe.plan(model, problems, dtype="uint8")
        assert 4 * plan.bytes == probe.plan(model, problems, dtype="float32").bytes
        for dtype, most in EXACT.items():
            for _ in range(2):
                ds = probe.capture(model, problems, tmp_path / dtype, dtype=dtype, progress=False)
            assert float(abs(ds.pattern - whole.pattern).max()) <= most
        for sites in (("z",), ("pattern", "scores")):
            with pytest.raises(InputError, match="dtype='uint16' holds patterns, not "):
                probe.plan(model, problems, sites=sites, dtype="uint16")


def test_a_shard_of_codes_is_gone_on_with(tmp_path: Path) -> None:
    some = [labels(i, 5) for i in range(4)]
    with create(tmp_path / "s", some, dtype="uint16") as writer:
        writer.append([1], {"pattern": [result("pattern", some[1], 1)]})
    with store.resume(tmp_path / "s", config=CONFIG) as writer:
        for i in (0, 2, 3):
            writer.append([i], {"pattern": [result("pattern", some[i], i)]})
    for i, found in enumerate(store.open(tmp_path / "s").pattern.values):
        assert np.abs(found - result("pattern", some[i], i)).max() < 2e-5


def test_what_is_no_probability_is_no_code(tmp_path: Path) -> None:
    one = [labels(0, 2)]
    message = says(
        "pattern of problem 'gsm8k/0' goes from 0 to 1.5, and codes are of probabilities. Use "
        "dtype='float16'."
    )
    with create(tmp_path / "s", one, dtype="uint16") as writer:
        values = np.zeros((2, 3, 2, 2), "float32")
        values[0, 0, 1, 1] = 1.5
        with pytest.raises(InputError, match=message):
            writer.append([0], {"pattern": [values]})
        values[0, 0, 1, 1] = np.nan
        with pytest.raises(InputError, match="goes from nan to nan"):
            writer.append([0], {"pattern": [values]})
