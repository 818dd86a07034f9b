"""The same on a GPU: `python -m benchmarks.gpu`; it has not run yet.

A Llama of 16 layers x 2,048 in bfloat16, its patterns brought home to the machine's own memory or
to a finished store. Clocks are those of the wall, after the GPU has settled; peaks are of its
memory.
"""

import argparse
import json
from pathlib import Path

import torch
from rich.console import Console

from benchmarks import report
from benchmarks.case import Setting
from benchmarks.field import compared, install


def main() -> None:
    """Measure, and print the tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=(1024, 4096))
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--environments", type=Path, help="of TransformerLens and nnterp")
    parser.add_argument("--install", action="store_true", help="make them")
    parser.add_argument("--json", type=Path, help="keep the figures here")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("there is no GPU that torch can use. `python -m benchmarks` needs none.")
    if options.install:
        install(options.environments)
    console, found = Console(width=130), {}
    for length in options.lengths:
        setting = Setting(
            length=length, layers=16, hidden=2048, heads=16, device="cuda", dtype="bfloat16"
        )
        for workload in ("full", "stored", "rows", "some", "padded"):
            results = compared(
                setting, workload, repeats=options.repeats, environments=options.environments
            )
            key = f"{length} {workload}"
            title = f"{torch.cuda.get_device_name()}, {key}"
            found[key] = report.shown(console, title, results)
            if options.json:
                options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
