"""nnterp 1.3 on nnsight 0.7: attention probabilities of an eager model, one trace."""

from typing import Any

import numpy as np
from nnterp import StandardizedTransformer

from benchmarks.case import Case, Run


def trace(case: Case) -> Run:
    """What is wanted of the layers that are wanted."""
    model = StandardizedTransformer(case.load("eager"), enable_attention_probs=True)
    inputs = case.inputs

    def run() -> object:
        found = []
        with model.trace(inputs):
            for layer in case.layers:
                kept: Any = case.kept(model.attention_probabilities[layer])
                found.append(kept.save())
        if case.workload != "stored":
            return found
        for layer, pattern in enumerate(found):
            np.save(case.out / f"{layer}.npy", pattern.half().numpy())
        return lambda: [np.load(case.out / f"{layer}.npy") for layer in case.layers]

    return run


WAYS = {"trace": trace}
