"""Generation into every cache: each step reads as in an eager copy with a cache of its own."""

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, QuantizedCache, StaticCache
from transformers.cache_utils import DynamicSlidingWindowLayer

from probe.proof import prove
from probe.tap import Tap
from tests.conftest import FAMILIES
from tests.references import (
    LENGTHS,
    WINDOW,
    batch_of,
    each_kernel,
    eager,
    real_rows,
    same,
    tapped,
    untouched,
    watch,
)
from tests.references import no_grad as no_grad

N_STEPS = 9  # past the window of 5, twice
Make = Callable[[PreTrainedModel], dict[str, Any]]

CACHES: dict[str, Make] = {
    "none": lambda _: {"use_cache": False},
    "dynamic": lambda m: {"past_key_values": DynamicCache(config=m.config)},
    "dynamic, without a config": lambda _: {"past_key_values": DynamicCache()},
    "static": lambda _: {"cache_implementation": "static"},
    "static, too large": lambda m: {
        "past_key_values": StaticCache(config=m.config, max_cache_len=40)
    },
}
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="moves keys to a GPU and back")
OFFLOADED: dict[str, Make] = {
    "offloaded": lambda _: {"cache_implementation": "offloaded"},
    "offloaded, static": lambda _: {"cache_implementation": "offloaded_static"},
}


def options(model: Any, make: Make) -> dict[str, Any]:
    return {"max_new_tokens": N_STEPS, "do_sample": False, **make(model)}


def wanted(model: Any, batch: dict[str, Any], make: Make, **kwargs: Any) -> Any:
    return model.generate(
        **batch,
        **options(model, make),
        **kwargs,
        output_attentions=True,
        return_dict_in_generate=True,
    ).attentions


def read(tap: Tap, batch: dict[str, Any], make: Make, **kwargs: Any) -> list[list[Tensor]]:
    """The pattern of each layer of each step, proven there: a static cache is written over."""
    steps: list[list[Tensor]] = []
    inputs = {**batch, **options(tap.module, make), **kwargs}
    with tap.envoy.trace(fn="generate", **inputs) as tracer:
        for _ in tracer.iter[:N_STEPS]:
            steps.append([])
            for envoy in tap.layers.values():
                call, pattern, z = envoy.call, envoy.pattern, envoy.z
                prove(call, z)
                steps[-1].append(pattern)
    assert len(steps) == N_STEPS
    return steps


def check(family: str, kernel: str, padding: str, make: Make) -> None:
    batch = batch_of(family, padding)
    batch.pop("position_ids", None)
    steps = read(tapped(family, kernel), batch, make)
    attentions = wanted(untouched(family, "eager"), batch, make)
    rows = real_rows(batch)[:, None, :, None]
    for step, want in zip(steps, attentions, strict=True):
        n = step[0].shape[2]  # without a cache each step runs every row again
        real = torch.ones(2, 1, n, 1)
        real[:, :, : LENGTHS[0]] = rows if n > 1 else 1
        same(step, want, 5e-6, real)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("padding", ["no", "left"])
@each_kernel
def test_each_step_reads_as_in_an_eager_copy(
    family: str, kernel: str, padding: str, cache: str
) -> None:
    check(family, kernel, padding, CACHES[cache])


@needs_gpu
@pytest.mark.parametrize("cache", OFFLOADED)
def test_each_step_into_an_offloaded_cache_reads_as_in_an_eager_copy(
    family: str, cache: str
) -> None:
    check(family, "sdpa", "left", OFFLOADED[cache])


def test_a_sliding_cache_holds_no_more_keys_than_its_window() -> None:
    tap = tapped("qwen3")  # layer 0 sees everything, the others a window
    steps = read(tap, batch_of("qwen3", "no"), CACHES["dynamic"])
    widths = [[pattern.shape[-1] for pattern in step] for step in steps]
    assert widths[0] == [11, 11, 11]
    assert widths[1:] == [[11 + i, WINDOW, WINDOW] for i in range(1, N_STEPS)]
    cache = DynamicCache(config=cast(PreTrainedModel, tap.module).config)
    assert [isinstance(layer, DynamicSlidingWindowLayer) for layer in cache.layers] == [0, 1, 1]


def fp8(model: PreTrainedModel) -> dict[str, Any]:
    return {"past_key_values": QuantizedCache("fp8", model.config)}


@pytest.mark.parametrize("family", ["llama", "gpt2"])  # sliding layers cannot be quantised
def test_a_quantised_cache_is_read_as_the_model_attends_to_it(family: str) -> None:
    batch = batch_of(family, "left")
    batch.pop("position_ids", None)
    exact = wanted(untouched(family, "eager"), batch, CACHES["dynamic"])
    attentions = wanted(untouched(family, "eager"), batch, fp8)
    steps = read(tapped(family, "eager"), batch, fp8)  # the same bits, so the same rounding
    for step, want in list(zip(steps, attentions, strict=True))[1:]:
        same(step, want, 1e-6)
    lost = [(a[0] - b[0]).abs().max() for a, b in zip(attentions[1:], exact[1:], strict=True)]
    assert max(map(float, lost)) > 1e-3
    read(tapped(family, "sdpa"), batch, fp8)  # proves each step


@each_kernel
def test_a_cache_goes_on_where_an_earlier_call_left_it(family: str, kernel: str) -> None:
    ids = batch_of(family, "no")["input_ids"]
    tap = tapped(family, kernel)
    config = cast(PreTrainedModel, tap.module).config
    mine, its = DynamicCache(config=config), DynamicCache(config=config)
    for part in (ids[:, :6], ids[:, 6:7], ids[:, 7:]):
        piece = {"input_ids": part, "use_cache": True}
        _, seen = watch(tap, piece | {"past_key_values": mine}, "pattern")
        same(seen["pattern"], eager(family, piece | {"past_key_values": its}), 3e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_beams_are_read_in_the_order_of_the_model(family: str) -> None:
    batch = batch_of(family, "no")
    beams: dict[str, Any] = {"num_beams": 3}
    steps = read(tapped(family, "eager"), batch, CACHES["dynamic"], **beams)
    attentions = wanted(untouched(family, "eager"), batch, CACHES["dynamic"], **beams)
    for step, want in zip(steps, attentions, strict=True):
        assert len(step[0]) == 6
        same(step, want, 1e-6)
