"""What each form of a mask lets a query see."""

import math

import pytest
import torch
from torch import Tensor

from probe.attention import AttentionCall
from probe.errors import InputError
from probe.filling import fill
from tests.naive import INF, call_of, close, naive


def seen(call: AttentionCall, batch: int = 0) -> list[str]:
    """Each row of the first head as a string: x where it attends."""
    rows = (call.pattern()[batch, 0] > 0).tolist()
    return ["".join("x" if on else "." for on in row) for row in rows]


def test_without_a_mask_rows_are_causal_from_the_top_left() -> None:
    assert seen(call_of(3, 3)) == ["x..", "xx.", "xxx"]


def test_without_a_mask_a_prefill_into_a_static_cache_sees_nothing_of_the_empty_rest() -> None:
    assert seen(call_of(2, 5)) == ["x....", "xx..."]


def test_without_a_mask_a_single_row_sees_every_key() -> None:
    assert seen(call_of(1, 4)) == ["xxxx"]


def test_a_missing_mask_means_what_torch_makes_of_it() -> None:
    for n, k in ((4, 4), (3, 6), (1, 5), (5, 3)):
        call = call_of(n, k)
        z = torch.nn.functional.scaled_dot_product_attention(
            call.query, call.key, call.value, is_causal=n > 1, enable_gqa=True
        )
        torch.testing.assert_close(call.mix(call.pattern()), z.transpose(1, 2))


def test_a_two_dimensional_mask_is_aligned_at_the_bottom_right() -> None:
    mask = torch.ones(2, 5, dtype=torch.long)
    assert seen(call_of(2, 5, mask)) == ["xxxx.", "xxxxx"]


def test_a_two_dimensional_mask_hides_padding_on_either_side() -> None:
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]])
    assert seen(call_of(4, 4, mask), 0) == ["....", "....", "..x.", "..xx"]
    assert seen(call_of(4, 4, mask), 1) == ["x...", "xx..", "xxx.", "xxx."]


def test_a_window_holds_the_row_itself() -> None:
    assert seen(call_of(4, 4, window=2)) == ["x...", "xx..", ".xx.", "..xx"]
    assert seen(call_of(1, 4, window=2)) == ["..xx"]
    assert seen(call_of(2, 4, torch.ones(2, 4), window=2)) == [".xx.", "..xx"]
    assert seen(call_of(3, 3, window=2, causal=False)) == ["xx.", "xxx", ".xx"]


def test_a_mask_of_four_dimensions_brings_its_own_window() -> None:
    mask = torch.ones(1, 1, 3, 3, dtype=torch.bool).tril()
    assert seen(call_of(3, 3, mask, window=1)) == ["x..", "xx.", "xxx"]


def test_small_biases_of_a_float_mask_are_added_and_minus_infinity_hides() -> None:
    mask = torch.zeros(1, 1, 3, 3)
    mask[..., 1] = -1e4  # makes a key negligible, but attended all the same
    mask[..., 2] = -INF
    call = call_of(3, 3, mask)
    plain = call_of(3, 3, causal=False).scores()
    assert torch.equal(call.scores()[..., 0], plain[..., 0])
    assert torch.equal(call.scores()[..., 1], plain[..., 1] - 1e4)
    assert bool((call.scores()[..., 2] == -INF).all())


def test_a_bias_beside_the_smallest_number_still_hides() -> None:
    mask = torch.full((1, 1, 2, 2), torch.finfo(torch.float32).min)
    mask[..., 0] = 0
    mask = mask * 0.9  # as a product of masks would leave it
    assert seen(call_of(2, 2, mask)) == ["x.", "x."]


@pytest.mark.parametrize("sinks", [None, torch.zeros(4)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_fully_padded_row_is_zero_and_never_nan(dtype: torch.dtype, sinks: Tensor | None) -> None:
    hidden = torch.zeros(1, 1, 3, 3).tril() + torch.full((3, 3), torch.finfo(dtype).min)
    for mask in (
        hidden.to(dtype),
        torch.zeros(1, 1, 3, 3, dtype=torch.bool),
        torch.zeros(2, 3, dtype=torch.bool),
        torch.full((1, 1, 3, 3), -INF, dtype=dtype),
    ):
        call = call_of(3, 3, mask, sinks=sinks)
        assert bool((call.pattern() == 0).all())
        assert bool((call.scores() == -INF).all())
        out = fill(call, torch.full((2, 4, 3, 3), math.nan))
        assert bool((out == 0).all())


@pytest.mark.parametrize("share", [1, 2])
def test_a_single_query_of_a_window_without_a_mask_is_the_last_token(share: int) -> None:
    torch.manual_seed(share)
    call = AttentionCall(
        torch.randn(1, 2, 1, 3), torch.randn(1, 2 // share, 6, 3), torch.randn(1, 2 // share, 6, 3),
        window=4,
    )  # fmt: skip
    close(call.pattern(), naive(call)[1])
    close(fill(call, torch.full((1, 2, 1, 6), math.nan)), naive(call)[1])


def test_a_mask_of_three_dimensions_is_refused() -> None:
    with pytest.raises(InputError, match=r"shape \(2, 3, 3\) has 3 dimensions\. Give a 4-D mask"):
        call_of(3, 3, torch.ones(2, 3, 3))
