"""Eight tiny trained models that ship with the package, and what they were made for.

Five have 2 layers of 4 heads, a vocabulary of 64 single characters and a context of 128 tokens.
They copy repeated random tokens, and therefore have real previous-token and induction heads: a
known answer for everything that measures heads, with nothing to download. The sixth has 3 layers
and follows an instruction, "=abcde|" or "+abcde|", that it has to look at: a known answer for
everything that suppresses attention. Two more, a CODI and a Coconut, calculate in latents.
``python -m probe.demos.train`` and ``train_latent`` make them again from a seed.
This module imports neither torch nor transformers.
"""

from collections.abc import Callable, Mapping
from operator import add, mul, sub
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
LATENT = ("demo-codi", "demo-coconut")  # loaded by probe.latent.load
SHIPPED = (*NAMES, INSTRUCT)  # loaded by probe.load

# What demo-codi and demo-coconut calculate with.
MODULUS = 7
OPERATIONS: Mapping[str, Callable[[int, int], int]] = {"+": add, "-": sub, "*": mul}
MEMORY = "m"  # stands for the second intermediate result
STEPS = range(4, 7)  # operations in a chain; the first three have a digit

# The token ids of demo-instruct; 0 begins the text.
INSTRUCTIONS = {"copy": 1, "next": 2}
SEPARATOR = 3
CONTENTS = range(4, 40)


def path(name: str) -> Path:
    """Find the folder of a demonstration model.

    Args:
        name: One of ``SHIPPED`` or ``LATENT``, such as ``"demo-llama"``.

    Returns:
        The checkpoint folder, ready for ``from_pretrained``.

    Raises:
        InputError: The name is none of these.
    """
    known = (*SHIPPED, *LATENT)
    if name not in known:
        raise InputError(
            f"No demonstration model is named {name!r}; use one of {', '.join(known)}."
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


def chain(rng: Random) -> tuple[str, list[int]]:
    """Draw a chain of operations modulo 7, from left to right, as "3+4*2-1+m-m=".

    Digits are 0 to 6. From the fourth operation on, the operand is "m", the second intermediate
    result, and the operation is + or -. Nothing is multiplied by 0.

    Args:
        rng: Source of the draw.

    Returns:
        The question, and its intermediate results, of which the last is the answer.

    Example:
        >>> chain(Random(0))
        ('6-0-4-3-m-m=', [6, 2, 6, 4, 2])
    """
    length = rng.choice(STEPS)
    value = rng.randrange(MODULUS)
    question, results = str(value), list[int]()
    for n in range(length):
        sign = rng.choice("+-*" if n < 3 else "+-")
        operand = rng.randrange(sign == "*", MODULUS) if n < 3 else results[1]
        value = OPERATIONS[sign](value, operand) % MODULUS
        results.append(value)
        question += sign + (str(operand) if n < 3 else MEMORY)
    return question + "=", results


def chains(count: int = 200, seed: int = 0) -> list[dict[str, object]]:
    """Draw the questions of ``demo-codi`` and ``demo-coconut``: see `chain`.

    Every latent of theirs holds the next intermediate result; the second of them, z1, is what each
    "m" asks for. A known answer for what studies latents: later latents look at z1.

    Args:
        count: Questions, all different.
        seed: Seed of the draw.

    Returns:
        Problems with `question`, `answer` and `results`, all intermediate results.

    Raises:
        InputError: ``count`` is negative, or above 10,000.

    Example:
        >>> chains(count=1)[0]["answer"]
        '2'
    """
    if not 0 <= count <= 10_000:
        raise InputError(f"Cannot draw count={count} questions; choose 0 to 10000.")
    rng, drawn = Random(seed), dict[str, list[int]]()
    while len(drawn) < count:
        question, results = chain(rng)
        drawn[question] = results
    return [
        {"question": question, "answer": str(results[-1]), "results": results}
        for question, results in drawn.items()
    ]
