"""Problems in hand: which may come, and whether what comes fits the store."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from probe.errors import InputError
from probe.ledger import Ledger, Part
from probe.schema import DONE, Labels


class Arrivals:
    """The parts of a store that are not complete yet, and what is known not to come again.

    Attributes:
        parts: By their first problem.
        taken: For each problem, whether it is done, on the disk or on its way there.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self.parts: dict[int, Part] = {}
        self.taken = ledger.status == DONE
        self._known = ledger.rows.copy(), ledger.columns.copy()

    def part(self, index: int) -> Part:
        """The part in hand that takes this problem.

        Raises:
            InputError: There is no such problem, it is not ours, or it is done.
        """
        ledger, where = self._ledger, self._ledger.place
        count = len(ledger.ids)
        if not 0 <= index < count:
            raise InputError(
                f"there is no problem {index} in {where}: it has {count}, 0 to {count - 1}."
            )
        if index not in ledger.own:
            raise InputError(
                f"problem {ledger.ids[index]!r} of {where} is written by another part. "
                "Write only what pending() lists."
            )
        start = index - index % ledger.step
        part = self.parts.get(start)
        if self.taken[index] or (part and index in part.arrived):
            raise InputError(
                f"problem {ledger.ids[index]!r} of {where} is there already. "
                "Write only what pending() lists."
            )
        if part is None:
            part = Part(start, min(start + ledger.step, count))
            part.missing = int((~self.taken[start : part.stop]).sum())
            self.parts[start] = part
        return part

    def unlabel(self, part: Part, index: int) -> None:
        """Forget labels that came with an attempt."""
        if part.labels.pop(index, None):
            self._ledger.rows[index], self._ledger.columns[index] = (x[index] for x in self._known)

    def relabel(self, part: Part, index: int, labels: Labels) -> None:
        """Remember new labels; they are written with the part."""
        rows, columns = len(labels.query_position), len(labels.key_position)
        sizes = self._ledger.sizes
        if rows > sizes["query"] or columns > sizes["key"]:
            raise InputError(
                f"problem {labels.id!r} has {rows} rows and {columns} columns now, and "
                f"{self._ledger.place} was made for {sizes['query']} and {sizes['key']}. "
                "Create it with as many as the longest may get."
            )
        self._ledger.rows[index], self._ledger.columns[index] = rows, columns
        part.labels[index] = labels

    def note(self, part: Part, index: int, name: str, layer: int | None, stop: int | None) -> None:
        """Remember how far the rows of a layer, or of all layers, have come; None: all have."""
        stop = int(self._ledger.rows[index]) if stop is None else stop
        layers = range(self._ledger.sizes["layer"]) if layer is None else (layer,)
        part.came.setdefault(index, {}).setdefault(name, {}).update(dict.fromkeys(layers, stop))

    def layers(self, part: Part, index: int, name: str) -> int:
        """How many layers of a problem have come, with all their rows."""
        total = int(self._ledger.rows[index])
        return list(part.came.get(index, {}).get(name, {}).values()).count(total)

    def require_next(
        self, part: Part, index: int, name: str, layer: int | None, row: int, tall: int
    ) -> None:
        """Refuse a row that is not the next of a layer."""
        if layer is None or not {"query", "key"} <= set(self._ledger.axes[name]):
            raise InputError(
                f"{name} came with row={row} and layer={layer}, and only a layer of matrices comes "
                "in rows. Put it whole."
            )
        came = part.came.get(index, {}).get(name, {}).get(layer, 0)
        if row != came or row % tall:
            raise InputError(
                f"row {row} of {name}, problem {self._ledger.ids[index]!r}, layer {layer}, came "
                f"after {came} rows. Put rows in order, {tall} at once."
            )

    def require_fit(
        self,
        indices: Sequence[int],
        name: str,
        values: npt.NDArray[Any],
        layer: int | None,
        row: int | None,
    ) -> None:
        """Refuse values of another shape, or that the stored dtype cannot hold."""
        ledger, axes = self._ledger, self._ledger.axes[name][1:]
        count = ledger.sizes["layer"]
        if layer is not None and not 0 <= layer < count:
            raise InputError(f"layer={layer}: the store has {count}, 0 to {count - 1}.")
        some = list(indices)[::-1]
        extents = zip(ledger.rows[some].tolist(), ledger.columns[some].tolist(), strict=True)
        for index in dict(zip(extents, some, strict=True)).values():  # the first of each extent
            expected = ledger.shape(name, index)
            sizes = dict(zip(axes, expected, strict=True))
            if layer is not None:
                sizes["layer"] = 1
            if row is not None and values.ndim == len(axes) + 1:
                given = dict(zip(axes, values.shape[1:], strict=True))
                sizes["query"] = min(given["query"], sizes["query"] - row)
                sizes["key"] = min(given["key"], sizes["key"])
            expected = tuple(sizes.values())
            if values.shape[1:] != expected:
                raise InputError(
                    f"{name} of problem {ledger.ids[index]!r} has shape {values.shape[1:]}. "
                    f"Give ({', '.join(axes)}) = {expected}."
                )
        dtype = ledger.arrays[name].dtype
        if values.size and (dtype.kind == "u" or name == "scores"):
            for index, own in zip(indices, values, strict=True):
                self._require_range(index, name, own, dtype)

    def _require_range(
        self, index: int, name: str, values: npt.NDArray[Any], dtype: np.dtype[Any]
    ) -> None:
        if dtype.kind == "u" and not (values.min() >= 0 and values.max() < 1.001):
            raise InputError(
                f"{name} of problem {self._ledger.ids[index]!r} goes from {values.min():.3g} to "
                f"{values.max():.3g}, and codes are of probabilities. Use dtype='float16'."
            )
        if name == "scores" and values.max() > np.finfo(dtype).max:
            raise InputError(
                f"scores of problem {self._ledger.ids[index]!r} pass what {dtype} holds "
                f"({np.finfo(dtype).max:.0f}). Use dtype='float32'."
            )
