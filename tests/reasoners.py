"""Random latent reasoners of five families, in memory and as published checkpoints."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

import probe
from probe.latent import Reasoner
from tests.conftest import tiny_model

OPENS, CLOSES, LATENTS = 61, 62, 4


def projection(width: int, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A random one, as CODI's."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        made = nn.Sequential(nn.Dropout(0.0), nn.Linear(width, 24), nn.GELU(), nn.Linear(24, width))
        made.add_module("ln", nn.LayerNorm(width))
    nn.Module.to(made, dtype)
    made.train(mode=False)
    return made


def reasoner(
    family: str,
    implementation: str = "sdpa",
    dtype: torch.dtype = torch.float32,
    *,
    n_latents: int = LATENTS,
    projected: bool = True,
) -> Reasoner:
    """A random reasoner, whose words are below 60 and whose answers end nowhere."""
    module = tiny_model(family, implementation, dtype)
    following: Any = projection(32, dtype) if projected else nn.Identity()
    return Reasoner(
        model=probe.load(module),
        kind="random",
        n_latents=n_latents,
        opens=(OPENS,),
        closes=(CLOSES,),
        following=following,
        words=60,
    )


def published(module: PreTrainedModel, folder: Path, **tensors: torch.Tensor) -> Path:
    """Save a state dict as `pytorch_model.bin`, with the config of its base beside."""
    folder.mkdir(parents=True, exist_ok=True)
    module.config.save_pretrained(folder)
    torch.save(tensors, folder / "pytorch_model.bin")
    return folder
