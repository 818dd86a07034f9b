"""Masks of flex and flash kernels, read apart from any model."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask
from transformers import masking_utils
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    chunked_causal_mask_function,
    flash_attention_mask,
    packed_sequence_compatibility_function,
    sdpa_mask,
    sliding_window_causal_mask_function,
)

from probe import interface, masks
from probe.errors import UnsupportedModelError
from tests import kernels
from tests.conftest import tiny_model
from tests.references import no_grad as no_grad

FLEX, FLASH = "flex_attention", "flash_attention_2"


@pytest.fixture(autouse=True)
def libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels.uncompiled_flex(monkeypatch)
    kernels.install_flash(monkeypatch)


# ------------------------------------------------------------------------------ flex

N = 200  # more than a block of 128
PADDING = torch.ones(2, N, dtype=torch.bool)
PADDING[1, :30] = False
RIGHT = PADDING.flip(1)
POSITIONS = torch.cat([torch.arange(90), torch.arange(N - 90)]).expand(2, -1)
MASKS: dict[str, dict[str, Any]] = {
    "causal": {"mask_function": causal_mask_function},
    "left padding": {"mask_function": causal_mask_function, "attention_mask": PADDING},
    "right padding": {"mask_function": causal_mask_function, "attention_mask": RIGHT},
    "sliding": {"mask_function": sliding_window_causal_mask_function(7)},
    "sliding, padded": {
        "mask_function": sliding_window_causal_mask_function(7),
        "attention_mask": PADDING,
    },
    "chunked": {"mask_function": chunked_causal_mask_function(16, torch.tensor([0, 30]))},
    "both ways": {"mask_function": bidirectional_mask_function, "attention_mask": PADDING},
    "packed": {
        "mask_function": packed_sequence_compatibility_function(
            causal_mask_function,
            POSITIONS,
            (POSITIONS.diff(prepend=-torch.ones(2, 1)) != 1).cumsum(-1),
        )
    },
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("rows", [N, 1, 37])
def test_a_block_mask_becomes_what_sdpa_is_given(name: str, rows: int) -> None:
    shape: dict[str, Any] = {
        "batch_size": 2,
        "q_length": rows,
        "kv_length": N,
        "q_offset": N - rows,
    }
    blocks = masking_utils.flex_attention_mask(**shape, **MASKS[name])
    wanted = sdpa_mask(**shape, **MASKS[name], allow_is_causal_skip=False)
    assert wanted is not None
    got = masks.from_blocks(blocks, rows, N)
    assert (got.shape, got.dtype) == ((2, 1, rows, N), torch.bool)
    assert torch.equal(got, wanted)


def test_a_block_mask_of_every_head_that_all_batch_items_share_keeps_its_shape() -> None:
    blocks = create_block_mask(lambda b, h, q, k: k <= q - h, 1, 4, 11, 11, device="cpu")
    wanted = torch.stack([torch.ones(11, 11).tril(-h) for h in range(4)]).bool()[None]
    assert torch.equal(masks.from_blocks(blocks, 11, 11), wanted)


def test_flex_attention_without_a_mask_hides_nothing() -> None:
    q = torch.randn(1, 2, 3, 4)
    call = interface._call(FLEX, torch.nn.Linear(1, 1), q, q, q, None, {})
    assert bool(call.keep().all())


# ------------------------------------------------------------------------------ flash


def holes(shape: tuple[int, int], seed: int) -> Tensor:
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.6
    mask[:, 0] = True
    return mask


@pytest.mark.parametrize("rows", [1, 4, 9])
@pytest.mark.parametrize("keys", [9, 12])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("causal", [True, False])
def test_a_padding_mask_is_read_as_the_unpadding_kernel_uses_it(
    rows: int, keys: int, window: int | None, causal: bool
) -> None:
    torch.manual_seed(0)
    q = torch.randn(3, 4, rows, 8)
    k, v = torch.randn(2, 3, 2, keys, 8)
    module = nn.Linear(1, 1, bias=False)
    module.is_causal = causal  # type: ignore[assignment]
    module.config = tiny_model("llama", FLASH).config  # type: ignore[assignment]
    for seed in range(5):
        mask = holes((3, 9), seed)
        kwargs = {"sliding_window": window, "scaling": 0.4}
        kernel = interface._kernel(module, FLASH)
        z, _ = kernel(module, q, k, v, mask, **kwargs)
        call = interface._call(FLASH, module, q, k, v, mask, kwargs)
        torch.testing.assert_close(call.mix(call.pattern()), z, atol=1e-5, rtol=1e-5)


def test_without_padding_nothing_dense_is_made() -> None:
    q = torch.randn(1, 2, 3, 4)
    call = interface._call(FLASH, nn.Linear(1, 1), q, q, q, None, {})
    assert call.mask is not None
    assert call.mask.shape == (1, 3)


def test_the_mask_function_adds_what_a_static_cache_needs_and_nothing_else() -> None:
    def both(**kwargs: Any) -> tuple[Tensor | None, Tensor | None]:
        given: dict[str, Any] = {"batch_size": 2, "device": torch.device("cpu")} | kwargs
        return masks.flash_mask(**given), flash_attention_mask(**given)

    for sizes in ((5, 5, 0, 0), (1, 9, 8, 0), (3, 7, 10, 6)):
        names = ("q_length", "kv_length", "q_offset", "kv_offset")
        assert both(**dict(zip(names, sizes, strict=True))) == (None, None)
    ones = torch.ones(2, 5, dtype=torch.bool)
    got, _ = both(q_length=3, kv_length=8, q_offset=torch.tensor(2), kv_offset=0)
    assert got is not None
    assert torch.equal(got, ones)
    # what crosses to an encoder is not cached
    crossing = {"mask_function": bidirectional_mask_function}
    assert both(q_length=3, kv_length=8, **crossing) == (None, None)
    padded = ones.clone()
    padded[0, 0] = False
    got, its = both(q_length=5, kv_length=5, attention_mask=padded)
    assert got is padded or torch.equal(got, its)  # type: ignore[arg-type]


def test_chunked_attention_is_refused_where_it_would_be_lost() -> None:
    class Config:
        attention_chunk_size = 4

    sizes: dict[str, Any] = {
        "batch_size": 1,
        "q_length": 5,
        "kv_length": 5,
        "device": torch.device("cpu"),
    }
    assert masks.flash_mask(**sizes, config=Config()) is None  # a layer without chunks
    with pytest.raises(UnsupportedModelError, match=r"in chunks of 4 tokens.* reaches token 5"):
        masks.flash_mask(**sizes, config=Config(), local_size=4)
    assert masks.flash_mask(**sizes | {"q_length": 4, "kv_length": 4}, local_size=4) is None


@pytest.mark.parametrize(
    ("positions", "n_batch", "packed"),
    [
        (None, 1, False),
        (torch.tensor([[0, 1, 2]]), 1, False),
        (torch.tensor([[7, 8, 9]]), 1, False),
        (torch.tensor([[9]]), 1, False),
        (torch.tensor([[0, 1, 0]]), 1, True),
        (torch.tensor([[0, 1, 0], [0, 1, 2]]), 2, False),
    ],
)
def test_packing_is_recognised_as_transformers_does(
    positions: Tensor | None, n_batch: int, packed: bool
) -> None:
    assert masks.is_packed(positions, n_batch) is packed
    assert bool(kernels.is_packed(positions, n_batch)) is packed
