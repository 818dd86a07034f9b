"""Texts, token ids and batches, as one model takes them."""

import inspect
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from probe.errors import InputError, first_line
from probe.intake import Intake

_BROKEN = "\ufffd"  # stands for bytes that are no character
_LONGEST = 12  # tokens that may share characters

Inputs = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]] | Tensor | Mapping[str, Any]


class Text:
    """What a model reads: texts by its tokenizer, token ids, batches of them.

    Attributes:
        tokenizer: The model's, or None.
        name: The model's, for messages.
        intake: What the model takes.
    """

    def __init__(self, tokenizer: Any, name: str, intake: Intake) -> None:
        self.tokenizer, self.name, self.intake = tokenizer, name, intake
        self._said: dict[int, str] = {}  # what each token says, once it was asked

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids of a text, with the special tokens that the tokenizer adds, or without."""
        if self.tokenizer is None:
            raise InputError(
                f"{self.name} was loaded without a tokenizer, so it cannot read the text "
                f"{text[:40]!r}. Give token ids, or load it with tokenizer=."
            )
        try:
            # A tokenizer of one's own may know nothing of special tokens.
            options = {} if special else {"add_special_tokens": False}
            return [int(i) for i in self.tokenizer(text, **options)["input_ids"]]
        except Exception as error:
            raise InputError(
                f"the tokenizer of {self.name} cannot encode {text[:40]!r}: "
                f"{first_line(error)}. Change the text, or give token ids."
            ) from error

    def decode(self, token_ids: Sequence[int]) -> list[str]:
        """Each token as text, the space before a word included.

        "" without a tokenizer, and for negative ids: positions where no token is, but a latent.
        """
        if self.tokenizer is None:
            return [""] * len(token_ids)
        new = {i for i in token_ids if i >= 0} - self._said.keys()
        self._said |= {i: self._decode_one(i) for i in new}
        return [self._said.get(i, "") for i in token_ids]

    def said(self, token_ids: Sequence[int], special: bool = True) -> list[tuple[str, int]]:
        """What tokens say, in order, each text with the number of tokens that say it together.

        Several do where a character is spread over them, of which none can be read alone.

        Args:
            token_ids: The tokens.
            special: Whether special tokens have a text too, as "<s>"; else theirs is "".
        """
        each, silent = self.decode(token_ids), set()
        if not special:
            silent = set(getattr(self.tokenizer, "all_special_ids", ()))
        out, at = list[tuple[str, int]](), 0
        while at < len(each):
            text, count = "" if token_ids[at] in silent else each[at], 1
            if _BROKEN in text:
                text, count = self._together(token_ids[at : at + _LONGEST]) or (text, 1)
            out.append((text, count))
            at += count
        return out

    def joined(self, token_ids: Sequence[int]) -> str:
        """What tokens say together; "" without a tokenizer."""
        text = "".join(self.decode(token_ids))
        # A character may be spread over tokens, none of which says it alone.
        return str(self.tokenizer.decode(list(token_ids))) if _BROKEN in text else text

    def _together(self, token_ids: Sequence[int]) -> tuple[str, int] | None:
        """The first few of these tokens that say something whole."""
        for count in range(2, len(token_ids) + 1):
            text = str(self.tokenizer.decode(list(token_ids[:count])))
            if _BROKEN not in text:
                return text, count
        return None

    def _decode_one(self, token: int) -> str:
        # Alone, a token may lose its leading space; after itself it keeps it.
        once = self.tokenizer.decode([token])
        twice = self.tokenizer.decode([token, token])
        return str(twice[len(once) :] if twice.startswith(once) else once)

    def segments(self, token_ids: Sequence[int]) -> tuple[str, ...]:
        """What each token of a problem is: "bos" for a first token that is one, else "text"."""
        bos = getattr(self.tokenizer, "bos_token_id", None)
        first = "bos" if bos is not None and token_ids[0] == bos else "text"
        return (first, *["text"] * (len(token_ids) - 1))

    def batch(self, inputs: Inputs, *, side: str | None = None) -> dict[str, Tensor]:
        """Inputs as the model takes them: padded, masked, and with positions where padding shifts.

        Args:
            inputs: A text, texts, token ids (one list or several), a tensor of them, or the dict
                that a tokenizer returns (used as it is; on the left, padding also needs
                position_ids, which are added where the model takes them).
            side: "left" or "right", where to pad; default the tokenizer's.

        Returns:
            input_ids (batch, position), attention_mask of the same shape, perhaps position_ids.
        """
        if isinstance(inputs, Mapping):
            return self._positioned(self._tensors(inputs))
        if isinstance(inputs, Tensor):
            inputs = inputs.tolist()
        if isinstance(inputs, str):
            inputs = [inputs]
        try:
            ids = [
                self.encode(row) if isinstance(row, str) else [operator.index(i) for i in row]
                for row in _several(inputs)
            ]
        except TypeError as error:
            raise InputError(
                f"input {inputs!r:.60} is neither text nor token ids ({error}). Give a text, "
                "texts, a list of token ids, lists of them, or what a tokenizer returns."
            ) from error
        if not ids or not all(ids):
            raise InputError(f"input {inputs!r:.60} holds no tokens. Give at least one.")
        for row in ids:
            self.check(row)
        side = side or self.padding_side
        return self._positioned(pad(ids, self.padding, side=side, device=self.intake.device))

    def _tensors(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """What a tokenizer returns, with or without return_tensors, on the model's device."""
        batch = dict(inputs)
        if "input_ids" in batch:
            ids = batch["input_ids"]
            rows = _rows(ids.tolist() if isinstance(ids, Tensor) else ids)
            if not isinstance(ids, Tensor) and len({len(row) for row in rows}) > 1:
                batch |= pad(rows, self.padding, side=self.padding_side)  # its masks are all ones
            else:
                batch = {k: self._shaped(k, v, len(rows)) for k, v in batch.items()}
            for row in rows:
                self.check(row)
        return {
            k: v.to(self.intake.device) if isinstance(v, Tensor) else v for k, v in batch.items()
        }

    def _shaped(self, name: str, value: Any, rows: int) -> Any:
        """Lists of numbers as a tensor, a row for each sequence; tensors of several as they are."""
        if isinstance(value, Tensor) and (value.ndim != 1 or name != "input_ids"):
            return value
        if not isinstance(value, Tensor | list | tuple | np.ndarray):
            return value
        return torch.as_tensor(value).view(rows, -1)

    def check(self, token_ids: Sequence[int], *, what: str = "the input") -> None:
        """Refuse token ids that the model cannot run on.

        Raises:
            InputError: Too long for the context, or outside the vocabulary.
        """
        limit = self.intake.context
        if limit is not None and len(token_ids) > limit:
            raise InputError(
                f"{what} has {len(token_ids)} tokens, and the context of {self.name} is "
                f"{limit}. Shorten it, or cut it with max_length={limit}."
            )
        size = self.intake.vocabulary
        wrong = next((i for i in token_ids if not 0 <= i < size), None)
        if wrong is not None:
            raise InputError(
                f"{what} holds token id {wrong}, and the vocabulary of {self.name} has "
                f"{size} (0 to {size - 1}). Encode it with its own tokenizer."
            )

    @property
    def padding(self) -> int:
        """A token id to pad with; what it is never matters, padding is masked."""
        token = getattr(self.tokenizer, "pad_token_id", None)
        return int(token) if token is not None else 0

    @property
    def padding_side(self) -> str:
        """The tokenizer's side, "right" without one."""
        return str(getattr(self.tokenizer, "padding_side", "right"))

    def _positioned(self, batch: dict[str, Any]) -> dict[str, Any]:
        mask = batch.get("attention_mask")
        if mask is None or "position_ids" in batch or mask.ndim != 2 or bool(mask[:, 0].all()):
            return batch
        if "position_ids" in inspect.signature(type(self.intake.base).forward).parameters:
            batch["position_ids"] = (mask.long().cumsum(-1) - 1).clamp_min(0)
        return batch


def _rows(ids: Any) -> list[list[int]]:
    """The input_ids that a tokenizer returned, one list or several, as lists of ints.

    Raises:
        InputError: They are something else, or none.
    """
    try:
        rows = [[operator.index(i) for i in row] for row in _several(ids)]
    except TypeError as error:
        raise InputError(
            f"input_ids={ids!r:.60} are no token ids ({error}). Give lists of ints, or an int "
            "tensor (batch, position)."
        ) from error
    if not rows or not all(rows):
        raise InputError(f"input_ids={ids!r:.60} hold no tokens. Give at least one of each.")
    return rows


def pad(
    rows: Sequence[Sequence[int]],
    token: int,
    *,
    side: str = "right",
    device: torch.device | None = None,
) -> dict[str, Tensor]:
    """Token ids of different lengths as one batch.

    Returns:
        input_ids and attention_mask (1 = token), int64, (batch, longest).
    """
    longest = max(len(row) for row in rows)
    ids = torch.full((len(rows), longest), token)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        where = slice(longest - len(row), None) if side == "left" else slice(len(row))
        ids[i, where] = torch.as_tensor(row)
        mask[i, where] = 1
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def _several(inputs: Any) -> list[Any]:
    """Several inputs, also where one list of token ids was given."""
    rows = list(inputs)
    return [rows] if rows and isinstance(rows[0], int | np.integer) else rows
