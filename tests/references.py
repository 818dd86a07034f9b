"""What the tests of the tap share: batches, taps that stay open, eager copies to compare with."""

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from probe.envoys import AttentionEnvoy
from probe.tap import Tap, run
from tests.conftest import tiny_model

LENGTHS = (11, 7)
WINDOW = 5
KERNELS = ("sdpa", "eager")

each_kernel = pytest.mark.parametrize("kernel", KERNELS)
each_padding = pytest.mark.parametrize("padding", ["no", "left", "right"])
each_dtype = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"]
)


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    """Import this into a module whose tests need no gradients."""
    with torch.no_grad():
        yield


@functools.cache
def untouched(
    family: str, kernel: str = "sdpa", dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """A model for tests that leave it as it is."""
    return tiny_model(family, kernel, dtype)


@functools.cache
def tapped(family: str, kernel: str = "sdpa", dtype: torch.dtype = torch.float32) -> Tap:
    """A tap that stays open, for tests that leave its model as it is."""
    return Tap(tiny_model(family, kernel, dtype))


def eager(family: str, batch: Mapping[str, Any], dtype: torch.dtype = torch.float32) -> Any:
    """The attentions of an eager copy, which keeps them."""
    return untouched(family, "eager", dtype)(**batch, output_attentions=True).attentions


def batch_of(family: str, padding: str) -> dict[str, Tensor]:
    """Two sequences, as a careful user would give them."""
    random = torch.Generator().manual_seed(3)
    ids = torch.randint(1, 64, (2, LENGTHS[0]), generator=random)
    if padding == "no":
        return {"input_ids": ids}
    mask = torch.ones_like(ids)
    where = slice(0, LENGTHS[0] - LENGTHS[1]) if padding == "left" else slice(LENGTHS[1], None)
    ids[1, where] = 0
    mask[1, where] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    if family == "gpt2":
        batch["position_ids"] = (mask.cumsum(-1) - 1).clamp_min(0)
    return batch


def real_rows(batch: Mapping[str, Tensor]) -> Tensor:
    """(batch, query)."""
    return batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()


def projections(model: Any) -> list[nn.Module]:
    """The output projection of each layer."""
    if model.config.model_type == "gpt2":
        return [layer.attn.c_proj for layer in model.transformer.h]
    return [layer.self_attn.o_proj for layer in model.model.layers]


def watch(tap: Tap, batch: Mapping[str, Any], *sites: str) -> tuple[Any, dict[str, list[Any]]]:
    """(output, site -> one value per layer) of one traced forward."""
    seen: dict[str, list[Any]] = {site: [] for site in sites}

    def visit(layer: int, envoy: AttentionEnvoy) -> None:
        assert layer == len(seen[sites[0]])
        for site in sites:
            seen[site].append(getattr(envoy, site))

    output = run(tap, visit, batch, layers=tuple(tap.layers))
    return output, seen


def same(got: Any, wanted: Any, tolerance: float, rows: Tensor | float = 1.0) -> None:
    """Each of `got` is that of `wanted`, in the rows that count."""
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a * rows, b * rows, atol=tolerance, rtol=0)


Edit = Callable[[int, Tensor], Tensor]


def keep(_: int, x: Tensor) -> Tensor:
    return x


@dataclass
class ByHand:
    """Attention by hand, registered with transformers, with room for an edit in each place."""

    scores: Edit = keep
    hidden: Edit = keep
    pattern: Edit = keep
    z: Edit = keep
    layers: list[int] = field(default_factory=list)

    def forward(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor,
        *,
        scaling: float,
        **_: Any,
    ) -> tuple[Tensor, Tensor]:
        layer = module.layer_idx
        assert isinstance(layer, int)
        self.layers.append(layer)
        share = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(share, dim=1) for x in (key, value))
        hidden = self.hidden(layer, (attention_mask < -1e30).expand(-1, 4, -1, -1).clone())
        s = self.scores(layer, query @ key.transpose(-1, -2) * scaling)
        p = s.masked_fill(hidden, -torch.inf).softmax(-1).nan_to_num(0.0)
        p = self.pattern(layer, p)
        return self.z(layer, (p @ value).transpose(1, 2).contiguous()), p

    def model(self, family: str) -> PreTrainedModel:
        """A model that runs on this attention until the next one is asked for."""
        AttentionInterface.register("test-by-hand", self.forward)
        AttentionMaskInterface.register("test-by-hand", ALL_MASK_ATTENTION_FUNCTIONS["eager"])
        return untouched(family, "test-by-hand")

    def logits(self, family: str, batch: Mapping[str, Tensor]) -> Tensor:
        logits = self.model(family)(**batch).logits
        assert self.layers == [0, 1, 2]
        assert isinstance(logits, Tensor)
        return logits


class Wrapper(nn.Module):
    """A model in something that is none."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, **kwargs: Any) -> Any:
        return self.inner(**kwargs)


State = dict[str, dict[str, Any]]


def photograph(module: nn.Module) -> State:
    return {name: dict(m.__dict__) for name, m in module.named_modules()}


def unchanged(module: nn.Module, before: State) -> None:
    after = photograph(module)
    assert after.keys() == before.keys()
    for name, state in before.items():
        assert after[name].keys() == state.keys(), name
        for key, value in state.items():
            assert after[name][key] is value, (name, key)
