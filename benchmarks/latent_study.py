"""What the numbers of a full latent study cost: `python -m benchmarks.latent_study`.

A store of 7,473 problems x 16 layers x 32 heads x 6 x 6 of noise is written, then averaged, scored
and ranked with 2,000 bootstrap draws, in a process of its own: wall time and peak memory.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

import probe
from probe import schema, store
from probe.schema import PARTS, Labels
from recipes import latent

LATENTS = 6
NAMES = ("aggregate s", "scores s", "ranking s", "all s", "peak MB", "heads found")


def write_noise(path: Path, problems: int, layers: int, heads: int) -> None:
    """A store of noise, written as a capture of blocks is."""
    names = ["latent"] * LATENTS
    at, z = list(range(LATENTS)), [f"z{k}" for k in range(LATENTS)]
    labels = [
        Labels(
            id=f"noise_{i}",
            length=LATENTS,
            query_position=at,
            key_position=at,
            token=z,
            token_id=[-1] * LATENTS,
            segment=names,
        )
        for i in range(problems)
    ]
    more: dict[str, Any] = {
        "mass": ("problem", "layer", "head", "query", "part"),
        "correct": ("problem",),
        "query_segment": schema.Array(("problem", "query"), "string", ""),
    }
    with store.create(
        path,
        labels=labels,
        layers=range(layers),
        heads=range(heads),
        config={},
        reduced=more,
        sizes={"part": len(PARTS)},
        coords={"part": PARTS},
        loss=False,
        attrs={"model": "noise", "latent": {"n_latents": LATENTS}},
    ) as writer:
        for start in range(0, problems, 500):
            ds = latent.noise(min(500, problems - start), layers, heads, LATENTS, seed=start)
            arrays = {name: list(ds[name].values) for name in ("pattern", "mass", "query_segment")}
            count = ds.sizes["problem"]
            right = [np.array(np.nan, "float32")] * count
            writer.append(range(start, start + count), {**arrays, "correct": right})


def measure(path: Path, draws: int) -> None:
    """Print seconds of each step, and the peak memory of this process, in MB."""
    start = time.perf_counter()
    ds = probe.open(path)
    aggregated = latent.aggregate(ds)
    averaged = time.perf_counter()
    latent.criteria(aggregated, latent.published(aggregated))
    scores = latent.scores(ds)
    scored = time.perf_counter()
    found = latent.findings(scores, draws=draws)
    ranked = time.perf_counter()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    times = (averaged - start, scored - averaged, ranked - scored, ranked - start)
    print(*(f"{x:.1f}" for x in times), f"{peak:.0f}", int(found["found"].sum()))


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.latent_study", description=main.__doc__
    )
    parser.add_argument("--problems", type=int, default=7473)
    parser.add_argument("--draws", type=int, default=2000)
    parser.add_argument("--store", type=Path, help="measure this store alone")
    chosen = parser.parse_args()
    if chosen.store:
        measure(chosen.store, chosen.draws)
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "noise.zarr"
        write_noise(path, chosen.problems, 16, 32)
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) / 1e6
        arguments = ["--store", str(path), "--draws", str(chosen.draws)]
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.latent_study", *arguments],
            check=True,
            capture_output=True,
            text=True,
        )
    title = f"{chosen.problems} x 16 x 32 x 6 x 6 of noise ({size:.0f} MB)"
    table = Table(*NAMES, title=title)
    table.add_row(*done.stdout.split())
    Console(width=110).print(table, f"load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
