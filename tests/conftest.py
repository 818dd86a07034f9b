"""What the tests of the two packages share: tiny random models of five families."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gpt2")
WINDOW = 5
Tiny = Callable[..., PreTrainedModel]


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


def tiny_config(family: str) -> PreTrainedConfig:
    """3 layers, 4 query heads on 2 key heads, windows of 5 where the family has them."""
    if family == "gpt2":  # its factor on scores differs from layer to layer
        return GPT2Config(
            vocab_size=64,
            n_embd=32,
            n_layer=3,
            n_head=4,
            n_positions=64,
            initializer_range=0.2,
            scale_attn_by_inverse_layer_idx=True,
            bos_token_id=0,
            eos_token_id=None,
            pad_token_id=0,
        )
    shape: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
        "bos_token_id": 0,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    if family == "llama":
        return LlamaConfig(**shape)
    if family == "mistral":
        return MistralConfig(**shape, sliding_window=WINDOW)
    shape |= {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}
    if family == "qwen2":
        del shape["head_dim"]
        return Qwen2Config(**shape)
    assert family == "qwen3"
    return Qwen3Config(**shape)


def tiny_model(
    family: str, implementation: str = "sdpa", dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """A random model; the same family always has the same weights."""
    config = tiny_config(family)
    with torch.random.fork_rng():
        torch.manual_seed(7)
        make: Callable[..., PreTrainedModel] = AutoModelForCausalLM.from_config
        model = make(config, attn_implementation=implementation)
    nn.Module.to(model, dtype)
    model.train(mode=False)
    return model


@pytest.fixture(scope="session")
def tiny() -> Tiny:
    """`tiny(family, implementation, dtype)`: a fresh copy of a tiny random model."""
    return tiny_model


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    """Each of the five families."""
    return str(request.param)
