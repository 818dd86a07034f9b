"""Selecting along one dim of a tensor, by a slice (a view) or by a list of indices (a copy)."""

from collections.abc import Sequence

import torch
from torch import Tensor

Index = Sequence[int] | slice | None


def slices(size: int, step: int) -> list[slice]:
    """A range cut into pieces of at most `step`."""
    return [slice(i, min(i + step, size)) for i in range(0, size, step)]


def wide(x: Tensor) -> Tensor:
    """At least float32."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def take(x: Tensor, index: Index, dim: int) -> Tensor:
    """Select along one dim: a view for slices, a copy for lists."""
    if index is None:
        return x
    if isinstance(index, slice):
        return x[(slice(None),) * dim + (index,)]
    return x.index_select(dim, torch.as_tensor(index, device=x.device, dtype=torch.long))


def positions(index: Index, size: int, device: torch.device) -> Tensor:
    """What an index selects, as int64 positions.

    Raises:
        IndexError: A list names a place that is not there; negative ones are not.
    """
    if isinstance(index, slice | None):
        start, stop, step = (index or slice(None)).indices(size)
        return torch.arange(start, max(start, stop), step, device=device)
    if len(index) and not (min(index) >= 0 and max(index) < size):
        wrong = next(i for i in index if not 0 <= i < size)
        raise IndexError(f"index {wrong} is out of range: there are 0 to {size - 1}.")
    return torch.as_tensor(index, device=device, dtype=torch.long)


def bounds(index: Index, size: int) -> tuple[int, int]:
    """The smallest range [first, stop) that holds an index."""
    if isinstance(index, slice | None):
        inside = range(*(index or slice(None)).indices(size))
        return (inside[0], inside[-1] + 1) if inside else (0, 0)
    return (min(index), max(index) + 1) if len(index) else (0, 0)


def unbroken(index: Index) -> bool:
    """Whether an index is known to select neighbours in order."""
    return index is None or (isinstance(index, slice) and index.step in (None, 1))
