"""Which layers, heads, rows and columns: what a user writes, resolved to absolute numbers."""

import operator
import re
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from numbers import Integral
from typing import Any, TypeGuard, TypeVar

import numpy as np
import numpy.typing as npt

from probe.errors import InputError

Selector = int | slice | Sequence[int] | str | None

# What gives the texts of some tokens, and how many tokens say each together: see `named`.
Texts = Callable[..., Sequence[tuple[str, int]]]

_SEGMENT = re.compile(r"([^\[\],]+)(?:\[(?:(-?\d+)|((-?\d*):(-?\d*)))\])?")
_ENDS = re.compile(r"(first|last):([0-9]+)")
_NAMED = ("segment:", "text:", "regex:")


_Places = TypeVar("_Places", list[int], npt.NDArray[np.integer[Any]])


def neighbours(places: _Places) -> slice | _Places:
    """Places as an index: neighbours in order as a slice, of which a view is taken or a quick copy.

    Example:
        >>> neighbours([2, 3, 4])
        slice(2, 5, None)
    """
    if len(places) and (np.diff(places) == 1).all():
        return slice(int(places[0]), int(places[-1]) + 1)
    return places


def axis(selector: Selector, size: int, name: str) -> tuple[int, ...]:
    """Resolve a selection of layers or heads.

    Args:
        selector: None for all, an int (negative ones count from the end), a slice as in Python, or
            a sequence of ints.
        size: How many the model has.
        name: "layers" or "heads", for messages.

    Returns:
        Numbers from 0 to `size` - 1, in the order given.

    Raises:
        InputError: Out of range, given twice, nothing selected, or not a selection at all.

    Example:
        >>> axis([0, -1], 12, "layers")
        (0, 11)
    """
    noun = f"the model has {size} {name}"
    if isinstance(selector, str):
        raise InputError(
            f"{name}={selector!r} is not a selection. Give an int, a slice or a list of ints."
        )
    return _resolve(selector, size, name, noun, "")


def positions(
    selector: Selector,
    length: int,
    segments: Sequence[str] | None = None,
    *,
    name: str,
    problem: str,
    tokens: Texts | None = None,
) -> tuple[int, ...]:
    """Resolve a selection of rows or columns within one problem.

    Args:
        selector: As for `axis`; or "last:6" and "first:6" for the last and first 6 tokens (all, if
            the problem has fewer); or "segment:latent", "text: not", "regex:[0-9]+": see `named`.
        length: Tokens in the problem.
        segments: Segment of each token, `length` of them.
        tokens: Gives the text of each token, when they are named by it: see `named`.
        name: "queries" or "keys", for messages.
        problem: Id of the problem, for messages.

    Returns:
        Token positions from 0 to `length` - 1, in the order given.

    Raises:
        InputError: Out of range in this problem, given twice, nothing selected, an unknown segment,
            or not a selection at all.

    Example:
        >>> positions("last:2", 5, name="queries", problem="0")
        (3, 4)
    """
    noun = f"problem {problem!r} has {length} tokens"
    where = f" in problem {problem!r}"
    if not isinstance(selector, str):
        return _resolve(selector, length, name, noun, where)
    if is_name(selector):
        chosen = named(selector, segments or (), tokens or _no_texts, name=name)
        if not chosen:
            raise InputError(_unnamed(selector, segments or (), name, problem))
        return chosen
    side, count = end(selector, name)
    some = slice(count) if side == "first" else slice(-count, None)
    return _resolve(some, length, name, noun, where)


def end(selector: str, name: str) -> tuple[str, int]:
    """The side and the number of "first:6" or "last:6".

    Raises:
        InputError: It is neither.

    Example:
        >>> end("last:6", "queries")
        ('last', 6)
    """
    match = _ENDS.fullmatch(selector)
    if match is None or int(match[2]) < 1:
        raise InputError(
            f"{name}={selector!r} is not a selection. Give an int, a slice, a list of ints, "
            "'first:6', 'last:6', 'segment:latent', 'text: not' or 'regex:[0-9]+'."
        )
    return match[1], int(match[2])


def is_name(selector: Selector) -> bool:
    """Whether tokens are named by what they say or are: "segment:", "text:" or "regex:".

    Example:
        >>> is_name("text: not"), is_name("last:6"), is_name(3)
        (True, False, False)
    """
    return isinstance(selector, str) and selector.startswith(_NAMED)


def named(
    selector: str,
    segments: Sequence[str],
    tokens: Texts,
    *,
    name: str = "keys",
) -> tuple[int, ...]:
    r"""The tokens that a segment, a text or a regular expression names.

    Args:
        selector: "segment:latent": tokens of that segment; "segment:latent[2]" and
            "segment:latent[3:],eot,answer": some of them, counted within it, and several segments.
            "text: not": tokens that say just this, alone or several in a row, wherever they occur
            (so not the first half of " nothing").
            "regex:[0-9]+": tokens of which a regular expression matches any part, in all their
            texts joined, those of special tokens left out.
        segments: Segment of each token.
        tokens: `tokens(special=...)` gives texts in order, each with the number of tokens that say
            it (several where a character is spread over them), "" for special tokens if `special`
            is False; called only when texts are asked for.
        name: "queries" or "keys", for messages.

    Returns:
        Positions, rising; none where nothing matches.

    Raises:
        InputError: The regular expression or the place in a segment is none, or the tokens have no
            texts.

    Example:
        >>> named("segment:latent[1:],eot", ("text", "latent", "latent", "eot"), ())
        (2, 3)
        >>> said = lambda special: [(t, 1) for t in ("<s>", "do", " no", "t", " stop", " not")]
        >>> named("text: not", (), said), named("regex:n.t", (), said)
        ((2, 3, 5), (2, 3, 5))
    """
    kind, _, wanted = selector.partition(":")
    if kind == "segment":
        chosen = _segments(selector, name)
        found = {n for which, some in chosen for n in _within(segments, which)[some]}
        return tuple(sorted(found))
    expression = _expression(selector, name)
    units = tokens(special=expression is None)
    if not any(text for text, _ in units) and not any(text for text, _ in tokens(special=True)):
        raise InputError(
            f"{name}={selector!r} names tokens by their text, which is not known here: the model "
            "was loaded without a tokenizer. Use positions, or load it with tokenizer=."
        )
    whole = "".join(text for text, _ in units)
    ends = list(accumulate(len(text) for text, _ in units))
    starts = [0, *ends[:-1]]
    if expression is None:
        lasts = {at + len(wanted) for at in starts if whole.startswith(wanted, at)}
        spans = [(end - len(wanted), end) for end in lasts.intersection(ends)]
    else:
        spans = [match.span() for match in expression.finditer(whole)]
    here, first = list[int](), 0
    for start, end, (_, count) in zip(starts, ends, units, strict=True):
        if any(max(a, start) < min(b, end) for a, b in spans):
            here += range(first, first + count)
        first += count
    return tuple(here)


def require(selector: Selector, name: str) -> None:
    """Refuse what is no selection of rows or columns, before any model has run.

    Raises:
        InputError: It is not one of the forms that `positions` takes.
    """
    if not isinstance(selector, str):
        parts(selector, name)
    elif not is_name(selector):
        end(selector, name)
    elif selector.startswith("segment:"):
        _segments(selector, name)
    else:
        _expression(selector, name)


def parts(selector: int | slice | Sequence[int] | None, name: str) -> list[int | slice]:
    """The ints and slices that a selection is made of, checked for their types.

    Raises:
        InputError: It is made of something else.

    Example:
        >>> parts([0, -1], "keys")
        [0, -1]
    """
    selector = _listed(selector)
    if selector is None or isinstance(selector, slice):
        return [_slice(selector, name)]
    items = [selector] if _is_int(selector) else _items(selector, name)
    return [_int(item, name) for item in items]


def as_data(selector: Selector) -> int | str | list[int] | None:
    """The selection as JSON data, for the record; a slice becomes "start:stop:step".

    Example:
        >>> as_data(slice(2, None, 3))
        '2::3'
    """
    chosen = _listed(selector)
    if chosen is None or isinstance(chosen, str):
        return chosen
    if isinstance(chosen, slice):
        ends = (chosen.start, chosen.stop)
        parts = ends if chosen.step is None else (*ends, chosen.step)
        return ":".join("" if part is None else str(part) for part in parts)
    if isinstance(chosen, Iterable):
        return [operator.index(item) for item in chosen]
    return operator.index(chosen)


def _resolve(
    selector: int | slice | Sequence[int] | None, size: int, name: str, noun: str, where: str
) -> tuple[int, ...]:
    selector = _listed(selector)
    if selector is None or isinstance(selector, slice):
        chosen = tuple(range(size)[_slice(selector, name)])
    else:
        items = [selector] if _is_int(selector) else _items(selector, name)
        chosen = tuple(_absolute(item, size, name, noun) for item in items)
    if not chosen:
        raise InputError(
            f"{name}={selector!r} selects nothing: {noun}{_span(size)}. Select at least one."
        )
    if len(set(chosen)) < len(chosen):
        twice = next(item for n, item in enumerate(chosen) if item in chosen[:n])
        raise InputError(f"{name}={selector!r} selects {twice} twice{where}. Select each once.")
    return chosen


def _listed(selector: Any) -> Any:
    """What a tensor or a number in an array holds, as ints; anything else as it is."""
    single = getattr(selector, "ndim", None) == 0
    return selector.tolist() if single or hasattr(selector, "numpy") else selector


def _slice(selector: slice | None, name: str) -> slice:
    if selector is None:
        return slice(None)
    try:
        selector.indices(0)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{name}={selector!r} is not a slice of ints ({error}). Use ints."
        ) from None
    return selector


def _int(item: object, name: str) -> int:
    if not _is_int(item):
        raise InputError(f"{name} holds {item!r}, which is not an int. Give ints only.")
    return operator.index(item)


def _absolute(item: object, size: int, name: str, noun: str) -> int:
    index = _int(item, name)
    if not -size <= index < size:
        raise InputError(f"{name}={index} is out of range: {noun}{_span(size)}.")
    return index % size


def _no_texts(special: bool) -> Sequence[tuple[str, int]]:
    return ()


def _segments(selector: str, name: str) -> list[tuple[str, slice]]:
    """The segments in a selection, and which of their tokens."""
    found = []
    for part in selector.removeprefix("segment:").split(","):
        match = _SEGMENT.fullmatch(part.strip())
        if match is None:
            raise InputError(
                f"{name}={selector!r} names no segments. Write 'segment:latent', "
                "'segment:latent[2]', 'segment:latent[-1]' or 'segment:latent[3:],eot'."
            )
        which, one, span, start, stop = match.groups()
        if one is not None:
            found.append((which, slice(int(one), int(one) + 1 or None)))
        elif span is not None:
            found.append((which, slice(*(int(x) if x else None for x in (start, stop)))))
        else:
            found.append((which, slice(None)))
    return found


def _within(segments: Sequence[str], which: str) -> list[int]:
    return [n for n, segment in enumerate(segments) if segment == which]


def _expression(selector: str, name: str) -> re.Pattern[str] | None:
    """The regular expression in a selection; None where it is a plain text."""
    kind, _, wanted = selector.partition(":")
    if not wanted:
        raise InputError(f"{name}={selector!r} names no text. Write one behind the colon.")
    try:
        return re.compile(wanted) if kind == "regex" else None
    except re.error as error:
        raise InputError(
            f"{name}={selector!r} is not a regular expression ({error}). Mend it, or use "
            "'text:...' to find the text as it is."
        ) from None


def _unnamed(selector: str, segments: Sequence[str], name: str, problem: str) -> str:
    kind, _, wanted = selector.partition(":")
    if kind == "segment":
        known = ", ".join(dict.fromkeys(segments)) or "none"
        found = f"has no segment {wanted!r} (it has: {known})"
    else:
        found = f"has no token that carries it (spaces count: {wanted!r})"
    return (
        f"{name}={selector!r} selects nothing: problem {problem!r} {found}. "
        "Name one that every problem has."
    )


def _items(selector: object, name: str) -> Sequence[object]:
    if isinstance(selector, Iterable):
        return list(selector)
    raise InputError(
        f"{name}={selector!r} is not a selection. Give an int, a slice or a list of ints."
    )


def _is_int(value: object) -> TypeGuard[int]:
    # numpy's ints are Integral and its bools are not; Python's bools are
    return isinstance(value, Integral) and not isinstance(value, bool)


def _span(size: int) -> str:
    return f", 0 to {size - 1} (or -{size} to -1)" if size else ""
