"""Stores that lost a file, a tail or a bit: said when they are read, found by verify, repaired."""

import json
import os
import random
import re
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
import xarray as xr
import zarr
from typer.testing import CliRunner

from probe import opening, schema, store
from probe.errors import StoreError
from probe.sharding import grid
from recipes.cli import app
from tests.stores import CONFIG, FULL, TINY, check, fill, put, says

STORES = {"tiny": TINY, "full": FULL}
SHARD = {"tiny": "pattern/c/0/0/0/0/0", "full": "pattern/c/2/0/0/0/0"}
LOST = {"tiny": {f"gsm8k/{i}" for i in range(5)}, "full": {"gsm8k/2"}}


@pytest.fixture(params=["tiny", "full"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def path(tmp_path: Path, kind: str) -> Path:
    fill(tmp_path / "run.zarr", STORES[kind])
    return tmp_path / "run.zarr"


@pytest.fixture(params=["ours", "zarr-python"], autouse=True)
def reader(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "zarr-python":  # as in a bucket
        monkeypatch.setattr(opening, "grid", lambda name, array: None)


def remove(file: Path) -> str:
    file.unlink()
    return "it is missing"


def cut(file: Path) -> str:
    os.truncate(file, file.stat().st_size - 3)
    return "its index has another checksum (it is cut short, or bytes were changed)"


def cut_nearly_all(file: Path) -> str:
    os.truncate(file, 11)
    return r"it is cut short (11 bytes, and its index alone has"


def flip(file: Path) -> str:
    data = bytearray(file.read_bytes())
    data[40] ^= 16  # in the first tile
    file.write_bytes(data)
    return "a tile at byte 0 was changed ("


def change_index(file: Path) -> str:
    data = bytearray(file.read_bytes())
    data[-9] ^= 1
    file.write_bytes(data)
    return "its index has another checksum (it is cut short, or bytes were changed)"


def change_index_and_its_checksum(file: Path) -> str:
    """So that its first tile is 2^62 bytes."""
    own = grid("pattern", zarr.open_array(file.parents[5]))
    assert own is not None
    data, size = bytearray(file.read_bytes()), own.index_bytes
    data[-size + 8 : -size + 16] = (2**62).to_bytes(8, "little")
    data[-4:] = google_crc32c.value(bytes(data[-size:-4])).to_bytes(4, "little")
    file.write_bytes(data)
    return "a tile at byte 0 was changed ("


def cover(file: Path) -> str:
    file.unlink()
    file.mkdir()
    return "it cannot be read (Is a directory)"


HARM = [change_index_and_its_checksum, cover, remove, cut, cut_nearly_all, flip, change_index]


@pytest.mark.parametrize("harm", HARM)
def test_what_is_damaged_is_named_when_it_is_read(path: Path, kind: str, harm: Any) -> None:
    reason = harm(path / SHARD[kind])
    ds = store.open(path)  # labels can be read
    assert ds.sizes["problem"] == 5
    with pytest.raises(StoreError) as caught:
        ds.pattern.values  # noqa: B018
    start = f"{path} is damaged: {SHARD[kind]} cannot be read, {reason}"
    assert str(caught.value).startswith(start)
    assert str(caught.value).endswith(
        "Restore that file from a copy; or give up its problems with `probe info --verify "
        "--repair` and run the same capture again, which computes only them."
    )
    if kind == "full":  # the others can be read
        others = [i for i in range(5) if i != 2]
        check(ds.isel(problem=others), FULL)


@pytest.mark.parametrize("harm", HARM)
def test_verify_finds_it_and_repair_lets_it_be_computed_again(
    path: Path, kind: str, harm: Any
) -> None:
    assert store.verify(path) == []
    reason = harm(path / SHARD[kind])
    (found,) = store.verify(path)
    assert (found.key, set(found.problems)) == (SHARD[kind], LOST[kind])
    assert found.reason.startswith(reason)
    assert store.open(path).sizes["problem"] == 5
    assert store.verify(path, repair=True) == [found]
    assert store.verify(path) == []
    assert (
        set(store.open(path).problem.values.tolist())
        == {f"gsm8k/{i}" for i in range(5)} - LOST[kind]
    )
    with store.resume(path, config=CONFIG) as writer:
        for indices in writer.pending():
            put(writer, STORES[kind], indices)
    check(store.open(path), STORES[kind])
    assert store.open(path).sizes["problem"] == 5


def test_no_changed_byte_goes_unseen(path: Path, kind: str) -> None:
    file, whole = path / SHARD[kind], store.open(path).pattern.values
    good, chance = file.read_bytes(), random.Random(3)
    for _ in range(60):
        data = bytearray(good)
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        file.write_bytes(data)
        damaged = store.verify(path)
        try:
            values = store.open(path).pattern.values
        except StoreError:
            assert damaged
        else:  # a bit that says nothing of the numbers
            np.testing.assert_array_equal(values, whole)


def test_damaged_labels_are_named(path: Path) -> None:
    file = path / "token_id/c/0/0"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 64
    file.write_bytes(data)
    with pytest.raises(
        StoreError, match=f"{re.escape(str(path))} is damaged: its labels 'token_id'"
    ):
        store.verify(path)
    status = path / "status/c/0"
    status.write_bytes(status.read_bytes()[:-2])
    with pytest.raises(StoreError, match="is damaged: its labels 'status' cannot be read"):
        store.open(path)


def test_a_store_that_is_being_written_is_not_repaired(path: Path) -> None:
    message = says(f"{path} is being written by another process. Wait for it, or use another path.")
    with store.resume(path, config=CONFIG):
        assert store.verify(path) == []
        with pytest.raises(StoreError, match=message):
            store.verify(path, repair=True)


def test_the_command_says_what_is_damaged(path: Path, kind: str) -> None:
    run = CliRunner().invoke
    assert run(app, ["info", str(path), "--verify"]).exit_code == 0
    remove(path / SHARD[kind])
    for option in ([], ["--repair"]):
        result = run(app, ["info", str(path), "--verify", "--json", *option])
        assert json.loads(result.stdout)["damaged"] == [f"{SHARD[kind]}: it is missing"]
        assert isinstance(result.exception, StoreError)
        assert f"{len(LOST[kind])} problems of {path} " in str(result.exception)
    assert run(app, ["info", str(path), "--verify"]).exit_code == 0
    assert run(app, ["info", str(path), "--repair"]).exit_code == 2


def test_stores_of_earlier_writers_may_lack_what_holds_nothing(path: Path, kind: str) -> None:
    """zarr-python, which wrote shards once, leaves out those that hold only zeros."""
    root = json.loads((path / "zarr.json").read_text())
    del root["attributes"]["whole_shards"]
    (path / "zarr.json").write_text(json.dumps(root))
    remove(path / SHARD[kind])
    assert store.verify(path) == []
    ds = store.open(path)
    assert not ds.pattern.sel(problem="gsm8k/2").values.any()


def test_dask_chunks_are_shards(path: Path, kind: str) -> None:
    pytest.importorskip("dask")
    whole, lazy = store.open(path), store.open(path, chunks="shards")
    step = 5 if kind == "tiny" else 1
    assert lazy.pattern.data.chunksize == (step, *whole.pattern.shape[1:])
    xr.testing.assert_equal(lazy.load(), whole.load())
    with pytest.raises(Exception, match=r"^chunks='auto'. Choose 'shards', or None for no dask\.$"):
        store.open(path, chunks="auto")  # type: ignore[arg-type]
    assert schema.SCHEMA == "probe/1"


def test_a_store_named_relatively_is_read_where_it_was(
    path: Path, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(path.parent)
    ds = store.open(path.name)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    check(ds, STORES[kind])


def test_too_much_memory_is_no_damage(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise MemoryError("Unable to allocate 9 TiB")

    monkeypatch.setattr(opening, "fetch", refuse)
    monkeypatch.setattr(opening, "grid", grid)
    with pytest.raises(MemoryError, match=r"^Unable to allocate 9 TiB$"):
        store.open(path).pattern.load()
