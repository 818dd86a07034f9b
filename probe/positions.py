"""Which token each row and column of an attention call is: in padded batches, and in generation.

Positions count a sequence's own tokens from 0, so they depend neither on padding nor on the batch.
"""

import inspect
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from probe.errors import InputError
from probe.selection import Selector, end, is_name, named, parts

# What a sequence says: the ids of its tokens, and the segment of each.
Script = tuple[Sequence[int], Sequence[str]]
# The positions of the tokens that a text or a segment names, for each sequence.
Naming = Callable[[str], Sequence[Sequence[int]]]


class Reader(Protocol):
    """Who knows what token ids say, and which segment each is in: `probe.text.Text`."""

    def said(self, token_ids: Sequence[int], special: bool = True) -> Sequence[tuple[str, int]]: ...

    def segments(self, token_ids: Sequence[int]) -> tuple[str, ...]: ...


@dataclass(frozen=True, slots=True, eq=False)
class Positions:
    """The tokens of an attention call, by position in their sequence; -1 for padding.

    Attributes:
        query: (batch or 1, query) int64.
        key: (batch or 1, key) int64.
        prompt: (batch or 1) int64, tokens in the prompt: what "last:6" and negative numbers count
            from, also while more tokens are generated.
        named: Finds the tokens that are named by a text or a segment, where that is known.
        copies: Sequences that run for each input, one after the other: beams.

    Example:
        >>> row = torch.arange(3)[None]
        >>> Positions(row, row, torch.tensor([3])).rows("last:2")
        tensor([[False,  True,  True]])
    """

    query: Tensor
    key: Tensor
    prompt: Tensor
    named: Naming | None = None
    copies: int = 1

    def rows(self, selector: Selector) -> Tensor:
        """Which rows a selection names: bool (batch or 1, query). See `chosen`."""
        return chosen(selector, self.query, self.prompt, "queries", self.named)

    def columns(self, selector: Selector) -> Tensor:
        """Which columns a selection names: bool (batch or 1, key). See `chosen`."""
        return chosen(selector, self.key, self.prompt, "keys", self.named)

    def part(self, batch: slice, length: int | None = None) -> "Positions":
        """Those of some batch items, perhaps of their first `length` columns."""

        def some(x: Tensor) -> Tensor:
            x = x[batch] if x.shape[0] > 1 else x
            return x if length is None else x[:, :length]

        prompt = self.prompt[batch] if self.prompt.shape[0] > 1 else self.prompt
        return Positions(some(self.query), some(self.key), prompt)


def chosen(
    selector: Selector, position: Tensor, prompt: Tensor, name: str, naming: Naming | None = None
) -> Tensor:
    """Which of these tokens a selection names.

    Args:
        selector: None for all, an int or several (of the prompt; negative ones count from its
            end), "first:6", "last:6", "text: not", "regex:[0-9]+" (of the prompt), "segment:bos",
            or a slice: one without an end goes on through the tokens that are generated.
        position: (batch or 1, n), -1 where there is none.
        prompt: (batch or 1), tokens in the prompt.
        name: For messages.
        naming: Finds what a text or a segment names.

    Returns:
        bool (batch or 1, n); never true for padding. A sequence in which a text or a segment does
        not occur has none; if no sequence of the batch has one, there is a warning.

    Raises:
        InputError: An int is not a position of every prompt.
    """
    ends = prompt[:, None]
    if isinstance(selector, str) and is_name(selector):
        return _by_name(selector, position, name, naming)
    if isinstance(selector, str):
        side, n = end(selector, name)
        start = torch.zeros_like(ends) if side == "first" else ends - n
        return (position >= start.clamp_min(0)) & (position < torch.minimum(start + n, ends))
    here = torch.zeros_like(position, dtype=torch.bool)
    for part in parts(selector, name):
        if isinstance(part, slice):
            here = here | _between(part, position, ends)
        else:
            shortest = int(prompt.min())
            if not -shortest <= part < shortest:
                raise InputError(
                    f"{name}={part} is out of range: a prompt of this batch has {shortest} tokens. "
                    f"Use 0 to {shortest - 1}, or an open slice to reach tokens that are generated."
                )
            here = here | (position == (ends + part if part < 0 else part))
    return here


def _by_name(selector: str, position: Tensor, name: str, naming: Naming | None) -> Tensor:
    if naming is None:
        raise InputError(
            f"{name}={selector!r} cannot be chosen here, where what the tokens say is not known. "
            "Use positions, 'first:6' or 'last:6'."
        )
    found = naming(selector)
    if not any(found):
        warnings.warn(
            f"{name}={selector!r} selects nothing: no input of this batch has such a token (spaces "
            "count). Nothing is changed there.",
            stacklevel=2,
        )
    longest = 1 + max((max(own, default=0) for own in found), default=0)
    named = torch.zeros(len(found), max(longest, int(position.max()) + 1), dtype=torch.bool)
    for item, own in enumerate(found):
        named[item, list(own)] = True
    at = position.expand(len(found), -1)
    return named.to(position.device).gather(1, at.clamp_min(0)) & (at >= 0)


def _between(part: slice, position: Tensor, ends: Tensor) -> Tensor:
    if (part.step or 1) < 0:
        raise InputError(f"{part} counts backwards, which has no meaning here. Use a step above 0.")
    start = part.start or 0
    low = (ends + start).clamp_min(0) if start < 0 else torch.full_like(ends, start)
    inside = (position >= low) & ((position - low) % (part.step or 1) == 0)
    if part.stop is not None:
        inside &= position < (ends + part.stop if part.stop < 0 else part.stop)
    return inside


class Ruler:
    """Knows which tokens a model reads, from the inputs of each of its forwards."""

    def __init__(self, model: nn.Module, ids: str = "input_ids") -> None:
        self._ids = ids
        self.text: Reader | None = None  # knows what token ids say
        self._signature = inspect.signature(type(model).forward)
        # Set them to say how much of each input is the prompt, how much is not padding, and what
        # the sequences say where that cannot be read from token ids, because some are embeddings.
        self.prompt: Tensor | None = None
        self.length: Tensor | None = None
        self.script: Sequence[Script] | None = None
        self.forget()

    def forget(self) -> None:
        """Let go of the last inputs."""
        self.position: Tensor | None = None  # (batch, past + new), -1 for padding
        self._tokens: Tensor | None = None  # their ids, where all are known
        self._lengths = torch.zeros(1, dtype=torch.long)
        self._new = 0
        self._placed: dict[tuple[int, int, torch.device], Positions] = {}
        self._cache: Callable[[], object] = _none

    def read(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Take the inputs of a forward: its mask, or the position ids beside a ready 4-D mask."""
        self._placed.clear()
        given = self._signature.bind(None, *args, **kwargs).arguments
        given |= given.get("kwargs", {})
        inputs = (given.get(name) for name in (self._ids, "inputs_embeds"))
        tokens = next((x for x in inputs if isinstance(x, Tensor)), None)
        if tokens is None:
            self.position = self._tokens = None
            return
        cache = given.get("past_key_values")
        past = 0 if cache is None else int(cache.get_seq_length())
        # A cache that the model made for itself is first seen when the next forward is given it.
        before = self.position
        made = self._cache is _none and before is not None and before.shape[1] == past
        goes_on = past > 0 and (made or self._cache() is cache)
        if self.length is None:
            real = _tokens(given, tokens, past, before if goes_on else None)
        else:
            real = torch.arange(tokens.shape[1]) < self.length[:, None]
        self.position = (real.long().cumsum(1) - 1).masked_fill(~real, -1)
        self._new = tokens.shape[1]
        new = tokens if tokens.ndim == 2 else None  # and not embeddings
        if goes_on and new is not None and self._tokens is not None:
            # A cache may have been cut back, as where a draft was not taken.
            new = torch.cat([self._tokens[:, :past], new], 1)
        self._tokens = None if past and not goes_on else new
        if not goes_on:
            self._lengths = real.sum(1)
        if cache is None:
            self._cache = _none
        elif self._cache() is not cache:
            self._cache = weakref.ref(cache)

    def same(self, position: Tensor | None) -> bool:
        """Whether the tokens are where they were."""
        now = self.position
        if position is None or now is None:
            return position is now
        return position is now or torch.equal(position, now)

    def place(self, n_queries: int, n_keys: int, device: torch.device) -> Positions | None:
        """The positions of a call with so many rows and columns; None where they are unknown.

        Sliding caches keep the last columns only, static ones have columns without a token yet.
        """
        if self.position is None or n_queries != self._new:
            return None
        known = self._placed.get((n_queries, n_keys, device))
        if known is not None:
            return known
        total = self.position.shape[1]
        position = self.position.to(device)
        key = position[:, max(0, total - n_keys) :]
        key = nn.functional.pad(key, (0, n_keys - key.shape[1]), value=-1)
        prompt = self._prompts().to(device)
        copies = 1 if self.prompt is None else max(1, len(position) // len(self.prompt))
        place = Positions(position[:, total - n_queries :], key, prompt, self._naming(), copies)
        self._placed[n_queries, n_keys, device] = place  # the layers of a forward share it
        return place

    def _prompts(self) -> Tensor:
        """Tokens of the prompt of each sequence."""
        assert self.position is not None
        prompt, batch = self._lengths if self.prompt is None else self.prompt, len(self.position)
        if len(prompt) not in (1, batch):  # beams of each input, one after the other
            prompt = prompt.repeat_interleave(batch // len(prompt))
        return prompt

    def _naming(self) -> Naming | None:
        """Finds tokens by what they say or are, in the sequences as they are now."""
        if self.text is None or self.position is None:
            return None
        prompts = self._prompts().tolist()
        if self.script is not None:
            own = partial(_scripted, self.text, self.script, prompts)
        elif self._tokens is None:
            return None
        else:
            if len(prompts) < len(self._tokens):
                prompts *= len(self._tokens)
            own = partial(_named, self.text, self._tokens, self.position, prompts)
        known: dict[str, Sequence[Sequence[int]]] = {}  # the layers of a forward share it

        def find(selector: str) -> Sequence[Sequence[int]]:
            if selector not in known:
                known[selector] = own(selector)
            return known[selector]

        return find


def _named(
    text: Reader, tokens: Tensor, position: Tensor, prompts: Sequence[int], selector: str
) -> list[tuple[int, ...]]:
    """In each sequence, the positions that a selector names: texts are sought in its prompt."""
    found = []
    for ids, at, n in zip(tokens, position.expand(len(tokens), -1), prompts, strict=True):
        own = ids[(at >= 0).to(ids.device)].tolist()
        if len(own) < n and not selector.startswith("segment:"):
            raise InputError(
                f"{selector!r} is sought in prompts that are read in pieces, of which only the "
                "first are known yet. Use positions, or read prompts whole."
            )
        segments = (*text.segments(own[:n]), *["generated"] * (len(own) - n))
        found.append(named(selector, segments, partial(text.said, own[:n])))
    return found


def _scripted(
    text: Reader, script: Sequence[Script], prompts: Sequence[int], selector: str
) -> list[tuple[int, ...]]:
    """The same where the whole sequences are known beforehand, also what is still to be read."""
    return [
        named(selector, segments, partial(text.said, ids[:n]))
        for (ids, segments), n in zip(script, prompts, strict=True)
    ]


def _tokens(given: Mapping[str, Any], tokens: Tensor, past: int, before: Tensor | None) -> Tensor:
    """Which columns are tokens and not padding: bool (batch, past + new)."""
    batch, new = tokens.shape[:2]
    mask, ids = given.get("attention_mask"), given.get("position_ids")
    if isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] >= past + new:
        return mask[:, : past + new].bool()
    real = torch.ones(batch, past + new, dtype=torch.bool, device=tokens.device)
    if before is not None and before.shape[1] == past:
        real[:, :past] = before >= 0
    if isinstance(ids, Tensor) and ids.shape[1] == new and isinstance(mask, Tensor | Mapping):
        # On the left, padding repeats position 0 until the first token has it, which in a prefill
        # in pieces may come after a piece that was padding up to its last column.
        real[:, past:-1] = (ids[:, :-1] != 0) | (ids[:, 1:] != 0)
        real[:, :past] &= (ids[:, :1] != 0) | (real[:, :past].sum(1, keepdim=True) > 1)
    elif ids is None:  # as models take it that have no position_ids
        real[:, past:] &= _attended(mask, past, new)
    return real


def _attended(mask: Any, past: int, new: int) -> Tensor | bool:
    """Which new columns some row of a ready 4-D mask attends to: nobody attends to padding."""
    each = mask.values() if isinstance(mask, Mapping) else [mask]
    ready = [x for x in each if isinstance(x, Tensor) and x.ndim == 4 and x.shape[3] >= past + new]
    if not ready:
        return True
    columns = ready[0][..., past : past + new]
    keep = columns if columns.dtype == torch.bool else columns > torch.finfo(columns.dtype).min / 2
    return keep.flatten(1, 2).any(1)


def _none() -> None:
    return None
