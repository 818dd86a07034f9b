"""What the tests of interventions share: attention by hand that knows which token is where."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    DynamicCache,
    PreTrainedModel,
    StaticCache,
)
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

import probe
from probe.interventions import Bias, Edit, Intervention
from probe.model import Model
from tests.conftest import tiny_model
from tests.references import LENGTHS, batch_of, untouched

STEPS = 8  # past the window of 5

# (layer, value, position of each row, position of each column) -> value
Step = Callable[[int, Tensor, Tensor, Tensor], Tensor]


@functools.cache
def watched(family: str, kernel: str = "sdpa", dtype: torch.dtype = torch.float32) -> Model:
    """A model that stays open, for tests that leave it as it is."""
    return probe.load(tiny_model(family, kernel, dtype))


@dataclass
class ByToken:
    """Eager attention by hand over all keys that were ever cached, edited by token position.

    Attributes:
        steps: By site, what is done there; "bias" gets zeros (batch, head, query, key).
        start: (batch), column of each sequence's first token.
        tokens: (batch), how many each has; in generation more follow.
    """

    steps: Mapping[str, Step]
    start: Tensor
    tokens: Tensor
    grows: bool = False
    patterns: list[Tensor] = field(default_factory=list)

    def forward(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor,
        *,
        scaling: float,
        **_: Any,
    ) -> tuple[Tensor, Tensor]:
        n, keys, layer = query.shape[2], key.shape[2], module.layer_idx
        columns = torch.arange(keys) - self.start[:, None]
        if not self.grows:
            columns = columns.masked_fill(columns >= self.tokens[:, None], -1)
        columns = columns.clamp_min(-1)
        rows = columns[:, keys - n :]

        def do(site: str, x: Tensor) -> Tensor:
            step = self.steps.get(site)
            return x if step is None else step(layer, x, rows, columns)

        q, k, v = (
            do(site, x.transpose(1, 2)).transpose(1, 2)
            for site, x in (("q", query), ("k", key), ("v", value))
        )
        share = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(share, dim=1) for x in (k, v))
        s = q @ k.transpose(-1, -2) * scaling
        hidden = (attention_mask < -1e30).expand(s.shape)
        s = s + do("bias", torch.zeros_like(s))
        s = do("scores", s.masked_fill(hidden, -torch.inf))
        p = do("pattern", s.softmax(-1).nan_to_num(0.0))
        self.patterns.append(p)
        return do("z", (p @ v).transpose(1, 2).contiguous()), p

    def model(self, family: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        """A model that runs on this attention until the next one is asked for."""
        AttentionInterface.register("test-by-token", self.forward)
        AttentionMaskInterface.register("test-by-token", ALL_MASK_ATTENTION_FUNCTIONS["eager"])
        return untouched(family, "test-by-token", dtype)


def by_token(steps: Mapping[str, Step], padding: str, *, grows: bool = False) -> ByToken:
    """Attention by hand for the batches of `batch_of`."""
    short = LENGTHS[0] if padding == "no" else LENGTHS[1]
    start = LENGTHS[0] - short if padding == "left" else 0
    sizes = torch.tensor([0, start]), torch.tensor([LENGTHS[0], short])
    return ByToken(steps, *sizes, grows=grows)


def at(positions: Tensor, chosen: Callable[[int, int], bool]) -> Tensor:
    """(batch, n): for which of these tokens `chosen(item, position)` is true, never for padding."""
    return torch.tensor(
        [[p >= 0 and chosen(i, p) for p in row] for i, row in enumerate(positions.tolist())]
    )


def biased(
    value: float,
    rows: Callable[[int, int], bool],
    columns: Callable[[int, int], bool],
    layers: Sequence[int] = (0, 1, 2),
    heads: Sequence[int] = (0, 1, 2, 3),
) -> Step:
    def step(layer: int, x: Tensor, r: Tensor, c: Tensor) -> Tensor:
        edge = at(r, rows)[:, None, :, None] & at(c, columns)[:, None, None, :]
        edge = edge & torch.tensor([h in heads for h in range(4)])[:, None, None]
        return x.masked_fill(edge, value) if layer in layers else x

    return step


def everywhere(_: int, position: int) -> bool:
    return position >= 0


def later(position: Tensor, dims: int) -> Tensor:
    """A factor that grows with the token's position, which no padding or cache changes."""
    return (1 + 0.05 * position).view(*position.shape, *[1] * dims)


def by_key(x: Tensor, call: Any) -> Tensor:
    assert call.where is not None
    return x * later(call.where.key, 2)


def by_row(x: Tensor, call: Any) -> Tensor:
    assert call.where is not None
    return x * later(call.where.query, 2) + 0.1


def in_place(x: Tensor, call: Any) -> None:
    assert call.where is not None
    x *= later(call.where.query, 1)[:, None]


def halved_first(x: Tensor, call: Any) -> Tensor:
    assert call.where is not None
    return torch.where(call.where.key[:, None, None] == 1, 0.5 * x, x)


def only(heads: list[int], dim: int, step: Step) -> Step:
    def some(layer: int, x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        index = torch.tensor(heads)
        part = step(layer, x.index_select(dim, index), rows, columns)
        return x.index_copy(dim, index, part)

    return some


def rowwise(_: int, x: Tensor, rows: Tensor, __: Tensor) -> Tensor:
    return x * later(rows, 2) + 0.1


def keywise(_: int, x: Tensor, __: Tensor, columns: Tensor) -> Tensor:
    return x * later(columns, 2)


def prompt(padding: str) -> tuple[int, int]:
    return LENGTHS[0], LENGTHS[0] if padding == "no" else LENGTHS[1]


Kind = tuple[list[Intervention], Callable[[tuple[int, int]], dict[str, Step]]]

KINDS: dict[str, Kind] = {
    "a finite bias": (
        [Bias(value=-1.5, keys=1)],
        lambda _: {"bias": biased(-1.5, everywhere, lambda _, c: c == 1)},
    ),
    "a bias of some heads, rows and layers": (
        [Bias(value=0.7, queries=slice(3, None), keys=[0, 2], layers=[0, -1], heads=[1, 3])],
        lambda _: {
            "bias": biased(0.7, lambda _, r: r > 2, lambda _, c: c in (0, 2), (0, 2), (1, 3))
        },
    ),
    "a knock-out": (
        [Bias(value=-torch.inf, queries=slice(2, None), keys=1)],
        lambda _: {"bias": biased(-torch.inf, lambda _, r: r > 1, lambda _, c: c == 1)},
    ),
    "a knock-out of every third key in one head": (
        [Bias(value=-torch.inf, queries=slice(4, None, 2), keys=slice(0, None, 3), heads=2)],
        lambda _: {
            "bias": biased(
                -torch.inf,
                lambda _, r: r >= 4 and r % 2 == 0,
                lambda _, c: c % 3 == 0,
                heads=(2,),
            )
        },
    ),
    "rows and keys counted from the end of the prompt": (
        [Bias(value=-2.0, queries="last:3", keys=-4), Bias(value=1.0, keys=slice(-2, None))],
        lambda n: {
            "bias": lambda layer, x, r, c: (
                biased(-2.0, lambda i, r: n[i] - 3 <= r < n[i], lambda i, c: c == n[i] - 4)(
                    layer, x, r, c
                )
                + biased(1.0, everywhere, lambda i, c: c >= n[i] - 2)(layer, x, r, c)
            )
        },
    ),
    "q": ([Edit(site="q", function=by_row)], lambda _: {"q": rowwise}),
    "q of one head": (
        [Edit(site="q", function=by_row, heads=2)],
        lambda _: {"q": only([2], 2, rowwise)},
    ),
    "k of one key head": (
        [Edit(site="k", function=by_key, heads=[1])],
        lambda _: {"k": only([1], 2, keywise)},
    ),
    "v": ([Edit(site="v", function=by_key)], lambda _: {"v": keywise}),
    "scores in place": (
        [Edit(site="scores", function=in_place)],
        lambda _: {"scores": lambda _, x, rows, __: x * later(rows, 1)[:, None]},
    ),
    "pattern of some heads": (
        [Edit(site="pattern", function=halved_first, heads=[0, 3], layers=slice(1, None))],
        lambda _: {
            "pattern": lambda layer, x, rows, columns: (
                only(
                    [0, 3],
                    1,
                    lambda _, x, __, c: torch.where(c[:, None, None] == 1, 0.5 * x, x),
                )(layer, x, rows, columns)
                if layer
                else x
            )
        },
    ),
    "z": ([Edit(site="z", function=by_row, heads=[1])], lambda _: {"z": only([1], 2, rowwise)}),
}
# One list of all kinds, in an order that is not that of the sites.
EVERYTHING = [one for name in reversed(KINDS) for one in KINDS[name][0]]


def all_steps(n: tuple[int, int]) -> dict[str, Step]:
    """What `EVERYTHING` does: the sum of biases, and each site's steps in the order given."""
    steps: dict[str, list[Step]] = {}
    for name in reversed(KINDS):
        for site, step in KINDS[name][1](n).items():
            steps.setdefault(site, []).append(step)

    def total(layer: int, x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        return x + sum(step(layer, x, rows, columns) for step in steps["bias"])

    def chain(some: list[Step]) -> Step:
        def do(layer: int, x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
            for step in some:
                x = step(layer, x, rows, columns)
            return x

        return do

    return {site: total if site == "bias" else chain(some) for site, some in steps.items()}


def generated(model: Any, batch: Mapping[str, Tensor], cache: Any, **kwargs: Any) -> Any:
    return model.generate(
        **batch,
        max_new_tokens=STEPS,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        past_key_values=cache,
        **kwargs,
    )


def cache_of(kind: str, model: nn.Module) -> Any:
    """The caches that a user would have; the reference keeps every key."""
    config: Any = model.config
    if kind == "static":
        return StaticCache(config=config, max_cache_len=40)
    return DynamicCache() if kind == "whole" else DynamicCache(config=config)


def left(family: str) -> dict[str, Tensor]:
    """A left-padded batch for generate, which counts positions itself."""
    batch = batch_of(family, "left")
    batch.pop("position_ids", None)
    return batch
