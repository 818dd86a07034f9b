"""Steps of generation and prefills into a cache, read and edited like those of an eager copy."""

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache

from probe.tap import Tap
from tests.references import (
    ByHand,
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

STEPS: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}


def generate(model: Any, **kwargs: Any) -> Any:
    return model.generate(**kwargs, **STEPS, return_dict_in_generate=True)


def traced(tap: Tap, visit: Callable[[], None], **kwargs: Any) -> Any:
    """What `generate` returns while `visit` reads or edits each step."""
    box: list[Any] = []

    def forward(**inputs: Any) -> Any:
        box.append(generate(tap.module, **inputs))
        return box[0]

    with tap.envoy.trace(fn=forward, **kwargs) as tracer:
        for _ in tracer.iter[:4]:
            visit()
    return box[0]


@each_kernel
@pytest.mark.parametrize("cache", ["static", "dynamic"])
def test_a_prefill_in_two_pieces_into_a_cache_is_read_like_an_eager_copy(
    family: str, kernel: str, cache: str
) -> None:
    ids = batch_of(family, "no")["input_ids"]
    tap = tapped(family, kernel)
    config = cast(PreTrainedModel, tap.module).config
    mine, its = (
        StaticCache(config=config, max_cache_len=16)
        if cache == "static"
        else DynamicCache(config=config)
        for _ in range(2)
    )
    for part in (ids[:, :4], ids[:, 4:10], ids[:, 10:]):
        piece = {"input_ids": part, "use_cache": True}
        got = watch(tap, piece | {"past_key_values": mine}, "pattern")[1]["pattern"]
        same(got, eager(family, piece | {"past_key_values": its}), 3e-6)


@each_kernel
def test_each_step_of_generate_reads_as_in_an_eager_copy(family: str, kernel: str) -> None:
    batch = batch_of(family, "left")
    batch.pop("position_ids", None)
    wanted = generate(untouched(family, "eager"), **batch, output_attentions=True)
    tap = tapped(family, kernel)
    seen: list[list[Tensor]] = []
    got = traced(tap, lambda: seen.append([e.pattern for e in tap.layers.values()]), **batch)
    assert torch.equal(got.sequences, wanted.sequences)
    assert len(seen) == len(wanted.attentions) == 4
    same(seen[0], wanted.attentions[0], 2e-6, real_rows(batch)[:, None, :, None])
    for step in (1, 2, 3):
        same(seen[step], wanted.attentions[step], 2e-6)


def test_a_pattern_edited_in_every_step_changes_what_is_generated_like_attention_by_hand(
    family: str,
) -> None:
    def rescale(layer: int, p: Tensor) -> Tensor:
        return p * (0.5 + layer)

    def visit() -> None:
        for layer, envoy in tap.layers.items():
            envoy.pattern = rescale(layer, envoy.pattern)

    inputs: dict[str, Any] = batch_of(family, "no") | {"output_logits": True}
    tap = tapped(family)
    got = traced(tap, visit, **inputs)
    wanted = generate(ByHand(pattern=rescale).model(family), **inputs)
    torch.testing.assert_close(got.logits, wanted.logits, atol=1e-5, rtol=1e-5)


def test_generate_can_be_traced_by_its_name() -> None:
    tap = tapped("llama")
    inputs: dict[str, Any] = batch_of("llama", "no") | STEPS | {"max_new_tokens": 3}
    shapes = []
    with tap.envoy.trace(fn="generate", **inputs) as tracer:
        for _ in tracer.iter[:3]:
            shapes.append(tap.layers[1].pattern.shape)
    assert [tuple(shape) for shape in shapes] == [(2, 4, 11, 11), (2, 4, 1, 12), (2, 4, 1, 13)]


def test_one_step_of_generate_can_be_read_alone() -> None:
    tap = tapped("llama")
    seen: list[Tensor] = []
    with tap.envoy.trace(fn="generate", **batch_of("llama", "no"), **STEPS) as tracer:
        for _ in tracer.iter[2]:
            seen.append(tap.layers[1].pattern)
    assert [tuple(p.shape) for p in seen] == [(2, 4, 1, 13)]
