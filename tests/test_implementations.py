"""Paged attention refused, continuous batching left alone, and a name that hides nothing."""

from typing import Any

import pytest
from transformers import GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from probe.errors import UnsupportedModelError
from probe.tap import Tap
from tests.conftest import Tiny
from tests.references import batch_of, eager, same, watch
from tests.references import no_grad as no_grad

REQUESTS = [[1, 2, 3], [4, 5, 6, 7]]
GREEDY = {"max_new_tokens": 2, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
SMALL: dict[str, Any] = {
    "generation_config": GenerationConfig.from_dict(GREEDY),
    "continuous_batching_config": ContinuousBatchingConfig(
        page_size=32, num_blocks=8, max_batch_tokens=32
    ),
    "progress_bar": False,
}


def batched(model: Any) -> list[list[int]]:
    results = model.generate_batch(inputs=REQUESTS, **SMALL)
    assert all(result.error is None for result in results.values())
    return [result.generated_tokens for result in results.values()]


def test_paged_attention_is_refused_and_left_alone(tiny: Tiny) -> None:
    model = tiny("llama", "paged|eager")
    with pytest.raises(
        UnsupportedModelError,
        match=r"'paged\|eager' packs all requests .* attn_implementation='eager'",
    ):
        Tap(model)
    assert model.config._attn_implementation == "paged|eager"


def test_an_old_paged_name_is_what_transformers_makes_of_it(tiny: Tiny) -> None:
    with pytest.warns(FutureWarning, match="`paged|` prefix is no longer needed"):
        model = tiny("llama", "paged|sdpa")
    tap = Tap(model)
    assert tap.implementation == "sdpa"
    batch = batch_of("llama", "no")
    same(watch(tap, batch, "pattern")[1]["pattern"], eager("llama", batch), 3e-6)
    tap.close()


def test_continuous_batching_of_an_idle_model_is_what_it_is_without_the_tap(tiny: Tiny) -> None:
    model = tiny("llama")
    wanted = batched(model)
    tap = Tap(model)
    assert batched(model) == wanted
    batch = batch_of("llama", "no")
    same(watch(tap, batch, "pattern")[1]["pattern"], eager("llama", batch), 3e-6)
    tap.close()
    assert batched(model) == wanted


def test_continuous_batching_cannot_be_watched(tiny: Tiny) -> None:
    model: Any = tiny("llama")
    tap = Tap(model)
    with tap.watch.on():  # it runs in a thread of its own
        results = model.generate_batch(inputs=REQUESTS, **SMALL)
    assert len(results) == 2
    assert all("watched by another thread" in str(r.error) for r in results.values())
    tap.close()
