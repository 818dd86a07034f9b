"""Put activations of another run in place: activation patching, and path patching.

>>> _, other = model.run_with_cache("abcdbc", sites="z")
>>> with model.intervene(Patch(other, heads=[(1, 0)])):
...     logits = model("abcabc").logits
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from probe import selection
from probe.attention import AttentionCall
from probe.branching import branch, dissect, grow
from probe.cache import Cache
from probe.errors import InputError
from probe.hearing import reading
from probe.hooks import full_name
from probe.interventions import SITES, Change, Site, where
from probe.mlps import frozen
from probe.model import Model
from probe.planning import plan
from probe.plans import Item
from probe.selection import Selector
from recipes._choosing import Heads, Pairs, chunks, heads_in, plain, require_heads
from recipes._placing import absolute
from recipes._replacing import aligned

__all__ = ["Patch", "heads", "paths"]

Metric = Callable[[Tensor], Any]

_KEYED = ("k", "v")


@dataclass(frozen=True, eq=False)
class Patch:
    """Replace activations by those of another run, token by token.

    Attributes:
        cache: From `model.run_with_cache`, of one input or of as many as the batch has, with the
            tokens that are replaced at the same positions.
        site: "z", "pattern", "scores", "q", "k" or "v".
        layers: int, negative int, slice or list; default those that the cache has.
        heads: Query heads, likewise, or pairs (layer, head); of k and v key heads. Default those
            that the cache has.
        queries: Tokens whose rows are replaced, by position (of k and v, whose columns); default
            all.

    Raises:
        InputError: The cache does not hold them.

    Example:
        >>> _, other = model.run_with_cache("xyzxyz", sites="pattern", layers=0)
        >>> with model.intervene(Patch(other, site="pattern")):
        ...     logits = model("abcabc").logits
    """

    cache: Cache
    site: Site = "z"
    layers: Selector = None
    heads: Heads = None
    queries: Selector = None

    def __post_init__(self) -> None:
        if not isinstance(self.cache, Cache):
            raise InputError(
                f"cache is a {type(self.cache).__name__}. Give what model.run_with_cache returns "
                "second."
            )
        if self.site not in SITES:
            raise InputError(f"site={self.site!r}. Choose from {', '.join(SITES)}.")
        for name in ("layers", "heads", "queries"):
            object.__setattr__(self, name, plain(getattr(self, name)))
        require_heads(self.layers, self.heads)
        selection.require(self.queries, "queries")

    def edits(self, call: AttentionCall) -> Iterable[Change]:
        """A function that returns the cached values."""
        layers = {layer for site, layer in self.cache.tensors if site == self.site}
        named = self.layers is not None or self.heads is not None
        if not named and call.layer not in layers:
            return
        size = call.n_kv_heads if self.site in _KEYED else call.n_heads
        chosen = heads_in(call, self.layers, self.heads, size=size)
        if not chosen:
            return
        if call.layer not in layers:
            raise InputError(
                f"{self.site} of layer {call.layer} was not kept (the cache has it of layers "
                f"{sorted(layers)}). Keep it, or name other layers."
            )
        kept = self._kept(call.layer)
        if self.heads is None:
            chosen = tuple(kept)
        if missing := [head for head in chosen if head not in kept]:
            raise InputError(
                f"{self.site} of head {missing[0]} of layer {call.layer} was not kept (the cache "
                f"has heads {list(kept)}). Keep it, or name other heads."
            )
        yield Change(self.site, partial(self._patched, call, chosen), "a Patch", chosen)

    def _kept(self, layer: int) -> Sequence[int]:
        """The heads that the cache has of a layer."""
        size = self.cache.tensors[self.site, layer].shape[_head_dim(self.site)]
        some = self.site not in _KEYED and len(self.cache.heads) == size
        return self.cache.heads if some else range(size)

    def _patched(self, call: AttentionCall, chosen: Sequence[int], value: Tensor) -> Tensor:
        at, cache = where(call), self.cache
        rows = at.columns(self.queries) if self.site in _KEYED else at.rows(self.queries)
        own = at.key if self.site in _KEYED else at.query
        real = rows & (own >= 0)
        if not bool(real.any()):  # while tokens are generated that nobody replaces
            return value
        keyed = self.site in _KEYED
        positions = [one.key_position if keyed else one.query_position for one in cache.labels]
        index = aligned(own, positions, cache.columns if keyed else cache.rows, real)
        given = cache.tensors[self.site, call.layer].to(value.device, value.dtype)
        kept, head_dim = self._kept(call.layer), _head_dim(self.site)
        given = given.index_select(
            head_dim, torch.tensor([list(kept).index(h) for h in chosen], device=given.device)
        )
        if len(given) == 1:
            given = given.expand(len(index), *given.shape[1:])
        item = torch.arange(len(index), device=index.device)[:, None]
        if head_dim == 2:
            return torch.where(real[:, :, None, None], given[item, index], value)
        columns = aligned(
            at.key, [one.key_position for one in cache.labels], cache.columns, at.key >= 0
        )
        picked = given.movedim(1, 3)[item[..., None], index[:, :, None], columns[:, None, :]]
        seen = (at.key >= 0)[:, None, None, :]
        empty = 0.0 if self.site == "pattern" else -torch.inf
        picked = torch.where(seen, picked.movedim(3, 1), empty)
        return torch.where(real[:, None, :, None], picked, value)


def _head_dim(site: Site) -> int:
    return 1 if site in ("scores", "pattern") else 2


def heads(
    model: Model,
    clean: object,
    corrupt: object,
    metric: Metric,
    *,
    queries: Selector = None,
    batch_size: int = 16,
) -> xr.DataArray:
    """Activation patching: what each head's output for one input does in another.

    Args:
        model: The model.
        clean: One input, a text or token ids: it runs.
        corrupt: Another of as many tokens, whose z is put in, a head at a time. (Swap the two to
            see which heads restore an answer.)
        metric: `metric(logits)` of (batch, position, vocabulary) gives one number for each item.
        queries: Tokens whose z is replaced; default all.
        batch_size: Heads that run together.

    Returns:
        (layer, head) float32, metric(patched) - metric(clean); NaN where there is no head.

    Raises:
        InputError: Other lengths, or a metric that gives something else.

    Example:
        >>> answer = lambda logits: logits[:, -1, 2] - logits[:, -1, 3]
        >>> heads(model, "abcab", "abdab", answer).sizes["head"]
        4
    """
    run, other = _pair(model, clean, corrupt)
    rows = list(selection.positions(queries, run.length, run.segments, name="queries", problem="0"))
    out = np.full((model.n_layers, model.n_heads), np.nan, "float32")
    with reading(model.module):
        anatomy = dissect(model, run)
        trunk, donor = (grow(model, one, anatomy) for one in (run, other))
        base = _measured(metric, trunk.logits)[0]
        for layer in model.layers:
            for some in chunks(range(trunk.z[layer].shape[2]), batch_size):
                z = trunk.z[layer].repeat(len(some), 1, 1, 1)
                for n, head in enumerate(some):
                    z[n, rows, head] = donor.z[layer][0, rows, head]
                values = _measured(metric, branch(model, trunk, anatomy, layer, z))
                out[layer, list(some)] = values - base
    coords = {"layer": range(model.n_layers), "head": range(model.n_heads)}
    return xr.DataArray(out, coords=coords, dims=("layer", "head"), name="effect")


def paths(
    model: Model,
    clean: object,
    corrupt: object,
    metric: Metric,
    *,
    senders: Pairs,
    receivers: Sequence[tuple[Site, int, int]] | None = None,
    freeze_mlps: bool = False,
) -> dict[tuple[int, int], float]:
    """Path patching: what a head tells its receivers directly (Wang et al. 2022; Goldowsky-Dill).

    The clean input runs with the output of every head frozen to its clean value, but the sender's,
    which is that of the corrupt input; what the receivers read there is put into a clean run.

    Args:
        model: The model.
        clean: One input, a text or token ids.
        corrupt: Another of as many tokens.
        metric: `metric(logits)` of (1, position, vocabulary) gives one number.
        senders: (layer, head) pairs, one path each.
        receivers: ("q", layer, head), or "k" or "v" with a key head. Default: the logits, that is
            the direct effect.
        freeze_mlps: Also freeze the MLPs; else they carry on what the sender says.

    Returns:
        For each sender metric(patched) - metric(clean).

    Raises:
        InputError: Other lengths, or a receiver that is no q, k or v.

    Example:
        >>> answer = lambda logits: logits[:, -1, 2]
        >>> keys = [("k", 1, 0)]
        >>> found = paths(model, "abcab", "abdab", answer, senders=[(0, 3)], receivers=keys)
        >>> list(found)
        [(0, 3)]
    """
    ids = [list(item.token_ids) for item in _pair(model, clean, corrupt)]
    if receivers is not None:
        _require_receivers(receivers)
    with reading(model.module):
        (logits, before), (_, other) = (model.run_with_cache(one, sites="z") for one in ids)
        base = float(_measured(metric, logits)[0])
        out = {}
        for pair in absolute(senders, model):
            told = Patch(before), Patch(other, heads=[pair])
            with frozen(model, ids[0]) if freeze_mlps else nullcontext(), model.intervene(*told):
                if receivers is None:
                    changed = model.run_with_hooks(ids[0])
                else:
                    heard = _heard(model, ids[0], receivers)
            if receivers is not None:
                with model.intervene(*heard):
                    changed = model.run_with_hooks(ids[0])
            out[pair] = float(_measured(metric, changed)[0]) - base
    return out


def _require_receivers(receivers: Sequence[Any]) -> None:
    for one in receivers or [()]:
        if not isinstance(one, list | tuple) or len(one) != 3 or one[0] not in ("q", "k", "v"):
            raise InputError(
                f"receivers={receivers!r:.80}. A receiver reads q, k or v: give (site, layer, "
                "head), as ('q', 1, 3), at least once; or leave them out."
            )


def _heard(model: Model, ids: list[int], receivers: Sequence[tuple[Site, int, int]]) -> list[Patch]:
    """What the receivers read now, as patches of a later run."""
    names = {full_name(site, selection.axis(layer, model.n_layers, "layers")[0])
             for site, layer, _ in receivers}  # fmt: skip
    _, cache = model.run_with_cache(ids, names_filter=lambda n: n in names, return_type=None)
    return [Patch(cache, site=site, heads=[(layer, head)]) for site, layer, head in receivers]


def _pair(model: Model, clean: object, corrupt: object) -> tuple[Item, Item]:
    one, two = (plan(model, [x]).items[0] for x in (clean, corrupt))
    if one.length != two.length:
        raise InputError(
            f"clean has {one.length} tokens and corrupt {two.length}. Give two inputs of as many, "
            "in which the same positions play the same part."
        )
    return one, two


def _measured(metric: Metric, logits: Tensor) -> np.ndarray[Any, Any]:
    values = torch.as_tensor(metric(logits)).reshape(-1)
    if len(values) != len(logits):
        raise InputError(
            f"metric returned {len(values)} numbers for {len(logits)} inputs. Return one for each: "
            "logits are (batch, position, vocabulary)."
        )
    return values.double().cpu().numpy()
