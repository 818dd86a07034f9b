"""Every head ablated on its own, or heads in an order together: what it costs, problem by problem.

A sweep runs the blocks below an ablation once: see `probe.branching`.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Unpack, get_args

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from probe import selection
from probe.anatomy import Anatomy
from probe.branching import Trunk, alone, branch, dissect, grow
from probe.describing import described
from probe.errors import InputError
from probe.interventions import lasting
from probe.model import Model
from probe.plans import Item
from probe.running import Reading
from probe.selection import Selector
from recipes._ablate import Ablate
from recipes._choosing import Pairs, chunks
from recipes._jobs import Options, job, planned
from recipes._measures import Numbers, mean_of, nll_of
from recipes.effects import require_same, scored_tokens
from recipes.references import Reference, stated

SweepMode = Literal["zero", "mean", "resample", "uniform", "first", "identity"]

# Numbers in the hidden states of variants that run together: in a core's cache on a CPU, few
# launches on a GPU.
_NUMBERS = {"cpu": 1 << 18}
_GPU_NUMBERS = 1 << 25


def sweep(
    model: Model,
    problems: object,
    store: str | Path | None = None,
    *,
    mode: SweepMode = "zero",
    reference: Reference | None = None,
    layers: Selector = None,
    heads: Selector = None,
    tokens: Selector = None,
    per_token: bool = False,
    seed: int = 0,
    **options: Unpack[Options],
) -> xr.Dataset:
    """Ablate every head on its own, in every problem.

    Args:
        model: The model.
        problems: An opened store or its folder, whose problems keep their ids; or whatever
            `probe.problems` reads.
        store: Folder for the results; the same call again resumes. Default: in memory.
        mode: As for `ablation.Ablate`, without "frozen". "resample" takes z from another problem
            that is at least as long, at the same positions.
        reference: For "mean", from `ablation.reference`; default that of these problems.
        layers: Which layers; default all.
        heads: Which heads of each, likewise.
        tokens: Which tokens' predictions count: see `effects.effect`.
        per_token: Also keep the difference of every token.
        seed: Of the draw of other problems.
        options: `batch_size` (ignored: the variants of one problem run together), `max_length`,
            `on_error`, `overwrite`, `progress`, as for `probe.capture`.

    Returns:
        float32, NaN for heads that were not ablated: `delta_loss` (problem, layer, head), ablated -
        base, nats, signed; `delta_nll` (problem, layer, head, query) where asked for, of the
        prediction made at each token. The controls (problem): `noop`, the loss with a head replaced
        by itself, less the loss without: 0, in a layer that changes from problem to problem; and
        `random_head`, what a head drawn at random costs: the mean over all. `base_loss` counts the
        chosen tokens, `loss` all.

    Raises:
        InputError: Something cannot be used; nothing has run.
        WiringError: The no-op changed something.

    Example:
        >>> ds = sweep(model, probe.demos.repeated(count=2), progress=False)
        >>> ds.delta_loss.dims, float(ds.noop.max())
        (('problem', 'layer', 'head'), 0.0)
    """
    _require_mode(mode, reference)
    tokens = lasting(tokens)
    todo = planned(model, problems, options, where=store)
    items = todo.items
    scored = [scored_tokens(model, item, tokens) for item in items]
    chosen = _chosen(model, layers, heads)
    donors = _donors(items, seed) if mode == "resample" else None
    named = sorted({layer for layer, _ in chosen})
    one = stated(Ablate(layers=named, mode=mode, reference=reference), model, todo)
    each = _Sweep(model, chosen, one, per_token)
    anatomy: list[Anatomy | None] = []

    def compute(batch: Sequence[int], *, proof: bool) -> list[Reading]:
        (i,) = batch
        if not anatomy:
            anatomy.append(dissect(model, items[i]))
        donor = None if donors is None else items[donors[i]]
        return [each.over(items[i], donor, anatomy[0], scored[i], i)]

    per_head = ("problem", "layer", "head")
    arrays: dict[str, tuple[str, ...]] = {"delta_loss": per_head}
    arrays |= dict.fromkeys(("base_loss", "noop", "random_head"), ("problem",))
    if per_token:
        arrays["delta_nll"] = (*per_head, "query")
    recipe = {
        "name": "sweep",
        "mode": mode,
        "reference": described(one.reference, "reference"),
        "heads": [list(pair) for pair in chosen],
        "tokens": selection.as_data(tokens),
        "per_token": per_token,
        "seed": seed,
    }
    return job(
        model,
        todo,
        store,
        recipe=recipe,
        arrays=arrays,
        compute=compute,
        alone=True,
        options=options,
    )


def _chosen(model: Model, layers: Selector, heads: Selector) -> list[tuple[int, int]]:
    some = model.layers if layers is None else selection.axis(layers, model.n_layers, "layers")
    if missing := [layer for layer in some if layer not in model.layers]:
        raise InputError(f"layer {missing[0]} has no attention, so no heads. Choose others.")
    return [
        (layer, head)
        for layer in some
        for head in selection.axis(heads, model.tap.shapes[layer].heads, "heads")
    ]


def _require_mode(mode: str, reference: object) -> None:
    if mode not in get_args(SweepMode):
        known = ", ".join(get_args(SweepMode))
        raise InputError(f"mode={mode!r} cannot be swept. Choose from {known}.")
    if reference is not None and mode != "mean":
        raise InputError(f"mode={mode!r} takes no reference here. Leave it out.")


def _donors(items: Sequence[Item], seed: int) -> list[int]:
    """For each problem another one that is at least as long, drawn at random.

    Raises:
        InputError: There is none for a problem.
    """
    rng, out = random.Random(seed), []
    for i, item in enumerate(items):
        able = [k for k, other in enumerate(items) if k != i and other.length >= item.length]
        if not able:
            raise InputError(
                f"mode='resample' takes z from another problem that is as long, and none is as "
                f"long as {item.problem.id!r} ({item.length} tokens). Cut them with max_length=, "
                "or leave that one out."
            )
        out.append(rng.choice(able))
    return out


@dataclass(frozen=True, slots=True)
class _Sweep:
    """What a sweep does with every problem."""

    model: Model
    chosen: Pairs
    one: Ablate  # of all heads
    per_token: bool

    def over(
        self,
        item: Item,
        donor: Item | None,
        anatomy: Anatomy | None,
        scored: Sequence[int],
        turn: int,
    ) -> Reading:
        """All heads of one problem, and the controls."""
        model, n = self.model, item.length
        trunk = grow(model, item, anatomy)
        new = self._replacing(trunk, donor)
        ids = torch.tensor(item.token_ids)
        base = nll_of(trunk.logits[0], ids)
        delta = np.full((len(model.layers), model.n_heads, n), np.nan)
        layers = sorted({layer for layer, _ in self.chosen})
        for layer in layers:
            own = [head for la, head in self.chosen if la == layer]
            found = self._differences(trunk, anatomy, layer, own, new[layer][0, :n], base)
            delta[model.layers.index(layer), own, : n - 1] = found
        loss = delta[..., np.array(scored, int) - 1].mean(-1) if scored else delta[..., 0] * np.nan
        results: dict[str, Any] = {
            "delta_loss": loss,
            "base_loss": mean_of(base, scored),
            "noop": mean_of(self._idle(trunk, anatomy, layers[turn % len(layers)]) - base, scored),
            "random_head": np.nanmean(loss) if scored else np.nan,
        }
        if self.per_token:
            results["delta_nll"] = delta
        arrays = {name: np.asarray(value, "float32") for name, value in results.items()}
        return Reading(arrays, float(base.mean()) if n > 1 else float("nan"))

    def _replacing(self, trunk: Trunk, donor: Item | None) -> Mapping[int, Tensor]:
        """By layer, what stands in place of the z of all heads."""
        if donor is not None:
            return grow(self.model, donor, None).z
        if self.one.mode == "zero":
            return {layer: torch.zeros_like(z) for layer, z in trunk.z.items()}
        return alone(self.model, trunk, self.one)

    def _differences(
        self,
        trunk: Trunk,
        anatomy: Anatomy | None,
        layer: int,
        heads: Sequence[int],
        new: Tensor,
        base: Numbers,
    ) -> Numbers:
        """(head, position - 1): nll with a head replaced, less that without."""
        z, ids = trunk.z[layer], torch.tensor(trunk.item.token_ids)
        # In 16 bits rounding depends on the batch, so there the unchanged one is part of it.
        paired = self.model.dtype.itemsize < 4
        out = []
        numbers = _NUMBERS.get(z.device.type, _GPU_NUMBERS)
        most = max(1, numbers // z[0].numel())
        for some in chunks(range(len(heads)), most):
            variants = z.repeat(len(some) + paired, 1, 1, 1)
            for n, k in enumerate(some):
                variants[n, :, heads[k]] = new[:, heads[k]]
            rows = branch(self.model, trunk, anatomy, layer, variants)
            each = [nll_of(row, ids) for row in rows]
            before = each.pop() if paired else base
            out += [after - before for after in each]
        return np.stack(out)

    def _idle(self, trunk: Trunk, anatomy: Anatomy | None, layer: int) -> Numbers:
        """(position - 1): nll with the z of a layer replaced by itself."""
        idle = branch(self.model, trunk, anatomy, layer, trunk.z[layer].clone())
        require_same(trunk.logits, idle, [trunk.item])
        return nll_of(idle[0], torch.tensor(trunk.item.token_ids))
