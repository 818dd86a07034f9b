"""What has come for shards that must be whole before they are encoded, as those of tiny problems.

Nothing is copied while results come: they are laid together by the thread that encodes them.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from probe.ledger import Ledger, Part
from probe.schema import DONE
from probe.selection import neighbours
from probe.sharding import cast

Array = npt.NDArray[Any]


class Piles:
    """What has come of each array of a part, in order, until the part is committed.

    Attributes:
        spare: Memory of a shard that is kept, for the next: new memory costs more than filling it.
    """

    def __init__(
        self, ledger: Ledger, taken: npt.NDArray[np.bool_], wait: Callable[[], None]
    ) -> None:
        """Begin with nothing.

        Args:
            ledger: Of the store.
            taken: For each problem, whether it is done; kept up to date by who has it.
            wait: Returns when all that was committed is kept.
        """
        self._ledger, self._taken, self._wait = ledger, taken, wait
        self.spare: dict[str, Array] = {}

    def add(
        self, part: Part, name: str, indices: Sequence[int], corner: Sequence[int], values: Array
    ) -> None:
        """Hold on to cells of some problems, which begin at this corner of each."""
        dtype = self._ledger.arrays[name].dtype
        if values.dtype.kind not in "OT" and values.dtype != dtype:
            values = cast(values, dtype)
        elif not values.flags.c_contiguous:  # a view may keep much more in memory
            values = values.copy()
        rows = neighbours(np.array(indices) - part.start)
        extent = [slice(at, at + n) for at, n in zip(corner, values.shape[1:], strict=True)]
        self.begin(part, name).append(((rows, *extent), values))

    def begin(self, part: Part, name: str) -> list[tuple[Any, Any]]:
        """The pile of one array, with what earlier runs finished of it: a shard is kept whole."""
        if name not in part.piles:
            pile = []
            if self._taken[part.start : part.stop].any():
                self._wait()
                done = self._ledger.status[part.start : part.stop] == DONE
                there = np.asarray(self._ledger.arrays[name][part.start : part.stop])
                pile.append(((done,), there[done]))
            part.piles[name] = pile
        return part.piles[name]

    def forget(self, part: Part, index: int, name: str) -> None:
        """Leave nothing of what came of a problem before."""
        blank = self._ledger.arrays[name].fill_value
        part.piles[name].append(((index - part.start,), blank))

    def blocks(self, part: Part) -> Iterator[tuple[str, Array, Callable[[], None]]]:
        """Memory for the cells of each array, and what lays there all that has come.

        Of problems that are not done it lays nothing.
        """
        unfinished = ~self._taken[part.start : part.stop]
        for name, pile in part.piles.items():
            block, blank = self._memory(part, name), self._ledger.arrays[name].fill_value
            whole = [((...,), blank), *pile, ((unfinished,), blank)]
            yield name, block, partial(_lay, block, whole)

    def _memory(self, part: Part, name: str) -> Array:
        array, ledger = self._ledger.arrays[name], self._ledger
        # one problem needs only its own rows and columns; several share whole matrices
        shape = ledger.shape(name, part.start) if ledger.step == 1 else array.shape[1:]
        shape = (part.stop - part.start, *shape)
        block = self.spare.pop(name, None)
        if block is None or block.shape != shape:
            block = np.empty(shape, array.dtype)
        return block


def _lay(block: Array, pile: Sequence[tuple[Any, Any]]) -> None:
    for cells, values in pile:
        block[cells] = values
