"""TransformerLens 4: `run_with_cache` of a bridge around the same weights."""

import torch
from transformer_lens.model_bridge import TransformerBridge

from benchmarks.case import Case, Run


def cache(case: Case) -> Run:
    """The patterns of the layers that are wanted, and of them the rows."""
    bridge = TransformerBridge.boot_transformers(
        str(case.weights),
        hf_model=case.load("eager"),
        device=case.setting.device,
        dtype=getattr(torch, case.setting.dtype),
    )
    inputs = case.inputs
    options = {"attention_mask": inputs["attention_mask"]} if len(inputs) > 1 else {}
    names = {f"blocks.{layer}.attn.hook_pattern" for layer in case.layers}

    def run() -> object:
        _, found = bridge.run_with_cache(
            inputs["input_ids"], names_filter=lambda name: name in names, **options
        )
        return case.given([case.kept(found["pattern", layer]) for layer in case.layers])

    return run


WAYS = {"cache": cache}
