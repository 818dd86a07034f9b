"""A contender's process: `python -m benchmarks.worker MODULE WAY WORKLOAD SETTING WEIGHTS OUT`.

It says what differs from an eager copy, then waits: for each line `pair` it runs a plain forward of
its own and the contender, in alternating order, and says how long they took; for `peak N`, what
memory a run takes, the median of N. Answers are JSON lines that begin with `@`: what libraries
print is let be.
"""

import ctypes
import gc
import importlib
import json
import os
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.case import Case, Run, Setting, UnsupportedError
from benchmarks.contenders import huggingface

PARITY = 128  # tokens


def say(**what: object) -> None:
    """Answer."""
    print(f"\n@{json.dumps(what)}", flush=True)


def prepared(way: Any, case: Case) -> Run:
    """A contender's run, after which all that it wrote is on the disk."""
    run = way(case)
    if case.workload != "stored":
        return run  # type: ignore[no-any-return]

    def to_the_disk() -> Any:
        result = run()
        os.sync()
        return result

    return to_the_disk


def timed(run: Run, case: Case) -> list[float]:
    """Seconds: of this thread's CPU, of the process's, and of the wall clock."""
    shutil.rmtree(case.out, ignore_errors=True)
    case.out.mkdir(parents=True)
    gc.collect()
    settled(case)
    start = time.thread_time(), time.process_time(), time.perf_counter()
    result = run()
    settled(case)
    end = time.thread_time(), time.process_time(), time.perf_counter()
    del result
    return [b - a for a, b in zip(start, end, strict=True)]


def settled(case: Case) -> None:
    """Wait for what a GPU still does."""
    if case.setting.device != "cpu":
        torch.cuda.synchronize()


def peak(run: Run, case: Case) -> int:
    """Bytes that one run takes above what is held before it, where the model is (Linux)."""
    gc.collect()
    if case.setting.device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        timed(run, case)
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)  # what the allocator holds would hide what the run takes
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts from here
    before = resident("VmRSS")
    timed(run, case)
    return resident("VmHWM") - before


def difference(way: Any, case: Case) -> float:
    """Of what a contender reads of short sequences from an eager model's patterns."""
    case.out.mkdir(parents=True, exist_ok=True)
    found = way(case)()
    known = huggingface.output_attentions(
        Case(case.setting, "full" if case.workload == "stored" else case.workload, case.weights,
             case.out)
    )()  # fmt: skip
    return case.same(found() if callable(found) else found, known)


def resident(field: str) -> int:
    """Bytes (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(field)))


def main() -> None:
    """Serve."""
    module, name, workload, text, weights, out = sys.argv[1:]
    setting = Setting.of(text)
    torch.set_num_threads(setting.threads)
    torch.set_grad_enabled(mode=False)
    case = Case(setting, workload, Path(weights), Path(out))
    short = setting.but(length=min(PARITY, setting.length), rows=min(8, setting.rows))
    try:
        way = importlib.import_module(f"benchmarks.contenders.{module}").WAYS[name]
        reads = name not in ("sdpa", "eager")
        small = Case(short, workload, case.weights, case.out / "small")
        wrong = difference(way, small) if reads else 0.0
        run, plain = prepared(way, case), huggingface.sdpa(case)
    except UnsupportedError as error:
        say(unsupported=str(error))
        return
    say(ready=True, difference=wrong)
    turn = 0
    for line in sys.stdin:
        if line.startswith("peak"):
            most = statistics.median(peak(run, case) for _ in range(int(line.split()[1])))
            size = sum(file.stat().st_size for file in case.out.rglob("*") if file.is_file())
            say(peak=most, written=size)
            continue
        turn += 1
        pair = {}
        for which in ("plain", "own") if turn % 2 else ("own", "plain"):
            pair[which] = timed(plain if which == "plain" else run, case)
        say(**pair)


if __name__ == "__main__":
    main()
