"""nnsight by itself, which reads the eager kernel's call inside each attention module."""

from typing import Any

import numpy as np
from nnsight import NNsight

from benchmarks.case import Case, Run


def source(case: Case) -> Run:
    """One trace that saves what the attention interface returned, layer by layer."""
    module = case.load("eager")
    model, inputs = NNsight(module), case.inputs

    def run() -> object:
        with model.trace(**inputs, use_cache=False):
            found: Any = list().save()  # type: ignore[attr-defined] # noqa: C408
            for layer in case.layers:
                attention = model.model.layers[layer].self_attn
                found.append(case.kept(attention.source.attention_interface_1.output[1]))
        if case.workload != "stored":
            return found
        for layer, pattern in enumerate(found):
            np.save(case.out / f"{layer}.npy", pattern.half().numpy())
        return lambda: [np.load(case.out / f"{layer}.npy") for layer in case.layers]

    return run


WAYS = {"source": source}
