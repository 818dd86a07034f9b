"""From the device to the machine's own memory, while the device goes on with the model."""

from collections import deque
from collections.abc import Callable
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor

# Tensors on their way, which the device's memory holds: as many, or so many bytes, but two always.
_COPIES, _BYTES = 16, 1 << 28

Array = npt.NDArray[Any]


class Landing:
    """Tensors on their way home, handed on in order.

    On CUDA a copy goes to pinned memory, on a stream of its own; a tensor of the CPU is handed on
    at once, as it is.
    """

    def __init__(self) -> None:
        self._coming: deque[tuple[torch.cuda.Event, Tensor, Callable[[Array], None]]] = deque()
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def bring(self, there: Tensor, then: Callable[[Array], None]) -> None:
        """Call `then` with the numbers, not later than in `finish`.

        Args:
            there: Numbers that nobody changes any more.
            then: What takes them.
        """
        if there.device.type != "cuda":
            then(there.to("cpu").numpy())
            return
        here = torch.empty(there.shape, dtype=there.dtype, pin_memory=True)
        if there.device not in self._streams:
            self._streams[there.device] = torch.cuda.Stream(there.device)  # type: ignore[no-untyped-call]
        stream = self._streams[there.device]
        stream.wait_stream(torch.cuda.current_stream(there.device))  # until it is computed
        with torch.cuda.stream(stream):
            here.copy_(there, non_blocking=True)
        there.record_stream(stream)  # its memory is not used again before it is copied
        self._coming.append((stream.record_event(), here, then))
        while len(self._coming) > 2 and self._full():
            self._hand_on()

    def finish(self) -> None:
        """Hand on all that is still coming."""
        while self._coming:
            self._hand_on()

    def _full(self) -> bool:
        size = sum(here.nbytes for _, here, _ in self._coming)
        return len(self._coming) > _COPIES or size > _BYTES

    def _hand_on(self) -> None:
        event, here, then = self._coming.popleft()
        event.synchronize()
        then(here.numpy())
