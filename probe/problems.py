"""The problems that a model runs: read from texts, files and datasets, each with an id."""

import hashlib
import importlib
import json
import operator
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, overload

from probe import demos
from probe.errors import InputError

FIELDS = ("text", "question", "prompt")

_DEMOS: Mapping[str, Callable[[], Sequence[object]]] = {
    "demo:repeated": demos.repeated,
    "demo:copy": partial(demos.instructed, "copy"),
    "demo:next": partial(demos.instructed, "next"),
    "demo:chains": demos.chains,
}

_LATER = ("generated", "bot", "latent", "eot", "answer")  # segments that follow a problem

_HF = re.compile(r"hf:(?P<name>[^:@]+)(@(?P<revision>[^:]+))?(:(?P<config>[^:\[]+))?:(?P<split>.+)")


@dataclass(frozen=True, slots=True)
class Problem:
    """One input: a text, or the token ids themselves.

    Attributes:
        id: Unique among the problems of a run.
        text: What the tokenizer reads; None when token ids are given.
        token_ids: Vocabulary ids; None when they come from the text.
        fields: What else its source said about it, as `answer`.
    """

    id: str
    text: str | None = None
    token_ids: tuple[int, ...] | None = None
    fields: Mapping[str, object] = field(default_factory=dict, hash=False)


@dataclass(frozen=True, slots=True, repr=False)
class Problems(Sequence[Problem]):
    """Problems in order, and where they come from.

    Attributes:
        items: The problems.
        source: A file's name, "hf:...", "list" or "text".
    """

    items: tuple[Problem, ...]
    source: str

    @overload
    def __getitem__(self, index: int) -> Problem: ...
    @overload
    def __getitem__(self, index: slice) -> "Problems": ...
    def __getitem__(self, index: int | slice) -> "Problem | Problems":
        if isinstance(index, slice):
            return Problems(self.items[index], self.source)
        return self.items[index]

    def __len__(self) -> int:
        return len(self.items)

    def __repr__(self) -> str:
        return f"<{len(self)} problems of {self.source!r}>"

    @property
    def sha256(self) -> str:
        """Identifies the content: a hash over ids, texts and token ids, in order."""
        digest = hashlib.sha256()
        for item in self.items:
            digest.update(json.dumps([item.id, item.text, item.token_ids]).encode() + b"\n")
        return digest.hexdigest()


def problems(
    source: object, text: str | None = None, n: int | None = None, seed: int | None = None
) -> Problems:
    """Read problems.

    Args:
        source: A text; a list of texts, of dicts (read as lines of a jsonl file), of lists of token
            ids, or of `Problem`; the path of a .txt file, one problem a line, or of a .jsonl file;
            "hf:NAME[@REVISION][:CONFIG]:SPLIT", a dataset of the Hugging Face hub;
            "demo:repeated", "demo:copy", "demo:next" or "demo:chains", what the demonstration
            models were made for (see `probe.demos`); or an opened store, whose finished problems
            are read again under their ids, as the token ids they were, without what followed them.
        text: The field that holds the text; without it `text`, else `question`, else `prompt`.
        n: How many to take; None for all.
        seed: With it, `random.Random(seed).sample(range(all), n)` chooses, in that order; without
            it the first `n` are taken.

    Returns:
        The problems. Their ids are their field `id`, else their place in the source, from 0.

    Raises:
        InputError: The source is missing, empty or malformed; the message says where.

    Example:
        >>> problems([{"question": "1 + 1?", "answer": "2"}, {"question": "2 + 2?"}])[0].text
        '1 + 1?'
    """
    if isinstance(source, Problems):
        found = source
    else:
        name, items = _items(source)
        found = Problems(tuple(_problem(*item, text) for item in items), name)
    if not found:
        raise InputError(f"{found.source} holds no problems. Give at least one.")
    _require_unique(found)
    return _choose(found, n, seed)


def _items(source: object) -> tuple[str, Iterator[tuple[str, str, object]]]:
    """The name of a source, and its items: where each is, its place as an id, and the item."""
    if isinstance(source, str | Path) and _is_path(source) and Path(source, "zarr.json").is_file():
        raise InputError(f"{source} is a store. Give it opened: probe.open({str(source)!r}).")
    if isinstance(source, Path) or (
        isinstance(source, str) and source.endswith((".txt", ".jsonl")) and "\n" not in source
    ):
        return _file(Path(source))
    if isinstance(source, str) and source in _DEMOS:
        return source, ((source, str(i), ids) for i, ids in enumerate(_DEMOS[source]()))
    if isinstance(source, str) and source.startswith("hf:"):
        rows = _dataset(source)
        return source, ((f"{source} row {i}", str(i), row) for i, row in enumerate(rows))
    if isinstance(source, str) and "\n" not in source and _is_path(source):
        raise InputError(
            f"{source} is a file or folder, but neither .txt nor .jsonl. Convert it, or put the "
            "words in a list to use them as a text."
        )
    if isinstance(source, str):
        return "text", iter([("the text", "0", source)])
    if hasattr(source, "data_vars"):
        return "store", iter([(f"problem {p.id!r}", p.id, p) for p in _stored(source)])
    if isinstance(source, list | tuple):
        return "list", ((f"item {i} of the list", str(i), x) for i, x in enumerate(source))
    raise InputError(
        f"problems cannot be read from type {type(source).__name__}. Give a text, a list, "
        "the path of a .txt or .jsonl file, 'hf:NAME:SPLIT', or an opened store."
    )


def _stored(ds: Any) -> Iterator[Problem]:
    """The finished problems of a store, as token ids."""
    needed = ("problem", "status", "length", "key_position", "token_id", "segment")
    if missing := [name for name in needed if name not in ds.variables]:
        raise InputError(
            f"this dataset is no store: it lacks {', '.join(missing)}. "
            "Give what probe.open returns."
        )
    if "problem" not in ds.dims:
        raise InputError(
            f"this is one problem of a store, {ds['problem'].item()!r}, without its dim. "
            "Keep it, with a list: ds.sel(problem=[...])."
        )
    columns = {name: ds[name].values for name in needed}
    for n in (columns["status"] == 1).nonzero()[0]:
        name, length = str(columns["problem"][n]), int(columns["length"][n])
        if columns["key_position"][n, :length].tolist() != list(range(length)):
            raise InputError(
                f"the store holds only some columns of problem {name!r}, so its tokens are not all "
                "known. Capture with keys=None, or give the problems themselves."
            )
        own = zip(columns["token_id"][n, :length], columns["segment"][n, :length], strict=True)
        ids = tuple(int(token) for token, segment in own if segment not in _LATER)
        fields = {"answer": str(ds["expected"].values[n])} if "expected" in ds else {}
        yield Problem(name, None, ids, fields)


def _is_path(text: str | Path) -> bool:
    try:
        return bool(str(text).strip()) and Path(text).exists()
    except (OSError, ValueError):  # too long for a name, or not one
        return False


def _file(path: Path) -> tuple[str, Iterator[tuple[str, str, object]]]:
    if path.suffix not in (".txt", ".jsonl"):
        raise InputError(f"{path} is neither .txt nor .jsonl. Rename it, or read it into a list.")
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path.name} is not UTF-8 text (byte {error.start}). Save it as UTF-8."
        ) from error
    except OSError as error:
        raise InputError(
            f"{path} cannot be read ({error.strerror}). Check the path; "
            "to use these words as a text, put them in a list."
        ) from error
    if lines[-1] == "":
        lines.pop()
    return path.name, (_line(path, i, line) for i, line in enumerate(lines))


def _line(path: Path, number: int, line: str) -> tuple[str, str, object]:
    where = f"{path.name} line {number}"
    if not line.strip():
        raise InputError(f"{where} is blank (lines count from 0). Remove it.")
    if path.suffix == ".txt":
        return where, str(number), line
    try:
        item = json.loads(line)
    except ValueError as error:
        raise InputError(f"{where} is not JSON ({error}). Write one object a line.") from error
    if not isinstance(item, dict):
        raise InputError(f"{where} is a JSON {type(item).__name__}. Write one object a line.")
    return where, str(number), item


def _dataset(source: str) -> Iterable[object]:
    match = _HF.fullmatch(source)
    if match is None:
        raise InputError(
            f"{source!r} names no dataset. Write 'hf:NAME:SPLIT', 'hf:NAME:CONFIG:SPLIT' or "
            "'hf:NAME@REVISION:SPLIT', as 'hf:openai/gsm8k:main:train'."
        )
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        raise InputError(
            f"{source!r} needs the package datasets, which is not installed. "
            "Install it with: pip install attn-probe[hf]"
        ) from error
    try:
        rows: Iterable[object] = datasets.load_dataset(
            match["name"], match["config"], split=match["split"], revision=match["revision"]
        )
    except (OSError, ValueError) as error:
        raise InputError(
            f"{source!r} cannot be loaded ({error}). Check its name, config and split."
        ) from error
    return rows


def _problem(where: str, place: str, item: Any, field: str | None) -> Problem:
    """One problem from a text, a dict, token ids or a `Problem`."""
    if isinstance(item, dict):
        found = _from_fields(where, place, item, field)
    elif field is not None:
        raise InputError(f"{where} has no fields to find {field!r} in. Leave out text=.")
    elif isinstance(item, Problem):
        ids = item.token_ids
        found = item if ids is None else replace(item, token_ids=_token_ids(where, ids))
    elif isinstance(item, str):
        found = Problem(place, item)
    elif hasattr(item, "tolist") or isinstance(item, list | tuple):
        values = item.tolist() if hasattr(item, "tolist") else item
        found = Problem(place, None, _token_ids(where, values))
    else:
        raise InputError(
            f"{where} is {item!r}, of type {type(item).__name__}. Give a text, a dict, a list "
            "of token ids or a Problem (one problem of token ids is [[1, 2, 3]])."
        )
    if found.text is None and found.token_ids is None:
        raise InputError(f"{where} has neither text nor token ids. Give one of them.")
    if found.text is not None and not found.text.strip():
        raise InputError(f"{where} (id {found.id!r}) has an empty text. Remove it, or fill it.")
    return found


def _from_fields(where: str, place: str, item: Mapping[str, object], name: str | None) -> Problem:
    has = ", ".join(map(str, item)) or "none"
    field = name or next((name for name in FIELDS if name in item), None)
    if field is None or field not in item:
        wanted = repr(name) if name else " or ".join(map(repr, FIELDS))
        guess = next((f for f in (*FIELDS, *item) if isinstance(item.get(f), str)), None)
        advice = f"Name the field: text={guess!r}" if guess else "Add one."
        raise InputError(f"{where} has no field {wanted} (it has: {has}). {advice}")
    value, id_ = item[field], item.get("id", place)
    if not isinstance(value, str):
        raise InputError(
            f"{where} has {type(value).__name__} {value!r} in its field {field!r}. Write a text."
        )
    if not isinstance(id_, str | int) or isinstance(id_, bool):
        raise InputError(f"{where} has the id {id_!r}. Write a text or an int.")
    rest = {key: value for key, value in item.items() if key not in (field, "id")}
    return Problem(str(id_), value, None, rest)


def _token_ids(where: str, ids: Any) -> tuple[int, ...]:
    if not isinstance(ids, list | tuple) or not ids:
        raise InputError(f"{where} has no token ids: {ids!r}. Give at least one, or remove it.")
    for i, value in enumerate(ids):
        is_int = hasattr(value, "__index__") and not isinstance(value, bool)
        if not is_int or operator.index(value) < 0:
            raise InputError(f"{where} has token id {value!r} at {i}. Token ids are ints from 0.")
    return tuple(map(operator.index, ids))


def _require_unique(found: Problems) -> None:
    seen: dict[str, int] = {}
    for i, item in enumerate(found):
        if item.id in seen:
            raise InputError(
                f"{found.source} has the id {item.id!r} twice, in problems {seen[item.id]} and "
                f"{i}. Give each its own."
            )
        seen[item.id] = i


def _choose(found: Problems, n: int | None, seed: int | None) -> Problems:
    count = len(found)
    if n is None:
        if seed is not None:
            raise InputError(f"seed={seed} chooses which problems to take. Say how many with n=.")
        return found
    if not 1 <= n <= count:
        raise InputError(f"n={n} cannot be taken: {found.source} has {count}. Use 1 to {count}.")
    if seed is None:
        return found[:n]
    # random.seed(seed); random.sample(range(count), n) gives the same, without the global state
    picked = random.Random(seed).sample(range(count), n)
    return Problems(tuple(found[i] for i in picked), found.source)
