"""What contenders do, and in what setting; needs nothing but torch and transformers.

Contenders run in processes and virtual environments of their own: what they share is a folder with
the model's weights, the settings as JSON, and the names of workloads.
"""

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

# What is read of every forward, by name.
WORKLOADS = {
    "full": "all patterns, in memory",
    "stored": "all patterns, on the disk",
    "rows": "the last rows of every layer and head",
    "some": "all rows of 3 layers x 4 heads",
    "padded": "all patterns of a left-padded batch, in memory",
}
LAYERS, HEADS = (2, 5, 8), (0, 2, 4, 6)  # of "some"


class UnsupportedError(Exception):
    """What a contender cannot do, and why."""


# Gives what was read, layer by layer: (batch, head, query, key); or a function that gives it.
Run = Callable[[], Any]


@dataclass(frozen=True)
class Setting:
    """A Llama of this size reads `batch` sequences of `length` tokens."""

    length: int = 1024
    batch: int = 2
    layers: int = 12
    hidden: int = 512
    heads: int = 8
    threads: int = 1
    rows: int = 32  # of the workload "rows"
    device: str = "cpu"
    dtype: str = "float32"

    def model(self, attention: str) -> LlamaForCausalLM:
        """A random model, the same weights every time."""
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=2048,
            hidden_size=self.hidden,
            intermediate_size=3 * self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.heads,
            max_position_embeddings=8192,
        )
        config._attn_implementation = attention
        model: LlamaForCausalLM = LlamaForCausalLM(config).train(False)
        return model

    def save(self, folder: Path) -> None:
        """The weights, and a tokenizer, without which some libraries do not begin."""
        self.model("sdpa").save_pretrained(folder)
        words = {f"w{n}": n for n in range(2048)}
        special = {"bos_token": "w0", "eos_token": "w1", "unk_token": "w2", "pad_token": "w0"}
        inner = Tokenizer(WordLevel(words, unk_token="w2"))
        tokenizer: Any = PreTrainedTokenizerFast(tokenizer_object=inner, **special)  # type: ignore[no-untyped-call]
        tokenizer.save_pretrained(folder)

    def ids(self) -> Tensor:
        """Token ids (batch, position)."""
        generator = torch.Generator().manual_seed(1)
        return torch.randint(3, 2048, (self.batch, self.length), generator=generator)

    def but(self, **changes: Any) -> "Setting":
        """The same with something else."""
        return dataclasses.replace(self, **changes)

    @staticmethod
    def of(text: str) -> "Setting":
        """From JSON."""
        return Setting(**json.loads(text))

    def as_json(self) -> str:
        """As JSON."""
        return json.dumps(dataclasses.asdict(self))


@dataclass(frozen=True)
class Case:
    """One workload in one setting."""

    setting: Setting
    workload: str
    weights: Path  # of the model, as `save_pretrained` leaves them
    out: Path  # where "stored" writes; it is emptied before every run

    @property
    def inputs(self) -> dict[str, Tensor]:
        """What the model is given; of "padded", sequence n is an n-th shorter than the longest."""
        ids = self.setting.ids()
        if self.workload != "padded":
            return {"input_ids": ids.to(self.setting.device)}
        mask = torch.ones_like(ids)
        for n, row in enumerate(mask):
            row[: n * self.setting.length // (2 * self.setting.batch)] = 0
        inputs = {"input_ids": ids * mask, "attention_mask": mask}
        return {name: x.to(self.setting.device) for name, x in inputs.items()}

    @property
    def layers(self) -> list[int]:
        """The layers that are read."""
        return list(LAYERS) if self.workload == "some" else list(range(self.setting.layers))

    def load(self, attention: str) -> Any:
        """The model, by transformers."""
        dtype = getattr(torch, self.setting.dtype)
        model: Any = LlamaForCausalLM.from_pretrained(
            self.weights, attn_implementation=attention, dtype=dtype
        )
        for weight in model.parameters():  # a file that is mapped would be read in the first run
            weight.data = weight.data.to(self.setting.device, copy=True)
        return model.to(self.setting.device).train(False)

    def kept(self, pattern: Tensor) -> Tensor:
        """What the workload wants of a layer's whole pattern, in the machine's own memory."""
        if self.workload == "rows":
            return pattern[:, :, -self.setting.rows :].to("cpu", copy=True)
        return (pattern[:, list(HEADS)] if self.workload == "some" else pattern).to("cpu")

    def given(self, patterns: Sequence[Tensor]) -> Any:
        """The layers that were kept; or what reads them after they went to the disk, a file each.

        That is np.save of float16, which is what one would write by hand.
        """
        if self.workload != "stored":
            return list(patterns)
        for layer, pattern in enumerate(patterns):
            np.save(self.out / f"{layer}.npy", pattern.half().numpy())
        return lambda: [np.load(self.out / f"{layer}.npy") for layer in range(len(patterns))]

    def same(self, found: list[Any], known: list[Tensor]) -> float:
        """Largest difference of what was read from an eager model's; padding is left out."""
        worst = 0.0 if len(found) == len(known) else float("inf")
        mask = self.inputs.get("attention_mask", torch.ones_like(self.setting.ids())).bool().cpu()
        for one, other in zip(found, known, strict=False):
            for n, real in enumerate(mask):
                rows = real[-other.shape[2] :]
                own = torch.as_tensor(one[n])
                if own.shape[-1] == len(real):  # with its padding
                    own = own[:, rows][..., real]
                right = other[n][:, rows][..., real]
                if own.shape != right.shape:
                    return float("inf")
                worst = max(worst, float((own.float() - right).abs().max()))
        return worst
