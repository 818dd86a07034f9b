"""Five tiny trained models that ship with the package, and the stimulus that they were made for.

Each has 2 layers of 4 heads, a vocabulary of 64 single characters and a context of 128 tokens. They
copy repeated random tokens, and therefore have real previous-token and induction heads: a known
answer for everything that measures heads, with nothing to download. ``python -m probe.demos.train``
makes them again from a seed. This module imports neither torch nor transformers.
"""

from pathlib import Path
from random import Random

from probe.errors import InputError

NAMES: tuple[str, ...] = (
    "demo-llama",
    "demo-gpt2",
    "demo-mistral",
    "demo-qwen2",
    "demo-qwen3",
)


def path(name: str) -> Path:
    """Find the folder of a demonstration model.

    Args:
        name: One of ``NAMES``, such as ``"demo-llama"``.

    Returns:
        The checkpoint folder, ready for ``from_pretrained``.

    Raises:
        InputError: The name is not one of ``NAMES``.
    """
    if name not in NAMES:
        raise InputError(
            f"No demonstration model is named {name!r}; use one of {', '.join(NAMES)}."
        )
    return Path(__file__).parent / name.removeprefix("demo-")


def repeated(n: int = 20, count: int = 64, seed: int = 0, vocab: int = 64) -> list[list[int]]:
    """Draw the induction stimulus: the beginning-of-text token, then n random tokens, twice.

    Tokens are distinct within a sequence and carry no natural statistics, so the second copy can
    be predicted only by looking back at the first (prefix matching in Olsson et al. 2022,
    "In-context Learning and Induction Heads").

    Args:
        n: Tokens in one copy.
        count: Sequences.
        seed: Seed of the draw; the same arguments always give the same sequences.
        vocab: Token ids in the model; 0 begins the text and is never drawn.

    Returns:
        Token ids, ``count`` lists of ``2 * n + 1``.

    Raises:
        InputError: ``n`` distinct tokens cannot be drawn, or ``count`` is negative.
    """
    if not 1 <= n < vocab:
        raise InputError(
            f"Cannot draw n={n} distinct tokens from vocab={vocab}; choose n from 1 to {vocab - 1}."
        )
    if count < 0:
        raise InputError(f"Cannot draw count={count} sequences; choose 0 or more.")
    rng = Random(seed)
    copies = (rng.sample(range(1, vocab), n) for _ in range(count))
    return [[0, *copy, *copy] for copy in copies]
