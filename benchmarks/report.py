"""Tables, targets and a plot of what `python -m benchmarks` has measured."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.field import CPU, WALL, Result

Figures = dict[str, Any]
Found = Iterator[tuple[str, Any]]  # figures by name, each as soon as it is measured

COLUMNS = ("", "x CPU", "middle half", "x wall", "peak MB", "disk MB", "from eager")


def lines(found: Figures) -> Iterator[list[str]]:
    """Contenders of one workload: times as multiples of a plain forward's, and the rest."""
    for name, one in found.items():
        result = Result(**one)
        if result.said or not result.pairs:
            yield [name, result.said or "not timed"]
            continue
        low, high = result.spread(CPU)
        yield [
            name,
            f"{result.ratio(CPU):.2f}",
            f"{low:.2f} - {high:.2f}",
            f"{result.ratio(WALL):.2f}",
            f"{result.peak / 1e6:.0f}",
            f"{result.written / 1e6:.0f}" if result.written else "",
            f"{result.difference:.0e}",
        ]


def show(console: Console, title: str, found: Figures) -> None:
    """A table of one workload."""
    table = Table(title=title)
    for column in COLUMNS:
        table.add_column(column, justify="left" if not column else "right")
    for row in lines(found):
        table.add_row(*row)
    console.print(table)


def shown(console: Console, title: str, results: Mapping[str, Result]) -> Figures:
    """The same of what was just measured, which it returns as JSON has it."""
    found = {name: asdict(one) for name, one in results.items()}
    show(console, title, found)
    return found


def markdown(figures: Figures) -> str:
    """All workloads in one table, as `show` has each."""
    out = ["| " + " | ".join(["tokens, what", *COLUMNS]) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for title, found in figures["table"].items():
        for row in lines(found):
            out.append("| " + " | ".join([title, *row, *[""] * (len(COLUMNS) - len(row))]) + " |")
    return "\n".join(out)


def show_all(console: Console, figures: Figures) -> None:
    """All tables again."""
    for part, found in figures.items():
        if part in ("table", "sizes"):
            for title, one in found.items():
                show(console, title, one)
        elif part == "rows":
            show(console, "rows of 1024", {f"{n} rows": one for n, one in found.items()})
        else:
            console.print(part, found)


def line(figures: Figures) -> tuple[float, float, float]:
    """Cost of no rows, of a row, and the share of its spread that a straight line explains."""
    found = figures["rows"]
    x = np.array([int(n) for n in found], float)
    y = np.array([Result(**one).ratio(CPU) for one in found.values()])
    slope, start = np.polyfit(x, y, 1)
    residue = y - (start + slope * x)
    return float(start), float(slope), float(1 - residue.var() / y.var())


def _cell(figures: Figures, key: str, clock: int, name: str = "probe, capture") -> float:
    return Result(**figures["table"][key][name]).ratio(clock)


def _growth(figures: Figures, what: str) -> float:
    peaks = [peak for name, peak in figures["memory"].items() if name.endswith(what)]
    return float(max(peaks[1:]) / peaks[0])


def _peak(figures: Figures) -> float:
    ours = figures["table"]["1024 stored"]["probe, capture"]["peak"]
    return float(ours / figures["table"]["1024 full"]["plain forward"]["peak"])


# What is wanted of a Llama of 12 layers x 512 with 8 heads, batch 2, float32, one thread.
TARGETS: list[tuple[str, float, Callable[[Figures], float]]] = [
    ("32 rows of 1,024, x CPU", 1.02, lambda f: _cell(f, "1024 rows", CPU)),
    ("all patterns of 1,024 in memory, x CPU", 1.20, lambda f: _cell(f, "1024 full", CPU)),
    ("all patterns of 256 in memory, x CPU", 1.08, lambda f: _cell(f, "256 full", CPU)),
    ("all patterns of 1,024 in a finished store, x wall", 1.35,
     lambda f: _cell(f, "1024 stored", WALL)),
    ("peak of a capture into a store, x plain forward", 2.0, _peak),
    ("that peak with 24 and 48 layers, of that with 12", 1.1, lambda f: _growth(f, "layers")),
    ("that peak with 48 and 96 problems, of that with 24", 1.1, lambda f: _growth(f, "problems")),
    ("tap, microseconds a traced layer", 60, lambda f: float(f["tap"]["layer"])),
    ("a tapped model that nobody watches, x CPU", 1.01, lambda f: float(f["tap"]["idle"])),
    ("sweep, of L x H forwards", 0.5, lambda f: float(f["sweep"]["256 tokens"])),
    ("cost against rows: not on a straight line", 0.01, lambda f: 1 - line(f)[2]),
]  # fmt: skip


def targets(console: Console, figures: Figures) -> None:
    """Which targets are met; those of parts that were not measured are left out."""
    table = Table(title="targets")
    for column in ("", "at most", "measured", ""):
        table.add_column(column)
    for what, most, measure in TARGETS:
        try:
            found = measure(figures)
        except KeyError:
            continue
        verdict = "pass" if found <= most else "FAIL"
        table.add_row(what, f"{most:g}", f"{found:.4g}", verdict)
    console.print(table)


def plot(figures: Figures, path: Path) -> None:
    """Cost against length, and against the rows that are asked."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    costs: dict[str, list[tuple[int, float]]] = {}
    for key, found in figures["table"].items():
        length, workload = key.split()
        for name, one in found.items() if workload == "full" else ():
            if one["pairs"] and name != "plain forward":
                costs.setdefault(name, []).append((int(length), Result(**one).ratio(CPU)))
    for name, points in costs.items():
        x, y = zip(*sorted(points), strict=True)
        ours = name.startswith("probe")
        left.plot(x, y, "o-" if ours else "x--", lw=2.5 if ours else 1, label=name)
    left.set(xscale="log", xlabel="tokens", ylabel="CPU time, plain SDPA forwards")
    lengths = sorted({length for points in costs.values() for length, _ in points})
    left.set_xticks(lengths, [f"{n:,}" for n in lengths])
    left.minorticks_off()
    left.set_title("all patterns, in memory")
    left.legend(fontsize=7)
    if "rows" in figures:
        start, slope, _ = line(figures)
        asked = [int(n) for n in figures["rows"]]
        right.plot(asked, [Result(**one).ratio(CPU) for one in figures["rows"].values()], "o")
        right.plot([0, max(asked)], [start, start + slope * max(asked)], "-", lw=1)
    right.axhline(1, color="grey", lw=0.5)
    right.set(xlabel="rows asked, of 1,024", ylabel="CPU time, plain SDPA forwards")
    right.set_title("probe, capture: the last rows of every layer and head")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
