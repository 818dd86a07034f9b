import json
import re
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
import zarr

from probe import schema, store
from probe.errors import InputError, StoreError
from probe.schema import Labels
from tests.stores import (
    CONFIG,
    FULL,
    HEADS,
    LAYERS,
    TINY,
    check,
    create,
    fill,
    labels,
    result,
    says,
)

ROOT = Path(__file__).parents[1]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run.zarr"


@pytest.mark.parametrize("some", [TINY, FULL], ids=["tiny", "full"])
def test_what_is_written_is_read_back_exactly(path: Path, some: list[Labels]) -> None:
    fill(path, some, "pattern", "scores", "z")
    ds = store.open(path)
    check(ds, some)
    assert ds["pattern"].dims == ("problem", "layer", "head", "query", "key")
    assert ds["z"].dims == ("problem", "layer", "query", "head", "head_dim")
    assert set(ds.indexes) == {"problem", "layer", "head", "query", "key"}
    assert set(ds.coords) == set(schema.INDEXES) | set(schema.COORDINATES)
    assert set(ds.data_vars) == {"pattern", "scores", "z", "length", "loss"}
    assert ds["layer"].values.tolist() == list(LAYERS)
    assert ds["head"].values.tolist() == list(HEADS)
    for name, spec in schema.COLUMNS.items():
        assert spec.dtype == ("string" if ds[name].dtype.kind == "T" else ds[name].dtype)
        assert ds[name].dims == spec.dims
    one = ds.sel(problem="gsm8k/1", layer=4, head=2)
    assert one["token"].values[:4].tolist() == [" tök0", " tök1", " tök2", ""]
    assert one["token_id"].values[:4].tolist() == [100, 101, 102, -1]
    assert one["segment"].values[:4].tolist() == ["bos", "question", "question", ""]
    assert one["key_position"].values[:4].tolist() == [0, 1, 2, -1]
    np.testing.assert_array_equal(
        one["pattern"].values[:3, :3], result("pattern", some[1], 1)[1, 1].astype("float16")
    )


def test_float32_is_kept_as_it_is(path: Path) -> None:
    fill(path, TINY, "scores", dtype="float32")
    ds = store.open(path)
    assert ds["scores"].dtype == np.float32
    check(ds, TINY)


def test_selected_rows_stay_labelled_in_ragged_problems(path: Path) -> None:
    some = [labels(i, n, tuple(range(n))[-2:]) for i, n in enumerate((6, 3, 1))]
    fill(path, some)
    ds = store.open(path)
    assert ds.sizes["query"] == 2
    assert ds["query_position"].values.tolist() == [[4, 5], [1, 2], [0, -1]]
    check(ds, some)


@pytest.mark.parametrize("some", [TINY, FULL], ids=["tiny", "full"])
def test_xarray_and_zarr_read_the_same_without_this_package(path: Path, some: list[Labels]) -> None:
    fill(path, some, "pattern", "scores")
    ours, plain = store.open(path), xr.open_zarr(path, consolidated=False)
    xr.testing.assert_identical(ours, plain.load())
    raw = zarr.open_group(path, mode="r")
    for name in ours.variables:
        read = raw[str(name)][...]  # type: ignore[index]
        np.testing.assert_array_equal(np.asarray(read), ours[name].values)


def test_opening_reads_labels_only_and_needs_no_dask(path: Path) -> None:
    fill(path, FULL)
    ds = store.open(path)
    assert ds["pattern"].chunks is None
    assert not ds["pattern"].variable._in_memory
    started = time.perf_counter()
    store.open(path)
    assert time.perf_counter() - started < 1  # milliseconds; the limit only catches disasters


def test_attributes_tell_how_the_store_was_made(path: Path) -> None:
    attrs = {"versions": {"torch": "2.9"}, "causal": True, "model": "gpt2"}
    fill(path, TINY, attrs=attrs, config=CONFIG | {"layers": (1, 4)})
    found = store.open(path).attrs
    assert found["schema"] == "probe/1"
    assert found["config"] == CONFIG | {"layers": [1, 4]}
    assert len(found["config_sha256"]) == 64
    assert found["model"] == "gpt2"
    assert found["versions"]["torch"] == "2.9"
    assert found["versions"]["zarr"] == zarr.__version__
    assert re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", found["created"])


def edit(path: Path, **attrs: object) -> None:
    root = json.loads((path / "zarr.json").read_text())
    root["attributes"] |= attrs
    (path / "zarr.json").write_text(json.dumps(root))


def foreign(path: Path) -> str:
    zarr.create_group(path, attributes={"schema": "other/1"})
    return (
        f"{path} is Zarr data of another kind (schema 'other/1'), not a store. "
        "Read it with xarray.open_zarr, or use another path."
    )


def plain_folder(path: Path) -> str:
    path.mkdir()
    (path / "thesis.txt").write_text("irreplaceable")
    return f"{path} is a folder that holds no store (no zarr.json). Use another path."


def plain_file(path: Path) -> str:
    path.write_text("irreplaceable")
    return f"{path} is a file, not a store. Use another path."


def broken(path: Path) -> str:
    path.mkdir()
    (path / "zarr.json").write_text("[1]")
    return (
        f"{path} is damaged: its zarr.json cannot be read ('list' object has no attribute 'get'). "
        "Restore it from a copy, or use another path."
    )


@pytest.mark.parametrize("make", [foreign, plain_folder, plain_file, broken])
def test_what_is_not_a_store_is_neither_read_nor_written_nor_replaced(
    path: Path, make: Any
) -> None:
    message = says(make(path))
    before = sorted(str(item) for item in path.parent.rglob("*"))
    with pytest.raises(StoreError, match=message):
        store.open(path)
    with pytest.raises(StoreError, match=message):
        store.resume(path, config=CONFIG)
    with pytest.raises(StoreError, match=message):
        create(path, TINY, overwrite=True)
    assert not store.vacant(path)
    assert sorted(str(item) for item in path.parent.rglob("*")) == before


def test_a_path_with_nothing_in_it_cannot_be_opened(path: Path) -> None:
    message = f"there is no store at {path}. Check the path, or make one with probe.capture."
    with pytest.raises(StoreError, match=says(message)):
        store.open(path)
    with pytest.raises(StoreError, match=says(message)):
        store.resume(path, config=CONFIG)


def test_a_newer_schema_asks_for_an_upgrade(path: Path) -> None:
    fill(path, TINY)
    edit(path, schema="probe/2")
    message = (
        f"{path} has schema 'probe/2', and this version reads 'probe/1'. "
        "Upgrade with: pip install --upgrade attn-probe"
    )
    with pytest.raises(StoreError, match=says(message)):
        store.open(path)
    with pytest.raises(StoreError, match=says(message)):
        store.resume(path, config=CONFIG)


@pytest.mark.parametrize("name", ["pattern", "token", "status", "layer"])
def test_a_missing_array_is_named(path: Path, name: str) -> None:
    fill(path, TINY)
    shutil.rmtree(path / name)
    message = (
        f"{path} is damaged: it lacks {name}. "
        "Restore it from a copy, or make it anew with overwrite=True."
    )
    with pytest.raises(StoreError, match=says(message)):
        store.open(path)
    with pytest.raises(StoreError, match=says(message)):
        store.resume(path, config=CONFIG)


@pytest.mark.parametrize(
    ("now", "difference"),
    [
        (
            {"dtype": "float32", "queries": "last:6"},
            "dtype float16, now float32; queries None, now 'last:6'",
        ),
        ({"layers": [1]}, "layers absent, now [1]"),
        (
            {"model": {"name": "gpt2", "revision": "607a30d"}},
            "model gpt2, now {'name': 'gpt2', 'revision': '607a30d'}",
        ),
    ],
)
def test_resuming_with_other_settings_lists_what_differs(
    path: Path, now: dict[str, object], difference: str
) -> None:
    fill(path, TINY)
    message = (
        f"cannot resume {path}, it was made with other settings: {difference}. "
        "Use the old settings, another store, or overwrite=True."
    )
    with pytest.raises(StoreError, match=says(message)):
        store.resume(path, config=CONFIG | now)


def test_settings_inside_settings_are_compared_one_by_one(path: Path) -> None:
    config = {"a": {"b": 1, "c": (2, 3)}, "nan": float("nan")}
    fill(path, TINY, config=config)
    store.resume(path, config=config).close()
    with pytest.raises(StoreError, match=re.escape("settings: a.b 1, now 2; a.c [2, 3], now abs")):
        store.resume(path, config=config | {"a": {"b": 2}})


def test_a_store_is_replaced_only_when_told(path: Path) -> None:
    fill(path, TINY)
    message = (
        f"{path} already holds a store. "
        "Resume it, use another path, or replace it with overwrite=True."
    )
    with pytest.raises(StoreError, match=says(message)):
        create(path, FULL)
    check(store.open(path), TINY)
    fill(path, FULL, overwrite=True)
    assert store.open(path).sizes["key"] == 300
    assert [item.name for item in path.parent.iterdir()] == ["run.zarr"]


def test_an_empty_folder_is_as_good_as_none(path: Path) -> None:
    path.mkdir()
    assert store.vacant(path)
    fill(path, TINY)
    check(store.open(path), TINY)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sites": ["patern"]}, "there is no site 'patern'. Choose from pattern, scores, z."),
        ({"dtype": "bfloat16"}, "dtype='bfloat16' cannot be stored. Choose float16 or float32."),
        (
            {"labels": []},
            "a store needs at least one problem, and labels is empty. Give one.",
        ),
        (
            {"labels": [labels(0, 3), labels(0, 4)]},
            "two problems have the id 'gsm8k/0'. Give each its own.",
        ),
        (
            {"sites": ["z"], "sizes": {}},
            "z has dim 'head_dim' of unknown length. Give sizes={'head_dim': ...}.",
        ),
        (
            {"reduced": {"entropy": ("layer", "head")}},
            "an array 'entropy' over ('layer', 'head') cannot be stored. "
            'Its first dim must be "problem", and its name must not be one that stores use.',
        ),
        (
            {"config": {"model": {1, 2}}},
            "config cannot be recorded as JSON (Object of type set is not JSON serializable). "
            "Give strings, numbers, lists and dicts.",
        ),
    ],
)
def test_a_store_that_cannot_be_made_says_why(
    path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=says(message)):
        create(path, TINY, **options)
    assert list(path.parent.iterdir()) == []


def test_reading_a_store_needs_no_torch(path: Path) -> None:
    fill(path, TINY)
    code = (
        f"import sys; import probe.store, probe.problems; probe.store.open({str(path)!r});"
        "print(sorted({'torch', 'nnsight', 'transformers'} & set(sys.modules)))"
    )
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_stores_of_earlier_versions_open_and_are_gone_on_with(tmp_path: Path) -> None:
    """Schema probe/1 as zarr-python wrote it, without checksums: before shards were our own."""
    with zipfile.ZipFile(ROOT / "tests/data/probe-1-by-zarr-python.zip") as packed:
        packed.extractall(tmp_path)
    tiny, full = tmp_path / "tiny.zarr", tmp_path / "full.zarr"
    check(store.open(tiny), TINY)
    assert store.verify(tiny) == []
    some = [labels(i, n) for i, n in enumerate((70, 3, 66))]
    ds = store.open(full)
    assert ds.status.values.tolist() == [schema.DONE, schema.FAILED]
    check(ds, some)
    with store.resume(full, config=CONFIG) as writer:
        assert writer.pending() == [(1,), (2,)]
        for i in (1, 2):
            arrays = {name: [result(name, some[i], i)] for name in ("pattern", "scores")}
            writer.append([i], arrays, loss=[i / 2])
    check(store.open(full), some)
    assert store.open(full).sizes["problem"] == 3
    assert store.verify(full) == []
