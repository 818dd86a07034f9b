"""The run: a model reads problems, and what its attention does goes into a store."""

import logging
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import chain, islice
from os import PathLike
from pathlib import Path
from typing import Literal

import torch
import xarray as xr
from tqdm.auto import tqdm

from probe import store as stores
from probe.disk import size
from probe.errors import InputError, StoreError, UnsupportedModelError, WiringError
from probe.hearing import reading
from probe.interventions import Intervention
from probe.model import Model
from probe.planning import plan
from probe.plans import Plan
from probe.reading import Reading, read
from probe.schema import Site
from probe.selection import Selector

log = logging.getLogger("probe")

_HOPELESS = 8  # problems of a new store that may fail before any succeeds


def capture(
    model: Model,
    problems: object,
    store: str | Path,
    *,
    sites: Sequence[Site] | Site = ("pattern",),
    layers: Selector = None,
    heads: Selector = None,
    queries: Selector = None,
    keys: Selector = None,
    interventions: Sequence[Intervention] = (),
    dtype: str = "float16",
    batch_size: int | None = None,
    max_length: int | None = None,
    max_new_tokens: int = 0,
    on_error: Literal["record", "raise"] = "record",
    overwrite: bool = False,
    progress: bool = True,
) -> xr.Dataset:
    """Run problems through a model and store what its attention does.

    The model stays on its own kernel; only the rows, keys, heads and layers asked for are
    computed, in float32, and stored. The same call again goes on where a killed run stopped and
    tries again what failed. The first batch of every run proves layer by layer that what is
    stored is what the model computed with.

    Args:
        model: From `probe.load`; it runs in eval mode.
        problems: Anything that `probe.problems` reads.
        store: Folder of the store.
        sites: Of "pattern" (probabilities), "scores" (before the softmax), and "z" (each head's
            output before the output projection).
        layers: int, negative int, slice or list; default all.
        heads: Query heads, likewise.
        queries: Rows, likewise, or "last:6", "first:6", "segment:text".
        keys: Columns, likewise.
        interventions: What to change: see `Model.intervene`. They are recorded as data. What is
            stored is what the model then did.
        dtype: "float16" or "float32".
        batch_size: Problems in a batch at most. A problem's numbers do not depend on it beyond the
            rounding of the model's own kernel (about 1e-6 in float32, a few percent in bfloat16).
        max_length: Longer problems are cut to so many tokens.
        max_new_tokens: Let the model go on greedily, so many tokens at most. The new tokens have
            rows and columns like the others, and the segment "generated"; selections apply to the
            whole sequence, which is read in one forward. `loss` stays that of the problem.
        on_error: What to do with a problem on which the model fails: "record" it with its reason
            (status 2) and go on, or "raise". A new run whose first problems all fail raises.
        overwrite: Replace a store that is there.
        progress: Show a progress bar on stderr.

    Returns:
        The store, opened: see `probe.open`.

    Raises:
        InputError: A problem, selection or option cannot be used; nothing has run.
        StoreError: The store is of another run, foreign, in use, or the disk is full.
        WiringError: What was read is not what the model computed; nothing wrong is stored.

    Example:
        >>> ds = probe.capture(model, "train.jsonl", "last.zarr", queries="last:6", progress=False)
        >>> ds.pattern.sel(problem="0", layer=1, head=3).shape
        (6, 10)
    """
    if not isinstance(store, str | PathLike):
        raise InputError(f"store={store!r:.60}. Give the folder of the store, as 'run.zarr'.")
    if on_error not in ("record", "raise"):
        raise InputError(f"on_error={on_error!r}. Choose 'record' or 'raise'.")
    todo = plan(
        model,
        problems,
        sites=sites,
        layers=layers,
        heads=heads,
        queries=queries,
        keys=keys,
        dtype=dtype,
        batch_size=batch_size,
        max_length=max_length,
        max_new_tokens=max_new_tokens,
        interventions=interventions,
    )
    path = Path(store).expanduser()
    with ExitStack() as stack:
        stack.enter_context(reading(model.module))
        if overwrite or stores.vacant(path):
            writer, pending = None, set(range(len(todo.items)))
            _require_room(todo, path)
            if not stores.vacant(path):
                stores.own_attributes(path)  # nothing foreign is ever replaced
        else:
            writer = stack.enter_context(stores.resume(path, config=todo.config))
            pending = {i for shard in writer.pending() for i in shard}
        # Batches stay as planned whatever is done already: in another batch a number may differ in
        # its last bit, and a resumed run must equal an uninterrupted one.
        batches = [batch for batch in todo.batches if pending.intersection(batch)]
        outcomes = _outcomes(model, todo, batches, on_error, new=writer is None)
        # A store is made, or an old one replaced, once the first batch has run and is proven.
        first = list(islice(outcomes, 1))
        if writer is None:
            writer = stack.enter_context(_create(model, todo, path, overwrite))
        bar = tqdm(total=len(pending), unit="problem", disable=not (progress and pending))
        with bar:
            for index, outcome in chain(first, outcomes):
                if index not in pending:
                    continue
                if isinstance(outcome, str):
                    log.warning("problem %r failed: %s", todo.items[index].problem.id, outcome)
                    writer.fail(index, outcome)
                else:
                    arrays = {site: [array] for site, array in outcome.arrays.items()}
                    new = None if outcome.labels is None else [outcome.labels]
                    writer.append([index], arrays, loss=[outcome.loss], labels=new)
                    del arrays
                first.clear()
                del outcome  # or it would stay in memory while the next batch is read
                bar.update()
    return stores.open(path)


def _require_room(todo: Plan, path: Path) -> None:
    existing = next(folder for folder in path.absolute().parents if folder.exists())
    free = shutil.disk_usage(existing).free
    if todo.stored > free:
        raise StoreError(
            f"this run would write about {size(todo.stored)} to {path}, and the disk has "
            f"{size(free)} free. Select fewer layers, heads, queries or keys (see probe.plan), "
            "or use another disk."
        )


def _create(model: Model, todo: Plan, path: Path, overwrite: bool) -> stores.Writer:
    return stores.create(
        path,
        labels=[item.labels(model) for item in todo.items],
        layers=todo.layers,
        heads=todo.heads,
        config=todo.config,
        sites=todo.sites,
        sizes=todo.sizes | {"head_dim": todo.z_width},
        dtype=todo.dtype,
        attrs=todo.attrs,
        overwrite=overwrite,
    )


def _outcomes(
    model: Model, todo: Plan, batches: Sequence[Sequence[int]], on_error: str, *, new: bool
) -> Iterator[tuple[int, Reading | str]]:
    """Problem by problem, what was read or why it failed.

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
            readings = read(model, todo, batch, proof=not proven)
        except (WiringError, UnsupportedModelError):
            raise
        except Exception as error:
            if len(batch) > 1:
                half = len(batch) // 2
                if _out_of_memory(error) and half < limit:
                    limit = half
                    log.warning("out of memory; going on with batches of %d problems", limit)
                queue += [batch[half:], batch[:half]]
            elif on_error == "raise" or (new and not proven and _hopeless(error, failed, todo)):
                error.add_note(f"This happened in problem {todo.items[batch[0]].problem.id!r}.")
                raise
            else:
                failed += 1
                yield batch[0], f"{type(error).__name__}: {error}"
        else:
            proven = True
            yield from zip(batch, readings, strict=True)
            del readings


def _hopeless(error: Exception, failed: int, todo: Plan) -> bool:
    """Whether a run that has done nothing yet should stop: nothing will ever succeed."""
    all_refused = isinstance(error, InputError) and failed + 1 == len(todo.items)
    return failed >= _HOPELESS or all_refused


def _out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "allocate memory" in str(error)
    )
