"""A run over problems into a store: resumable, batch by batch, whatever is computed.

Captures are such runs, and so are the experiments of the recipes. This module knows neither what is
computed nor what is stored.
"""

import logging
import shutil
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import numpy.typing as npt
import torch
import xarray as xr
from tqdm.auto import tqdm
from zarr.abc.store import Store

from probe import store as stores
from probe.disk import size
from probe.errors import InputError, StoreError, UnsupportedModelError, WiringError
from probe.hearing import reading
from probe.model import Model
from probe.places import Folder, Objects, place
from probe.plans import Item
from probe.schema import Labels

log = logging.getLogger("probe")

_HOPELESS = 8  # problems of a new store that may fail before any succeeds

OnError = Literal["record", "raise"]


@dataclass(frozen=True, slots=True)
class Reading:
    """What was computed of one problem.

    Attributes:
        arrays: For each array of the store, without the dim problem; none where they were put.
        loss: Mean next-token negative log-likelihood of the problem in nats, generated tokens not
            counted; NaN for one token or without logits.
        labels: What its rows and columns are, where tokens were generated.
    """

    arrays: Mapping[str, npt.NDArray[Any]]
    loss: float
    labels: Labels | None = None


@dataclass(frozen=True, slots=True)
class Work:
    """What a run does.

    Attributes:
        items: The problems, in the order of the store.
        batches: Indices of those that are computed together, the same whenever a run is resumed.
        config: All that shapes the numbers, as JSON data; a store resumes only under the same.
        size: Bytes expected on disk.
        create: Makes the store: `create(path, **options)`, see `probe.store.create`.
        compute: `compute(batch, proof=...)` gives what was computed of each problem of a batch;
            `proof` until a batch has succeeded in this run.
        around: What takes the results instead of the writer: it is given that, and the part.
        puts: Whether `compute` takes a writer as well, and puts the arrays there layer by layer.
    """

    items: Sequence[Item]
    batches: Sequence[Sequence[int]]
    config: Mapping[str, object]
    size: int
    create: Callable[..., stores.Writer]
    compute: Callable[..., Sequence[Reading]]
    puts: bool = False
    around: Callable[[stores.Writer, tuple[int, int]], Any] | None = None


@dataclass(frozen=True, slots=True)
class Into:
    """Where a batch's arrays go while it is computed: into a store, but for what that has."""

    writer: Any
    batch: Sequence[int]
    pending: Container[int]

    def begin(self, n: int, labels: Labels | None = None) -> None:
        """Begin with the n-th problem of the batch; labels where they were not known before."""
        if self.batch[n] in self.pending:
            self.writer.begin(self.batch[n], labels)

    def tall(self, name: str) -> int:
        """See `Writer.tall`."""
        return int(self.writer.tall(name))

    def put(
        self,
        some: Sequence[int],
        name: str,
        values: npt.NDArray[Any],
        layer: int,
        row: int | None = None,
    ) -> None:
        """One layer of neighbours in the batch, alike in rows and columns: see `Writer.put`."""
        kept = [n for n, at in enumerate(some) if self.batch[at] in self.pending]
        if kept:
            indices = [self.batch[some[n]] for n in kept]
            some_values = values if len(kept) == len(some) else values[kept]
            self.writer.put(indices, name, some_values, layer, row)


def require(
    store: object, on_error: object, part: object = (1, 1), overwrite: bool = False
) -> None:
    """Refuse what is no place for a store, no way to treat errors, and no part of a run.

    Raises:
        InputError: The value, and what to give.
    """
    place(store)
    if on_error not in get_args(OnError):
        raise InputError(f"on_error={on_error!r}. Choose 'record' or 'raise'.")
    numbers = isinstance(part, tuple) and len(part) == 2 and all(type(n) is int for n in part)
    if not numbers or not 1 <= part[0] <= part[1]:  # type: ignore[index]
        raise InputError(f"part={part!r:.40}. Give (i, n), from (1, n) to (n, n).")
    if overwrite and part != (1, 1):
        raise InputError(
            f"overwrite=True with part={part!r}: each part would remove what the others have "
            "written. Remove the old store first."
        )


def run(
    model: Model,
    work: Work,
    store: str | Path | Store,
    *,
    on_error: OnError = "record",
    overwrite: bool = False,
    progress: bool = True,
    part: tuple[int, int] = (1, 1),
    fsync: bool = False,
) -> xr.Dataset:
    """Do the work that a store still lacks, in eval mode and without gradients.

    Args:
        model: The model.
        work: What to do.
        store: Folder of the store, or a zarr store object.
        on_error: What to do with a problem that fails: "record" it with its reason (status 2) and
            go on, or "raise". A new run whose first problems all fail raises.
        overwrite: Replace a store that is there.
        progress: Show a progress bar on stderr.
        part: (i, n): do the i-th of n parts, which n processes may do at once.
        fsync: Force each shard to the disk: see `probe.store.create`.

    Returns:
        The store, opened: see `probe.open`.

    Raises:
        InputError: The store, the part, or on_error cannot be used.
        StoreError: The store is of another run, foreign, in use, or the disk is full.
        WiringError: What was read is not what the model computed; nothing wrong is stored.
    """
    require(store, on_error, part, overwrite)
    where = place(store)
    new = overwrite or where.vacant()
    options: dict[str, Any] = {"part": part, "fsync": fsync}
    with ExitStack() as stack:
        stack.enter_context(reading(model.module))
        if new:
            _require_room(work.size, where)
        own = stack.enter_context(_writer(work, where, new, overwrite, options))
        writer: Any = stack.enter_context(closing(work.around(own, part))) if work.around else own
        pending = {i for shard in writer.pending() for i in shard}
        # Batches stay as planned whatever is done already: in another batch a number may differ in
        # its last bit, and a resumed run must equal an uninterrupted one.
        batches = [batch for batch in work.batches if pending.intersection(batch)]
        outcomes = _outcomes(work, batches, on_error, partial(Into, writer, pending=pending), new)
        bar = tqdm(total=len(pending), unit="problem", disable=not (progress and pending))
        with bar:
            for index, outcome in outcomes:
                writer.publish()  # a store is there once a batch has run and is proven
                if index not in pending:
                    continue
                if isinstance(outcome, str):
                    log.warning("problem %r failed: %s", work.items[index].problem.id, outcome)
                    writer.fail(index, outcome)
                elif work.puts:
                    writer.done(index, outcome.loss)
                else:
                    arrays = {name: [array] for name, array in outcome.arrays.items()}
                    labels = None if outcome.labels is None else [outcome.labels]
                    writer.append([index], arrays, loss=[outcome.loss], labels=labels)
                    del arrays
                del outcome  # or it would stay in memory while the next batch is read
                bar.update()
    return stores.open(where)


def _writer(
    work: Work, where: Folder | Objects, new: bool, overwrite: bool, options: Mapping[str, Any]
) -> stores.Writer:
    """A new store's, hidden until it is proven; or that of a store that is there.

    Where several processes begin at once, one makes the store and the others join it.
    """
    if not new:
        return stores.resume(where, config=work.config, **options)
    together = options["part"][1] > 1
    try:
        return work.create(where, overwrite=overwrite, hidden=not together, **options)
    except StoreError:
        if not together or overwrite or where.vacant():
            raise
        return stores.resume(where, config=work.config, **options)


def _require_room(expected: int, where: Folder | Objects) -> None:
    if isinstance(where, Objects):
        return
    path = where.path
    existing = next(folder for folder in path.absolute().parents if folder.exists())
    free = shutil.disk_usage(existing).free
    if expected > free:
        raise StoreError(
            f"this run would write about {size(expected)} to {path}, and the disk has "
            f"{size(free)} free. Select fewer layers, heads, queries or keys (see probe.plan), "
            "or use another disk."
        )


def _outcomes(
    work: Work,
    batches: Sequence[Sequence[int]],
    on_error: str,
    into: Callable[[Sequence[int]], Into],
    new: bool,
) -> Iterator[tuple[int, Reading | str]]:
    """Problem by problem, what was computed or why it failed.

    A batch that fails is halved until it fits in memory or the problem at fault stands alone. When
    the first problems of a new store all fail, so will the others: then the run does too.
    """
    queue = [list(batch) for batch in reversed(batches)]
    limit, proven, failed = max(map(len, queue), default=0), False, 0
    while queue:
        batch = queue.pop()
        if len(batch) > limit:
            queue += [batch[limit:], batch[:limit]]
            continue
        try:
            where = {"into": into(batch)} if work.puts else {}
            readings = work.compute(batch, proof=not proven, **where)
        except (WiringError, UnsupportedModelError, StoreError):
            raise
        except Exception as error:
            if len(batch) > 1:
                half = len(batch) // 2
                if out_of_memory(error) and half < limit:
                    limit = half
                    log.warning("out of memory; going on with batches of %d problems", limit)
                queue += [batch[half:], batch[:half]]
            elif on_error == "raise" or (new and not proven and _hopeless(error, failed, work)):
                error.add_note(f"This happened in problem {work.items[batch[0]].problem.id!r}.")
                raise
            else:
                failed += 1
                yield batch[0], f"{type(error).__name__}: {error}"
        else:
            proven = True
            yield from zip(batch, readings, strict=True)
            del readings


def _hopeless(error: Exception, failed: int, work: Work) -> bool:
    """Whether a run that has done nothing yet should stop: nothing will ever succeed."""
    all_refused = isinstance(error, InputError) and failed + 1 == len(work.items)
    return failed >= _HOPELESS or all_refused


def out_of_memory(error: Exception) -> bool:
    """Whether an error says that memory ran short, on a GPU or elsewhere."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "allocate memory" in str(error)
    )
