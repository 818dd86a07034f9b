"""The run: a model reads problems, and what its attention does goes into a store."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import xarray as xr
from zarr.abc.store import Store

from probe import store as stores
from probe.interventions import Intervention
from probe.model import Model
from probe.planning import plan
from probe.plans import Plan, Reduce
from probe.reading import read
from probe.running import OnError, Work, require, run
from probe.schema import Site
from probe.selection import Selector
from probe.summing import SummaryWriter


def capture(
    model: Model,
    problems: object,
    store: str | Path | Store,
    *,
    sites: Sequence[Site] | Site = ("pattern",),
    layers: Selector = None,
    heads: Selector = None,
    queries: Selector = None,
    keys: Selector = None,
    interventions: Sequence[Intervention] = (),
    reduce: Reduce | None = None,
    dtype: str = "float16",
    batch_size: int | None = None,
    max_length: int | None = None,
    max_new_tokens: int = 0,
    on_error: OnError = "record",
    overwrite: bool = False,
    progress: bool = True,
    part: tuple[int, int] = (1, 1),
    fsync: bool = False,
) -> xr.Dataset:
    """Run problems through a model and store what its attention does.

    The model stays on its own kernel; only the rows, keys, heads and layers asked for are
    computed, in float32, and stored. The same call again goes on where a killed run stopped and
    tries again what failed. The first batch of every run proves layer by layer that what is
    stored is what the model computed with.

    Args:
        model: From `probe.load`; it runs in eval mode.
        problems: Anything that `probe.problems` reads.
        store: Folder of the store; or a zarr store object, in memory or in a bucket.
        sites: Of "pattern" (probabilities), "scores" (before the softmax), and "z" (each head's
            output before the output projection).
        layers: int, negative int, slice or list; default all.
        heads: Query heads, likewise.
        queries: Rows, likewise, or "last:6", "first:6", "segment:text".
        keys: Columns, likewise.
        interventions: What to change: see `Model.intervene`. They are recorded as data. What is
            stored is what the model then did.
        reduce: What to store instead of the patterns, which are then computed in float32. Metrics
            by name, as {"entropy": recipes.heads.entropy}: functions of a tensor (problem, head,
            query, key) on the model's device that give (problem, head), or (problem, head, query
            or key), as a float or int64; each is told those of `query_position` (query,),
            `key_position` (key,) and `token_id` (problem, key) that it takes as keywords. A store
            knows them by their code, and by what they hold. Or
            "moments": mean and spread over problems, cell by cell of the stored rows and columns:
            what fits in memory for any number of problems, none of them generated;
            `recipes.moments.stored` reads them, and a run that is killed loses about a minute.
        dtype: "float16" or "float32". Or codes, for patterns alone, which `probe.open` decodes:
            "uint16" (about the bytes of float16, and ten times as exact) or "uint8" (four tenths of
            them, for previews: rows sum to 1 within .01); see `probe.schema.coded`.
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
        part: (i, n): run the i-th of n parts of the problems, as n processes on one store do at
            once, each with its own i. Each is resumed by itself.
        fsync: Force each shard to the disk before its status, so that what is done outlives the
            machine, and not only the process. Without it, all is forced when the run ends.

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
        >>> from recipes import heads
        >>> metrics = {"entropy": heads.entropy}
        >>> ds = probe.capture(model, "train.jsonl", "e.zarr", reduce=metrics, progress=False)
        >>> ds.entropy.sizes
        Frozen({'problem': 2, 'layer': 2, 'head': 4})
    """
    require(store, on_error, part, overwrite)
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
        reduce=reduce,
    )
    work = Work(
        items=todo.items,
        batches=todo.batches,
        config=todo.config,
        size=todo.stored,
        create=partial(_create, model, todo),
        compute=partial(read, model, todo),
        puts=True,
        around=SummaryWriter if reduce == "moments" else None,
    )
    return run(
        model,
        work,
        store,
        on_error=on_error,
        overwrite=overwrite,
        progress=progress,
        part=part,
        fsync=fsync,
    )


def _create(model: Model, todo: Plan, where: object, **options: Any) -> stores.Writer:
    return stores.create(
        where,
        labels=[item.labels(model) for item in todo.items],
        layers=todo.layers,
        heads=todo.heads,
        config=todo.config,
        sites=(),
        reduced=todo.arrays,
        sizes=todo.sizes | {"head_dim": todo.z_width},
        attrs=todo.attrs,
        **options,
    )
