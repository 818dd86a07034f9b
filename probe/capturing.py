"""The run: a model reads problems, and what its attention does goes into a store."""

import math
import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import xarray as xr
from zarr.abc.store import Store

from probe import store as stores
from probe.disk import size
from probe.errors import InputError
from probe.interventions import Intervention
from probe.model import Model
from probe.planning import plan
from probe.plans import Plan
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
    reduce: Literal["moments"] | None = None,
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
        reduce: "moments" to store no matrices but their mean and spread over problems, float32,
            cell by cell of the stored rows and columns: what fits in memory for any number of
            problems, none of them generated. `recipes.moments.stored` reads them. A run that is
            killed loses about a minute.
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
    """
    require(store, on_error, part, overwrite)
    _check_reduce(reduce, sites, max_new_tokens)
    todo = plan(
        model,
        problems,
        sites=sites,
        layers=layers,
        heads=heads,
        queries=queries,
        keys=keys,
        dtype="float32" if reduce else dtype,
        batch_size=batch_size,
        max_length=max_length,
        max_new_tokens=max_new_tokens,
        interventions=interventions,
    )
    if reduce:
        todo = _summary(todo)
    work = Work(
        items=todo.items,
        batches=todo.batches,
        config=todo.config,
        size=_size(todo) if reduce else todo.stored,
        create=partial(_create, model, todo, reduce),
        compute=partial(read, model, todo),
        puts=True,
        around=SummaryWriter if reduce else None,
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


def _check_reduce(reduce: object, sites: object, max_new_tokens: int) -> None:
    if reduce not in (None, "moments"):
        raise InputError(f"reduce={reduce!r:.40}. Choose 'moments', or None to store matrices.")
    if reduce and sites not in ("pattern", ("pattern",), ["pattern"]):
        raise InputError(f"reduce='moments' keeps those of the pattern, not of {sites!r:.40}.")
    if reduce and max_new_tokens:
        raise InputError(
            f"reduce='moments' with {max_new_tokens=}: rows of one number would be of other tokens "
            "in each problem. Generate first, and capture the whole texts."
        )


def _size(todo: Plan) -> int:
    """Bytes of mean and squared deviations, which are in memory while it runs."""
    return 8 * math.prod([len(todo.layers), len(todo.heads), *todo.sizes.values()])


def _summary(todo: Plan) -> Plan:
    """The same, as a store of moments records it."""
    need, have = _size(todo), os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if need > have:
        raise InputError(
            f"the moments need {size(need)} of memory, and this machine has {size(have)}. Select "
            "fewer layers, heads, queries or keys."
        )
    return replace(todo, config={**todo.config, "reduce": "moments"})


def _create(
    model: Model, todo: Plan, reduce: str | None, where: object, **options: Any
) -> stores.Writer:
    return stores.create(
        where,
        labels=[item.labels(model) for item in todo.items],
        layers=todo.layers,
        heads=todo.heads,
        config=todo.config,
        sites=() if reduce else todo.sites,
        sizes=todo.sizes | {"head_dim": todo.z_width},
        dtype=todo.dtype,
        attrs={**todo.attrs, **({"reduce": reduce} if reduce else {})},
        **options,
    )
