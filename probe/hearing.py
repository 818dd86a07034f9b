"""Who calls transformers' attention interface: heard in one short forward of a model."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from probe.attention import AttentionCall
from probe.compiled import eagerly
from probe.errors import ProbeError, UnsupportedModelError
from probe.interface import LISTENER, Kernel


class Heard(NamedTuple):
    """One attention call of a forward: who called, with what, and what the kernel returned."""

    module: nn.Module
    call: AttentionCall
    z: Tensor


@contextmanager
def reading(module: nn.Module) -> Iterator[None]:
    """Eval mode, uncompiled, without gradients; never opened in a trace, where it would leak."""
    modes = {m: m.training for m in module.modules()}
    module.eval()
    try:
        with torch.no_grad(), eagerly(module):
            yield
    finally:
        for m, training in modes.items():
            m.training = training


def overhear(module: nn.Module, model: PreTrainedModel, n_tokens: int = 16) -> list[Heard]:
    """One short forward with every module listening: who calls attention, and with what.

    Args:
        module: What runs.
        model: The transformers model in it.
        n_tokens: How many it reads, at most.
    """
    heard: list[Heard] = []
    vocabulary = vocabulary_size(model)
    context = getattr(model.config, "max_position_embeddings", None) or n_tokens
    ids = torch.arange(min(n_tokens, context), device=placement(model))[None] % vocabulary
    for path, m in module.named_modules():
        m.__dict__[LISTENER] = _Recorder(m, path, heard)
    try:
        with reading(module):
            module(input_ids=ids, use_cache=False)
    except ProbeError:
        raise
    except Exception as error:
        raise UnsupportedModelError(
            f"a forward of {type(module).__name__} over {ids.shape[1]} token ids failed with "
            f"{type(error).__name__}: {error}. The tap needs a model that runs on input_ids."
        ) from error
    finally:
        for m in module.modules():
            m.__dict__.pop(LISTENER, None)
    for caller, call, _ in heard:
        if (call.n_queries, call.n_keys) != (ids.shape[1], ids.shape[1]):
            raise UnsupportedModelError(
                f"given {ids.shape[1]} tokens, a {type(caller).__name__} attends from "
                f"{call.n_queries} rows to {call.n_keys} keys, so its rows and keys are not the "
                "tokens (but bytes, patches or summaries of them) and could not be labelled. Give "
                "a model that attends from tokens to tokens."
            )
    return heard


def placement(model: PreTrainedModel) -> torch.device:
    """Where inputs go. Offloaded weights are on no device; what fetches them moves inputs too."""
    device: torch.device = model.device
    return torch.device("cpu") if device.type == "meta" else device


def vocabulary_size(model: PreTrainedModel) -> int:
    """Rows of the input embedding: token ids are below it."""
    embedding = model.get_input_embeddings()
    weight = getattr(embedding, "weight", None)
    if not isinstance(weight, Tensor):
        raise UnsupportedModelError(
            f"the input embedding of {type(model).__name__} is a {type(embedding).__name__} and "
            "not one table, so what its token ids are is not known. Give a model that reads text."
        )
    return weight.shape[0]


def numbered(heard: list[Heard]) -> dict[int, nn.Module]:
    """Attention modules by absolute layer: what `overhear` numbered them, else in call order."""
    modules = [module for module, _, _ in heard]
    counts = Counter(modules)
    caller, times = counts.most_common(1)[0]
    if times > 1:
        raise UnsupportedModelError(
            f"a {type(caller).__name__} calls its attention kernel {times} times in one forward "
            "(it runs as several layers, or takes its attention apart), and which pattern is the "
            "layer's the tap cannot tell. Give a model whose layers each attend once."
        )
    numbers = distinct([call.layer for _, call, _ in heard])
    return dict(sorted(zip(numbers, modules, strict=True)))


def distinct(numbers: list[int]) -> list[int]:
    """Numbers of layers if they tell these apart, else their order."""
    told = len(set(numbers)) == len(numbers) and min(numbers, default=0) >= 0
    return numbers if told else list(range(len(numbers)))


def layer_number(module: nn.Module, path: str) -> int:
    """A module's layer_idx, else the first number in its path, else -1."""
    layer = getattr(module, "layer_idx", None)
    if isinstance(layer, int) and layer >= 0:  # shared blocks leave it out
        return layer
    return next((int(part) for part in path.split(".") if part.isdecimal()), -1)


class _Recorder:
    """Overhears one forward: which modules call, with what, and what their kernel returned."""

    awake = True

    def __init__(self, module: nn.Module, path: str, heard: list[Heard]) -> None:
        self._module, self._heard = module, heard
        self.layer = layer_number(module, path)

    def serve(self, call: AttentionCall, kernel: Kernel) -> tuple[Tensor, Tensor | None]:
        z, weights = kernel(call)
        self._heard.append(Heard(self._module, call, z))
        return z, weights
