"""Plain forward hooks on an eager model: each takes what it wants, and lets go of the rest."""

from torch import Tensor

from benchmarks.case import Case, Run


def hooks(case: Case) -> Run:
    """A hook on every layer that is wanted."""
    model, inputs = case.load("eager"), case.inputs
    kept: list[Tensor] = []

    def run() -> object:
        kept.clear()
        handles = [
            model.model.layers[layer].self_attn.register_forward_hook(
                lambda module, inputs, output: kept.append(case.kept(output[1]))
            )
            for layer in case.layers
        ]
        model(**inputs, use_cache=False)
        for handle in handles:
            handle.remove()
        return case.given(kept)

    return run


WAYS = {"hooks": hooks}
