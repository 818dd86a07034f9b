"""What the benchmarks measure is right, and what they say follows from it."""

import sys
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from benchmarks import report
from benchmarks.case import WORKLOADS, Case, Setting, UnsupportedError
from benchmarks.contenders import CONTENDERS, hooks, huggingface, ours, source
from benchmarks.field import WRONG, Result, Worker, compared

MODULES = {"huggingface": huggingface, "hooks": hooks, "source": source, "ours": ours}
HERE = {name: one for name, one in CONTENDERS.items() if not one.environment}
SETTING = Setting(length=12, hidden=32, heads=8, rows=5)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    SETTING.save(folder)
    return folder


@pytest.mark.parametrize("workload", WORKLOADS)
@pytest.mark.parametrize("name", HERE)
def test_contenders_read_what_an_eager_model_computes(
    weights: Path, tmp_path: Path, name: str, workload: str
) -> None:
    case = Case(SETTING, workload, weights, tmp_path)
    contender = HERE[name]
    with torch.no_grad():
        try:
            found = MODULES[contender.module].WAYS[contender.way](case)()
        except UnsupportedError:
            return
        if contender.way == "eager":
            return
        whole = Case(SETTING, "full" if workload == "stored" else workload, weights, tmp_path)
        known: Any = huggingface.output_attentions(whole)()
    found = found() if callable(found) else found
    assert case.same(found, known) < 6e-4
    moved = [torch.roll(one, 1, -1) for one in known]
    assert case.same(moved, known) > 0.05
    assert case.same(known[1:], known) == float("inf")


def test_contenders_run_in_turn_and_the_wrong_one_is_not_timed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names = ["forward hooks", "TransformerLens run_with_cache"]
    found = compared(SETTING, "full", repeats=2, names=names, warmups=1)
    assert len(found["forward hooks"].pairs) == len(found["plain forward"].pairs) == 2
    assert found["TransformerLens run_with_cache"].said == "not installed: environment lens"
    monkeypatch.setitem(WRONG, "float32", -1.0)
    found = compared(SETTING, "full", repeats=1, names=["forward hooks"], warmups=0)
    assert found["forward hooks"].said == "SILENTLY WRONG by 0"
    assert not found["forward hooks"].pairs


def test_a_contender_that_was_killed_says_so(weights: Path, tmp_path: Path) -> None:
    one = CONTENDERS["forward hooks"]
    worker = Worker(sys.executable, one, "full", SETTING, weights, tmp_path / "out", {})
    worker._process.kill()
    assert "SIGKILL" in worker.heard()["error"]
    worker.close()


def result(ratio: float, peak: float = 1.0) -> dict[str, Any]:
    pairs = [([1.0] * 3, [ratio] * 3)] * 4
    return vars(Result(pairs=pairs, peak=peak))


def test_targets_say_what_is_met(tmp_path: Path) -> None:
    figures: dict[str, Any] = {
        "table": {
            "1024 full": {"probe, capture": result(1.19), "plain forward": result(1, peak=100)},
            "1024 stored": {"probe, capture": result(1.4, peak=190)},
            "256 full": {"probe, capture": result(1.1)},
        },
        "rows": {str(n): result(1 + n / 1000) for n in (1, 32, 1024)},
        "tap": {"layer": 30.0, "idle": 1.0},
        "memory": {
            **{"12 layers": 100.0, "24 layers": 150.0, "48 layers": 90.0},
            **{"24 problems": 100.0, "48 problems": 105.0, "96 problems": 60.0},
        },
    }
    said = StringIO()
    report.targets(Console(file=said, width=130), figures)
    verdicts = [line.strip("│ \n").split("│") for line in said.getvalue().splitlines()]
    found = {one[0].strip(): one[-1].strip() for one in verdicts if len(one) == 4}
    assert found["all patterns of 1,024 in memory, x CPU"] == "pass"
    assert found["all patterns of 1,024 in a finished store, x wall"] == "FAIL"
    assert found["all patterns of 256 in memory, x CPU"] == "FAIL"
    assert found["peak of a capture into a store, x plain forward"] == "pass"
    assert found["that peak with 24 and 48 layers, of that with 12"] == "FAIL"
    assert found["that peak with 48 and 96 problems, of that with 24"] == "pass"
    assert found["cost against rows: not on a straight line"] == "pass"
    assert "32 rows of 1,024, x CPU" not in found  # not measured
    start, slope, share = report.line(figures)
    assert (start, slope, share) == pytest.approx((1, 1e-3, 1))
    report.plot(figures, tmp_path / "cost.png")
    assert (tmp_path / "cost.png").stat().st_size > 10_000
