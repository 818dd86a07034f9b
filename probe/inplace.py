"""Scores in memory that is there, without gradients and without temporaries."""

from functools import lru_cache
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


def on_cpu(x: Tensor) -> bool:
    """Whether `hide_triangle` can take it: numbers of a CPU, none that are fake."""
    return x.device.type == "cpu" and type(x) is Tensor


def hide_triangle(s: Tensor) -> None:
    """Put -inf on and above the diagonal, whatever is there, without gradients.

    The bits, as whole numbers, are kept between bounds that leave any of them, or only those of
    -inf. On a CPU that takes an eighth of the time of `masked_fill_`.
    """
    least, most = map(torch.from_numpy, _bounds(*s.shape[-2:], s.itemsize))
    bits = s.view(least.dtype)
    torch.clamp(bits, least, most, out=bits)


@lru_cache(maxsize=8)
def _bounds(rows: int, columns: int, itemsize: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """NumPy's: what torch makes inside a mode (fake, functional) must not be kept for outside."""
    number, whole = (np.float32, np.int32) if itemsize == 4 else (np.float64, np.int64)
    hidden = np.triu(np.ones((rows, columns), bool))
    minus_inf, kind = np.full((), -np.inf, number).view(whole), np.iinfo(whole)
    least = np.where(hidden, minus_inf, whole(kind.min))
    return least, np.where(hidden, minus_inf, whole(kind.max))


def within(room: Tensor | None, *shape: int) -> Tensor | None:
    """The beginning of a flat tensor in this shape."""
    return None if room is None else room[: prod(shape)].view(shape)
