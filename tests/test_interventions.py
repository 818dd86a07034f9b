"""Every kind of intervention against attention by hand: in forward, in generation, in 16 bits."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from probe.interventions import Bias, Edit, Intervention
from tests.edited import (
    EVERYTHING,
    KINDS,
    STEPS,
    all_steps,
    biased,
    by_token,
    cache_of,
    everywhere,
    generated,
    left,
    prompt,
    watched,
)
from tests.references import batch_of, each_kernel, each_padding, real_rows
from tests.references import no_grad as no_grad

TOLERANCE: dict[str, Any] = {"atol": 1e-5, "rtol": 1e-5}
each_cache = pytest.mark.parametrize("cache", ["dynamic", "static"])


@pytest.mark.parametrize("kind", KINDS)
@each_padding
@each_kernel
def test_a_forward_is_changed_as_attention_by_hand(
    family: str, kernel: str, padding: str, kind: str
) -> None:
    some, steps = KINDS[kind]
    batch, model = batch_of(family, padding), watched(family, kernel)
    plain = model(batch).logits
    with model.intervene(*some):
        got = model(batch).logits
    hand = by_token(steps(prompt(padding)), padding)
    wanted = hand.model(family)(**model.batch(batch)).logits
    rows = real_rows(batch)
    torch.testing.assert_close(got[rows], wanted[rows], **TOLERANCE)
    assert float((got[rows] - plain[rows]).abs().max()) > 1e-3
    assert torch.equal(model(batch).logits, plain)  # over when the block is


@pytest.mark.parametrize("kind", KINDS)
@each_cache
def test_each_step_of_a_padded_generation_is_changed_as_attention_by_hand(
    family: str, cache: str, kind: str
) -> None:
    some, steps = KINDS[kind]
    check_generation(family, "sdpa", cache, some, steps(prompt("left")))


@each_cache
@each_kernel
def test_all_kinds_at_once_act_site_by_site_in_generation(
    family: str, kernel: str, cache: str
) -> None:
    check_generation(family, kernel, cache, EVERYTHING, all_steps(prompt("left")))


def check_generation(
    family: str, kernel: str, cache: str, some: list[Any], steps: Mapping[str, Any]
) -> None:
    batch, model = left(family), watched(family, kernel)
    with model.intervene(*some):
        got = generated(model.module, batch, cache_of(cache, model.module))
    hand = by_token(steps, "left", grows=True).model(family)
    wanted = generated(hand, batch, cache_of("whole", hand))
    assert torch.equal(got.sequences, wanted.sequences)
    assert len(got.logits) == STEPS
    torch.testing.assert_close(got.logits, wanted.logits, **TOLERANCE)


@each_padding
@each_kernel
def test_all_kinds_at_once_act_site_by_site_in_forward(
    family: str, kernel: str, padding: str
) -> None:
    batch, model = batch_of(family, padding), watched(family, kernel)
    with model.intervene(*EVERYTHING):
        got = model(batch).logits
    wanted = (
        by_token(all_steps(prompt(padding)), padding).model(family)(**model.batch(batch)).logits
    )
    rows = real_rows(batch)
    torch.testing.assert_close(got[rows], wanted[rows], **TOLERANCE)


@each_kernel
def test_in_float64_the_numbers_are_exact(family: str, kernel: str) -> None:
    batch, model = batch_of(family, "left"), watched(family, kernel, torch.float64)
    with model.intervene(*EVERYTHING):
        got = model(batch).logits
    hand = by_token(all_steps(prompt("left")), "left")
    wanted = hand.model(family, torch.float64)(**model.batch(batch)).logits
    rows = real_rows(batch)
    # A bias that went through float32 would be off by 1e-8.
    torch.testing.assert_close(got[rows], wanted[rows], atol=1e-9, rtol=0)


@each_kernel
def test_in_bfloat16_a_knock_out_is_exact_and_the_rest_is_close(family: str, kernel: str) -> None:
    batch, model = batch_of(family, "left"), watched(family, kernel, torch.bfloat16)
    exact = watched(family, kernel)
    edits: list[Intervention] = [
        Bias(value=-torch.inf, queries=slice(2, None), keys=1),
        Edit(site="z", function=lambda z, _: 0.5 * z, heads=[0]),
    ]
    with model.intervene(*edits), exact.intervene(*edits):
        got, cache = model.run_with_cache(batch, "pattern")
        wanted, _ = exact.run_with_cache(batch, "pattern")
    rows = real_rows(batch)
    assert got.dtype == torch.bfloat16
    assert float((got[rows].float() - wanted[rows]).abs().mean()) < 0.1
    for layer in range(3):
        p = cache["pattern", layer]
        assert float(p[0, :, 2:, 1].abs().max()) == 0
        assert float(p[1, :, 6:, 5].abs().max()) == 0  # its padding is 4 columns wide


def test_a_generation_without_a_cache_counts_from_the_prompt_too(family: str) -> None:
    batch, model = left(family), watched(family)
    some, steps = KINDS["rows and keys counted from the end of the prompt"]
    with model.intervene(*some):
        got = model.generate(
            batch,
            max_new_tokens=STEPS,
            do_sample=False,
            use_cache=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
    hand = by_token(steps(prompt("left")), "left", grows=True).model(family)
    wanted = generated(hand, batch, cache_of("whole", hand))
    torch.testing.assert_close(got.logits, wanted.logits, **TOLERANCE)


OPTIONS: list[dict[str, Any]] = [
    {"num_beams": 3},
    {"prefill_chunk_size": 3},  # of the second sequence, the first piece is all padding
    {"prefill_chunk_size": 3, "cache_implementation": "static"},
    {"prefill_chunk_size": 4, "cache_implementation": "static"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_beams_and_a_prefill_in_pieces_are_changed_at_the_positions_of_the_prompt(
    options: dict[str, Any],
) -> None:
    batch, model = left("llama"), watched("llama")
    some, steps = KINDS["rows and keys counted from the end of the prompt"]
    with model.intervene(*some):
        got = model.generate(batch, max_new_tokens=STEPS, do_sample=False, **options)
    hand = by_token(steps(prompt("left")), "left", grows=True)
    if "num_beams" in options:
        hand.start = hand.start.repeat_interleave(3)
        hand.steps = beamed([n for n in prompt("left") for _ in range(3)])
    reference: Any = hand.model("llama")
    options = options | {"cache_implementation": "dynamic"}  # by hand, the last key is the last row
    wanted = reference.generate(**batch, max_new_tokens=STEPS, do_sample=False, **options)
    assert torch.equal(got, wanted)


def beamed(n: list[int]) -> dict[str, Any]:
    """The biases of the kind that counts from the end of the prompt, for each beam."""
    first = biased(-2.0, lambda i, r: n[i] - 3 <= r < n[i], lambda i, c: c == n[i] - 4)
    second = biased(1.0, everywhere, lambda i, c: c >= n[i] - 2)
    return {"bias": lambda *args: first(*args) + second(*args)}


def decode(model: Any, ids: Tensor) -> list[Tensor]:
    """A loop of the user's own, in which the model makes the cache."""
    output = model(input_ids=ids, use_cache=True)
    logits = [output.logits[:, -1]]
    for _ in range(STEPS):
        token = logits[-1].argmax(-1, keepdim=True)
        output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True)
        logits.append(output.logits[:, -1])
    return logits


def test_a_decoding_loop_of_the_users_own_counts_from_its_first_input(family: str) -> None:
    ids, model = batch_of(family, "no")["input_ids"], watched(family)
    some, steps = KINDS["rows and keys counted from the end of the prompt"]
    with model.intervene(*some):
        got = decode(model.module, ids)
    hand = by_token(steps(prompt("no")), "no", grows=True)

    def whole(**kwargs: Any) -> Any:
        kwargs.setdefault("past_key_values", cache_of("whole", model.module))
        return hand.model(family)(**kwargs)

    torch.testing.assert_close(got, decode(whole, ids), **TOLERANCE)
