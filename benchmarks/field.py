"""Contenders beside each other: processes of their own, in turn, in pairs with a plain forward."""

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

from benchmarks.case import Setting
from benchmarks.contenders import CONTENDERS, ENVIRONMENTS, Contender

WARMUPS = 3
# From an eager model, of probabilities; float16 rounds them by up to 5e-4.
WRONG = {"float32": 2e-3, "float16": 2e-2, "bfloat16": 5e-2}
PLAIN = Contender("huggingface", "sdpa")
ROOT = Path(__file__).parent.parent

CPU, PROCESS, WALL = 0, 1, 2


@dataclass
class Result:
    """What was found of one contender.

    Attributes:
        said: Why it was not timed; "" if it was.
        difference: Largest, from an eager model's patterns.
        pairs: Each of the seconds of a plain forward and of its own: CPU, process, wall.
        peak: Bytes above what it held before.
        written: Bytes on the disk.
    """

    said: str = ""
    difference: float = 0.0
    pairs: list[tuple[list[float], list[float]]] = field(default_factory=list)
    peak: float = 0.0
    written: float = 0.0

    def ratio(self, clock: int) -> float:
        """Median of its own over the median of the plain forward."""
        plain, own = (
            statistics.median(one[clock] for one in of) for of in zip(*self.pairs, strict=True)
        )
        return float(own / plain)

    def spread(self, clock: int) -> tuple[float, float]:
        """The middle half of the pairs' ratios."""
        low, _, high = statistics.quantiles([b[clock] / a[clock] for a, b in self.pairs], n=4)
        return low, high


class Worker:
    """A process that hosts a contender: see `benchmarks.worker`."""

    def __init__(self, python: str, contender: Contender, workload: str, setting: Setting,
                 weights: Path, out: Path, variables: Mapping[str, str]) -> None:  # fmt: skip
        self._errors = (out.parent / f"{out.name}.log").open("w+")
        command = [python, "-m", "benchmarks.worker", contender.module, contender.way, workload]
        self._process = subprocess.Popen(
            [*command, setting.as_json(), str(weights), str(out)],
            cwd=ROOT,
            env=os.environ | variables,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )

    def heard(self) -> dict[str, Any]:
        """Its next answer; of a process that died, its last words."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("@"):
                return cast("dict[str, Any]", json.loads(line[1:]))
        code = self._process.wait()
        if code == -signal.SIGKILL:
            return {"error": "killed (SIGKILL); was there enough memory?"}
        self._errors.seek(0)
        said = [line for line in self._errors.read().splitlines() if line.strip()]
        return {"error": said[-1] if said else f"exit {code}"}

    def ask(self, what: str) -> dict[str, Any]:
        """Its answer to a line."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{what}\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # what it said is in its answer
        return self.heard()

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.communicate()
        self._errors.close()


def python_of(contender: Contender, environments: Path | None) -> str | None:
    """The interpreter that a contender needs; None where its environment is not there."""
    if not contender.environment:
        return sys.executable
    if environments is None:
        return None
    found = environments / contender.environment / "bin" / "python"
    return str(found) if found.exists() else None


def install(environments: Path) -> None:
    """Make the virtual environments of other libraries, with this one's torch."""
    from importlib.metadata import version

    torch = f"torch=={version('torch').partition('+')[0]}"
    for name, packages in ENVIRONMENTS.items():
        folder = environments / name
        if not folder.exists():
            subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        for some in ([torch], packages):
            subprocess.run([folder / "bin" / "pip", "install", "-q", *some], check=True)


def compared(
    setting: Setting,
    workload: str,
    *,
    repeats: int,
    environments: Path | None = None,
    names: Sequence[str] = tuple(CONTENDERS),
    warmups: int = WARMUPS,
    peaks: int = 1,
    variables: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, Result]:
    """What every contender takes for a workload; a plain forward is measured against itself too.

    The peak is the median of so many runs, the first ones of each. Variables are added to the
    environment of their processes.
    """
    results: dict[str, Result] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        setting.save(folder / "weights")
        workers = dict(_ready(folder, setting, workload, environments, names, results, variables))
        try:
            for one, worker in workers.items():
                _take(results[one], worker.ask(f"peak {peaks}"))
            for turn in range(warmups + repeats):
                first = turn % max(1, len(workers))
                order = list(workers)
                for one in order[first:] + order[:first]:
                    answer = {} if results[one].said else workers[one].ask("pair")
                    if "own" in answer and turn >= warmups:
                        results[one].pairs.append((answer["plain"], answer["own"]))
                    elif "error" in answer:
                        results[one].said = f"ERROR: {answer['error']}"
        finally:
            for worker in workers.values():
                worker.close()
    return results


def _ready(
    folder: Path,
    setting: Setting,
    workload: str,
    environments: Path | None,
    names: Sequence[str],
    results: dict[str, Result],
    variables: Mapping[str, str],
) -> Iterator[tuple[str, Worker]]:
    """Workers of those that are right; `results` says of each what it is."""
    started: dict[str, Worker] = {}
    everybody = {"plain forward": PLAIN} if workload == "full" else {}
    for n, (name, one) in enumerate((everybody | {k: CONTENDERS[k] for k in names}).items()):
        if (python := python_of(one, environments)) is None:
            results[name] = Result(f"not installed: environment {one.environment}")
        else:
            out = folder / str(n)
            weights = folder / "weights"
            started[name] = Worker(python, one, workload, setting, weights, out, variables)
    for name, worker in started.items():
        answer = worker.heard()
        if "unsupported" in answer:
            worker.close()
            continue
        results[name] = result = Result(difference=answer.get("difference", 0.0))
        if "error" in answer:
            result.said = f"ERROR: {answer['error']}"
        elif not result.difference <= WRONG[setting.dtype]:
            result.said = f"SILENTLY WRONG by {result.difference:.1g}"
        if result.said:
            worker.close()
        else:
            yield name, worker


def _take(result: Result, answer: dict[str, Any]) -> None:
    if "error" in answer:
        result.said = f"ERROR: {answer['error']}"
    else:
        result.peak, result.written = answer["peak"], answer["written"]


def load() -> str:
    """The machine's load, for the tables."""
    return f"load {os.getloadavg()[0]:.1f}, {os.cpu_count()} cores"
