"""Masks of one's own against attention by hand, and what is refused."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from probe.errors import InputError
from probe.interventions import Bias
from probe.model import Model
from recipes.suppression import Mask
from tests.edited import Step, by_token, cache_of, generated, left, watched
from tests.models import Bare
from tests.models import bare as bare
from tests.references import batch_of, each_kernel, each_padding, real_rows
from tests.references import no_grad as no_grad

LOW = torch.finfo(torch.float32).min
SIZE = 24  # tokens of a prompt and of what is generated after it


def random_mask(batch: int, heads: int) -> Tensor:
    """Numbers to add up to 0, and a third of the edges below the diagonal hidden."""
    generator = torch.Generator().manual_seed(5)
    mask = -torch.rand(batch, heads, SIZE, SIZE, generator=generator) * 2
    hidden = torch.rand(batch, heads, SIZE, SIZE, generator=generator) < 1 / 3
    mask[hidden.tril(-1)] = LOW
    mask[0, 0, 0, 0] = 0.0
    return mask


def placed(mask: Tensor) -> Step:
    """The mask of each token's row and column, by loops."""

    def step(_: int, x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        out = x.clone()
        for i, (own, other) in enumerate(zip(rows.tolist(), columns.tolist(), strict=True)):
            for q, r in enumerate(own):
                for k, c in enumerate(other):
                    if r >= 0 and c >= 0:
                        value = mask[i % len(mask), :, r, c]
                        out[i, :, q, k] += value.masked_fill(value <= LOW, -torch.inf)
        return out

    return step


SHAPES = {"one for all": (1, 1), "each head": (1, 4), "each item": (2, 1), "each of both": (2, 4)}


@pytest.mark.parametrize("shape", SHAPES)
@each_padding
@each_kernel
def test_a_mask_is_added_by_token_position_as_attention_by_hand(
    family: str, kernel: str, padding: str, shape: str
) -> None:
    mask = random_mask(*SHAPES[shape])
    batch, model = batch_of(family, padding), watched(family, kernel)
    with model.intervene(Mask(mask)):
        got = model(batch).logits
    hand = by_token({"bias": placed(mask)}, padding).model(family)
    wanted = hand(**model.batch(batch)).logits
    rows = real_rows(batch)
    torch.testing.assert_close(got[rows], wanted[rows], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_a_mask_covers_the_tokens_that_are_generated(family: str, cache: str) -> None:
    mask, batch, model = random_mask(2, 4), left(family), watched(family)
    with model.intervene(Mask(mask)):
        got = generated(model.module, batch, cache_of(cache, model.module))
    hand = by_token({"bias": placed(mask)}, "left", grows=True).model(family)
    wanted = generated(hand, batch, cache_of("whole", hand))
    assert torch.equal(got.sequences, wanted.sequences)
    torch.testing.assert_close(got.logits, wanted.logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("padding", ["no", "left", "right"])
def test_the_zeros_of_the_document_change_nothing(family: str, padding: str) -> None:
    batch, model = batch_of(family, padding), watched(family)
    with model.intervene(Mask(torch.zeros(1, 4, 11, 11))):
        got = model(batch).logits
    assert torch.equal(got, model(batch).logits)


def test_a_mask_opens_the_future_only_if_it_is_allowed_to(bare: Bare) -> None:
    model = bare("llama", "eager")
    ids = torch.tensor([[3, 17, 40, 8, 22]])
    zeros = torch.zeros(1, 1, 5, 5)
    with model.intervene(Mask(zeros, allow_future=True)):
        got = model(ids).logits
        _, cache = model.run_with_cache(ids, sites="pattern")
    assert bool((cache["pattern", 0] > 0).all())
    model.close()
    # Transformers takes a 4-D mask as it is, without a causal one.
    wanted = model.module(input_ids=ids, attention_mask=zeros).logits
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


def test_with_the_future_open_padding_stays_hidden() -> None:
    model = watched("qwen3")
    ids = torch.tensor([[3, 17, 40, 8, 22], [0, 0, 9, 4, 6]])
    batch = {"input_ids": ids, "attention_mask": (ids > 0).long()}
    one = Mask(torch.zeros(1, 1, 5, 5), allow_future=True, layers=[0, 1])
    with model.intervene(one):
        both = model(model.batch(batch)).logits
        alone = model([[9, 4, 6]]).logits
    torch.testing.assert_close(both[1, 2:], alone[0], atol=1e-5, rtol=1e-5)


def test_half_the_minimum_of_any_dtype_hides(family: str) -> None:
    model = watched(family)
    hidden = torch.zeros(1, 1, 6, 6, dtype=torch.float16)
    hidden[..., 3:, 1] = torch.finfo(torch.float16).min
    ids = [[5, 9, 2, 33, 17, 21]]
    with model.intervene(Mask(hidden)):
        got = model(ids).logits
    with model.intervene(Bias(value=-torch.inf, queries=slice(3, None), keys=1)):
        wanted = model(ids).logits
    assert torch.equal(got, wanted)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.zeros(5, 5), "mask has shape (5, 5). Give a tensor (batch or 1, head or 1, query, "),
        ([[0.0]], "mask has shape (). Give a tensor"),
        (torch.ones(1, 1, 5, 5).bool(), "mask is torch.bool. Give floats to add: 0 attends, the d"),
        (torch.ones(1, 1, 5, 5), "the greatest number of mask is 1.0, not 0. A custom 4-D mask is"),
        (torch.full((1, 1, 5, 5), LOW), f"the greatest number of mask is {LOW}, not 0."),
        (torch.full((1, 1, 5, 5), float("nan")), "the greatest number of mask is nan, not 0."),
    ],
)
def test_what_is_no_mask_is_refused_when_it_is_written(mask: Any, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        Mask(mask)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((3, 1, 5, 5), "mask is for 3 inputs and 1 heads, and layer 0 has 2 and 4. Give (1 or 2, "),
        ((1, 3, 5, 5), "mask is for 1 inputs and 3 heads"),
        ((1, 1, 4, 5), "mask has 4 rows and 5 columns, and there are tokens up to position 4 now."),
        ((1, 1, 5, 4), "mask has 5 rows and 4 columns"),
    ],
)
def test_what_does_not_fit_is_refused(shape: tuple[int, ...], message: str) -> None:
    model = watched("llama")
    with (
        model.intervene(Mask(torch.zeros(shape))),
        pytest.raises(InputError, match=re.escape(message)),
    ):
        model([[3, 17, 40, 8, 22], [9, 1, 30, 5, 6]])


def test_a_row_that_is_left_nothing_is_refused() -> None:
    mask = torch.zeros(1, 1, 3, 3)
    mask[..., 1, :] = -torch.inf
    model: Model = watched("llama")
    with model.intervene(Mask(mask)), pytest.raises(InputError, match="hides every key of row 1"):
        model([[3, 17, 40]])
