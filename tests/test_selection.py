import json
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from probe.errors import InputError
from probe.selection import Selector, as_data, axis, parts, positions

slices = st.builds(
    slice,
    st.none() | st.integers(-30, 30),
    st.none() | st.integers(-30, 30),
    st.none() | st.integers(-5, 5).filter(bool),
)


def where(selector: Selector, length: int = 5, segments: Sequence[str] | None = None) -> list[int]:
    return list(positions(selector, length, segments, name="queries", problem="gsm8k/3"))


def says(text: str) -> str:
    return f"^{re.escape(text)}$"


@given(st.integers(1, 20), slices)
def test_a_slice_selects_as_in_python(size: int, chosen: slice) -> None:
    expected = list(range(size))[chosen]
    if expected:
        assert list(axis(chosen, size, "layers")) == expected
        assert where(chosen, size) == expected
    else:
        with pytest.raises(InputError, match="selects nothing"):
            axis(chosen, size, "layers")
        with pytest.raises(InputError, match="selects nothing"):
            where(chosen, size)


@given(st.integers(1, 20), st.lists(st.integers(-25, 25), max_size=6))
def test_a_list_selects_as_python_indexing_in_its_order(size: int, chosen: list[int]) -> None:
    numbers = list(range(size))
    inside = all(-size <= item < size for item in chosen)
    expected = [numbers[item] for item in chosen] if inside else []
    if expected and len(set(expected)) == len(expected):
        assert list(axis(chosen, size, "heads")) == expected
        assert where(chosen, size) == expected
        assert list(axis(np.array(chosen), size, "heads")) == expected  # type: ignore[arg-type]
    else:
        with pytest.raises(InputError):
            axis(chosen, size, "heads")
        with pytest.raises(InputError):
            where(chosen, size)


@given(st.integers(1, 30), st.integers(1, 40))
def test_first_and_last_take_as_many_tokens_as_there_are(length: int, count: int) -> None:
    assert where(f"first:{count}", length) == list(range(length))[:count]
    assert where(f"last:{count}", length) == list(range(length))[-count:]


@given(st.lists(st.sampled_from(["bos", "question", "latent"]), min_size=1, max_size=12))
def test_a_segment_selects_its_positions(segments: list[str]) -> None:
    for segment in set(segments):
        chosen = where(f"segment:{segment}", len(segments), segments)
        assert chosen == [i for i, name in enumerate(segments) if name == segment]


def test_none_selects_everything() -> None:
    assert axis(None, 3, "layers") == (0, 1, 2)
    assert where(None) == [0, 1, 2, 3, 4]


def test_an_int_selects_one_and_counts_from_the_end_when_negative() -> None:
    assert axis(2, 12, "layers") == (2,)
    assert axis(-1, 12, "layers") == (11,)
    assert axis(np.int64(3), 12, "layers") == (3,)  # type: ignore[arg-type]
    assert axis(range(2, 4), 12, "layers") == (2, 3)


@pytest.mark.parametrize(
    ("selector", "message"),
    [
        (12, "layers=12 is out of range: the model has 12 layers, 0 to 11 (or -12 to -1)."),
        ([0, -13], "layers=-13 is out of range: the model has 12 layers, 0 to 11 (or -12 to -1)."),
        ([3, -9], "layers=[3, -9] selects 3 twice. Select each once."),
        (
            [],
            "layers=[] selects nothing: the model has 12 layers, 0 to 11 (or -12 to -1). "
            "Select at least one.",
        ),
        (
            slice(20, None),
            "layers=slice(20, None, None) selects nothing: the model has 12 layers, 0 to 11 "
            "(or -12 to -1). Select at least one.",
        ),
        (True, "layers=True is not a selection. Give an int, a slice or a list of ints."),
        (1.5, "layers=1.5 is not a selection. Give an int, a slice or a list of ints."),
        ("last:2", "layers='last:2' is not a selection. Give an int, a slice or a list of ints."),
        ([0, True], "layers holds True, which is not an int. Give ints only."),
        ([0, 1.0], "layers holds 1.0, which is not an int. Give ints only."),
        (np.array([True]), "layers holds np.True_, which is not an int. Give ints only."),
        (
            slice(0, 5, 0),
            "layers=slice(0, 5, 0) is not a slice of ints (slice step cannot be zero). Use ints.",
        ),
    ],
)
def test_a_bad_selection_of_layers_says_why(selector: Selector, message: str) -> None:
    with pytest.raises(InputError, match=says(message)):
        axis(selector, 12, "layers")


@pytest.mark.parametrize(
    ("selector", "message"),
    [
        (
            [600],
            "queries=600 is out of range: problem 'gsm8k/3' has 412 tokens, "
            "0 to 411 (or -412 to -1).",
        ),
        ([1, 1], "queries=[1, 1] selects 1 twice in problem 'gsm8k/3'. Select each once."),
        (
            slice(412, None),
            "queries=slice(412, None, None) selects nothing: problem 'gsm8k/3' has 412 tokens, "
            "0 to 411 (or -412 to -1). Select at least one.",
        ),
        (
            "segment:latent",
            "queries='segment:latent' selects nothing: problem 'gsm8k/3' has no segment 'latent' "
            "(it has: bos, question). Name one that every problem has.",
        ),
        *(
            (
                grammar,
                f"queries={grammar!r} is not a selection. Give an int, a slice, a list of ints, "
                "'first:6', 'last:6', 'segment:latent', 'text: not' or 'regex:[0-9]+'.",
            )
            for grammar in ("last", "last:0", "last:-1", "first:x", "latent", "2:8")
        ),
    ],
)
def test_a_bad_selection_of_positions_says_why(selector: Selector, message: str) -> None:
    with pytest.raises(InputError, match=says(message)):
        where(selector, 412, ["bos", *["question"] * 411])


def test_a_problem_without_segments_says_so() -> None:
    with pytest.raises(InputError, match=re.escape("(it has: none)")):
        where("segment:latent")


def test_a_problem_without_tokens_has_no_positions() -> None:
    with pytest.raises(InputError, match=re.escape("has 0 tokens. Select at least one.")):
        where(None, 0)


@pytest.mark.parametrize(
    ("selector", "data"),
    [
        (None, None),
        (3, 3),
        (np.int64(3), 3),
        ([np.int64(1), 2], [1, 2]),
        ((1, 2), [1, 2]),
        (slice(2, 8), "2:8"),
        (slice(None, None, -1), "::-1"),
        (slice(None, -6, None), ":-6"),
        ("last:6", "last:6"),
    ],
)
def test_a_selection_is_recorded_as_plain_data(selector: Selector, data: object) -> None:
    assert as_data(selector) == data
    assert json.loads(json.dumps(as_data(selector))) == data


@pytest.mark.parametrize("make", [np.array, torch.tensor], ids=["numpy", "torch"])
def test_arrays_and_tensors_select_like_the_ints_in_them(make: Callable[[object], object]) -> None:
    for chosen in (1, [0, 2]):
        array: Any = make(chosen)
        assert axis(array, 4, "layers") == axis(chosen, 4, "layers")
        assert as_data(array) == chosen
        assert parts(array, "keys") == parts(chosen, "keys")
    wrong: Any = make([0.5])
    with pytest.raises(InputError, match=r"layers holds .*0\.5.*, which is not an int"):
        axis(wrong, 4, "layers")
