"""Positions of tokens against naive loops, for any padding, in prefills of any pieces."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import DynamicCache

from probe.errors import InputError
from probe.positions import Positions, Ruler, chosen

MAYBE = st.none() | st.integers(-9, 12)
SLICES = st.builds(slice, MAYBE, MAYBE, st.none() | st.integers(1, 4))
ENDS = st.builds("{}:{}".format, st.sampled_from(["first", "last"]), st.integers(1, 12))
LENGTHS = st.lists(st.integers(1, 8), min_size=1, max_size=4)


def rows(prompts: list[int], new: int, sides: list[bool]) -> Tensor:
    """Positions of prompts padded to the same width, and of tokens generated after them."""
    width = max(prompts)
    out = []
    for n, left in zip(prompts, sides, strict=False):
        pad = [-1] * (width - n)
        own = list(range(n))
        out.append(pad + own if left else own + pad)
        out[-1] += [n + i for i in range(new)]
    return torch.tensor(out)


def naive(selector: Any, position: int, prompt: int) -> bool:
    """Whether one token is named, from the words of the docstring."""
    if position < 0:
        return False
    if selector is None:
        return True
    if isinstance(selector, str):
        side, n = selector.split(":")
        some = list(range(prompt))
        return position in (some[: int(n)] if side == "first" else some[-int(n) :])
    if isinstance(selector, slice):
        # An open slice goes on; its ends are those that it has in the prompt.
        start, stop = selector.start or 0, selector.stop
        start = max(0, prompt + start) if start < 0 else start
        stop = 1000 if stop is None else prompt + stop if stop < 0 else stop
        return position in range(start, stop, selector.step or 1)
    several = [selector] if isinstance(selector, int) else selector
    return position in [prompt + i if i < 0 else i for i in several]


@settings(max_examples=150, deadline=None)
@given(st.none() | SLICES | ENDS, LENGTHS, st.integers(0, 4), st.lists(st.booleans(), min_size=4))
def test_slices_and_ends_name_the_tokens_that_a_loop_does(
    selector: Any, prompts: list[int], new: int, sides: list[bool]
) -> None:
    position = rows(prompts, new, sides)
    got = chosen(selector, position, torch.tensor(prompts), "keys")
    wanted = [
        [naive(selector, p, n) for p in row]
        for row, n in zip(position.tolist(), prompts, strict=True)
    ]
    assert got.tolist() == wanted


@settings(max_examples=150, deadline=None)
@given(
    st.integers(-8, 7) | st.lists(st.integers(-8, 7), min_size=1, max_size=4),
    LENGTHS,
    st.integers(0, 4),
    st.lists(st.booleans(), min_size=4),
)
def test_ints_name_tokens_of_every_prompt_or_are_refused(
    selector: Any, prompts: list[int], new: int, sides: list[bool]
) -> None:
    position, ends = rows(prompts, new, sides), torch.tensor(prompts)
    several = [selector] if isinstance(selector, int) else selector
    shortest = min(prompts)
    if not all(-shortest <= i < shortest for i in several):
        with pytest.raises(InputError, match=rf"a prompt of this batch has {shortest} tokens"):
            chosen(selector, position, ends, "keys")
        return
    wanted = [
        [naive(selector, p, n) for p in row]
        for row, n in zip(position.tolist(), prompts, strict=True)
    ]
    assert chosen(selector, position, ends, "keys").tolist() == wanted


@given(st.none() | SLICES, st.integers(1, 8))
def test_within_a_prompt_a_slice_is_that_of_python(selector: Any, n: int) -> None:
    got = chosen(selector, torch.arange(n)[None], torch.tensor([n]), "keys")[0]
    assert got.nonzero()[:, 0].tolist() == list(range(n))[selector or slice(None)]


def test_rows_and_columns_of_part_of_a_batch_are_those_of_the_whole() -> None:
    key = rows([3, 5], 0, [True, True])
    place = Positions(key[:, -1:], key, torch.tensor([3, 5]))
    part = place.part(slice(1, 2), 4)
    assert part.rows(-1).tolist() == [[True]]
    assert part.columns("last:2").tolist() == [[False, False, False, True]]
    one = Positions(key[:1, -1:], key[:1], torch.tensor([3]))  # the same for every item
    assert one.part(slice(1, 2)).columns(0).tolist() == [[False, False, True, False, False]]


class Reader(nn.Module):
    """What the ruler needs to know of a model: the names of its inputs."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> None:
        """Nothing is computed."""


class Counted:
    """A cache that holds so many tokens."""

    n = 0

    def get_seq_length(self) -> int:
        return self.n


@settings(max_examples=100, deadline=None)
@given(
    LENGTHS,
    st.lists(st.integers(1, 4), max_size=4),
    st.booleans(),
    st.booleans(),
    st.sampled_from(["mask", "float mask", "embeds", "positional", "short mask"]),
)
def test_a_prefill_in_pieces_and_steps_after_it_are_placed_as_counted_by_hand(
    prompts: list[int], pieces: list[int], left: bool, static: bool, form: str
) -> None:
    position = rows(prompts, sum(pieces), [left] * 4)
    width = max(prompts)
    if not left:
        position[:, width:] = torch.arange(width, width + sum(pieces))  # after the padding
        real = position >= 0
        position = (real.long().cumsum(1) - 1).masked_fill(~real, -1)
    mask = (position >= 0).long()
    ruler, cache = Ruler(Reader()), Counted()
    for new in (width, *pieces):
        end = cache.n + new
        tokens = torch.ones(len(prompts), new, dtype=torch.long)
        given: dict[str, Any] = {"attention_mask": mask[:, :end], "past_key_values": cache}
        if form == "float mask":
            given["attention_mask"] = mask[:, :end].float()
        if form == "short mask" and cache.n:  # only of the new tokens: what was before is known
            given["attention_mask"] = mask[:, cache.n : end]
        if form == "embeds":
            ruler.read((), {"inputs_embeds": tokens[..., None].float(), **given})
        elif form == "positional":
            ruler.read((tokens,), given)
        else:
            ruler.read((), {"input_ids": tokens, **given})
        cache.n = end
        seen = end + 3 if static else end
        place = ruler.place(new, seen, torch.device("cpu"))
        assert place is not None
        assert torch.equal(place.query, position[:, end - new : end])
        assert torch.equal(place.key[:, :end], position[:, :end])
        assert bool((place.key[:, end:] == -1).all())
        assert place.prompt.tolist() == prompts  # also while more tokens come
        window = ruler.place(new, min(2, end), torch.device("cpu"))  # a sliding cache
        assert window is not None
        assert torch.equal(window.key, position[:, max(0, end - 2) : end])


def test_beside_a_ready_mask_padding_is_known_from_the_positions() -> None:
    ruler = Ruler(Reader())
    ids = torch.ones(3, 4, dtype=torch.long)
    positions = torch.tensor([[0, 1, 2, 3], [0, 0, 0, 1], [0, 0, 0, 0]])
    mask = torch.ones(3, 1, 4, 4)
    ruler.read((ids,), {"attention_mask": mask, "position_ids": positions})
    place = ruler.place(4, 4, torch.device("cpu"))
    assert place is not None
    assert place.key.tolist() == [[0, 1, 2, 3], [-1, -1, 0, 1], [-1, -1, -1, 0]]
    assert place.prompt.tolist() == [4, 2, 1]


def test_a_piece_that_is_all_padding_is_known_as_such_by_the_next_one() -> None:
    ruler, cache = Ruler(Reader()), Counted()
    positions = torch.tensor([[0, 1, 2, 3, 4, 5], [0, 0, 0, 0, 0, 1], [0, 0, 0, 1, 2, 3]])
    for start, end in ((0, 3), (3, 5), (5, 6)):
        inputs = {"attention_mask": torch.ones(3, 1, end - start, 6), "past_key_values": cache}
        ids = torch.ones(3, end - start, dtype=torch.long)
        ruler.read((ids,), inputs | {"position_ids": positions[:, start:end]})
        cache.n = end
    place = ruler.place(1, 6, torch.device("cpu"))
    assert place is not None
    assert place.key.tolist() == [
        [0, 1, 2, 3, 4, 5],
        [-1, -1, -1, -1, 0, 1],
        [-1, -1, 0, 1, 2, 3],
    ]


def test_a_cache_that_the_model_made_is_known_again_and_another_one_is_not() -> None:
    ruler, cache = Ruler(Reader()), Counted()
    ruler.read((torch.ones(1, 5).long(),), {})
    cache.n = 5  # the model made it and returned it
    for _ in range(3):
        ruler.read((torch.ones(1, 1).long(),), {"past_key_values": cache})
        cache.n += 1
        place = ruler.place(1, cache.n, torch.device("cpu"))
        assert place is not None
        assert place.prompt.tolist() == [5]
    other = Counted()
    other.n = 2  # filled where nobody watched: all of it is the prompt
    ruler.read((torch.ones(1, 4).long(),), {"past_key_values": other})
    place = ruler.place(4, 6, torch.device("cpu"))
    assert place is not None
    assert place.prompt.tolist() == [6]


def test_calls_that_do_not_fit_the_inputs_have_no_positions() -> None:
    ruler = Ruler(Reader())
    assert ruler.place(3, 3, torch.device("cpu")) is None
    ruler.read((torch.ones(1, 4).long(),), {})
    assert ruler.place(3, 3, torch.device("cpu")) is None
    assert ruler.place(4, 4, torch.device("cpu")) is not None
    ruler.read((), {})
    assert ruler.place(4, 4, torch.device("cpu")) is None


def test_a_prompt_that_is_given_is_that_of_each_of_its_beams() -> None:
    ruler = Ruler(Reader())
    ruler.prompt = torch.tensor([2, 4])
    ruler.read((torch.ones(6, 5).long(),), {"past_key_values": DynamicCache()})
    place = ruler.place(5, 5, torch.device("cpu"))
    assert place is not None
    assert place.prompt.tolist() == [2, 2, 2, 4, 4, 4]
