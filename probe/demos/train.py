"""Train the demonstration models from a seed: ``python -m probe.demos.train all``.

The task of five is to copy: a beginning-of-text token, then a segment of distinct random tokens,
tiled to fill the sequence. The period differs from one sequence to the next, so no fixed offset
solves it; the model has to find the previous occurrence of the present token and look one further.
Two layers learn that as a previous-token head below induction heads (Elhage et al. 2021, "A
Mathematical Framework for Transformer Circuits"; Olsson et al. 2022, "In-context Learning and
Induction Heads"). The sixth follows an instruction; what it alone needs is in ``train_instruct``.

One thread and one seed make every run bit-identical on the same machine and library versions.
"""

import argparse
import logging
import string
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from probe.demos import train_instruct

logger = logging.getLogger(__name__)

BOS = "<bos>"
ALPHABET = string.ascii_lowercase + string.ascii_uppercase + string.digits + "."
VOCAB = 1 + len(ALPHABET)
CONTEXT = 128  # the longest input that the models accept
LENGTH = 64  # tokens in a training sequence
BATCH = 32
PERIODS = (6, 31)  # inclusive; the longest still fits twice after the first token
LEARNING_RATE = 2e-3
WARMUP = 100  # steps
# Longer than the two copies of 20 tokens that the heads are measured on, shorter than a training
# sequence: the model copies as well as the others, with a window that really hides something.
WINDOW = 48


def tokenizer(alphabet: str = ALPHABET) -> PreTrainedTokenizerFast:
    """Build the tokenizer of a demonstration model: one character, one token.

    Id 0 begins every text; the alphabet follows from 1. There is no unknown token on purpose: any
    other character raises instead of becoming something else silently.

    Args:
        alphabet: The characters; by default those that the five copying models share.

    Returns:
        The tokenizer, ready to save beside a checkpoint.

    Example:
        >>> tokenizer("=+").encode("+=")
        [0, 2, 1]
    """
    vocab = {symbol: index for index, symbol in enumerate([BOS, *alphabet])}
    core = Tokenizer(models.WordLevel(vocab))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, vocab[BOS])]
    )
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=core,
        bos_token=BOS,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": 0,
    "eos_token_id": None,
}
GATED = SHAPE | {"intermediate_size": 128}
GPT2 = SHAPE | {"n_inner": 128, "initializer_range": 0.1}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def start_sinusoid(model: PreTrainedModel) -> None:
    """Start GPT-2's learned positions as a sinusoid (Vaswani et al. 2017), of wavelengths that fit.

    From a random table the same training learns to copy as well, but by another way: no head
    scores above 0.11 for induction. The table is trained like every other weight.

    Args:
        model: GPT-2 as initialised, changed in place.
    """
    state = model.state_dict()
    position = torch.arange(CONTEXT)[:, None]
    angle = position / 50.0 ** (torch.arange(0, 64, 2) / 64)  # (position, 32)
    sinusoid = torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)  # (position, 64)
    state["transformer.wpe.weight"].copy_(0.3 * sinusoid)
    state["transformer.wte.weight"].normal_(0.0, 0.1)


def start_sharp(model: PreTrainedModel) -> None:
    """Start Qwen3's query and key norms with a gain of 2 each.

    Qwen3 normalises queries and keys, so that with the usual gain of 1 no score exceeds
    sqrt(head_dim) = 4, too little to look at one token alone; the gain grows slowly in training.

    Args:
        model: Qwen3 as initialised, changed in place.
    """
    for name, weight in model.state_dict().items():
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            weight.fill_(2.0)


def tiled(generator: torch.Generator) -> tuple[Tensor, int]:
    """Draw training sequences: 0, then distinct random tokens, tiled with a random period.

    Args:
        generator: Source of the draw.

    Returns:
        Token ids, (sequence, position), and how many of them are given rather than asked for: one.
        Every other counts, the unpredictable first copy too: trained on the later copies alone, a
        model is confidently wrong there, instead of at the known ln 63.
    """
    shortest, longest = PERIODS
    period = torch.randint(shortest, longest + 1, (BATCH, 1), generator=generator)
    order = torch.rand(BATCH, VOCAB - 1, generator=generator).argsort(dim=1) + 1
    segments = order.gather(1, torch.arange(LENGTH - 1) % period)
    return F.pad(segments, (1, 0), value=0), 1


@dataclass(frozen=True)
class Family:
    """What differs between the models.

    Attributes:
        kind: The architecture, by its name in transformers.
        settings: The configuration, in the family's own names.
        steps: Training steps; the induction heads form in a sudden drop of the loss between steps
            200 and 600, and sharpen until the end.
        start: Changes the initial weights in place, where the usual ones do not do.
        seed: Seed of the weights and of the sequences.
        alphabet: The characters of its tokenizer.
        draw: Draws a batch of its task: token ids, and how many of each row are given.
    """

    kind: str
    settings: Mapping[str, Any]
    steps: int
    start: Callable[[PreTrainedModel], None] | None = None
    seed: int = 0
    alphabet: str = ALPHABET
    draw: Callable[[torch.Generator], tuple[Tensor, int]] = tiled


TWO_KEY_HEADS = GATED | {"num_key_value_heads": 2}
FAMILIES: dict[str, Family] = {
    "llama": Family("llama", GATED | {"num_key_value_heads": 4}, steps=800),
    "gpt2": Family("gpt2", GPT2 | NO_DROPOUT, steps=1500, start=start_sinusoid),
    "mistral": Family("mistral", TWO_KEY_HEADS | {"sliding_window": WINDOW}, steps=800),
    "qwen2": Family("qwen2", TWO_KEY_HEADS, steps=800),
    "qwen3": Family("qwen3", TWO_KEY_HEADS | {"head_dim": 16}, steps=1200, start=start_sharp),
    "instruct": Family(
        "llama",
        TWO_KEY_HEADS | train_instruct.SETTINGS,
        steps=train_instruct.STEPS,
        seed=train_instruct.SEED,
        alphabet=train_instruct.ALPHABET,
        draw=train_instruct.batch,
    ),
}


def untrained(name: str) -> PreTrainedModel:
    """Make the model that training starts from: ``name`` is a key of ``FAMILIES``."""
    family = FAMILIES[name]
    config = AutoConfig.for_model(family.kind, **family.settings)
    make = AutoModelForCausalLM.from_config
    model: PreTrainedModel = make(config, attn_implementation="eager")  # type: ignore[no-untyped-call]
    if family.start is not None:
        family.start(model)
    return model


@contextmanager
def reproducible(seed: int) -> Iterator[None]:
    """Seed torch and keep it to one thread; on leaving, the caller's state is as it was."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            yield
    finally:
        torch.set_num_threads(threads)


def learn(
    name: str,
    parameters: Sequence[nn.Parameter],
    steps: int,
    loss: Callable[[], Tensor],
    rate: float = LEARNING_RATE,
    falling: Callable[[int], float] = lambda step: 1.0,
) -> None:
    """Minimise a loss by AdamW.

    Args:
        name: For the log.
        parameters: What is trained.
        steps: How often.
        loss: Draws a batch, and gives its loss.
        rate: The learning rate, once warm.
        falling: What is left of it at a step.
    """
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.98), weight_decay=0.01)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / WARMUP) * falling(step)
        now = loss()
        optimizer.zero_grad()
        torch.autograd.backward(now)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if step % 100 == 0:
            logger.info("%s: step %4d, loss %.3f", name, step, now.item())


def train(name: str, *, steps: int | None = None) -> PreTrainedModel:
    """Train one model from its seed.

    Args:
        name: A key of ``FAMILIES``.
        steps: Training steps; by default as many as the shipped model had.

    Returns:
        The trained model in evaluation mode, float32 on the CPU.
    """
    family = FAMILIES[name]
    with reproducible(family.seed):
        model = untrained(name)
        model.train()
        sequences = torch.Generator().manual_seed(family.seed)

        def loss() -> Tensor:
            ids, given = family.draw(sequences)
            logits = model(ids, use_cache=False).logits[:, given - 1 : -1]
            return F.cross_entropy(logits.flatten(0, 1), ids[:, given:].flatten())

        learn(name, list(model.parameters()), family.steps if steps is None else steps, loss)
    model.train(mode=False)
    return model


def save(model: PreTrainedModel, folder: Path, alphabet: str = ALPHABET) -> None:
    """Write a checkpoint that ``from_pretrained`` loads, with the tokenizer of an alphabet."""
    model.save_pretrained(folder)
    words = tokenizer(alphabet)
    if model.config.model_type == "qwen2":
        # AutoTokenizer replaces whatever class a qwen2 folder names by Qwen2Tokenizer, which drops
        # unknown characters silently, unless the folder has an auto_map. This one maps to no code.
        words.init_kwargs["auto_map"] = {"AutoTokenizer": ["tokenizer.TokenizersBackend"] * 2}
    words.save_pretrained(folder)


def command(
    module: str,
    names: Sequence[str],
    make: Callable[[str, Path], None],
    arguments: Sequence[str] | None,
) -> None:
    """Make some of the shipped models again, as the command line says.

    Args:
        module: Which is run with -m.
        names: Of its models.
        make: Trains the model of a name, and writes it into a folder.
        arguments: Of the command; by default those of this process.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m {module}",
        description="Train the demonstration models again, from their seeds.",
    )
    parser.add_argument("name", choices=[*names, "all"], help="which model to train")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).parent,
        help="where the model's folder goes (default: over the shipped one)",
    )
    chosen = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    for name in names if chosen.name == "all" else [chosen.name]:
        start = time.process_time()
        make(name, chosen.out / name)
        seconds = time.process_time() - start
        logger.info("%s: trained in %.0f CPU seconds, in %s", name, seconds, chosen.out / name)


def _make(name: str, folder: Path) -> None:
    save(train(name), folder, FAMILIES[name].alphabet)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train the demonstration models again, from their seeds."""
    command("probe.demos.train", list(FAMILIES), _make, arguments)


if __name__ == "__main__":
    main()
