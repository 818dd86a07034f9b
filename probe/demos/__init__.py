"""Six tiny trained models that ship with the package, and the stimuli that they were made for.

Five have 2 layers of 4 heads, a vocabulary of 64 single characters and a context of 128 tokens.
They copy repeated random tokens, and therefore have real previous-token and induction heads: a
known answer for everything that measures heads, with nothing to download. The sixth has 3 layers
and follows an instruction, "=abcde|" or "+abcde|", that it has to look at: a known answer for
everything that suppresses attention. ``python -m probe.demos.train`` makes them again from a seed.
This module imports neither torch nor transformers.
"""

from pathlib import Path
from random import Random
from typing import Literal

from probe.errors import InputError

NAMES: tuple[str, ...] = (
    "demo-llama",
    "demo-gpt2",
    "demo-mistral",
    "demo-qwen2",
    "demo-qwen3",
)
INSTRUCT = "demo-instruct"
SHIPPED = (*NAMES, INSTRUCT)

# The token ids of demo-instruct; 0 begins the text.
INSTRUCTIONS = {"copy": 1, "next": 2}
SEPARATOR = 3
CONTENTS = range(4, 40)


def path(name: str) -> Path:
    """Find the folder of a demonstration model.

    Args:
        name: One of ``SHIPPED``, such as ``"demo-llama"``.

    Returns:
        The checkpoint folder, ready for ``from_pretrained``.

    Raises:
        InputError: The name is not one of ``SHIPPED``.
    """
    if name not in SHIPPED:
        raise InputError(
            f"No demonstration model is named {name!r}; use one of {', '.join(SHIPPED)}."
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


def instructed(
    instruction: Literal["copy", "next"] = "copy", n: int = 10, count: int = 256, seed: int = 0
) -> list[list[int]]:
    """Draw the stimulus of ``demo-instruct``: a text's beginning, instruction, contents, output.

    The n contents are distinct and random; after a separator the output repeats them, or gives the
    content that follows each, the first after the last. Of all that comes before the output, the
    instruction alone, the token at position 1, says which.

    Args:
        instruction: "copy", as in "=abc|abc", or "next", as in "+abc|bcd".
        n: Contents; the model was trained on 5 to 12, and is lost beyond.
        count: Sequences.
        seed: Seed of the draw, which is the same for both instructions.

    Returns:
        Token ids, ``count`` lists of ``2 * n + 3``; the output is the last n of each.

    Raises:
        InputError: The instruction is unknown, ``n`` distinct contents cannot be drawn, or
            ``count`` is negative.

    Example:
        >>> instructed("copy", n=3, count=1)
        [[0, 1, 28, 30, 6, 3, 28, 30, 6]]
        >>> instructed("next", n=3, count=1)
        [[0, 2, 28, 30, 6, 3, 29, 31, 7]]
    """
    if instruction not in INSTRUCTIONS:
        raise InputError(
            f"No instruction is named {instruction!r}; use one of {', '.join(INSTRUCTIONS)}."
        )
    if not 1 <= n <= len(CONTENTS):
        raise InputError(
            f"Cannot draw n={n} distinct contents; choose n from 1 to {len(CONTENTS)}."
        )
    if count < 0:
        raise InputError(f"Cannot draw count={count} sequences; choose 0 or more.")
    rng = Random(seed)
    following = dict(zip(CONTENTS, [*CONTENTS[1:], CONTENTS[0]], strict=True))
    drawn = [rng.sample(CONTENTS, n) for _ in range(count)]
    answers = [[following[x] for x in xs] for xs in drawn] if instruction == "next" else drawn
    return [
        [0, INSTRUCTIONS[instruction], *contents, SEPARATOR, *output]
        for contents, output in zip(drawn, answers, strict=True)
    ]
