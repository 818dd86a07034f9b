"""A 4-D attention mask of one's own, checked, as an intervention."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from probe.attention import AttentionCall
from probe.errors import InputError
from probe.interventions import Add, names, where
from probe.selection import Selector


@dataclass(frozen=True, eq=False)
class Mask:
    """Add a mask to the scores, as document 004 gives it: 0 attends, the dtype's minimum hides.

    The model's own mask stays: padding and the future are hidden whatever is given, so the zeros
    of the document's example change nothing. (Transformers takes a 4-D mask as it is, so that they
    open the future there, and reads a 2-D one as a keep-mask, upside down.) It is fused into the
    mask of the model's own kernel; flash and flex kernels take none, and there attention is
    computed as read.

    Attributes:
        mask: (batch or 1, head or 1, query, key) float, by token position: with padding on the
            left, row 0 is still the first token. Its greatest number is 0; others are added, and
            half the dtype's minimum or less hides. For generation it covers the tokens to come.
        allow_future: Put it in place of the model's own mask, padding excepted.
        layers: int, negative int, slice or list; default all.

    Raises:
        InputError: Another rank, a bool mask, a greatest number that is not 0, NaN; when it runs,
            a batch, heads or tokens that it does not fit, or a row that it leaves nothing.

    Example:
        >>> far = torch.zeros(1, 1, 7, 7).masked_fill(torch.ones(7, 7).tril(-3).bool(), -torch.inf)
        >>> with model.intervene(Mask(far)):
        ...     logits = model("abcabc").logits
    """

    mask: Tensor
    allow_future: bool = False
    layers: Selector = None

    def __post_init__(self) -> None:
        mask: Any = self.mask
        if not isinstance(mask, Tensor) or mask.ndim != 4:
            shape = tuple(getattr(mask, "shape", ()))
            raise InputError(
                f"mask has shape {shape}. Give a tensor (batch or 1, head or 1, query, key)."
            )
        if type(self.allow_future) is not bool:
            raise InputError(f"allow_future={self.allow_future!r:.60}. Give True or False.")
        if not mask.is_floating_point():
            raise InputError(
                f"mask is {mask.dtype}. Give floats to add: 0 attends, the dtype's minimum hides."
            )
        greatest = float(mask.max()) if mask.numel() else 0.0
        if greatest != 0:
            raise InputError(
                f"the greatest number of mask is {greatest}, not 0. A custom 4-D mask is passed in "
                "inverted form: 0 attends, the dtype's minimum hides."
            )

    def edits(self, call: AttentionCall) -> Iterable[Add]:
        """A bias, in place of the model's own mask where the future is allowed."""
        if not names(self.layers, call):
            return
        bias = self._placed(call)
        own = call.mask
        if self.allow_future and own is not None and own.is_floating_point():
            seen = own > torch.finfo(own.dtype).min / 2
            if bool((seen & (own != 0)).any()):
                raise InputError(
                    f"layer {call.layer} adds a position bias with its mask, which allow_future="
                    "True would drop. Leave it out."
                )
        if self.allow_future or bool((bias != 0).any()):
            yield Add(bias, opens=self.allow_future)

    def of_items(self, items: Sequence[int], n: int) -> Self:
        """The same for some of n problems: see `probe.interventions.of_items`."""
        if not isinstance(self.mask, Tensor) or len(self.mask) == 1:
            return self
        if len(self.mask) != n:
            raise InputError(
                f"mask is for {len(self.mask)} inputs, and there are {n} problems. Give one for "
                "each problem, or one for all."
            )
        return replace(self, mask=self.mask[list(items)])

    def _placed(self, call: AttentionCall) -> Tensor:
        """The mask of this call's tokens, (batch or 1, head or 1, query, key)."""
        at = where(call)
        batch, heads, rows, keys = self.mask.shape
        b, h, *_ = call.shape
        if batch not in (1, b) or heads not in (1, h):
            raise InputError(
                f"mask is for {batch} inputs and {heads} heads, and layer {call.layer} has {b} and "
                f"{h}. Give (1 or {b}, 1 or {h}, query, key)."
            )
        last = int(at.query.max()), int(at.key.max())
        if last[0] >= rows or last[1] >= keys:
            raise InputError(
                f"mask has {rows} rows and {keys} columns, and there are tokens up to position "
                f"{max(last)} now. Make it as large as the longest sequence, generated tokens too."
            )
        low = torch.finfo(self.mask.dtype).min / 2
        mask = self.mask.to(call.device, call.dtype)
        mask = mask.masked_fill(self.mask.to(call.device) <= low, -torch.inf)
        n = max(batch, len(at.key))
        query, key = (x.clamp_min(0).expand(n, -1) for x in (at.query, at.key))
        item = torch.arange(n, device=call.device) if batch > 1 else torch.zeros_like(query[:, 0])
        index = (item[:, None, None], slice(None), query[:, :, None], key[:, None, :])
        placed = mask[index].movedim(-1, 1)
        padding = (at.query < 0)[:, None, :, None] | (at.key < 0)[:, None, None, :]
        return placed.masked_fill(padding, 0.0)  # it is hidden already
