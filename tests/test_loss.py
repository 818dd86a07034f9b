"""The next-token loss, computed block by block, against a loop over tokens in float64."""

import math

import pytest
import torch

from probe import loss
from probe.loss import next_token_nll


def naive(logits: torch.Tensor, ids: torch.Tensor) -> list[float]:
    rows = logits.double().tolist()
    return [
        math.log(math.fsum(math.exp(x) for x in row)) - row[int(after)]
        for row, after in zip(rows[:-1], ids[1:], strict=True)
    ]


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 17])
@pytest.mark.parametrize("block", [1, 21, 1 << 19])  # one row, three rows, all rows at once
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_equals_a_loop(
    length: int, block: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(loss._BLOCK, "cpu", block)
    logits = torch.randn(length, 7, generator=torch.Generator().manual_seed(0)).to(dtype) * 5
    ids = torch.arange(length) % 7
    found = next_token_nll(logits, ids)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert found.tolist() == pytest.approx(naive(logits, ids), abs=1e-5)


def test_nothing_of_nothing() -> None:
    assert next_token_nll(torch.zeros(0, 7), torch.zeros(0, dtype=torch.long)).shape == (0,)


def test_gradients_are_those_of_a_softmax(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(loss._BLOCK, "cpu", 14)
    logits = torch.randn(9, 7, dtype=torch.float64, requires_grad=True)
    ids = torch.arange(9) % 7
    found = torch.autograd.grad(next_token_nll(logits, ids).sum(), logits)[0]
    known = logits.detach().softmax(-1)
    known[range(8), ids[1:]] -= 1
    known[8] = 0  # nothing comes after the last
    assert torch.allclose(found, known)


def test_gradients_of_half_precision_flow_under_autocast() -> None:
    logits = torch.randn(3, 5, dtype=torch.float16, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (found,) = torch.autograd.grad(next_token_nll(logits, torch.arange(3)).sum(), logits)
    assert bool(found[:2].any())
