"""What reading attention costs, beside others: `python -m benchmarks`.

`--install` first makes virtual environments for TransformerLens and nnterp below `--environments`;
those that are not there are left out, and said. Without `--only` all parts are measured, which
takes more than three hours on one core; `--json` keeps each figure once it is measured, and
`--from` prints and draws them again.
"""

import argparse
import json
import platform
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from benchmarks import report, sides
from benchmarks.case import WORKLOADS, Setting
from benchmarks.contenders import CONTENDERS
from benchmarks.field import compared, install, load
from benchmarks.report import Figures, Found

LENGTHS = (256, 1024, 4096)
ROWS = (1, 32, 128, 256, 512, 1024)
SIZES = ((4, 128), (12, 512), (12, 1024))  # layers, hidden
OURS = "probe, capture"
TIGHT = {"MALLOC_MMAP_THRESHOLD_": "131072"}  # glibc: what is freed goes back to the system
LONG = ("output_attentions=True", "forward hooks", "probe, run_with_cache", OURS)


def at(length: int, repeats: int) -> tuple[Setting, int]:
    """Two sequences, repeated; of long ones one, less often."""
    long = length > 1024
    return Setting(length=length, batch=1 if long else 2), max(3, repeats // 4) if long else repeats


def table(options: argparse.Namespace, console: Console) -> Found:
    """Every contender, workload and length; of long sequences those that fit in memory."""
    for length in options.lengths:
        setting, repeats = at(length, options.repeats)
        long = length > 1024
        for workload in options.workloads:
            names = [n for n in options.contenders if not long or n in LONG]
            results = compared(
                setting, workload, repeats=repeats, environments=options.environments, names=names
            )
            title = f"{length} {workload}"
            yield title, report.shown(console, title, results)


def rows(options: argparse.Namespace, console: Console) -> Found:
    """Ours, with more and more rows of 1,024."""
    for n in ROWS:
        setting = Setting(rows=n)
        results = compared(setting, "rows", repeats=options.repeats, names=[OURS])
        yield str(n), report.shown(console, f"{n} rows of 1024", results)[OURS]


def sizes(options: argparse.Namespace, console: Console) -> Found:
    """Models from small to large, all patterns of 256 tokens."""
    for layers, hidden in SIZES:
        setting = Setting(length=256, layers=layers, hidden=hidden)
        results = compared(
            setting, "full", repeats=options.repeats, environments=options.environments
        )
        title = f"{layers} layers x {hidden}"
        yield title, report.shown(console, f"{title}, 256 tokens, full", results)


def memory(options: argparse.Namespace, console: Console) -> Found:
    """Peaks of a capture into a store: more and more layers, more and more problems.

    Each is the median of five runs, while the allocator gives back at once what is freed: what it
    keeps else, up to twice as much, differs from process to process.
    """
    del options
    for what, values in (("layers", (12, 24, 48)), ("batch", (24, 48, 96))):
        for value in values:
            setting = Setting(length=512).but(**{what: value})
            peak = compared(
                setting, "stored", repeats=0, names=[OURS], warmups=0, peaks=5, variables=TIGHT
            )[OURS].peak
            name = f"{value} {'problems' if what == 'batch' else what}"
            console.print(f"a capture of {name} into a store: {peak / 1e6:.0f} MB at the peak")
            yield name, peak


PARTS: dict[str, Callable[[argparse.Namespace, Console], Found]] = {
    "tap": sides.tap,
    "table": table,
    "rows": rows,
    "sizes": sizes,
    "memory": memory,
    "sweep": sides.sweep,
    "latent": sides.latent,
}


def main() -> None:
    """Measure what is asked, print it, and say which targets are met."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--only", choices=PARTS, nargs="+", default=list(PARTS))
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--workloads", choices=WORKLOADS, nargs="+", default=list(WORKLOADS))
    parser.add_argument("--contenders", choices=CONTENDERS, nargs="+", default=list(CONTENDERS))
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--environments", type=Path, help="of TransformerLens and nnterp")
    parser.add_argument("--install", action="store_true", help="make them")
    parser.add_argument("--json", type=Path, help="keep the figures here; those of others stay")
    parser.add_argument("--from", type=Path, dest="before", help="measure nothing, read this")
    parser.add_argument("--plot", type=Path, help="draw cost against length and rows, as .png")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    options = parser.parse_args()
    console = Console(width=130)
    if options.install:
        install(options.environments)
    figures: Figures = {}
    if options.before or (options.json and options.json.exists()):
        figures = json.loads((options.before or options.json).read_text())
    if options.before:
        report.show_all(console, figures)
    for part in () if options.before else options.only:
        console.rule(f"{part}, {load()}")
        figures["machine"] = f"{platform.machine()}, Python {platform.python_version()}"
        for name, found in PARTS[part](options, console):
            figures.setdefault(part, {})[name] = found
            figures.setdefault("loads", {})[part] = load()
            if options.json:
                options.json.write_text(json.dumps(figures, indent=1))
    report.targets(console, figures)
    if options.markdown:
        print(report.markdown(figures))
    if options.plot:
        report.plot(figures, options.plot)


if __name__ == "__main__":
    main()
