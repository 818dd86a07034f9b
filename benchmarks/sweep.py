"""What an ablation of every head costs, in plain forwards: `python -m benchmarks.sweep`.

Sweeps of one problem and of five run in turn, with plain forwards before and after, in one
process; times are thread CPU times and ratios are of medians. What a further problem costs is a
fourth of the difference; the rest is paid once for a run: finding the blocks, proving that a branch
equals the whole, making the store. The yardstick is a plain forward and its loss for each head: a
loop over heads. Before anything is timed, the sweep is compared with such a loop, by hooks on the
output projections.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import probe
from benchmarks.case import Setting
from probe.loss import next_token_nll
from probe.model import Model
from recipes.ablation import sweep

SIZES = {
    "demo (2 layers x 64)": Setting(layers=2, hidden=64, heads=4),
    "stories260K's (5 x 64)": Setting(layers=5, hidden=64, heads=8),
    "Llama (12 x 512)": Setting(layers=12, hidden=512, heads=8),
}


def cpu(run: Callable[[], object]) -> float:
    """Thread CPU seconds."""
    start = time.thread_time()
    run()
    return time.thread_time() - start


def loss(model: Model, ids: Tensor) -> float:
    """A plain forward and its loss."""
    with torch.no_grad():
        return float(next_token_nll(model.module(ids).logits[0], ids[0]).mean())


def looped(model: Model, ids: Tensor, heads: int) -> Tensor:
    """(layer, head) delta loss: a whole forward for each head, by hooks."""
    base, out = loss(model, ids), []
    layers: Any = model.module.model.layers  # type: ignore[union-attr]
    for layer in layers:
        for head in range(heads):

            def off(_: Any, args: Any, head: int = head) -> Any:
                z = args[0].clone()
                width = z.shape[-1] // heads
                z[..., head * width : (head + 1) * width] = 0
                return (z,)

            handle = layer.self_attn.o_proj.register_forward_pre_hook(off)
            out.append(loss(model, ids) - base)
            handle.remove()
    return torch.tensor(out).view(len(layers), heads)


def measured(setting: Setting, repeats: int) -> tuple[float, list[float], list[float], float]:
    """(seconds of a plain forward, ratios, forwards paid once, difference from the loop)."""
    model = probe.load(setting.model("sdpa"))
    ids = Setting(**{**vars(setting), "batch": 5}).ids()
    one = ids[:1]
    found = torch.from_numpy(sweep(model, one.tolist(), progress=False).delta_loss.values[0])
    wrong = float((found - looped(model, one, setting.heads)).abs().max())
    plain, ratios, once = [], [], []
    each = max(3, int(0.5 / cpu(lambda: loss(model, one))))
    for _ in range(repeats):
        around = [cpu(lambda: loss(model, one)) for _ in range(each)]
        single, five = (
            cpu(lambda some=some: sweep(model, some.tolist(), progress=False))  # type: ignore[misc]
            for some in (one, ids)
        )
        around += [cpu(lambda: loss(model, one)) for _ in range(each)]
        plain.append(statistics.median(around))
        ratios.append((five - single) / 4 / (plain[-1] * setting.layers * setting.heads))
        once.append((single - (five - single) / 4) / plain[-1])
    return statistics.median(plain), ratios, once, wrong


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    load = Path("/proc/loadavg").read_text().split()[0]
    table = Table(
        "model", "tokens", "plain forward s", "a problem / (L x H) forwards", "range",
        "once, forwards", "from the loop", title=f"float32, one thread, load {load}",
    )  # fmt: skip
    for name, size in SIZES.items():
        for length in arguments.lengths:
            setting = Setting(**{**vars(size), "length": length})
            plain, ratios, once, wrong = measured(setting, arguments.repeats)
            table.add_row(
                name,
                str(length),
                f"{plain:.4f}",
                f"{statistics.median(ratios):.2f}",
                f"{min(ratios):.2f} - {max(ratios):.2f}",
                f"{statistics.median(once):.0f}",
                f"{wrong:.0e}",
            )
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
