"""nnterp 1.3 on nnsight 0.7: attention probabilities of an eager model, one trace."""

from typing import Any

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
        return case.given(found)

    return run


WAYS = {"trace": trace}
