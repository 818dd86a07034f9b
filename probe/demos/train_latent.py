"""Train the demonstration reasoners from a seed: ``python -m probe.demos.train_latent all``.

Both calculate a chain of operations modulo 7 (see `probe.demos.chain`) in six latents, each of
which holds the next intermediate result; a shorter chain repeats its last. First the model learns
to say the results as tokens, then to think them: demo-coconut by all of its weights, its last
hidden state being the next embedding (Hao et al. 2024, "Training Large Language Models to Reason in
a Continuous Latent Space"); demo-codi by LoRA adapters and a projection, which starts as the map
from a hidden state to the embedding of what it says (Shen et al. 2025, "CODI"). Each latent is
trained through the model's head too, on the result that comes after it: without that, two layers do
not find the way.

Written as both are published, adapters beside their base. Needs the package peft.
"""

import json
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, Literal

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from probe.demos import STEPS, chain
from probe.demos.train import (
    GATED,
    GPT2,
    NO_DROPOUT,
    command,
    learn,
    reproducible,
    tokenizer,
)

Kind = Literal["codi", "coconut"]

ALPHABET = "0123456+-*m=."  # "." ends an answer
WORDS = 1 + len(ALPHABET)
STOP = WORDS - 1
FIRST = 1  # the id of "0"
LATENTS = 6
WIDTH = 64
BATCH = 64
RANK, ALPHA = 32, 64
SHARED: dict[str, Any] = {"vocab_size": WORDS + 3, "max_position_embeddings": 64}
SHARED |= {"eos_token_id": STOP, "initializer_range": 0.1}
BASES: dict[Kind, tuple[str, dict[str, Any]]] = {
    "codi": ("llama", GATED | {"num_key_value_heads": 4} | SHARED),
    "coconut": ("gpt2", GPT2 | NO_DROPOUT | SHARED),
}
ADAPTED = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj", "gate_proj"]
# The tokens that open and close: after a padding token in CODI, before a latent's in Coconut.
MARKS: dict[Kind, tuple[int, int]] = {"codi": (WORDS + 1, WORDS + 2), "coconut": (WORDS, WORDS + 1)}
SAID, CARRIED = 800, 600  # steps of saying, of the projection
THOUGHT: dict[Kind, tuple[int, float]] = {"codi": (2500, 3e-3), "coconut": (2000, 2e-3)}
SEED = 0


def batch(rng: Random) -> tuple[Tensor, Tensor]:
    """Draw questions of one length.

    Returns:
        Token ids, (question, position); ids of results, (question, 1 + latents): what each latent
        holds, and the answer.
    """
    length = rng.choice(STEPS)
    questions: list[list[int]] = []
    results: list[list[int]] = []
    while len(questions) < BATCH:
        question, found = chain(rng)
        if len(found) == length:
            questions.append([0, *(FIRST + ALPHABET.index(x) for x in question)])
            results.append([FIRST + x for x in found + found[-1:] * (LATENTS + 1 - length)])
    return torch.tensor(questions), torch.tensor(results)


def cosine(steps: int) -> Callable[[int], float]:
    """A learning rate that falls as half a cosine, to a twentieth."""
    return lambda step: 0.525 + 0.475 * math.cos(math.pi * step / steps)


def column(token: int) -> Tensor:
    """One token for each of a batch."""
    return torch.full((BATCH, 1), token)


def saying(model: nn.Module, kind: Kind, rng: Random) -> Tensor:
    """The loss of results that are said as tokens, and of the answer."""
    opens, closes = MARKS[kind]
    ids, results = batch(rng)
    given = ids.shape[1]
    said = [results[:, :-1], column(closes), results[:, -1:], column(STOP)]
    whole = torch.cat([ids, column(opens), *said], 1)
    logits = model(whole, use_cache=False).logits[:, given:-1]
    return F.cross_entropy(logits.flatten(0, 1), whole[:, given + 1 :].flatten())


def carrying(model: Any, projection: nn.Module, kind: Kind, rng: Random) -> Tensor:
    """How far the projection of a hidden state is from the embedding of what it says."""
    ids, results = batch(rng)
    given = ids.shape[1]
    whole = torch.cat([ids, column(MARKS[kind][0]), results[:, :-1]], 1)
    with torch.no_grad():
        hidden = model(whole, use_cache=False, output_hidden_states=True).hidden_states[-1]
        wanted = model.get_input_embeddings()(results[:, :-1])
    return F.mse_loss(projection(hidden[:, given:-1]), wanted)


def thinking(model: Any, projection: nn.Module, kind: Kind, rng: Random) -> Tensor:
    """The loss of results that latents hold, and of the answer."""
    opens, closes = MARKS[kind]
    ids, results = batch(rng)
    embed = model.get_input_embeddings()
    latent, cache, heard = embed(torch.cat([ids, column(opens)], 1)), None, []
    for _ in range(LATENTS):
        out = model(
            inputs_embeds=latent, past_key_values=cache, use_cache=True, output_hidden_states=True
        )
        cache = out.past_key_values
        heard.append(out.logits[:, -1])
        latent = projection(out.hidden_states[-1][:, -1:])
    answer = torch.cat([column(closes), results[:, -1:]], 1)
    rest = torch.cat([latent, embed(answer)], 1)
    logits = model(inputs_embeds=rest, past_key_values=cache, use_cache=True).logits
    steps = F.cross_entropy(torch.stack(heard, 1).flatten(0, 1), results[:, :-1].flatten())
    said = torch.cat([results[:, -1:], column(STOP)], 1)
    return steps + 2 * F.cross_entropy(logits[:, 1:].flatten(0, 1), said.flatten())


def projected() -> nn.Sequential:
    """CODI's projection, before training."""
    made = nn.Sequential(
        nn.Dropout(0.0), nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH)
    )
    made.add_module("ln", nn.LayerNorm(WIDTH))
    return made


def train(kind: Kind) -> tuple[Any, dict[str, Tensor]]:
    """Train one reasoner from its seed.

    Returns:
        The config of its base, and its tensors under the names that it is published with.
    """
    steps, rate = THOUGHT[kind]
    with reproducible(SEED):
        rng = Random(SEED)
        family, settings = BASES[kind]
        config = AutoConfig.for_model(family, **settings)
        make = AutoModelForCausalLM.from_config
        model: Any = make(config, attn_implementation="eager")  # type: ignore[no-untyped-call]
        own = list(model.parameters())
        learn(kind, own, SAID, partial(saying, model, kind, rng), 2e-3, cosine(SAID))
        following: nn.Module = nn.Identity()
        if kind == "codi":
            following = projected()
            own = list(following.parameters())
            far = partial(carrying, model, following, kind, rng)
            learn(kind, own, CARRIED, far, 2e-3, cosine(CARRIED))
            adapters = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=ADAPTED)
            model = get_peft_model(model, adapters)
        free = [p for p in (*model.parameters(), *following.parameters()) if p.requires_grad]
        wrong = partial(thinking, model, following, kind, rng)
        learn(kind, free, steps, wrong, rate, cosine(steps))
    prefix = {"codi": "codi.", "coconut": "base_causallm."}[kind]
    tensors = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    tensors |= {f"prj.{name}": tensor for name, tensor in following.state_dict().items()}
    if kind == "coconut":
        tensors["embedding.weight"] = model.get_input_embeddings().weight
    return config, {name: tensor.detach().clone() for name, tensor in tensors.items()}


def save(kind: Kind, config: Any, tensors: dict[str, Tensor], folder: Path) -> None:
    """Write a checkpoint that `probe.latent.load` loads."""
    config.save_pretrained(folder)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    words = tokenizer(ALPHABET)
    words.eos_token = "."
    words.save_pretrained(folder)
    settings = {"kind": kind, "n_latents": LATENTS, "question": "{}", "answer": "{}"}
    settings |= {"lora_alpha": ALPHA} if kind == "codi" else {}
    (folder / "latent.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _make(name: str, folder: Path) -> None:
    kind: Kind = "codi" if name == "codi" else "coconut"
    save(kind, *train(kind), folder)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train the demonstration reasoners again, from their seeds."""
    command("probe.demos.train_latent", list(BASES), _make, arguments)


if __name__ == "__main__":
    main()
