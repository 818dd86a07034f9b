"""Experiments as runs: labelled, resumed, refused and recorded like captures."""

import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr

import probe
from probe import demos
from probe.errors import InputError, StoreError
from probe.model import Model
from recipes.ablation import Ablate, cumulative, sweep
from recipes.suppression import (
    Knockout,
    Suppress,
    dose_response,
    effect,
    knockout_by_layer,
    relevance,
)

ONE = Suppress(keys=1, factor=0.2)
RAGGED = [[0, 5, 9, 2, 5, 9, 2], [0, 4], [0, 7, 7], [0, 1, 2, 3, 4, 5, 6, 7, 8], [3, 1, 3]]
LABELS = ("problem", "length", "token", "token_id", "query_position", "key_position", "segment")
QUIET: Any = {"progress": False}

Run = Callable[..., xr.Dataset]
RUNS: dict[str, Run] = {
    "effect": lambda m, p, store=None, **o: effect(m, p, ONE, store=store, **QUIET, **o),
    "doses": lambda m, p, store=None, **o: dose_response(m, p, ONE, [1, 0], store, **QUIET, **o),
    "windows": lambda m, p, store=None, **o: knockout_by_layer(
        m, p, Knockout(keys=1), store, **QUIET, **o
    ),
    "relevance": lambda m, p, store=None, **o: relevance(m, p, store, **QUIET, **o),
    "sweep": lambda m, p, store=None, **o: sweep(m, p, store, **QUIET, **o),
    "groups": lambda m, p, store=None, **o: cumulative(m, p, [(0, 3), (1, 0)], store, **QUIET, **o),
}
each_run = pytest.mark.parametrize("name", RUNS)


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    with probe.load("demo-llama", device="cpu") as found:
        yield found


@pytest.fixture(scope="module")
def captured(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("jobs") / "captured"
    probe.capture(model, RAGGED, path, **QUIET)
    return path


def failing(model: Model, token: int, error: Exception | None = None) -> Any:
    """A hook that makes the model fail on whatever holds a token."""

    def check(_: Any, __: Any, named: dict[str, Any]) -> None:
        if bool((named["input_ids"] == token).any()):
            raise error or ArithmeticError(f"token {token} overflowed")

    return model.module.register_forward_pre_hook(check, with_kwargs=True)


@each_run
def test_labels_and_loss_are_those_of_a_capture_in_a_store_and_in_memory(
    model: Model, captured: Path, tmp_path: Path, name: str
) -> None:
    ds, stored = probe.open(captured), RUNS[name](model, RAGGED, tmp_path / "s")
    memory = RUNS[name](model, RAGGED)
    for label in LABELS:
        np.testing.assert_array_equal(stored[label].values, ds[label].values)
        assert stored[label].dtype == ds[label].dtype
    np.testing.assert_allclose(stored.loss.values, ds.loss.values, atol=2e-6)
    xr.testing.assert_equal(stored.load(), memory)
    opened = probe.open(tmp_path / "s")
    assert opened.attrs["recipe"]["name"] == memory.attrs["recipe"]["name"]
    assert opened.attrs["model"] == "demo-llama"
    assert (opened.status == 1).all()


@each_run
def test_running_a_finished_job_again_computes_nothing(
    model: Model, tmp_path: Path, name: str
) -> None:
    problems = RAGGED[:2]
    first = RUNS[name](model, problems, tmp_path / "s").load()
    hook = failing(model, 0)
    try:
        again = RUNS[name](model, problems, tmp_path / "s").load()
    finally:
        hook.remove()
    assert first.identical(again)


MANY = [ids[:n] for n in range(9, 39) for ids in demos.repeated(20, 1, seed=n)]
KILLED = """if True:
    import os, signal, sys
    import probe
    from tests.test_jobs import MANY, RUNS, stopping_after
    stopping_after(21, lambda: os.kill(os.getpid(), signal.SIGKILL))
    with probe.load("demo-llama", device="cpu") as model:
        RUNS["effect"](model, MANY, sys.argv[1], batch_size=4)
"""


def stopping_after(n: int, stop: Callable[[], None]) -> pytest.MonkeyPatch:
    """Let a run stop when it has written so many problems."""
    write, seen, patch = probe.store.Writer.append, list[int](), pytest.MonkeyPatch()
    for pause in ("SECONDS", "SHARE"):  # what has come is written at once
        patch.setattr(f"probe.writer.{pause}", 0)

    def append(self: Any, indices: Any, *arguments: Any, **named: Any) -> None:
        write(self, indices, *arguments, **named)
        seen.extend(indices)
        if len(seen) == n:
            stop()

    patch.setattr(probe.store.Writer, "append", append)
    return patch


def interrupt() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("name", ["effect", "doses", "sweep"])
def test_a_stopped_run_that_is_run_again_equals_an_uninterrupted_one(
    model: Model, tmp_path: Path, name: str
) -> None:
    path = tmp_path / "stopped"
    if name == "effect":
        command = [sys.executable, "-c", KILLED, str(path)]
        root = Path(__file__).parents[1]
        done = subprocess.run(command, check=False, cwd=root, capture_output=True)
        assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    else:
        patch = stopping_after(21, interrupt)
        with pytest.raises(KeyboardInterrupt):
            RUNS[name](model, MANY, path, batch_size=4)
        patch.undo()
    assert 0 < probe.open(path).sizes["problem"] < 30
    forwards: list[int] = []
    hook = model.module.register_forward_pre_hook(lambda *_: forwards.append(1))
    again = RUNS[name](model, MANY, path, batch_size=4).load()
    resumed = len(forwards)
    whole = RUNS[name](model, MANY, tmp_path / "whole", batch_size=4).load()
    hook.remove()
    assert resumed < len(forwards) - resumed
    xr.testing.assert_equal(again, whole)
    assert not list(tmp_path.rglob("*.partial"))


def test_another_experiment_does_not_resume_a_store_and_what_differs_is_named(
    model: Model, tmp_path: Path
) -> None:
    def refused(
        message: str, one: Suppress, factors: Any, problems: Any = RAGGED, **options: Any
    ) -> None:
        with pytest.raises(StoreError, match=message):
            dose_response(model, problems, one, factors, tmp_path / "s", **QUIET, **options)

    factors = [1, 0]
    dose_response(model, RAGGED, Suppress(keys=1, heads=[1, 2]), factors, tmp_path / "s", **QUIET)
    one = Suppress(keys=1, heads=[1, 2])
    refused(r"intervention.heads \[1, 2\], now \[1, 3\]", Suppress(keys=1, heads=[1, 3]), factors)
    refused(r"intervention.keys 1, now 0", Suppress(keys=0, heads=[1, 2]), factors)
    refused(r"recipe.factors \[1.0, 0.0\], now \[1.0, 0.5\]", one, [1, 0.5])
    refused(r"recipe.tokens None, now 'last:1'", one, factors, tokens="last:1")
    refused(r"tokens_sha256 .*, now", one, factors, problems=RAGGED[:3])
    with (
        model.intervene(Ablate([(0, 3)])),
        pytest.raises(StoreError, match=r"interventions \[\], now \[\{.*recipes.ablation.Ablate"),
    ):
        dose_response(model, RAGGED, one, factors, tmp_path / "s", **QUIET)
    with pytest.raises(StoreError, match=r"recipe.name 'dose_response', now effect"):
        effect(model, RAGGED, one, store=tmp_path / "s", **QUIET)
    ds = dose_response(model, RAGGED, one, [1, 0.5], tmp_path / "s", overwrite=True, **QUIET)
    assert ds.attrs["recipe"]["factors"] == [1.0, 0.5]


@each_run
def test_a_problem_that_fails_is_recorded_and_the_others_go_on(
    model: Model, tmp_path: Path, name: str
) -> None:
    hook = failing(model, 8)
    try:
        ds = RUNS[name](model, RAGGED, tmp_path / "s")
        with pytest.raises(ArithmeticError, match="token 8 overflowed") as caught:
            RUNS[name](model, RAGGED, tmp_path / "raise", on_error="raise")
    finally:
        hook.remove()
    assert ds.status.values.tolist() == [1, 1, 1, 2, 1]
    assert ds.error.values.tolist()[3] == "ArithmeticError: token 8 overflowed"
    assert caught.value.__notes__ == ["This happened in problem '3'."]
    floats = [x for x in ds.data_vars.values() if x.dtype.kind == "f" and "problem" in x.dims]
    assert all(np.isnan(x.values[3]).all() for x in floats)
    again = RUNS[name](model, RAGGED, tmp_path / "s")  # now it works
    xr.testing.assert_allclose(again.load(), RUNS[name](model, RAGGED), atol=2e-3)


def test_nothing_is_left_on_disk_without_a_store(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    ds = RUNS["effect"](model, RAGGED)
    hook = failing(model, 0)
    with pytest.raises(ArithmeticError):
        RUNS["effect"](model, RAGGED, on_error="raise")
    hook.remove()
    assert list(tmp_path.iterdir()) == []
    assert float(ds.delta_loss.sum()) != 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batchsize": 2}, "there is no option 'batchsize'. Choose from batch_size, max_length"),
        ({"on_error": "ignore"}, "on_error='ignore'. Choose 'record' or 'raise'."),
        ({"batch_size": 0}, "batch_size=0. It must be an int of at least 1."),
        ({"max_length": 2.5}, "max_length=2.5. It must be an int of at least 1."),
        ({"store": 5}, "store=5. Give the folder of the store, as 'run.zarr'."),
    ],
)
@each_run
def test_an_option_that_is_none_is_refused_before_the_model_runs(
    model: Model, name: str, options: dict[str, Any], message: str
) -> None:
    hook = failing(model, 0, AssertionError("the model ran"))
    try:
        with pytest.raises(InputError, match=re.escape(message)):
            RUNS[name](model, RAGGED, **options)
    finally:
        hook.remove()


def test_problems_may_be_a_store_its_folder_or_a_part_of_it(
    model: Model, captured: Path, tmp_path: Path
) -> None:
    wanted = RUNS["sweep"](model, RAGGED)
    generated = probe.capture(model, RAGGED, tmp_path / "g", max_new_tokens=3, **QUIET)
    rows = probe.capture(model, RAGGED, tmp_path / "r", queries="last:1", **QUIET)
    for source in (probe.open(captured), captured, str(captured), generated, rows, wanted):
        xr.testing.assert_equal(RUNS["sweep"](model, source), wanted)
    some = RUNS["sweep"](model, probe.open(captured).isel(problem=[4, 0]))
    assert some.problem.values.tolist() == ["4", "0"]
    np.testing.assert_array_equal(some.delta_loss.values, wanted.delta_loss.values[[4, 0]])


def test_problems_that_are_no_store_are_refused(
    model: Model, captured: Path, tmp_path: Path
) -> None:
    run, ds = RUNS["effect"], probe.open(captured)
    few = probe.capture(model, RAGGED, tmp_path / "few", keys=slice(0, 1), **QUIET)
    with pytest.raises(InputError, match=r"only some columns of problem '0'.* Capture with"):
        run(model, few)
    with pytest.raises(InputError, match="holds only some columns of problem '0'"):
        run(model, ds.isel(key=[1, 0, 2, 3, 4, 5, 6, 7, 8]))
    with pytest.raises(InputError, match="this dataset is no store: it lacks problem, status"):
        run(model, xr.Dataset({"a": ("x", [1])}))
    with pytest.raises(InputError, match="cannot be read from type DataArray"):
        run(model, ds.pattern)
    with pytest.raises(InputError, match=r"one problem of a store, '3', without its dim. Keep it"):
        run(model, ds.sel(problem="3"))
    with pytest.raises(InputError, match="holds no problems"):
        run(model, ds.isel(problem=[]))
    with pytest.raises(InputError, match=r"captured is a store. Give it opened: probe.open\('"):
        probe.problems(captured)
    with pytest.raises(StoreError, match=r"there is no store at .*nowhere.zarr"):
        run(model, str(tmp_path / "nowhere.zarr"))


@pytest.mark.parametrize("text", ["abc " * 100, "~nobody at home", "a\x00b", "a\ud800"])
def test_a_text_that_is_no_path_is_a_text(model: Model, text: str) -> None:
    with pytest.raises(InputError, match=r"cannot encode|tokens, and the context"):
        RUNS["effect"](model, text)


def test_texts_survive_whatever_they_say(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = ["日本語 😀", "", "a\nb\x00\t", "\\N 'x' \"y\" [red]", "x" * 5000, "e\u0301\u202eabc"]
    problems = [[0, 5, 6, n] for n in range(6)]
    monkeypatch.setattr(model.text, "_decode_one", lambda token: odd[token % 6])
    monkeypatch.setattr(model.text, "_said", {})
    effect(model, problems, ONE, store=tmp_path / "s", max_new_tokens=4, **QUIET)
    new = [model.generate([ids], max_new_tokens=4)[0, 4:].tolist() for ids in problems]
    opened = probe.open(tmp_path / "s")
    assert opened.token.values[:, 3].tolist() == odd
    wanted = ["".join(odd[token % 6] for token in own) for own in new]
    assert opened.base_text.values.tolist() == wanted
    assert opened.text.shape == (6,)
    assert model.text.joined([0, 5]) == odd[0] + odd[5]
