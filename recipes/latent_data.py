"""The questions of a study: drawn once, checked, written to a file that every model then reads.

The file is document 002's: a JSON list of objects with `gsm8k_id`, `question`, `answer` (the
number) and `full_solution`.
"""

import json
from collections import Counter
from pathlib import Path

import probe
from probe.answers import expected
from probe.errors import InputError
from probe.problems import Problem, Problems
from recipes import _files

ID = "gsm8k_id"


def sample(
    source: object, *, n: int | None = 100, seed: int = 42, text: str | None = None
) -> Problems:
    """Draw questions as document 002 does: `random.seed(seed); random.sample(range(all), n)`.

    Ids are the file's or the split's name and the place in it, as train_5238, unless the source
    has ids of its own.

    Args:
        source: Anything that `probe.problems` reads, as "train.jsonl" or
            "hf:openai/gsm8k:main:train", with the field `answer`; or a file that `write` wrote.
        n: How many; None for all, in their order.
        seed: Of the draw.
        text: The field that holds the question.

    Returns:
        The problems, in the order in which they were drawn.

    Raises:
        InputError: A question is there twice, is empty, or has no answer; or n is more than there
            are.

    Example:
        >>> rows = [{"question": f"{i} + 1?", "answer": f"#### {i + 1}"} for i in range(9)]
        >>> [problem.id for problem in sample(rows, n=3)]
        ['list_1', 'list_0', 'list_5']
    """
    if isinstance(source, str | Path) and str(source).endswith(".json"):
        found = read(Path(source))
        return probe.problems(found, n=n, seed=None if n is None else seed)
    found = probe.problems(source, text=text)
    split = Path(found.source.rsplit(":", 1)[-1]).stem
    named = tuple(
        Problem(f"{split}_{p.id}" if p.id == str(i) else p.id, p.text, p.token_ids, p.fields)
        for i, p in enumerate(found)
    )
    chosen = probe.problems(Problems(named, found.source), n=n, seed=None if n is None else seed)
    check(chosen)
    return chosen


def check(problems: Problems) -> None:
    """Refuse questions that are there twice, are empty, or have no answer.

    Raises:
        InputError: Which one, and what to do.
    """
    times = Counter(problem.text for problem in problems)
    for problem in problems:
        if not (problem.text or "").strip():
            raise InputError(f"problem {problem.id!r} asks nothing: it has no text. Remove it.")
        if not expected(problem):
            raise InputError(
                f"problem {problem.id!r} has no answer: its fields are "
                f"{', '.join(problem.fields) or 'none'}. Give it a field `answer`."
            )
        if times[problem.text] > 1:
            same = [other.id for other in problems if other.text == problem.text]
            raise InputError(f"problems {', '.join(same)} ask the same. Keep one of them.")


def write(problems: Problems, path: Path) -> None:
    """Write problems as document 002 does; its folder is made.

    Raises:
        InputError: It cannot be written.
    """
    rows = [
        {
            ID: problem.id,
            "question": problem.text,
            "answer": expected(problem),
            "full_solution": problem.fields.get("full_solution", problem.fields.get("answer")),
        }
        for problem in problems
    ]
    _files.write(path, json.dumps(rows, indent=2, ensure_ascii=False) + "\n")


def read(path: Path) -> Problems:
    """Read what `write` wrote.

    Raises:
        InputError: It is no such file.
    """
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        found = tuple(
            Problem(
                str(row[ID]),
                _text(row["question"]),
                None,
                {key: row[key] for key in ("answer", "full_solution") if key in row},
            )
            for row in rows
        )
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}). Check the path.") from error
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(
            f"{path} holds no questions ({type(error).__name__}: {error}). Each needs {ID}, "
            "question and answer: see `probe latent sample`."
        ) from error
    problems = Problems(found, path.name)
    check(problems)
    return problems


def _text(question: object) -> str:
    if not isinstance(question, str):
        raise TypeError(f"the question {question!r} is no text")
    return question


def name(problems: Problems, *, every: bool) -> str:
    """The name that document 002 gives the file: attention_dataset_100_train.json."""
    split = problems[0].id.rpartition("_")[0] or "problems"
    return f"attention_dataset_{'full' if every else len(problems)}_{split}.json"
