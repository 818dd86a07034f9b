"""The intervention `Ablate`."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from probe.attention import AttentionCall
from probe.cache import Cache
from probe.errors import InputError
from probe.interventions import Change
from probe.selection import Selector
from recipes._choosing import Heads, are_pairs, heads_in, plain, require_heads
from recipes._replacing import PATTERNS, deranged, pattern_of, require_rows
from recipes.patching import Patch
from recipes.references import Reference

Mode = Literal["zero", "mean", "resample", "uniform", "first", "identity", "frozen"]


@dataclass(frozen=True)
class Ablate:
    """Take heads out.

    Attributes:
        heads: (layer, head) pairs; or heads of every layer of `layers`, by int, slice or list.
        mode: What stands in place of a head's z: "zero"; "mean", that of `reference`; "resample",
            that of another input. Or in place of its pattern: "uniform", evenly over all keys that
            a row may see; "first", all on the first of them; "identity", all on the row's own
            token; "frozen", that of another input.
        reference: For "mean" what `reference` returns, default the mean over all tokens of the
            batch that runs. For "resample" a cache with z of one input, or of as many (see
            `Patch`), default a derangement of the batch among inputs of the same length. For
            "frozen" a cache with patterns.
        layers: Whole layers, where heads are no pairs.
        seed: Of the derangement.

    Raises:
        InputError: No heads, an unknown mode, or a reference that does not fit it.

    Example:
        >>> with model.intervene(Ablate([(0, 3)], mode="uniform")):
        ...     _, cache = model.run_with_cache("abc", sites="pattern")
        >>> cache["pattern", 0][0, 3, 3].tolist()
        [0.25, 0.25, 0.25, 0.25]
    """

    __module__ = "recipes.ablation"  # by which a record names it
    heads: Heads = None
    mode: Mode = "zero"
    reference: Reference | Cache | None = None
    layers: Selector = None
    seed: int = 0
    _patch: Patch | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise InputError(f"mode={self.mode!r}. Choose from {', '.join(get_args(Mode))}.")
        for name in ("heads", "layers"):
            object.__setattr__(self, name, plain(getattr(self, name)))
        if self.heads in ([], ()) or (self.heads is None and self.layers is None):
            raise InputError("Ablate names no heads. Give pairs (layer, head), or layers=.")
        if self.layers is None and not are_pairs(self.heads):
            raise InputError(
                f"heads={self.heads!r:.60} of which layers? Give pairs (layer, head), or layers=."
            )
        require_heads(self.layers, self.heads)
        _require_reference(self.mode, self.reference)
        if isinstance(self.reference, Cache):
            site: Literal["z", "pattern"] = "pattern" if self.mode == "frozen" else "z"
            patch = Patch(self.reference, site=site, layers=self.layers, heads=self.heads)
            object.__setattr__(self, "_patch", patch)

    @property
    def moves(self) -> bool:
        """Whether a control may put it elsewhere; of other heads a cache may know nothing."""
        return self._patch is None

    def edits(self, call: AttentionCall) -> Iterable[Change]:
        """A function of z or of the pattern, in the layers that are named."""
        if self._patch is not None:
            yield from self._patch.edits(call)
            return
        heads = heads_in(call, self.layers, self.heads)
        if not heads:
            return
        name = f"Ablate(mode={self.mode!r})"
        if self.mode in PATTERNS:
            yield Change("pattern", partial(_patterned, self.mode, call, heads), name, heads)
        else:
            yield Change("z", partial(self._replaced, call, heads), name, heads)

    def _replaced(self, call: AttentionCall, heads: tuple[int, ...], z: Tensor) -> Tensor:
        if self.mode == "zero":
            return torch.zeros_like(z)
        if self.mode == "resample":
            return z[deranged(call, self.seed).to(z.device)]
        if isinstance(self.reference, Reference):
            return self.reference.at(call, heads).to(z.dtype).expand_as(z)
        real = require_rows(call)
        return z[real].double().mean(0).to(z.dtype).expand_as(z)


def _patterned(mode: str, call: AttentionCall, heads: tuple[int, ...], pattern: Tensor) -> Tensor:
    new = pattern_of(mode, call)
    new = new[:, list(heads)] if new.shape[1] > 1 else new
    return new.expand_as(pattern)


def _require_reference(mode: str, given: Any) -> None:
    fits = {"mean": Reference, "resample": Cache, "frozen": Cache}.get(mode)
    if given is None and mode != "frozen":
        return
    if fits is None:
        raise InputError(f"mode={mode!r} takes no reference. Leave it out.")
    if not isinstance(given, fits):
        wanted = "ablation.reference(model, problems)" if fits is Reference else "a cache"
        site = {"resample": " with z", "frozen": " with patterns"}.get(mode, "")
        raise InputError(
            f"mode={mode!r} needs reference={wanted}{site}, and a {type(given).__name__} was given."
        )
