"""What a store costs, beside what else attention can be kept in: `python -m benchmarks.store`.

Contenders run in processes of their own, in turn, `--rounds` times; ratios are of medians. What is
not installed is skipped (`pip install tensorstore h5py`). The ragged set is 24 problems of 82 to
512 tokens in 24 layers x 8 heads (610 MB): patterns of a trained model if `--model` and `--texts`
name one, else constructed ones. The tiny set is 7,473 problems of 16 x 32 heads x 6 x 6 (275 MB) of
noise. After that: a loop of 25 ms steps with and without putting what 32 problems give; mean,
spread and flow over the tiny set; and the memory of a capture of 10,000 problems.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

from benchmarks.store_contenders import CONTENDERS

Array = npt.NDArray[Any]
Figures = dict[str, dict[str, float]]
LENGTHS = [82, 512, *np.random.default_rng(0).integers(82, 360, 22).tolist()]
LAYERS, HEADS = 24, 8


def constructed(n: int, noise: np.random.Generator) -> Array:
    """Patterns with a sink, a local band and noise: (layer, head, query, key) float16."""
    at = np.arange(n)
    out = np.empty((LAYERS, HEADS, n, n), "float16")
    for layer in range(LAYERS):
        for head in range(HEADS):
            scores = noise.normal(size=(n, n)).astype("float32") * (1 + head / 2)
            scores -= np.abs(at[:, None] - at) * (0.02 * (layer % 6))
            scores[:, 0] += layer % 5
            scores[at[:, None] < at] = -np.inf
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            out[layer, head] = weights / weights.sum(-1, keepdims=True)
    return out


def captured(model: str, texts: Path) -> list[Array]:
    """Patterns of a trained model over the texts of a .jsonl, its layers repeated to 24."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    reader: Any = AutoModelForCausalLM.from_pretrained(model, attn_implementation="eager")
    reader.eval()
    tokenizer = AutoTokenizer.from_pretrained(model)
    lines = texts.read_text(encoding="utf-8").splitlines()[:400]
    ids = tokenizer(" ".join(json.loads(line)["question"] for line in lines))["input_ids"]
    out, start = [], 0
    with torch.no_grad():
        for n in LENGTHS:
            found = reader(torch.tensor([ids[start : start + n]]), output_attentions=True)
            start += n
            own = torch.stack([one[0] for one in found.attentions]).half().numpy()
            out.append(np.concatenate([own] * -(-LAYERS // len(own)))[:LAYERS])
    return out


def tiny() -> list[Array]:
    """7,473 problems of 16 layers x 32 heads x 6 x 6: softmax of causal noise, float16."""
    scores = np.random.default_rng(0).normal(size=(7473, 16, 32, 6, 6)).astype("float32") * 2
    scores[..., ~np.tril(np.ones((6, 6), bool))] = -np.inf
    weights = np.exp(scores)
    return list((weights / weights.sum(-1, keepdims=True)).astype("float16"))


def rounds(data: Path, count: int, names: list[str]) -> Figures:
    """Medians of every contender's figures; those that cannot run are left out."""
    found: dict[str, list[dict[str, float]]] = {}
    for number in range(count):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            with tempfile.TemporaryDirectory(dir=data.parent) as folder:
                command = [sys.executable, "-m", "benchmarks.store_contenders", name, str(data)]
                run = subprocess.run([*command, f"{folder}/x"], capture_output=True, text=True)
            if run.returncode:
                print(f"{name} is left out: {run.stderr.strip().splitlines()[-1]}", file=sys.stderr)
                continue
            found.setdefault(name, []).append(json.loads(run.stdout))
    return {
        name: {key: statistics.median(one[key] for one in several) for key in several[0]}
        for name, several in found.items()
    }


def shown(title: str, found: Figures) -> None:
    """The table of one set of problems."""
    table = Table(title=title)
    for column in ("", "first MB/s", "again MB/s", "bytes", "files"):
        table.add_column(column, justify="left" if not column else "right")
    for what in ("one head", "one problem"):
        table.add_column(f"{what}, cold / warm ms", justify="right")
    for name, one in found.items():
        speed = [f"{one['raw'] / one[key] / 1e6:.0f}" for key in ("first", "again")]
        reads = [
            f"{one[f'{what} cold'] * 1e3:.3g} / {one[f'{what} warm'] * 1e3:.3g}"
            for what in ("head", "problem")
        ]
        share, files = f"{one['bytes'] / one['raw']:.2f}", f"{one['files']:.0f}"
        table.add_row(name, *speed, share, files, *reads)
    Console(width=120).print(table)


def verdicts(found: Figures, targets: list[tuple[str, str, str, float]]) -> None:
    """Ratios of ours to others: (ours, other, figure, at least); of times, the inverse."""
    table = Table(title="targets")
    for column in ("", "target", "measured", ""):
        table.add_column(column)
    for ours, other, figure, least in targets:
        if ours in found and other in found:
            ratio = found[other][figure] / found[ours][figure]
            verdict = "met" if ratio >= least else "MISSED"
            table.add_row(f"{ours} : {other}, {figure}", f">= {least}", f"{ratio:.2f}", verdict)
    Console(width=120).print(table)


RAGGED = [
    (ours, other, f"{when}", least)
    for when in ("first", "again")
    for ours, other, least in (
        ("ours", "np.save", 0.6),
        ("ours, fsync", "np.save", 0.5),
        ("ours", "zarr-python", 1.8),
        ("ours", "zarr-python, write_empty_chunks", 1.8),
        ("ours", "tensorstore", 1.8),
        ("ours", "np.savez_compressed", 12),
        ("ours", "pickle, all in one", 0.9),
        ("ours", "pickle, one a problem", 0.9),
    )
] + [
    ("ours", "np.save", "bytes", 2.5),
    ("ours", "pickle, all in one", "head cold", 3),
    ("ours", "np.save", "problem cold", 0.5),
]
TINY = [
    ("ours", "np.save", "first", 1.2),
    ("ours", "np.save", "again", 1.2),
    ("ours", "np.save", "bytes", 1 / 0.62),
    ("ours", "pickle, one a problem", "head cold", 50),
    ("ours", "pickle, one a problem", "head warm", 50),
]


def loop(threads: int, blocks: int = 40, steps: int = 10) -> str:
    """Steps of about 25 ms, in blocks with and without putting 32 problems of 16 x 32 x 6 x 6."""
    import torch

    from probe import store
    from probe.schema import Labels

    torch.set_num_threads(threads)
    matrix, values = torch.ones(700, 700), np.asarray(tiny()[:32])
    one: dict[str, Any] = {"query_position": range(6), "key_position": range(6)}
    one |= {"token_id": range(6), "token": ["a"] * 6, "segment": ["latent"] * 6}
    labels = [Labels(id=str(i), length=6, **one) for i in range(32 * steps * blocks)]
    start = time.perf_counter()
    for _ in range(100):
        matrix @ matrix
    products = max(1, round(0.025 / ((time.perf_counter() - start) / 100)))
    seconds: dict[bool, list[float]] = {False: [], True: []}
    put = []
    with tempfile.TemporaryDirectory() as folder:
        options: dict[str, Any] = {"layers": range(16), "heads": range(32), "config": {}}
        with store.create(f"{folder}/s.zarr", labels=labels, **options) as writer:
            for number in range(2 * blocks):
                puts = bool(number % 2)
                start = time.perf_counter()
                for step in range(steps):
                    for _ in range(products):
                        matrix @ matrix
                    if puts:
                        middle = time.perf_counter()
                        first = 32 * (steps * (number // 2) + step)
                        some = range(first, first + 32)
                        for i in some:
                            writer.begin(i)
                        writer.put(some, "pattern", values)
                        for i in some:
                            writer.done(i, 1.0)
                        put.append(time.perf_counter() - middle)
                seconds[puts].append(time.perf_counter() - start)
                writer.wait()
    plain = statistics.median(seconds[False])
    ratio = statistics.median(b / a for a, b in zip(seconds[False], seconds[True], strict=True))
    return (
        f"a loop of {plain / steps * 1e3:.1f} ms steps on {threads} threads is "
        f"{ratio - 1:+.1%} slower with putting 32 problems a step, which takes "
        f"{statistics.median(put) * 1e3:.2f} ms ({np.percentile(put, 99) * 1e3:.1f} at the 99th "
        "percentile)"
    )


def analysis(folder: Path) -> str:
    """Mean, spread and flow over the tiny set."""
    import probe
    from benchmarks.store_contenders import CONTENDERS
    from recipes import flow, moments

    CONTENDERS["ours"].write(tiny(), folder)
    ds = probe.open(folder / "all.zarr")
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        moments.over(ds, lambda part: {"pattern": part.pattern, "flow": flow.flow(part.pattern)})
        seconds.append(time.perf_counter() - start)
    return f"flow, mean and std over the tiny set: {', '.join(f'{s:.2f}' for s in seconds)} s"


def memory(folder: Path, count: int = 10_000) -> str:
    """Resident memory of a capture, each thousand problems."""
    import probe

    ids = np.random.default_rng(0).integers(0, 60, (count, 24)).tolist()
    found: list[float] = []

    def resident() -> float:
        with Path("/proc/self/statm").open() as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6

    with probe.load("demo-llama") as model:
        seen = [0]

        def count_up(module: Any, arguments: Any, named: Any) -> None:
            seen[0] += named["input_ids"].shape[0]
            if seen[0] // 1000 > len(found):
                found.append(resident())

        hook = model.module.register_forward_pre_hook(count_up, with_kwargs=True)
        probe.capture(model, ids, folder / "s.zarr", batch_size=32, progress=False)
        hook.remove()
    return f"resident MB each 1,000 problems: {', '.join(f'{one:.0f}' for one in found)}"


def main() -> None:
    """Print the tables that are asked for."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--model", help="a trained model, for patterns of the ragged set")
    options.add_argument("--texts", type=Path, help="a .jsonl with questions, for it to read")
    options.add_argument("--only", choices=["ragged", "tiny", "loop", "analysis", "memory"])
    options.add_argument("--folder", type=Path, help="on the disk that is measured")
    given = options.parse_args()
    print(f"load {os.getloadavg()[0]:.1f}, {os.cpu_count()} cores")
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        folder = Path(name)

        def compared(title: str, data: list[Array], targets: Any, names: list[str]) -> None:
            arrays: dict[str, Any] = {f"p{i}": one for i, one in enumerate(data)}
            np.savez(folder / "data.npz", **arrays)
            found = rounds(folder / "data.npz", given.rounds, names)
            shown(title, found)
            verdicts(found, targets)

        def ragged() -> None:
            noise = np.random.default_rng(0)
            data = (
                captured(given.model, given.texts)
                if given.model
                else [constructed(n, noise) for n in LENGTHS]
            )
            compared("ragged, full matrices", data, RAGGED, list(CONTENDERS))

        def small() -> None:
            slow = ("np.savez_compressed", "zarr-python, write_empty_chunks")
            compared("tiny", tiny(), TINY, [name for name in CONTENDERS if name not in slow])

        parts: dict[str, Callable[[], object]] = {
            "ragged": ragged,
            "tiny": small,
            "loop": lambda: print(loop(1), loop(os.cpu_count() or 1), sep="\n"),
            "analysis": lambda: print(analysis(folder)),
            "memory": lambda: print(memory(folder)),
        }
        for part in [given.only] if given.only else parts:
            parts[part]()
    print(f"load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
