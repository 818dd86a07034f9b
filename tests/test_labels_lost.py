"""Labels that lost a file, store objects that cannot be written, and stores that are replaced."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import xarray as xr
from typer.testing import CliRunner
from zarr.storage import LocalStore, MemoryStore, ZipStore

import probe
from probe import schema, store
from probe.errors import InputError, StoreError
from probe.model import Model
from recipes.cli import app
from tests.stores import CONFIG, TINY, fill

READERS: list[Callable[[Any], object]] = [
    probe.open,
    probe.verify,
    lambda path: store.resume(path, config=CONFIG).close(),
]
NAMES = [*schema.INDEXES, *(name for name in schema.COLUMNS if name != "problem")]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    fill(tmp_path / "run.zarr", TINY)
    return tmp_path / "run.zarr"


@pytest.fixture(scope="module")
def model() -> Any:
    with probe.load("demo-llama", device="cpu") as loaded:
        yield loaded


def labels_of(path: Path, name: str) -> list[Path]:
    return [file for file in sorted((path / name / "c").rglob("*")) if file.is_file()]


@pytest.mark.parametrize("how", ["missing", "empty"])
@pytest.mark.parametrize("name", NAMES)
def test_a_lost_file_of_labels_is_said(path: Path, name: str, how: str) -> None:
    file = labels_of(path, name)[-1]
    file.unlink() if how == "missing" else file.write_bytes(b"")
    key = file.relative_to(path)
    for read in (probe.open, probe.verify):
        with pytest.raises(StoreError, match=f"is damaged: {'.*' if how == 'empty' else key}"):
            read(path)


@pytest.mark.parametrize("how", ["cut", "changed"])
@pytest.mark.parametrize("name", NAMES)
def test_labels_that_cannot_be_read_are_said(path: Path, name: str, how: str) -> None:
    file = labels_of(path, name)[-1]
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2] if how == "cut" else data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(StoreError, match=f"is damaged: its labels '{name}' cannot be read"):
        probe.open(path).load()
    with pytest.raises(StoreError, match="is damaged"):
        probe.verify(path)


def test_labels_of_objects_are_verified() -> None:
    there = MemoryStore()
    fill(there, TINY)  # type: ignore[arg-type]
    assert probe.verify(there) == []
    del there._store_dict["layer/c/0"]
    with pytest.raises(StoreError, match="is damaged: layer/c/0, of its labels, is missing"):
        probe.verify(there)


def test_nothing_that_is_written_removes_a_label(path: Path) -> None:
    probe.verify(path)
    for name in NAMES:
        assert labels_of(path, name), name
    (path / "pattern/c/0/0/0/0/0").unlink()
    assert probe.verify(path, repair=True)
    assert labels_of(path, "status")  # though all of it is empty
    assert probe.open(path).sizes["problem"] == 0
    fill_again = store.resume(path, config=CONFIG)
    fill_again.close()


@pytest.mark.parametrize("name", ["pattern", "status", "token", "problem"])
@pytest.mark.parametrize("text", ["", "{", "[]", '{"zarr_format": 3, "node_type": "array"}'])
def test_damaged_metadata_is_said(path: Path, name: str, text: str) -> None:
    (path / name / "zarr.json").write_text(text)
    message = f"{path} is damaged: {name}/zarr.json cannot be read ("
    for read in READERS:
        with pytest.raises(StoreError, match=f"{re.escape(message)}.*Restore that file from"):
            read(path)


@pytest.mark.parametrize(("name", "value"), [("node_type", "array"), ("zarr_format", 2)])
def test_a_root_that_is_no_group_is_said(path: Path, name: str, value: object) -> None:
    root = json.loads((path / "zarr.json").read_text())
    (path / "zarr.json").write_text(json.dumps(root | {name: value}))
    for read in READERS:
        with pytest.raises(StoreError, match=r"zarr.json cannot be read \(a .*, not a 'group'"):
            read(path)


class Strict(LocalStore):
    """Refuses keys below a file, as some buckets do, and one that is not allowed."""

    async def get(self, key: str, *args: Any, **kwargs: Any) -> Any:
        if any((self.root / parent).is_file() for parent in Path(key).parents):
            raise RuntimeError(f"{key}: not a directory")
        if key == "token/zarr.json" and (self.root / "secret").exists():
            raise RuntimeError(f"{key}: not allowed")
        return await super().get(key, *args, **kwargs)


def test_what_else_lies_in_a_store_does_no_harm(path: Path) -> None:
    for read in READERS:
        read(Strict(path))
    (path / "mine" / "zarr.json").mkdir(parents=True)
    (path / "mine.txt").write_text("a note")
    for read in READERS:
        read(path)


def test_descriptions_that_may_not_be_read_are_said(path: Path) -> None:
    (path / "secret").mkdir()
    for read in READERS:
        with pytest.raises(StoreError, match=r"cannot be read \(token/zarr.json: not allowed\)"):
            read(Strict(path))


@pytest.mark.parametrize(("name", "value"), [("arrays", None), ("layout", None), ("layout", [1])])
def test_damaged_attributes_are_said(path: Path, name: str, value: object) -> None:
    root = json.loads((path / "zarr.json").read_text())
    root["attributes"][name] = value
    (path / "zarr.json").write_text(json.dumps(root))
    for read in READERS:
        with pytest.raises(StoreError, match=r"its zarr.json lack arrays or layout. Restore that"):
            read(path)


def test_objects_that_cannot_be_written_are_refused(path: Path, tmp_path: Path) -> None:
    frozen = LocalStore(path, read_only=True)
    assert probe.open(frozen).sizes["problem"] == len(TINY)
    with pytest.raises(StoreError, match="a LocalStore that is read-only, or from which nothing"):
        store.resume(frozen, config=CONFIG)
    with pytest.raises(StoreError, match="a LocalStore that is read-only"):
        probe.verify(frozen, repair=True)
    with pytest.raises(StoreError, match="a ZipStore that is read-only, or from which nothing"):
        fill(ZipStore(tmp_path / "run.zip", mode="w"), TINY)  # type: ignore[arg-type]
    with pytest.raises(StoreError, match="there is no store at"):
        probe.open(LocalStore(tmp_path / "nowhere", read_only=True))


def test_a_store_object_is_replaced_once_the_new_run_is_proven(model: Model) -> None:
    there = MemoryStore()
    options: dict[str, Any] = {"progress": False, "on_error": "raise"}
    known = probe.capture(model, ["abc", "abd"], there, **options).load()

    def fails(*_: Any) -> None:
        raise RuntimeError("no")

    hook = model.module.register_forward_pre_hook(fails)
    for some, overwrite in ((["xyz"], True), (["abc", "abd"], True)):
        with pytest.raises(RuntimeError, match="no"):
            probe.capture(model, some, there, overwrite=overwrite, **options)
        xr.testing.assert_identical(probe.open(there).load(), known)
    empty = MemoryStore()
    with pytest.raises(RuntimeError, match="no"):
        probe.capture(model, ["abc"], empty, **options)
    hook.remove()
    assert store.vacant(empty)
    new = probe.capture(model, ["xyz", "abc"], there, overwrite=True, **options)
    assert new.sizes["problem"] == 2
    assert probe.verify(there) == []
    assert not [key for key in there._store_dict if "locks" in key]


def test_arrays_that_somebody_adds_are_let_be(path: Path) -> None:
    import zarr

    group = zarr.open_group(path, use_consolidated=False)
    group.create_array("mine", shape=(3, 4), dtype="f4", dimension_names=["a", "b"])
    assert probe.open(path).mine.shape == (3, 4)
    group.create_array("odd", shape=(3, 4), dtype="f4")
    store.resume(path, config=CONFIG).close()


def test_two_metrics_of_one_name_are_refused(tmp_path: Path) -> None:
    command = ["capture", "demo-llama", "demo:repeated", "-n", "2", "-o", str(tmp_path / "r")]
    done = CliRunner().invoke(app, [*command, "--reduce", "heads.entropy,recipes.heads.entropy"])
    assert isinstance(done.exception, InputError) or done.exit_code
    assert "are called entropy. Keep them in two stores." in str(done.exception) + done.output


def test_a_metric_may_be_called_expected(model: Model, tmp_path: Path) -> None:
    from recipes.cli_stores import told

    def expected(p: torch.Tensor) -> torch.Tensor:
        return p.amax((-1, -2))

    probe.capture(model, ["abc"], tmp_path / "r", reduce={"expected": expected}, progress=False)
    assert told(tmp_path / "r")["done"] == "1 problems done, 0 failed of 1"


def test_an_empty_store_has_no_problem_to_trim(tmp_path: Path) -> None:
    from tests.stores import create

    create(tmp_path / "run.zarr", TINY).close()
    with pytest.raises(InputError, match=r"there is no problem: none has run."):
        probe.trimmed(probe.open(tmp_path / "run.zarr"), 0)
