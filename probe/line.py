"""Work in a line: encoded by several threads, done in order by one."""

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any


class Line:
    """Work that is done in order by one thread, each after a part that several may do at once.

    It is bounded: who gives more than it holds waits. The first error stops all that follows, and
    is raised by whatever is asked of the line next.
    """

    def __init__(self, threads: int, depth: int, tend: Callable[[], float | None]) -> None:
        """Start it.

        Args:
            threads: How many do what comes first.
            depth: How much waits at most.
            tend: Called now and then by the thread that does things in order; says in how many
                seconds it wants to be called again at the latest, if it does.
        """
        self._tend, self._ended = tend, False
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="probe-encode")
        self._queue: queue.Queue[tuple[Future[Any] | None, Callable[..., None]] | None]
        self._queue = queue.Queue(depth)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="probe-write", daemon=True)
        self._thread.start()

    def after(self, then: Callable[[Any], None], what: Callable[..., Any], *args: Any) -> None:
        """Do `what` at once, and `then` with what it gave, after all that came before."""
        self._require_well()
        self._queue.put((self._pool.submit(what, *args), then))

    def early(self, what: Callable[[], None]) -> Future[None]:
        """Do something at once, before what `after` is given later."""
        self._require_well()
        return self._pool.submit(what)

    def do(self, what: Callable[[], None]) -> None:
        """Do something after all that came before."""
        self._require_well()
        self._queue.put((None, what))

    def wait(self) -> None:
        """Until all is done."""
        self._queue.join()
        self._require_well()

    def close(self) -> None:
        """Finish what is waiting, and stop. No error is raised; calling it again does nothing."""
        if threading.current_thread() is self._thread:  # who used it was dropped: it ends here
            self._ended = True
            self._queue.put(None)
            self._pool.shutdown(wait=False)
            return
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join()
        self._pool.shutdown()

    def _require_well(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        patience: float | None = None
        while True:
            try:
                item = self._queue.get(timeout=patience)
            except queue.Empty:
                patience = self._safely(self._tend)
                continue
            if item is not None:
                patience = self._safely(partial(self._step, *item))
            self._queue.task_done()
            if item is None:
                return
            item = None  # what it holds is not kept until the next comes

    def _step(self, future: Future[Any] | None, what: Callable[..., None]) -> float | None:
        what() if future is None else what(future.result())
        return self._tend()

    def _safely(self, what: Callable[[], float | None]) -> float | None:
        if self._error is None and not self._ended:
            try:
                return what()
            except BaseException as error:  # raised where the line is used next
                self._error = error
        return None
