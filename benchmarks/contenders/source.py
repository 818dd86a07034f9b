"""nnsight by itself, which reads the eager kernel's call inside each attention module."""

from typing import Any

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
        return case.given(found)

    return run


WAYS = {"source": source}
