"""Numbers come home in order, each as it was when it was given."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from probe.landing import Landing

DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    ),
]


@pytest.mark.parametrize("device", DEVICES)
def test_numbers_come_home_in_order(device: str) -> None:
    landing = Landing()
    found: list[npt.NDArray[Any]] = []
    for n in range(7):
        there = torch.full((3, 1000 + n), float(n), dtype=torch.float16, device=device)
        landing.bring(there.T, found.append)
        del there  # its memory may be used again
    landing.finish()
    assert [one.shape for one in found] == [(1000 + n, 3) for n in range(7)]
    for n, one in enumerate(found):
        np.testing.assert_array_equal(one, np.float16(n))


def test_on_the_cpu_nothing_is_copied_and_nothing_waits() -> None:
    landing = Landing()
    found: list[npt.NDArray[Any]] = []
    there = torch.zeros(4)
    landing.bring(there, found.append)
    there[0] = 1
    assert found[0].tolist() == [1, 0, 0, 0]
