"""Load a model by its name, or tap one that is there."""

from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from probe import demos
from probe.errors import InputError, UnsupportedModelError, first_line
from probe.layout import Layout
from probe.model import Model


def load(
    source: str | Path | nn.Module,
    tokenizer: Any = None,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    attn_implementation: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    layout: Layout | None = None,
) -> Model:
    """Load a causal language model and tap its attention.

    The model stays on its own kernel. On loading, a forward of a few tokens finds the attention,
    and proves that what is read of every layer is what the model computes.

    Args:
        source: A name on the Hugging Face hub, a local folder, a shipped demonstration model
            (`demo-llama`, ...), a transformers model (perhaps wrapped by peft) or any module that
            reads token ids, used in place.
        tokenizer: Its tokenizer; by default the one stored beside the model. A model given as a
            module needs none when it is fed token ids.
        device: Where to put a model that is loaded by name; default a GPU if there is one.
        dtype: dtype of a model that is loaded by name; default the checkpoint's.
        attn_implementation: "sdpa", "eager", ...; default the fastest that transformers chooses.
        revision: Commit, tag or branch on the hub.
        trust_remote_code: Run code that a checkpoint brings along.
        layout: Where a module of your own has its attention, if it is not found by itself.

    Raises:
        InputError: The source cannot be found.
        UnsupportedModelError: The model type is unknown, or its attention cannot be reached.
        WiringError: What is read is not what the model computes.

    Example:
        >>> model = probe.load("demo-llama")
        >>> model.n_layers, model.n_heads, model.n_kv_heads
        (2, 4, 4)
    """
    if layout is not None and not isinstance(layout, Layout):
        raise InputError(f"layout={layout!r:.60}. Give a probe.Layout(...).")
    if isinstance(source, nn.Module):
        return Model(source, tokenizer, layout=layout)
    if not isinstance(source, str | PathLike):
        raise InputError(
            f"source is a {type(source).__name__}. Give a name on the hub, a local folder, one of "
            f"{', '.join(demos.SHIPPED)}, or a module."
        )
    known = dtype == "auto" or isinstance(getattr(torch, str(dtype), None), torch.dtype)
    if isinstance(dtype, str) and not known:
        raise InputError(f"dtype={dtype!r}. Give one of torch, as 'bfloat16' or torch.float32.")
    target = device_of(device)
    name = str(source)
    if name in demos.LATENT:
        raise InputError(f"{name} thinks in latents. Load it with probe.latent.load({name!r}).")
    shipped = name.startswith("demo-") and not Path(name).exists()
    place = demos.path(name) if shipped else source
    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    try:
        module = AutoModelForCausalLM.from_pretrained(
            place, dtype=dtype or "auto", attn_implementation=attn_implementation, **options
        )
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise _unloadable(name, error) from error
    if tokenizer is None:
        try:
            tokenizer = AutoTokenizer.from_pretrained(place, **options)
        except (OSError, ValueError, ImportError) as error:
            raise InputError(
                f"{name!r} has no tokenizer that can be loaded ({first_line(error)}). "
                "Give one with tokenizer=, or load the model yourself and give probe.load that."
            ) from error
    return Model(nn.Module.to(module, target), tokenizer, name=name, layout=layout)


def device_of(device: str | torch.device | None) -> torch.device:
    """Where a loaded model goes; whether that is here shows before weights are read."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, TypeError) as error:
        raise InputError(
            f"device={device!r} cannot be used: {first_line(error)} Give one that this torch has, "
            "as 'cpu'."
        ) from error


def _unloadable(name: str, error: Exception) -> InputError | UnsupportedModelError:
    reason = first_line(error)
    if isinstance(error, ValueError) and ("model type" in str(error) or "Unrecognized" in reason):
        return UnsupportedModelError(
            f"{name!r} is not a causal language model that this transformers knows: {reason} "
            "Upgrade transformers, or load it yourself and give probe.load the module."
        )
    return InputError(
        f"{name!r} cannot be loaded: {reason} Give a name on the hub, a local folder, or one of "
        f"{', '.join(demos.SHIPPED)}."
    )
