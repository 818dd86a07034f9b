"""Which layers, heads, rows and columns: what a user writes, resolved to absolute numbers."""

import operator
import re
from collections.abc import Iterable, Sequence
from numbers import Integral
from typing import Any, TypeGuard

from probe.errors import InputError

Selector = int | slice | Sequence[int] | str | None

_ENDS = re.compile(r"(first|last):([0-9]+)")


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
) -> tuple[int, ...]:
    """Resolve a selection of rows or columns within one problem.

    Args:
        selector: As for `axis`; or "last:6" and "first:6" for the last and first 6 tokens (all, if
            the problem has fewer); or "segment:latent" for the tokens whose segment is "latent".
        length: Tokens in the problem.
        segments: Segment of each token, `length` of them.
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
    if selector.startswith("segment:"):
        return _segment(selector, segments or (), name, problem)
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
            "'first:6', 'last:6' or 'segment:latent'."
        )
    return match[1], int(match[2])


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


def _segment(selector: str, segments: Sequence[str], name: str, problem: str) -> tuple[int, ...]:
    wanted = selector.removeprefix("segment:")
    chosen = tuple(n for n, segment in enumerate(segments) if segment == wanted)
    if not chosen:
        known = ", ".join(dict.fromkeys(segments)) or "none"
        raise InputError(
            f"{name}={selector!r} selects nothing: problem {problem!r} has no segment {wanted!r} "
            f"(it has: {known}). Name one that every problem has."
        )
    return chosen


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
