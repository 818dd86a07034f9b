"""Latent reasoners as they are published: files of tensors, sorted into a model and a projection.

CODI (zhenyi4/codi) saves a PEFT model with LoRA adapters beside its base weights, and a projection;
Coconut (facebookresearch/coconut) a bare state dict. Nothing here runs code of a checkpoint: files
are read as tensors alone.
"""

import json
import pickle
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from probe.errors import InputError, first_line

Kind = Literal["codi", "coconut"]

# In this order, as the published loaders try them.
_NAMES = ("model.safetensors", "pytorch_model.bin")
_PREFIXES: Mapping[str, Kind] = {"codi.": "codi", "base_causallm.": "coconut"}
# A damaged pickle fails in every way that looking something up can.
_UNREADABLE = (
    *(SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError),
    *(LookupError, ValueError, TypeError, AttributeError),
)
_WRAPPER = "base_model.model."  # what PEFT puts around a model


@dataclass(frozen=True, slots=True)
class Published:
    """A checkpoint, sorted.

    Attributes:
        kind: "codi" or "coconut".
        weights: Of the causal language model, under the names that transformers gives them.
        adapters: LoRA matrices by the name of the weight that they change: A (r, in), B (out, r).
        projection: From hidden state to the next latent; empty without one.
        others: Names of tensors that belong to none of these.
    """

    kind: Kind
    weights: dict[str, Tensor]
    adapters: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    projection: dict[str, Tensor] = field(default_factory=dict)
    others: list[str] = field(default_factory=list)


def folder(source: str, revision: str | None = None) -> Path:
    """Where a checkpoint lies: a local folder or file, or one of the hub, fetched.

    Raises:
        InputError: There is none.
    """
    path = Path(source).expanduser()
    if path.exists():
        return path
    try:
        patterns = ["*.json", "*.safetensors", "*.bin", "tokenizer*", "*.txt"]
        return Path(snapshot_download(source, revision=revision, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{source!r} cannot be loaded: {first_line(error)} Give a name on the hub, as "
            "'zen-E/CODI-gpt2', or a local folder."
        ) from error


def read(path: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint, on the CPU.

    Raises:
        InputError: There are none, or the file holds more than tensors.
    """
    tensors: dict[str, Tensor] = {}
    for file in _files(path):
        try:
            tensors |= _tensors(file)
        except _UNREADABLE as error:
            # torch's own words advise to open it all the same
            reason = "" if isinstance(error, pickle.UnpicklingError) else f" ({first_line(error)})"
            raise InputError(
                f"{file} cannot be read as tensors{reason}. It is damaged, or a pickle of "
                "something else, which is not opened: save its state_dict() instead."
            ) from error
    return tensors


def _files(path: Path) -> Iterator[Path]:
    if path.is_file():
        yield path
        return
    for name in _NAMES:
        index = path / f"{name}.index.json"
        if (path / name).is_file():
            yield path / name
            return
        if index.is_file():
            parts = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
            yield from (path / part for part in dict.fromkeys(parts))
            return
    raise InputError(
        f"{path} holds no checkpoint: neither {' nor '.join(_NAMES)}. Give its folder, or the "
        "file of its state dict."
    )


def _tensors(file: Path) -> dict[str, Tensor]:
    if file.suffix == ".safetensors":
        return dict(load_file(file))
    loaded = torch.load(file, map_location="cpu", weights_only=True)
    loaded = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else loaded
    if not isinstance(loaded, dict) or not all(isinstance(x, Tensor) for x in loaded.values()):
        raise RuntimeError("it holds no state dict.")
    return loaded


def sort(state: Mapping[str, Tensor], name: str) -> Published:
    """Sort the tensors of a checkpoint by what they belong to.

    Raises:
        InputError: It is no latent reasoner, or an adapter lacks a half.
    """
    prefix = next((p for p in _PREFIXES if any(key.startswith(p) for key in state)), None)
    if prefix is None:
        some = ", ".join(list(state)[:3])
        raise InputError(
            f"{name} is neither CODI nor Coconut: its tensors are called {some}, ... and none "
            f"begins with {' or '.join(_PREFIXES)}. A plain model is loaded with probe.load."
        )
    found = Published(_PREFIXES[prefix], {})
    for key, tensor in state.items():
        inner = key.removeprefix(prefix)
        if inner == key:
            if key.startswith("prj."):
                found.projection[key.removeprefix("prj.")] = tensor
            elif not (found.kind == "coconut" and key == "embedding.weight"):  # a second name
                found.others.append(key)
            continue
        inner = inner.removeprefix(_WRAPPER)
        for half in ("A", "B"):
            stem, mark, rest = inner.partition(f".lora_{half}.")
            if mark and rest.endswith("weight"):
                found.adapters.setdefault(f"{stem}.weight", {})[half] = tensor
                break
        else:
            found.weights[inner.replace(".base_layer.", ".")] = tensor
    for weight, halves in found.adapters.items():
        if set(halves) != {"A", "B"} or weight not in found.weights:
            raise InputError(
                f"{name} has an adapter of {weight} without its lora_A, its lora_B or the weight "
                "itself. The checkpoint is incomplete: fetch it again."
            )
    return found


def merge(found: Published, skeleton: nn.Module, alpha: float, name: str) -> dict[str, Tensor]:
    """Weights with their adapters added: W + (alpha / r) B A, in float32, then W's dtype.

    GPT-2's Conv1D keeps its weight as (in, out), and gets the transpose.

    Raises:
        InputError: An adapter does not fit its weight.
    """
    flipped = {
        f"{n}.weight" for n, module in skeleton.named_modules() if isinstance(module, Conv1D)
    }
    merged = dict(found.weights)
    for weight, halves in found.adapters.items():
        a, b = halves["A"].float(), halves["B"].float()
        change = alpha / len(a) * (b @ a)
        change = change.T if weight in flipped else change
        base = merged[weight]
        if base.shape != change.shape:
            raise InputError(
                f"{name}: the adapter of {weight} is {tuple(change.shape)} and the weight "
                f"{tuple(base.shape)}. Give the base model that it was trained on, as base='gpt2'."
            )
        merged[weight] = (base.float() + change).to(base.dtype)
    return merged


def build(
    found: Published, config: PreTrainedConfig, alpha: float, name: str, **options: object
) -> tuple[PreTrainedModel, list[str]]:
    """The language model of a checkpoint, its adapters merged.

    Args:
        found: The checkpoint.
        config: Of the base model; its vocabulary becomes that of the checkpoint.
        alpha: LoRA's alpha.
        name: For messages.
        options: For `from_pretrained`, as dtype.

    Returns:
        The model, and the names of tensors that have no place in it.

    Raises:
        InputError: Weights are missing, or do not fit.
    """
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    embedding = next(
        n for n, module in skeleton.named_modules() if module is skeleton.get_input_embeddings()
    )
    rows = found.weights.get(f"{embedding}.weight")
    if rows is None:
        raise InputError(
            f"{name} has no {embedding}.weight, as a {config.model_type} has. Give the base model "
            "that it was trained on, as base='gpt2'."
        )
    config.vocab_size = len(rows)
    model, report = type(skeleton).from_pretrained(
        None,
        config=config,
        state_dict=merge(found, skeleton, alpha, name),
        output_loading_info=True,
        **options,
    )
    missing, wrong = sorted(report["missing_keys"]), sorted(report["mismatched_keys"])
    if missing or wrong:
        what = f"lacks {', '.join(missing[:3])}" if missing else f"does not fit: {wrong[0]}"
        raise InputError(
            f"{name} {what} ({len(missing)} weights missing, {len(wrong)} of another shape, of "
            f"{len(model.state_dict())}). Give the base model that it was trained on, as "
            "base='gpt2', or fetch the checkpoint again."
        )
    return model, sorted(report["unexpected_keys"])


def projection(weights: Mapping[str, Tensor], name: str) -> nn.Module:
    """CODI's way from a hidden state to the next latent: Linear, GELU, Linear, perhaps LayerNorm.

    Raises:
        InputError: It is made otherwise.
    """
    expected = {"1.weight", "1.bias", "3.weight", "3.bias"}
    if not expected <= set(weights) or set(weights) - expected - {"ln.weight", "ln.bias"}:
        raise InputError(
            f"the projection of {name} holds {', '.join(sorted(weights))}, and CODI's holds "
            f"{', '.join(sorted(expected))} and perhaps ln. Build a probe.latent.Reasoner yourself."
        )
    inner, width = weights["1.weight"].shape
    made = nn.Sequential(
        nn.Dropout(0.0), nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, width)
    )
    if "ln.weight" in weights:
        made.add_module("ln", nn.LayerNorm(width))
    nn.Module.to(made, weights["1.weight"].dtype)
    made.load_state_dict(dict(weights))
    made.train(mode=False)
    return made


def base_config(path: Path, base: str | None, revision: str | None) -> PreTrainedConfig:
    """The config of the model that a checkpoint was trained from; its weights are not needed."""
    source = base or str(path)
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            source, revision=None if base else revision, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise InputError(
            f"the config of the base model cannot be read from {source!r}: {first_line(error)} "
            "Name the model that the checkpoint was trained from, as base='gpt2'."
        ) from error
    return config
