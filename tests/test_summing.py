"""Moments kept while a capture runs, against those of what it would have stored."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from transformers import BertConfig, BertModel
from zarr.storage import MemoryStore

import probe
from probe import demos, generations
from probe.errors import InputError, StoreError
from probe.model import Model
from probe.places import place
from recipes.moments import over, stored
from tests.stores import says

PROBLEMS = [ids[:n] for n in (5, 30, 1, 12) for ids in demos.repeated(20, 3, seed=n)]
quietly: dict[str, Any] = {"progress": False}
moments: dict[str, Any] = {"reduce": "moments"}


@pytest.fixture(scope="module")
def model() -> Any:
    with probe.load("demo-llama", device="cpu") as loaded:
        yield loaded


def same(found: Any, known: Any) -> None:
    np.testing.assert_array_equal(found.count.pattern, known.count.pattern)
    np.testing.assert_allclose(found.mean.pattern, known.mean.pattern, rtol=2e-6, atol=1e-9)
    deviation = abs(found.std().pattern - known.std().pattern)
    assert float(deviation.max()) < 1e-6
    np.testing.assert_array_equal(found.mean.pattern.isnull(), known.mean.pattern.isnull())


@pytest.mark.parametrize("selection", [{}, {"queries": "last:2", "layers": [1, 0], "heads": [3]}])
def test_they_are_those_of_all_matrices(
    model: Model, tmp_path: Path, selection: dict[str, Any]
) -> None:
    whole = probe.capture(
        model, PROBLEMS, tmp_path / "whole", dtype="float32", **selection, **quietly
    )
    for where in (tmp_path / "m", MemoryStore()):
        ds = probe.capture(model, PROBLEMS, where, reduce="moments", **selection, **quietly)
        assert "pattern" not in ds
        np.testing.assert_allclose(ds.loss, whole.loss, rtol=1e-6)
        found = stored(where)
        same(found, over(whole))
        assert found.mean.pattern.layer.values.tolist() == whole.layer.values.tolist()
        again = probe.capture(model, PROBLEMS, where, reduce="moments", **selection, **quietly)
        xr.testing.assert_identical(again.load(), ds.load())
        xr.testing.assert_identical(stored(where).mean, found.mean)


def test_parts_are_merged(model: Model, tmp_path: Path) -> None:
    whole = probe.capture(model, PROBLEMS, tmp_path / "whole", dtype="float32", **quietly)
    for i in (1, 2, 3):
        probe.capture(model, PROBLEMS, tmp_path / "m", reduce="moments", part=(i, 3), **quietly)
    assert sorted(os.listdir(tmp_path / "m/moments")) == [  # noqa: PTH208
        "1-of-3",
        "2-of-3",
        "3-of-3",
        "zarr.json",
    ]
    same(stored(tmp_path / "m"), over(whole))


KILLED = """if True:
    import os, signal, sys
    import probe
    from probe import generations, summing
    from tests.test_summing import PROBLEMS
    summing.SECONDS = summing.SHARE = 0
    real, seen, when, after = generations._create, [], sys.argv[2], int(sys.argv[3])
    part = tuple(map(int, sys.argv[4].split("/")))
    def create(group, name, values):
        array = real(group, name, values)
        if name == when:
            seen.append(1)
            if len(seen) == after:
                os.kill(os.getpid(), signal.SIGKILL)
        return array
    generations._create = create
    probe.capture(probe.load("demo-llama"), PROBLEMS, sys.argv[1], reduce="moments", batch_size=2,
                  progress=False, part=part)
"""


def killed(path: Path, when: str, after: int, part: str = "1/1") -> None:
    """A run that is killed after it has written an array so many times."""
    command = [sys.executable, "-c", KILLED, str(path), when, str(after), part]
    done = subprocess.run(command, check=False, cwd=Path(__file__).parents[1], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()


@pytest.mark.parametrize(("when", "after"), [("mean", 3), ("loss", 2), ("members", 3)])
def test_a_run_that_dies_counts_no_problem_twice(
    model: Model, tmp_path: Path, when: str, after: int
) -> None:
    path = tmp_path / "m"
    killed(path, when, after)
    before = probe.open(path).sizes["problem"]
    assert 0 < before < len(PROBLEMS)
    found = int(stored(path).count.pattern.max())
    assert found >= before if when == "members" else found == before
    ds = probe.capture(model, PROBLEMS, path, reduce="moments", batch_size=2, **quietly)
    whole = probe.capture(model, PROBLEMS, tmp_path / "w", dtype="float32", batch_size=2, **quietly)
    same(stored(path), over(whole))
    np.testing.assert_allclose(ds.loss, whole.loss, rtol=1e-6)
    assert len(generations.numbers(place(path), "1-of-1")) == 1


def test_a_problem_that_fails_is_not_counted(model: Model, tmp_path: Path) -> None:
    def break_on(module: Any, arguments: Any, named: Any) -> None:
        if named["input_ids"].shape[1] == 12:
            raise RuntimeError("too long for this machine")

    hook = model.module.register_forward_pre_hook(break_on, with_kwargs=True)
    options: dict[str, Any] = {"reduce": "moments", "batch_size": 1, "progress": False}
    ds = probe.capture(model, PROBLEMS, tmp_path / "m", **options)
    hook.remove()
    assert ds.status.values.tolist() == [1] * 9 + [2] * 3
    assert int(stored(tmp_path / "m").count.pattern.max()) == 9
    probe.capture(model, PROBLEMS, tmp_path / "m", **options)
    assert int(stored(tmp_path / "m").count.pattern.max()) == 12


def test_what_cannot_be_summed_is_refused(model: Model, tmp_path: Path) -> None:
    refused: list[tuple[dict[str, Any], str]] = [
        ({"sites": "z"}, "reduce= is for the pattern, not for z."),
        (
            {"max_new_tokens": 3},
            "reduce='moments' with max_new_tokens=3: rows of one number would be of other tokens "
            "in each problem. Generate first, and capture the whole texts.",
        ),
    ]
    for options, message in refused:
        with pytest.raises(InputError, match=says(message)):
            probe.capture(model, PROBLEMS, tmp_path / "m", **quietly, **{**moments, **options})
    assert not (tmp_path / "m").exists()
    ds = probe.capture(model, PROBLEMS[:2], tmp_path / "m", reduce="moments", **quietly)
    with pytest.raises(InputError, match="the store holds no pattern"):
        over(ds)
    with pytest.raises(StoreError, match="reduce moments, now absent"):
        probe.capture(model, PROBLEMS[:2], tmp_path / "m", dtype="float32", **quietly)
    probe.capture(model, PROBLEMS[:2], tmp_path / "s", **quietly)
    with pytest.raises(InputError, match="this store has no moments"):
        stored(tmp_path / "s")


def test_moments_that_do_not_fit_in_memory_are_refused(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sysconf", lambda name: 64)
    with pytest.raises(InputError, match=r"^the moments need 57\.6 kB of memory, and this machine"):
        probe.capture(model, PROBLEMS, tmp_path / "m", reduce="moments", **quietly)


@pytest.mark.parametrize(("first", "then"), [("1/2", [(1, 1)]), ("1/1", [(1, 2), (2, 2)])])
def test_a_run_that_dies_goes_on_in_other_parts(
    model: Model, tmp_path: Path, first: str, then: list[tuple[int, int]]
) -> None:
    path, options = tmp_path / "m", {"reduce": "moments", "batch_size": 2, **quietly}
    killed(path, "members", 2, first)
    for part in then:
        probe.capture(model, PROBLEMS, path, part=part, **options)
    whole = probe.capture(model, PROBLEMS, tmp_path / "w", dtype="float32", batch_size=2, **quietly)
    same(stored(path), over(whole))
    assert probe.verify(path) == []


LOST = {
    "missing": lambda file: file.unlink(),
    "empty": lambda file: file.write_bytes(b""),
    "cut": lambda file: file.write_bytes(file.read_bytes()[:-3]),
    "changed": lambda file: file.write_bytes(
        bytes([file.read_bytes()[0] ^ 64]) + file.read_bytes()[1:]
    ),
}


@pytest.mark.parametrize("how", LOST)
@pytest.mark.parametrize("name", generations.NAMES)
def test_a_lost_file_is_said_and_repaired(
    model: Model, tmp_path: Path, name: str, how: str
) -> None:
    path = tmp_path / "m"
    for part in ((1, 2), (2, 2)):
        ds = probe.capture(model, PROBLEMS, path, reduce="moments", part=part, **quietly)
    known = stored(path)
    folder = path / "moments" / "2-of-2" / "1" / name
    file = next(one for one in sorted((folder / "c").rglob("*")) if one.is_file())
    LOST[how](file)
    unfinished = name == "members" and how in ("missing", "empty")
    said = "6 problems are done, and no moments" if unfinished else "moments/2-of-2/1 cannot be"
    with pytest.raises(StoreError, match=said):
        stored(path)
    second = [str(i) for i in ds.problem.values if int(i) >= len(PROBLEMS) // 2]
    (found,) = probe.verify(path)
    assert found.problems == tuple(second)
    probe.verify(path, repair=True)
    assert probe.open(path).sizes["problem"] == len(PROBLEMS) - len(second)
    for part in ((1, 2), (2, 2)):
        probe.capture(model, PROBLEMS, path, reduce="moments", part=part, **quietly)
    same(stored(path), known)
    assert probe.verify(path) == []


def test_a_damaged_group_of_moments_is_found(model: Model, tmp_path: Path) -> None:
    path = tmp_path / "m"
    probe.capture(model, PROBLEMS, path, reduce="moments", **quietly)
    (path / "moments/1-of-1/1/zarr.json").write_text("{")
    (found,) = probe.verify(path)
    assert "moments/1-of-1/1/zarr.json cannot be read" in found.reason
    with pytest.raises(StoreError, match="the moments in moments/1-of-1/1 cannot be read"):
        stored(path)


def test_moments_that_are_gone_are_missed(model: Model, tmp_path: Path) -> None:
    path = tmp_path / "m"
    probe.capture(model, PROBLEMS, path, reduce="moments", **quietly)
    shutil.rmtree(path / "moments")
    (found,) = probe.verify(path, repair=True)
    assert found.reason == "no moments hold these problems"
    assert len(found.problems) == len(PROBLEMS)
    probe.capture(model, PROBLEMS, path, reduce="moments", **quietly)
    assert int(stored(path).count.pattern.max()) == len(PROBLEMS)


@pytest.mark.parametrize("durable", [True, False])
def test_moments_are_forced_before_their_status(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, durable: bool
) -> None:
    forced: list[str] = []
    monkeypatch.setattr("probe.places._force", lambda path: forced.append(str(path)))
    probe.capture(model, PROBLEMS, tmp_path / "m", reduce="moments", fsync=durable, progress=False)
    members = [n for n, name in enumerate(forced) if "members/c/0" in name]
    status = [n for n, name in enumerate(forced) if "status/c/0" in name]
    assert members[0] < status[0]


def test_a_reader_of_moments_that_are_replaced_tries_again(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m"
    probe.capture(model, PROBLEMS, path, reduce="moments", **quietly)
    known, there = stored(path), place(path)
    real, calls = generations._read, []

    def replacing(where: Any, folder: str) -> Any:
        calls.append(folder)
        found = real(where, folder)
        if len(calls) == 1:  # a writer has finished another meanwhile
            generations.write(there, "1-of-1", 2, found)
            there.remove("moments/1-of-1/1")
        return found

    monkeypatch.setattr(generations, "_read", replacing)
    same(stored(path), known)
    assert calls == ["moments/1-of-1/1", "moments/1-of-1/2"]


def test_models_that_look_ahead_have_moments_everywhere(tmp_path: Path) -> None:
    config = BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=32,
    )  # fmt: skip
    torch.manual_seed(0)
    problems = [ids[:n] for n in (5, 9) for ids in demos.repeated(20, 2, seed=n)]
    with probe.load(BertModel(config).train(False)) as bert:
        probe.capture(bert, problems, tmp_path / "m", reduce="moments", **quietly)
        whole = probe.capture(bert, problems, tmp_path / "w", dtype="float32", **quietly)
    same(stored(tmp_path / "m"), over(whole))
    assert int(stored(tmp_path / "m").count.pattern[0, 0, 0, 4]) == 4
