"""The model on its own fast kernel, and only what is asked computed beside it."""

import sys
from collections.abc import Sequence
from typing import Any

import torch

import probe
from benchmarks.case import HEADS, Case, Run, UnsupportedError
from probe.reading import read


def _selection(case: Case) -> dict[str, Any]:
    if case.workload == "rows":
        return {"queries": f"last:{case.setting.rows}"}
    return {"layers": case.layers, "heads": list(HEADS)} if case.workload == "some" else {}


def cache(case: Case) -> Run:
    """`run_with_cache`: float32 tensors with gradients if wanted, padding included."""
    if case.workload == "stored":
        raise UnsupportedError("it keeps in memory")
    model, inputs, selection = probe.load(case.load("sdpa")), case.inputs, _selection(case)

    def run() -> object:
        _, found = model.run_with_cache(inputs, "pattern", **selection)
        return [found["pattern", layer].to("cpu") for layer in case.layers]

    return run


class Kept:
    """Takes what `capture` would write, and keeps it: one list of problems for each layer."""

    def __init__(self, layers: int, problems: int) -> None:
        self.layers: list[list[Any]] = [[None] * problems for _ in range(layers)]
        self.batch: Sequence[int] = ()

    def begin(self, n: int, labels: object = None) -> None:
        """Nothing to do."""

    def tall(self, name: str) -> int:
        """Whole matrices, as the others give them."""
        return sys.maxsize

    def put(self, some: Sequence[int], name: str, values: Any, layer: int, row: int) -> None:
        """Keep a layer of neighbours in the batch."""
        for n, one in zip(some, values, strict=True):
            self.layers[layer][self.batch[n]] = one


def capture(case: Case) -> Run:
    """What `capture` reads, float16, with the loss; in memory, or with all that a store takes."""
    model, selection = probe.load(case.load("sdpa")), _selection(case)
    inputs = case.inputs
    masks = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
    problems = [row[real].tolist() for row, real in zip(inputs["input_ids"], masks, strict=True)]
    if case.workload == "stored":

        def store() -> object:
            ds = probe.capture(model, problems, case.out / "run.zarr", progress=False)
            return lambda: [ds.pattern.isel(layer=n).values for n in range(ds.sizes["layer"])]

        return store
    plan = probe.plan(model, problems, batch_size=case.setting.batch, **selection)

    def run() -> object:
        kept = Kept(len(plan.layers), len(problems))
        for batch in plan.batches:
            kept.batch = batch
            read(model, plan, batch, proof=False, into=kept)  # type: ignore[arg-type]
        return kept.layers

    return run


WAYS = {"cache": cache, "capture": capture}
