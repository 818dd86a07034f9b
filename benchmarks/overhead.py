"""What reading attention costs: `python -m benchmarks.overhead`.

Every contender has a process of its own, with a model of the same weights and the same token ids.
Times are thread CPU times, in pairs with a plain forward of a second model, after two warm-up
pairs; ratios are of medians. Peak memory above the model is that of one run in a fresh process.
Before anything is timed, what a contender reads is compared with an eager copy of the model.
"""

import argparse
import gc
import json
import multiprocessing
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

import probe
from probe.reading import read

ROWS = 32


@dataclass(frozen=True)
class Setting:
    """One workload: a Llama of this size reads `batch` sequences of `length` tokens."""

    length: int = 1024
    batch: int = 2
    layers: int = 12
    hidden: int = 512
    heads: int = 8
    threads: int = 1

    def model(self, attention: str) -> LlamaForCausalLM:
        """A random model, the same weights every time."""
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=2048,
            hidden_size=self.hidden,
            intermediate_size=3 * self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.heads,
            max_position_embeddings=max(2048, self.length),
        )
        config._attn_implementation = attention
        model: LlamaForCausalLM = LlamaForCausalLM(config).train(False)
        return model

    def ids(self) -> torch.Tensor:
        """Token ids (batch, position)."""
        generator = torch.Generator().manual_seed(1)
        return torch.randint(3, 2048, (self.batch, self.length), generator=generator)


Run = Callable[[], Any]
Contender = Callable[[Setting], Run]


def sdpa(setting: Setting) -> Run:
    """The yardstick: a plain forward on the fast kernel."""
    model, ids = setting.model("sdpa"), setting.ids()
    return lambda: model(ids, use_cache=False)


def eager(setting: Setting) -> Run:
    """A plain forward on the eager kernel."""
    model, ids = setting.model("eager"), setting.ids()
    return lambda: model(ids, use_cache=False)


def output_attentions(setting: Setting) -> Run:
    """What transformers offers: all patterns, float32, held until the forward ends."""
    model, ids = setting.model("eager"), setting.ids()
    return lambda: model(ids, use_cache=False, output_attentions=True).attentions


def one_by_one(setting: Setting) -> Run:
    """The same, one sequence at a time, the last one's patterns dropped before the next."""
    model, ids = setting.model("eager"), setting.ids()

    def run() -> None:
        for row in ids:
            model(row[None], use_cache=False, output_attentions=True)

    return run


def tapped(setting: Setting) -> Run:
    """A tapped model that nobody listens to."""
    model, ids = probe.load(setting.model("sdpa")), setting.ids()
    return lambda: model.module(ids, use_cache=False)


class Kept:
    """Takes what is read, and keeps it in memory: (problem, layer) of the batch."""

    def __init__(self) -> None:
        self.patterns: dict[tuple[int, int], Any] = {}

    def begin(self, n: int, labels: object = None) -> None:
        """Nothing to do."""

    def put(self, some: Sequence[int], name: str, values: Any, layer: int) -> None:
        """Keep a layer."""
        for n, one in zip(some, values, strict=True):
            self.patterns[n, layer] = one


def _reading(setting: Setting, batch_size: int | None, **selection: Any) -> Run:
    model = probe.load(setting.model("sdpa"))
    plan = probe.plan(model, setting.ids().tolist(), batch_size=batch_size, **selection)

    def run() -> Any:
        result = None
        for batch in plan.batches:
            result = None
            result = Kept()
            read(model, plan, batch, proof=False, into=result)  # type: ignore[arg-type]
        return result

    return run


def last_rows(setting: Setting) -> Run:
    """32 rows of every layer and head, float16, with the loss."""
    return _reading(setting, setting.batch, queries=f"last:{ROWS}")


def full(setting: Setting) -> Run:
    """All patterns, float16, held until the forward ends, with the loss."""
    return _reading(setting, setting.batch)


def full_streamed(setting: Setting) -> Run:
    """The same in the batches that capture chooses, each handed on before the next."""
    return _reading(setting, None)


CONTENDERS: dict[str, Contender] = {
    "sdpa forward": sdpa,
    "eager forward": eager,
    "output_attentions=True": output_attentions,
    "output_attentions=True, one by one": one_by_one,
    "probe, idle": tapped,
    f"probe, {ROWS} rows": last_rows,
    "probe, full": full,
    "probe, full as captured": full_streamed,
}


def parity(setting: Setting) -> float:
    """Largest difference between what is read (float32) and an eager copy's patterns."""
    attentions = output_attentions(setting)()
    worst = 0.0
    for selection in ({}, {"queries": f"last:{ROWS}"}):
        kept = _reading(setting, setting.batch, dtype="float32", **selection)()
        for (problem, layer), pattern in kept.patterns.items():
            got = torch.from_numpy(pattern)
            expected = attentions[layer][problem][:, -got.shape[1] :]
            worst = max(worst, float((got - expected).abs().max()))
    return worst


def times(name: str, setting: Setting, repeats: int, warmups: int = 2) -> list[list[float]]:
    """Pairs of thread CPU seconds, of a plain forward and of a contender, one after the other.

    Both run in this process, in alternating order: processes differ by 10 % among themselves.
    """
    torch.set_num_threads(setting.threads)
    pairs = []
    with torch.no_grad():
        runs = [sdpa(setting), CONTENDERS[name](setting)]
        for round_ in range(warmups + repeats):
            pair = [0.0, 0.0]
            for which in (0, 1) if round_ % 2 else (1, 0):
                gc.collect()
                start = time.thread_time()
                result = runs[which]()
                pair[which] = time.thread_time() - start
                del result
            pairs.append(pair)
    return pairs[warmups:]


def peak(name: str, setting: Setting) -> float:
    """Bytes that one run of a contender needs at its peak above the loaded model (Linux)."""
    small = Setting(**{**vars(setting), "length": 8})
    CONTENDERS[name](small)()  # imports and lazy initialisation are not the run's
    run = CONTENDERS[name](setting)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    before = _status("VmRSS")
    result = run()
    high = _status("VmHWM")
    del result
    return float(high - before)


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(field)))


def main() -> None:
    """Print the table, or one contender's peak memory."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, value in vars(Setting()).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--peak", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    setting = Setting(**{name: getattr(arguments, name) for name in vars(Setting())})
    torch.set_num_threads(setting.threads)
    with torch.no_grad():
        if arguments.peak:
            print(peak(arguments.peak, setting))
            return
        wrong = parity(setting)
    seconds = {}
    for name in CONTENDERS:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            seconds[name] = pool.apply(times, (name, setting, arguments.repeats))
    memory = {name: _peak_elsewhere(name, setting) for name in CONTENDERS}
    _report(setting, seconds, memory, wrong)
    if arguments.json:
        figures = {"setting": vars(setting), "parity": wrong, "seconds": seconds, "bytes": memory}
        arguments.json.write_text(json.dumps(figures, indent=1))


def _peak_elsewhere(name: str, setting: Setting) -> float:
    options = [f"--{key}={value}" for key, value in vars(setting).items()]
    command = [sys.executable, "-m", "benchmarks.overhead", "--peak", name, *options]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def _report(
    setting: Setting, pairs: dict[str, list[list[float]]], memory: dict[str, float], wrong: float
) -> None:
    all_of_it = memory["output_attentions=True"]
    load = Path("/proc/loadavg").read_text().split()[0]
    table = Table(
        "contender",
        "median s",
        "plain s",
        "x plain",
        "of pairs",
        "peak MB",
        "x output_attentions",
        title=f"{setting}\nlargest difference from eager {wrong:.1e}, load {load}",
    )
    for name, runs in pairs.items():
        plain, own = (statistics.median(run) for run in zip(*runs, strict=True))
        low, _, high = statistics.quantiles([b / a for a, b in runs], n=4)
        table.add_row(
            name,
            f"{own:.3f}",
            f"{plain:.3f}",
            f"{own / plain:.3f}",
            f"{low:.2f} - {high:.2f}",
            f"{memory[name] / 1e6:.0f}",
            f"{memory[name] / all_of_it:.2f}",
        )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
