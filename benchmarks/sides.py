"""What is no forward beside a forward: the tap by itself, an ablation of every head, latents."""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console

import probe
from benchmarks.case import Setting
from benchmarks.report import Found
from probe.tap import run


def _seconds(*ways: Callable[[], object], rounds: int = 200) -> list[float]:
    """Median thread CPU seconds of each, in turn."""
    times: list[list[float]] = [[] for _ in ways]
    for turn in range(rounds + 10):
        for way, own in zip(ways, times, strict=True):
            start = time.thread_time()
            way()
            if turn >= 10:
                own.append(time.thread_time() - start)
    return [statistics.median(own) for own in times]


def tap(options: argparse.Namespace, console: Console) -> Found:
    """What a traced layer costs whose call is seen and nothing computed, and an idle tap."""
    del options
    torch.set_num_threads(1)
    with torch.no_grad():
        small = Setting(length=8, batch=1, hidden=32, heads=4)
        model = probe.load(small.model("sdpa"))
        inputs = {"input_ids": small.ids(), "use_cache": False}

        def traced(layers: int) -> Callable[[], object]:
            def visit(layer: int, attention: Any) -> None:
                attention.seen  # noqa: B018

            return lambda: run(model.tap, visit, inputs, layers=tuple(range(layers)))

        one, all_of_them = _seconds(traced(1), traced(small.layers))
        setting = Setting(length=256, batch=1)
        plain, idle = setting.model("sdpa"), probe.load(setting.model("sdpa"))
        ids = setting.ids()
        untapped, tapped = _seconds(
            lambda: plain(ids, use_cache=False), lambda: idle.module(ids, use_cache=False),
            rounds=30,
        )  # fmt: skip
    cost, ratio = (all_of_them - one) / (small.layers - 1) * 1e6, tapped / untapped
    console.print(f"a traced layer {cost:.0f} microseconds, an idle tap x {ratio:.3f}")
    yield "layer", cost
    yield "idle", ratio


def sweep(options: argparse.Namespace, console: Console) -> Found:
    """An ablation of every head, in L x H plain forwards of one problem: `benchmarks.sweep`."""
    from benchmarks.sweep import measured

    torch.set_num_threads(1)
    for length in (64, 128, 256):
        _, ratios, _, _ = measured(Setting(length=length), max(2, options.repeats // 5))
        ratio = statistics.median(ratios)
        console.print(f"{length} tokens: {ratio:.2f} of L x H forwards")
        yield f"{length} tokens", ratio


def latent(options: argparse.Namespace, console: Console) -> Found:
    """A latent capture, in inferences without one: `benchmarks.latent`."""
    from benchmarks.latent import captured

    torch.set_num_threads(1)
    for batch in (1, 16):
        ratio, low, high = captured(
            "Llama (12 x 512)", batch, 32, max(3, options.repeats // 3), "segment:latent"
        )
        console.print(f"latents, batch {batch}: x {ratio:.2f} ({low:.2f} - {high:.2f})")
        yield f"batch {batch}", ratio
