"""Scores in memory that is there, without gradients and without temporaries."""

from functools import lru_cache
from math import prod

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
    least, most = _bounds(*s.shape[-2:], s.dtype)
    bits = s.view(least.dtype)
    torch.clamp(bits, least, most, out=bits)


@lru_cache(maxsize=8)
def _bounds(rows: int, columns: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    kind = torch.int32 if dtype == torch.float32 else torch.int64
    with torch.device("cpu"):  # whatever the default is
        hidden = torch.ones(rows, columns, dtype=torch.bool).triu()
        minus_inf = torch.tensor(-torch.inf, dtype=dtype).view(kind)
        least = torch.full((rows, columns), torch.iinfo(kind).min, dtype=kind)
        most = torch.full((rows, columns), torch.iinfo(kind).max, dtype=kind)
        return least.masked_fill_(hidden, minus_inf), most.masked_fill_(hidden, minus_inf)


def within(room: Tensor | None, *shape: int) -> Tensor | None:
    """The beginning of a flat tensor in this shape."""
    return None if room is None else room[: prod(shape)].view(shape)
