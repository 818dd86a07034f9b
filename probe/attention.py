"""The attention maths: one attention call, read again without changing it.

An `AttentionCall` holds what a model handed to its attention kernel. From it the scores and the
pattern of any rows, keys and heads are computed in float32 while the model itself stays on its
fast kernel. Pure torch: nothing here knows nnsight or transformers.

Shapes: query (batch, head, query, head_dim); key and value (batch, kv_head, key, head_dim), never
repeated for grouped-query heads: query head h reads key head h // (n_heads / n_kv_heads).
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch import softmax as torch_softmax  # ours, whatever a model puts in torch's place

from probe.errors import InputError
from probe.indexing import Index, bounds, positions, take, unbroken, wide
from probe.inplace import hide, hide_triangle, on_cpu, within
from probe.positions import Positions

Site = Literal["pattern", "scores"]


@dataclass(frozen=True, slots=True, eq=False)
class AttentionCall:
    """What a model gave to its attention kernel, with the mask in one of four forms.

    Attributes:
        query: (batch, head, query, head_dim), after rotary embedding and query norm.
        key: (batch, kv_head, key, head_dim), cached keys included.
        value: (batch, kv_head, key, value_dim).
        mask: None: causal as scaled_dot_product_attention means it, aligned at the top left (a
            single query sees every key). 4-D (batch or 1, head or 1, query, key) bool, True =
            attend. 4-D float, added to the scores; half its dtype's minimum or less blocks.
            2-D (batch, key) keep-mask as FlashAttention takes it, aligned at the bottom right.
        scaling: Factor on query @ key; None is head_dim ** -0.5.
        softcap: Scores become softcap * tanh(scores / softcap) before the mask.
        sinks: (head,) logits that join each row's softmax and are then dropped, so that rows
            sum to less than 1.
        window: Width of a sliding window in tokens, the query's own included; used where the
            mask is None or 2-D (a 4-D mask holds its own window).
        causal: Whether masks that are None or 2-D hide the future.
        dropout: Probability with which `mix` drops pattern entries, 0 outside training.
        layer: Absolute layer index.
        n_layers: Layers of the model.
        where: The tokens that rows and columns are, where they are known.

    Example:
        >>> q = torch.zeros(1, 2, 3, 4)
        >>> AttentionCall(q, q[:, :1], q[:, :1]).pattern(queries=[1, 2], heads=[0])[0, 0]
        tensor([[0.5000, 0.5000, 0.0000],
                [0.3333, 0.3333, 0.3333]])
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None = None
    scaling: float | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    window: int | None = None
    causal: bool = True
    dropout: float = 0.0
    layer: int = 0
    n_layers: int = 1
    where: Positions | None = None

    def __post_init__(self) -> None:
        if self.mask is not None and self.mask.ndim not in (2, 4):
            raise InputError(
                f"an attention mask of shape {tuple(self.mask.shape)} has {self.mask.ndim} "
                "dimensions. Give a 4-D mask (batch, 1 or head, query, key), bool with True = "
                "attend or float to add, or a 2-D keep-mask (batch, key)."
            )
        if self.n_heads % self.n_kv_heads:
            raise InputError(
                f"{self.n_heads} query heads cannot share {self.n_kv_heads} key heads evenly. "
                "The number of query heads must be a multiple of the number of key heads."
            )

    @property
    def device(self) -> torch.device:
        """Where the numbers are."""
        return self.query.device

    @property
    def dtype(self) -> torch.dtype:
        """Of scores and patterns: float32, or float64 where the query is."""
        return torch.float64 if self.query.dtype == torch.float64 else torch.float32

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(batch, head, query, key) of scores and patterns."""
        return self.query.shape[0], self.n_heads, self.n_queries, self.n_keys

    @property
    def n_heads(self) -> int:
        """Query heads."""
        return self.query.shape[1]

    @property
    def n_kv_heads(self) -> int:
        """Key heads."""
        return self.key.shape[1]

    @property
    def share(self) -> int:
        """Query heads that read each key head."""
        return self.n_heads // self.n_kv_heads

    @property
    def factor(self) -> float:
        """What query @ key is multiplied by."""
        return self.scaling if self.scaling is not None else self.query.shape[-1] ** -0.5

    @property
    def n_queries(self) -> int:
        """Rows."""
        return self.query.shape[2]

    @property
    def n_keys(self) -> int:
        """Columns."""
        return self.key.shape[2]

    @property
    def diagonal(self) -> int:
        """Column of the first row's own token, where the mask is None or 2-D."""
        top_left = self.mask is None and self.n_queries > 1
        return 0 if top_left else self.n_keys - self.n_queries

    @property
    def plain(self) -> bool:
        """Whether scores are scaled products, of which nothing but the future is hidden."""
        special = self.mask, self.window, self.softcap, self.sinks
        return all(x is None for x in special) and self.causal and self.n_queries == self.n_keys

    def keep(self, queries: Index = None, keys: Index = None) -> Tensor:
        """Which keys each row may attend to: bool (batch or 1, head or 1, query, key)."""
        if self.mask is not None and self.mask.ndim == 4:
            mask = self._mask4(self.mask, queries, keys)
            return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        rows = positions(queries, self.n_queries, self.query.device) + self.diagonal
        behind = rows[:, None] - positions(keys, self.n_keys, self.query.device)
        keep = behind >= 0 if self.causal else torch.ones_like(behind, dtype=torch.bool)
        if self.window is not None:
            keep = keep & (behind.abs() < self.window)
        if self.mask is None:
            return keep[None, None]
        present = take(self.mask[:, -self.n_keys :].bool(), keys, 1)
        return keep & present[:, None, None, :]

    def scores(
        self,
        *,
        queries: Index = None,
        keys: Index = None,
        heads: Index = None,
        room: Tensor | None = None,
    ) -> Tensor:
        """Scaled scores with softcap and mask; -inf wherever nothing is attended.

        Only the rows, columns and heads asked for are computed. Gradients flow to query and key,
        unless they are computed in a `room`: a flat tensor of their dtype that holds them and the
        queries asked for.

        Returns:
            (batch, head, query, key) float32, or float64 where the query is.
        """
        if heads is not None:
            if not self.head_list(heads):
                return self._nothing(queries, keys)
            each = (self.head(h).scores(queries=queries, keys=keys) for h in self.head_list(heads))
            return torch.cat(list(each), dim=1)
        if torch.is_autocast_enabled(self.query.device.type):
            with torch.autocast(self.query.device.type, enabled=False):
                return self.scores(queries=queries, keys=keys, room=room)
        q = wide(take(self.query, queries, 2))
        k = wide(take(self.key, keys, 2))
        batch, _, n, width = q.shape
        own = None if room is None else room[len(room) - q.numel() :].view(q.shape)
        # The heads that share a key head become more rows of it, so that no key is repeated.
        q = torch.mul(q, self.factor, out=own).reshape(
            batch, self.n_kv_heads, self.share * n, width
        )
        s = torch.matmul(q, k.transpose(-1, -2), out=within(room, *q.shape[:3], k.shape[2]))
        s = s.reshape(batch, self.n_heads, n, k.shape[2])
        if self.softcap is not None:
            again = None if room is None else s
            s = torch.mul(torch.div(s, self.softcap, out=again).tanh_(), self.softcap, out=again)
        return self._hide(s, queries, keys, quick=room is not None)

    def pattern(self, *, queries: Index = None, keys: Index = None, heads: Index = None) -> Tensor:
        """Attention probabilities: a softmax over all keys, then the keys asked for.

        Rows sum to 1 over all keys (less with sinks); 0 wherever nothing is attended; a row that
        may attend to nothing (padding) is all 0. Gradients flow to query and key.

        Returns:
            (batch, head, query, key) float32 (float64 where the query is), before dropout.
        """
        if heads is not None:
            if not self.head_list(heads):
                return self._nothing(queries, keys)
            each = (self.head(h).pattern(queries=queries, keys=keys) for h in self.head_list(heads))
            return torch.cat(list(each), dim=1)
        return take(self.normalise(self.scores(queries=queries)), keys, 3)

    def softmax(self, scores: Tensor) -> Tensor:
        """Whole rows of (possibly edited) scores of every head, sinks included, as a pattern."""
        # A row of -inf alone would give NaN, in its value and in every gradient.
        dead = (scores == -torch.inf).all(-1, keepdim=True)
        return self._softmax(scores.masked_fill(dead, 0.0)).masked_fill(dead, 0.0)

    def mix(self, pattern: Tensor) -> Tensor:
        """What a (possibly edited) pattern of all heads and keys makes of the values.

        Returns:
            z (batch, query, head, value_dim) in the dtype of `value`, contiguous.
        """
        batch, _, n, n_keys = pattern.shape
        p = torch.dropout(pattern, self.dropout, train=self.dropout > 0).to(self.value.dtype)
        z = p.reshape(batch, self.n_kv_heads, self.share * n, n_keys) @ self.value
        return z.reshape(batch, self.n_heads, n, -1).transpose(1, 2).contiguous()

    def head(self, head: int) -> "AttentionCall":
        """The call of one query head and the key head that it reads."""
        group = head // self.share
        return self.part(slice(None), slice(group, group + 1), slice(head, head + 1))

    def cut(self, batch: slice, length: int) -> "AttentionCall":
        """The call of some batch items without the right padding after `length` tokens.

        For a forward without a cache, where rows and columns are the same tokens.
        """
        n = self.shape[0]
        if batch.indices(n) == (0, n, 1) and self.n_queries == self.n_keys == length:
            return self
        part = self.part(batch, slice(None))
        mask = part.mask
        if mask is not None:
            mask = mask[:, :length] if mask.ndim == 2 else mask[:, :, :length, :length]
        return replace(
            part,
            query=part.query[:, :, :length],
            key=part.key[:, :, :length],
            value=part.value[:, :, :length],
            mask=mask,
            where=None if self.where is None else self.where.part(batch, length),
        )

    def biased(self, bias: Tensor) -> "AttentionCall":
        """The call with a bias on its scores, fused into its mask: the model keeps its kernel.

        Args:
            bias: (batch or 1, head or 1, query or 1, key or 1), added after scaling and softcap;
                -inf hides. It is rounded to the query's dtype, as the kernel needs it.

        Raises:
            InputError: A row that attends to something would attend to nothing.
        """
        keep = self.keep()
        hidden = ~keep | (bias == -torch.inf)
        lost = keep.any(-1) & hidden.all(-1)
        if bool(lost.any()):
            item, head, row = (int(i) for i in lost.nonzero()[0])
            raise InputError(
                f"in layer {self.layer} a bias of -inf hides every key of row {row} (batch item "
                f"{item}, head {head}), so that nothing is left to attend to. Keep at least one "
                "key, for example the row's own."
            )
        hide = low = torch.finfo(self.query.dtype).min
        if self.mask is not None and self.mask.ndim == 4 and self.mask.dtype != torch.bool:
            bias = bias + wide(self.mask[:, :, -self.n_queries :, : self.n_keys])
        else:
            # A row of padding that attends to nothing is 0 behind a bool mask, and the mean of all
            # values behind a finite one: what recurrent layers make of it reaches real tokens.
            hide = -torch.inf
        bias = bias.to(self.query.dtype).clamp_min(low).expand(hidden.shape)
        return replace(self, mask=bias.masked_fill(hidden, hide))

    def normalise(self, scores: Tensor, *, quick: bool = False) -> Tensor:
        """Softmax of scores as computed: only a mask or a window can leave a row empty.

        In place where it can be, if `quick`.
        """
        if self.mask is None and self.window is None and scores.shape[-1] > 0:
            return self._softmax(scores, quick=quick)
        if not quick or not scores.shape[-1]:
            return self.softmax(scores)
        dead = scores.amax(-1, keepdim=True) == -torch.inf
        found = self._softmax(scores, quick=True)
        if on_cpu(found) and not bool(dead.any()):  # a GPU would be waited for
            return found
        return found.masked_fill_(dead, 0.0)

    def _softmax(self, scores: Tensor, *, quick: bool = False) -> Tensor:
        if self.sinks is None:
            return torch_softmax(scores, -1, out=scores if quick else None)
        sink = self.sinks.to(scores.dtype).view(1, -1, 1, 1)
        return (scores - torch.logaddexp(scores.logsumexp(-1, keepdim=True), sink)).exp()

    def _nothing(self, queries: Index, keys: Index) -> Tensor:
        """A tensor of no heads."""
        rows = positions(queries, self.n_queries, self.query.device)
        columns = positions(keys, self.n_keys, self.query.device)
        return wide(self.query[:, :0, :1, :1]).new_empty(
            self.query.shape[0], 0, len(rows), len(columns)
        )

    def head_list(self, heads: Index) -> list[int]:
        """Absolute query heads."""
        return positions(heads, self.n_heads, torch.device("cpu")).tolist()

    def head_slice(self, groups: slice) -> slice:
        """The query heads that read some key heads."""
        return slice(
            None if groups.start is None else groups.start * self.share,
            None if groups.stop is None else groups.stop * self.share,
        )

    def part(self, batch: slice, groups: slice, heads: slice | None = None) -> "AttentionCall":
        """Views of some batch items and key heads, with the query heads that read them."""
        heads = heads or self.head_slice(groups)
        mask = self.mask
        if mask is not None:
            mask = mask[batch] if mask.shape[0] > 1 else mask
            mask = mask[:, heads] if mask.ndim == 4 and mask.shape[1] > 1 else mask
        return replace(
            self,
            query=self.query[batch, heads],
            key=self.key[batch, groups],
            value=self.value[batch, groups],
            mask=mask,
            sinks=None if self.sinks is None else self.sinks[heads],
            where=None if self.where is None else self.where.part(batch),
        )

    def _mask4(self, mask: Tensor, queries: Index, keys: Index) -> Tensor:
        mask = mask[:, :, -self.n_queries :, : self.n_keys]
        mask = take(mask, queries, 2) if mask.shape[2] > 1 else mask
        return take(mask, keys, 3) if mask.shape[3] > 1 else mask

    def _hide(self, s: Tensor, queries: Index, keys: Index, *, quick: bool) -> Tensor:
        """Add the mask's bias to fresh scores and put -inf wherever nothing is attended.

        In place where it can be; `quick` where no gradients are wanted.
        """
        if self.mask is None and self.window is None:
            if not self.causal or self.n_queries == 1:
                return s
            # Only the columns from the first row's diagonal on can be hidden.
            rows = bounds(queries, self.n_queries)
            start = bounds(keys, self.n_keys)[0]
            if unbroken(keys) and rows[0] + 1 > start:
                ahead = s[..., rows[0] + 1 - start :]
                keys = slice(rows[0] + 1, bounds(keys, self.n_keys)[1])
                if not unbroken(queries):
                    hide(ahead, self.keep(queries, keys), quick=quick)
                elif quick and on_cpu(s):
                    hide_triangle(ahead)
                else:
                    hidden = torch.ones(ahead.shape[2:], dtype=torch.bool, device=s.device)
                    ahead.masked_fill_(hidden.triu(), -torch.inf)
                return s
        elif self.mask is not None and self.mask.ndim == 4 and self.mask.dtype != torch.bool:
            bias = self._mask4(self.mask, queries, keys).to(s.dtype)
            s = torch.add(s, bias, out=s if quick else None)
        hide(s, self.keep(queries, keys), quick=quick)
        return s
