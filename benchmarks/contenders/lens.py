"""TransformerLens 4: `run_with_cache` of a bridge around the same weights."""

import numpy as np
import torch
from transformer_lens.model_bridge import TransformerBridge

from benchmarks.case import HEADS, Case, Run


def cache(case: Case) -> Run:
    """The patterns of the layers that are wanted, and of them the rows."""
    bridge = TransformerBridge.boot_transformers(
        str(case.weights), hf_model=case.load("eager"), device="cpu", dtype=torch.float32
    )
    inputs = case.inputs
    options = {"attention_mask": inputs["attention_mask"]} if len(inputs) > 1 else {}
    names = {f"blocks.{layer}.attn.hook_pattern" for layer in case.layers}

    def run() -> object:
        _, found = bridge.run_with_cache(
            inputs["input_ids"], names_filter=lambda name: name in names, **options
        )
        patterns = [found["pattern", layer] for layer in case.layers]
        if case.workload == "rows":
            return [one[:, :, -case.setting.rows :].clone() for one in patterns]
        if case.workload == "some":
            return [one[:, list(HEADS)] for one in patterns]
        if case.workload != "stored":
            return patterns
        for layer, pattern in enumerate(patterns):
            np.save(case.out / f"{layer}.npy", pattern.half().numpy())
        return lambda: [np.load(case.out / f"{layer}.npy") for layer in case.layers]

    return run


WAYS = {"cache": cache}
