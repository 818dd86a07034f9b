"""What a latent capture costs: `python -m benchmarks.latent`.

Capture: a reasoner answers questions with and without capture, in turn, in one process; ratios are
of medians of process CPU times, one thread. Answers have a fixed number of tokens, as those of a
random model end nowhere. Everything that `probe.latent.capture` does counts, its store and the
proof of each layer too.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import probe
import probe.latent
from benchmarks.case import Setting
from probe.latent import Reasoner

QUESTION, ANSWER = 64, 8  # tokens, as GSM8K's questions and CODI's answers have
LATENTS = 6


def random_reasoner(module: Any) -> Reasoner:
    """One that thinks in its own hidden states, untrained."""
    return Reasoner(
        model=probe.load(module),
        kind="random",
        n_latents=LATENTS,
        opens=(1,),
        closes=(2,),
        following=nn.Identity(),
        words=2048,
    )


def gpt2() -> Any:
    """GPT-2's own size."""
    torch.manual_seed(0)
    config = GPT2Config()
    config._attn_implementation = "sdpa"
    return GPT2LMHeadModel(config).train(mode=False)


MODELS: dict[str, Callable[[], Reasoner]] = {
    "demo-codi (2 layers x 64)": lambda: probe.latent.load("demo-codi"),
    "Llama (12 x 512)": lambda: random_reasoner(Setting().model("sdpa")),
    "GPT-2 (12 x 768)": lambda: random_reasoner(gpt2()),
}


def questions(name: str, count: int) -> list[Any]:
    """What a model is asked: its own, or random tokens of lengths that differ."""
    if name.startswith("demo"):
        return list(probe.demos.chains(count))
    rng = np.random.default_rng(0)
    lengths = rng.integers(QUESTION // 2, QUESTION, count)
    return [rng.integers(3, 2048, n).tolist() for n in lengths]


def cpu(run: Callable[[], object]) -> float:
    """Process CPU seconds."""
    start = time.process_time()
    run()
    return time.process_time() - start


def captured(name: str, batch: int, count: int, repeats: int, queries: str) -> tuple[float, ...]:
    """Median ratio of capture to inference, and the quartiles of the pairs' ratios."""
    reasoner, asked = MODELS[name](), questions(name, count)
    options: dict[str, Any] = {"batch_size": batch, "max_new_tokens": ANSWER}
    with tempfile.TemporaryDirectory() as folder:

        def think() -> None:
            probe.latent.think(reasoner, asked, **options)

        def capture() -> None:
            more: dict[str, Any] = {"queries": queries, "overwrite": True, "progress": False}
            probe.latent.capture(reasoner, asked, Path(folder) / "run.zarr", **options, **more)

        cpu(think), cpu(capture)
        pairs = []
        for n in range(repeats):
            order = (think, capture) if n % 2 else (capture, think)
            times = {run: cpu(run) for run in order}
            pairs.append((times[capture], times[think]))
    ratios = [one / other for one, other in pairs]
    whole = statistics.median(c for c, _ in pairs) / statistics.median(t for _, t in pairs)
    low, _, high = statistics.quantiles(ratios, n=4)
    return whole, low, high


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.latent", description=main.__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--count", type=int, default=32, help="questions in a run")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    console = Console(width=110)
    table = Table(title=f"capture / inference, {chosen.count} questions, {ANSWER} tokens of answer")
    for column in ("model", "batch", "all rows", "latents alone"):
        table.add_column(column)
    for name in MODELS:
        for batch in (1, 16):
            cells = []
            for queries in (probe.latent.ROWS, "segment:latent"):
                whole, low, high = captured(name, batch, chosen.count, chosen.repeats, queries)
                cells.append(f"{whole:.2f} ({low:.2f} - {high:.2f})")
            table.add_row(name, str(batch), *cells)
    console.print(table, f"load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
