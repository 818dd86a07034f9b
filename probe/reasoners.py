"""Latent reasoners: language models that think in embeddings between a question and its answer.

A question ends with tokens that open; then the model reads its own last hidden state, carried over
to an embedding, again and again: these are the latents. Tokens that close follow, and the answer.
"""

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from probe import checkpoints, demos
from probe.errors import InputError, first_line
from probe.fingerprint import fingerprint
from probe.loading import device_of
from probe.model import Model
from probe.problems import Problem

log = logging.getLogger("probe")

# What published checkpoints were trained from. (Llama's own repository asks for an account.)
BASES: Mapping[str, str] = {
    "zen-E/CODI-gpt2": "openai-community/gpt2",
    "zen-E/CODI-llama3.2-1b-Instruct": "unsloth/Llama-3.2-1B-Instruct",
    "internlm/SIM_COT-GPT2-CODI": "openai-community/gpt2",
}
_SETTINGS = "latent.json"  # beside a checkpoint, what it does not say itself
_ADDED = 3  # tokens that both methods add to the vocabulary of their base
_WRITTEN: Mapping[checkpoints.Kind, Mapping[str, str]] = {
    "codi": {"question": "{}", "answer": "The answer is: {}"},
    "coconut": {"question": "{}\n", "answer": "### {}"},
}


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Reasoner:
    r"""A model that thinks in latents; `probe.latent.load` makes one of a published checkpoint.

    Attributes:
        model: The language model, tapped.
        kind: What it is called: "codi", "coconut", or a name of your own.
        n_latents: Latents that it reads.
        opens: Token ids between the question and the first latent.
        closes: Token ids between the last latent and the answer.
        following: From the last hidden state, after the model's final norm, to the embedding of the
            next latent: (batch, 1, width) to the same.
        words: Only token ids below it are said in an answer.
        question: How a question is written, as "{}\n".
        answer: How an answer is written, as "The answer is: {}".

    Raises:
        InputError: There is nothing to think with: fewer than 1 latent, no token that opens.
    """

    model: Model
    kind: str
    n_latents: int
    opens: tuple[int, ...]
    closes: tuple[int, ...]
    following: Callable[[Tensor], Tensor]
    words: int
    question: str = "{}"
    answer: str = "{}"

    def __post_init__(self) -> None:
        if type(self.n_latents) is not int or self.n_latents < 1:
            raise InputError(f"n_latents={self.n_latents!r}. It must be an int of at least 1.")
        for name in ("opens", "closes"):
            if not getattr(self, name):
                raise InputError(f"{name}=() leaves nothing to read there. Give a token id.")
        for name in ("question", "answer"):
            if "{}" not in getattr(self, name):
                raise InputError(f"{name}={getattr(self, name)!r} has no place for it: write {{}}.")

    @property
    def embed(self) -> nn.Module:
        """The model's embedding of token ids."""
        table: nn.Module = self.model.base.get_input_embeddings()  # type: ignore[operator]
        return table

    @property
    def stop(self) -> int | None:
        """The token id that ends an answer, or None."""
        token = getattr(self.model.tokenizer, "eos_token_id", None)
        return None if token is None else int(token)

    def prompt(self, problem: Problem) -> list[int]:
        """Token ids of a question, with what opens the latents."""
        if problem.token_ids is not None:
            return [*problem.token_ids, *self.opens]
        text = problem.text or ""
        if self.kind == "codi":  # as its own evaluation has it
            text = text.strip().replace("  ", " ")
        return [*self.model.text.encode(self.question.format(text)), *self.opens]

    def segments(self, n: int, *, bos: bool) -> tuple[str, ...]:
        """What each of the n tokens of a prompt is: bos, question or bot.

        Args:
            n: Tokens up to the last that opens.
            bos: Whether the first token begins a text.
        """
        question = ["question"] * (n - len(self.opens) - bos)
        return (*["bos"] * bos, *question, *["bot"] * len(self.opens))

    def as_data(self) -> dict[str, Any]:
        """What of it shapes numbers, beyond its model, as JSON data."""
        following = self.following
        weights = fingerprint(following, following) if isinstance(following, nn.Module) else None
        return {
            "kind": self.kind,
            "n_latents": self.n_latents,
            "opens": list(self.opens),
            "closes": list(self.closes),
            "projection": weights,
            "words": self.words,
            "question": self.question,
            "answer": self.answer,
        }

    def close(self) -> None:
        """Give the model back as it was."""
        self.model.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Reasoner({self.kind}, {self.n_latents} latents, {self.model!r})"


def load(
    source: str | Path,
    *,
    base: str | None = None,
    n_latents: int | None = None,
    lora_alpha: float | None = None,
    remove_eos: bool | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    attn_implementation: str | None = None,
    revision: str | None = None,
) -> Reasoner:
    """Load a latent reasoner as CODI or Coconut publish them, adapters merged, and tap it.

    Files are read as tensors alone, and no code of a checkpoint is run.

    Args:
        source: "zen-E/CODI-gpt2" or another name on the Hugging Face hub, a local folder or file,
            or "demo-codi" or "demo-coconut", which ship with the package. A folder may hold a
            `latent.json` with n_latents, lora_alpha, remove_eos, question and answer.
        base: The model that it was trained from, of which config and tokenizer are read and no
            weights; by default what the folder holds, or what is known of a published name.
        n_latents: Latents to read; default 6, as both were trained for GSM8K.
        lora_alpha: Alpha of its adapters; default 32, as published.
        remove_eos: Whether CODI writes no end-of-text token before it opens and after it closes;
            default True, as published.
        device: Default cuda if there is one, else cpu.
        dtype: Default that of the checkpoint.
        attn_implementation: As for transformers; default its own choice.
        revision: Of the checkpoint on the hub.

    Returns:
        The reasoner. Its model is an ordinary `probe.Model`.

    Raises:
        InputError: It cannot be loaded, or weights are missing.
    """
    name = str(source)
    target = device_of(device)
    path = demos.path(name) if name in demos.LATENT else checkpoints.folder(name, revision)
    given = {"n_latents": n_latents, "lora_alpha": lora_alpha, "remove_eos": remove_eos}
    settings = {"n_latents": 6, "lora_alpha": 32, "remove_eos": True, **_settings(path)}
    settings |= {key: value for key, value in given.items() if value is not None}
    found = checkpoints.sort(checkpoints.read(path), name)
    base = base or (None if (path / "config.json").is_file() else BASES.get(name))
    options = {"dtype": dtype or "auto", "attn_implementation": attn_implementation}
    config = checkpoints.base_config(path, base, revision)
    module, unused = checkpoints.build(found, config, settings["lora_alpha"], name, **options)
    if unused := [*found.others, *unused]:
        some = ", ".join(unused[:3]) + (", ..." if len(unused) > 3 else "")
        log.warning("%s holds %d tensors that have no place here: %s", name, len(unused), some)
    following = _following(found, name, module.dtype, target)
    model = Model(nn.Module.to(module, target), _tokenizer(base or str(path)), name=name)
    return _reasoner(found.kind, model, following, settings)


def _settings(path: Path) -> dict[str, Any]:
    file = path / _SETTINGS
    if not file.is_file():
        return {}
    try:
        settings: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{file} is not JSON ({error}). Mend it, or remove it.") from error
    return settings


def _following(
    found: checkpoints.Published, name: str, dtype: torch.dtype, device: torch.device
) -> Callable[[Tensor], Tensor]:
    if not found.projection:
        return _same
    return nn.Module.to(checkpoints.projection(found.projection, name), device, dtype)


def _same(hidden: Tensor) -> Tensor:
    return hidden


def _tokenizer(source: str) -> Any:
    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, ImportError) as error:
        raise InputError(
            f"{source!r} has no tokenizer that can be loaded ({first_line(error)}). Name the model "
            "that the checkpoint was trained from, as base='gpt2'."
        ) from error


def _reasoner(
    kind: checkpoints.Kind,
    model: Model,
    following: Callable[[Tensor], Tensor],
    settings: Mapping[str, Any],
) -> Reasoner:
    added = model.vocabulary - _ADDED
    written = {key: settings.get(key, text) for key, text in _WRITTEN[kind].items()}
    if kind == "coconut":  # its tokens: one that opens, one that closes, one that holds a place
        opens, closes, words = [added], [added + 1], model.vocabulary
    else:  # padding, one that opens, one that closes
        opens, closes, words = [added + 1], [added + 2], added + 2
    if kind == "codi" and not settings["remove_eos"]:
        end = model.tokenizer.eos_token_id
        opens, closes = [end, *opens], [*closes, end]
    return Reasoner(
        model=model,
        kind=kind,
        n_latents=settings["n_latents"],
        opens=tuple(opens),
        closes=tuple(closes),
        following=following,
        words=words,
        **written,
    )
