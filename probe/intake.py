"""How a model takes its tokens: a transformers model, or any module that reads token ids."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from probe.errors import InputError, UnsupportedModelError
from probe.hearing import placement, vocabulary_size
from probe.layout import Layout

_TOKENS = 17  # of a short forward: seldom a number of experts, of heads or of channels


@dataclass(frozen=True, slots=True, eq=False)
class Intake:
    """What goes into a model.

    Attributes:
        base: The transformers model, inside all wrappers; else the module itself.
        ids: The argument that takes token ids.
        vocabulary: Token ids are below it.
        context: Longest input in tokens, or None where the model states no limit.
    """

    base: nn.Module
    ids: str
    vocabulary: int
    context: int | None

    @property
    def device(self) -> torch.device:
        """Where inputs go."""
        if isinstance(self.base, PreTrainedModel):
            return placement(self.base)
        first = next(self.base.parameters(), None)
        return torch.device("cpu") if first is None or first.is_meta else first.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        floats = (p.dtype for p in self.base.parameters() if p.is_floating_point())
        return next(floats, torch.get_default_dtype())

    def sample(self) -> Tensor:
        """Two short sequences of token ids, of which no position has its own number."""
        n = min(_TOKENS, self.context or _TOKENS)
        ids = torch.arange(2 * n, device=self.device) * 5 + 3
        return ids.view(2, n) % self.vocabulary

    def arguments(
        self, inputs: Mapping[str, Any], *, causal: bool
    ) -> tuple[tuple[Any, ...], dict[str, Any], Tensor | None]:
        """Inputs, named as transformers names them, as the model's own forward takes them.

        A causal model without an argument for a mask needs none where padding is on the right.

        Returns:
            (positional arguments, named ones, lengths (batch) of sequences whose mask was dropped).

        Raises:
            InputError: The mask matters and the model takes none.
        """
        if isinstance(self.base, PreTrainedModel):
            return (), dict(inputs), None
        named, lengths = dict(inputs), None
        ids = named.pop("input_ids")
        if not _takes(self.base, "use_cache"):
            named.pop("use_cache", None)
        mask = named.get("attention_mask")
        if mask is not None and not _takes(self.base, "attention_mask"):
            del named["attention_mask"]
            if not bool(mask.bool().all()):
                lengths = mask.long().sum(1).cpu()
                self._require_right(mask, lengths, causal=causal)
        if self._by_name:
            return (), {self.ids: ids} | named, lengths
        return (ids,), named, lengths

    @property
    def _by_name(self) -> bool:
        """Whether the argument has that name; wrappers hand on whatever they are given."""
        parameters = inspect.signature(type(self.base).forward).parameters
        positional = any(p.kind is p.VAR_POSITIONAL for p in parameters.values())
        return self.ids in parameters or not positional

    def _require_right(self, mask: Tensor, lengths: Tensor, *, causal: bool) -> None:
        columns = torch.arange(mask.shape[1], device=mask.device)
        right = torch.equal(mask.bool(), columns < lengths.to(mask.device)[:, None])
        if right and causal:
            return
        why = "padding on the left moves its tokens" if causal else "its tokens see the padding"
        raise InputError(
            f"the forward of {type(self.base).__name__} takes no attention_mask, so {why}. "
            + ("Pad on the right, or g" if causal else "G")
            + "ive it inputs of one length."
        )


def guess(module: nn.Module, layout: Layout | None) -> Intake:
    """How a model takes its tokens, as far as can be told before it has run once.

    Raises:
        UnsupportedModelError: Nothing tells which token ids it knows, or it reads two texts.
    """
    base = next((m for m in module.modules() if isinstance(m, PreTrainedModel)), None)
    if base is not None:
        if "decoder_input_ids" in inspect.signature(type(base).forward).parameters:
            raise UnsupportedModelError(
                f"{type(base).__name__} has an encoder and a decoder, whose attention is over "
                "different tokens. Give one of them: probe.load(model.get_encoder())."
            )
        limit = getattr(base.config, "max_position_embeddings", None)
        context = limit if isinstance(limit, int) and limit > 0 else None
        return Intake(base, "input_ids", vocabulary_size(base), context)
    sizes = [m.num_embeddings for m in module.modules() if isinstance(m, nn.Embedding)]
    vocabulary, context = (layout.vocabulary, layout.context) if layout else (None, None)
    # Which table is of tokens and which of positions is not known yet: the smallest fits both.
    smallest = min(sizes, default=None)
    if vocabulary is None and smallest is None:
        raise UnsupportedModelError(
            f"{type(module).__name__} is not a transformers model and has no nn.Embedding, so what "
            "token ids it reads is not known. Give layout=probe.Layout(..., vocabulary=...)."
        )
    inner = getattr(module, "_orig_mod", module)  # of torch.compile
    ids = (layout and layout.ids) or _ids(inner)
    return Intake(inner, ids, vocabulary or smallest or 0, context or smallest)


def settled(
    intake: Intake,
    layout: Layout | None,
    ids: Tensor,
    tables: Sequence[tuple[nn.Embedding, Tensor]],
) -> Intake:
    """The same once a forward over `ids` has shown which tables it looked up, and where.

    Raises:
        UnsupportedModelError: No table was looked up by the token ids.
    """
    if isinstance(intake.base, PreTrainedModel):
        return intake
    n = ids.shape[1]
    tokens = [t for t, rows in tables if rows.numel() == ids.numel() and _same(rows, ids)]
    places = [t for t, rows in tables if _same(rows, torch.arange(n, device=ids.device), n)]
    vocabulary = (layout and layout.vocabulary) or (tokens[0].num_embeddings if tokens else 0)
    if not vocabulary:
        raise UnsupportedModelError(
            f"{type(intake.base).__name__} looks its token ids up in no nn.Embedding, so how many "
            "it knows is not known. Give layout=probe.Layout(..., vocabulary=...)."
        )
    context = min((t.num_embeddings for t in places), default=None)
    context = (layout and layout.context) or context
    return replace(intake, vocabulary=vocabulary, context=context)


def _same(rows: Tensor, wanted: Tensor, width: int | None = None) -> bool:
    """Whether a table was looked up at `wanted`, in each row if it has a width."""
    if width is None:
        return torch.equal(rows.flatten(), wanted.flatten())
    if rows.shape[-1:] != (width,):
        return False
    return bool((rows == wanted).all())


def _ids(module: nn.Module) -> str:
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    names = [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return "input_ids" if "input_ids" in names or not names else names[0]


def _takes(module: nn.Module, name: str) -> bool:
    return name in inspect.signature(type(module).forward).parameters
