"""What transformers offers: patterns of the eager kernel, float32, held until the forward ends."""

import pickle

from benchmarks.case import Case, Run, UnsupportedError


def sdpa(case: Case) -> Run:
    """The yardstick: a plain forward on the fast kernel, with the padding that the case has."""
    model, inputs = case.load("sdpa"), case.inputs
    return lambda: model(**inputs, use_cache=False).logits


def eager(case: Case) -> Run:
    """A forward on the eager kernel that keeps nothing."""
    if case.workload != "full":
        raise UnsupportedError("the same as for full")
    model, inputs = case.load("eager"), case.inputs
    return lambda: model(**inputs, use_cache=False).logits


def output_attentions(case: Case) -> Run:
    """All patterns; of them what is wanted."""
    model, inputs = case.load("eager"), case.inputs

    def run() -> object:
        found = model(**inputs, use_cache=False, output_attentions=True).attentions
        return case.given([case.kept(found[layer]) for layer in case.layers])

    return run


def pickled(case: Case) -> Run:
    """All patterns in one pickle, float16: what the tools of the field do."""
    if case.workload != "stored":
        raise UnsupportedError("the same as without a pickle")
    model, inputs = case.load("eager"), case.inputs

    def run() -> object:
        found = model(**inputs, use_cache=False, output_attentions=True).attentions
        with (case.out / "all.pkl").open("wb") as file:
            pickle.dump({n: one.half().cpu().numpy() for n, one in enumerate(found)}, file)
        return lambda: list(pickle.loads((case.out / "all.pkl").read_bytes()).values())

    return run


WAYS = {"sdpa": sdpa, "eager": eager, "output_attentions": output_attentions, "pickle": pickled}
