"""A study in sections, for the report and the terminal: what is found, and what noise passes."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import xarray as xr

from recipes import _latent_tables, flow, latent
from recipes.latent_analysis import Analysis
from recipes.latent_criteria import Criterion
from recipes.summaries import interval

if TYPE_CHECKING:
    from recipes.latent_study import Studied

SHOWN = ("sequential", "hub", "long_range")  # calibrated scores that the composite is made of
ARTEFACT = (
    "Read as published, one row and column off (the step of bot counted as latent 0, columns one "
    "ahead), flow is {low:.3f} to {high:.3f} for every head and the composite at most "
    "{composite:.3f}. This is an artefact of the reading, not a property of the model: row 0 and "
    "the last column are empty, what looks like latent i attending to latent i - 1 is a latent "
    "attending to itself, min-max of a constant flow is 0, and so no composite can pass 0.6."
)
CAUTION = (
    "Comparisons are in results/comparison. There is one model per arm: differences describe these "
    "checkpoints, not architectures, sizes or capacities."
)


class Section(NamedTuple):
    """A part of a report: text, and perhaps a table."""

    title: str
    text: str
    columns: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()


def report(found: Mapping[str, "Studied"]) -> str:
    """The report of a study, as Markdown.

    Args:
        found: By name, what `recipes.latent_study.run` returns.
    """
    lines = ["# Attention between latents", ""]
    for name, one in found.items():
        lines += [f"## {name}", ""]
        for section in _sections(one):
            lines += _markdown(section)
    if len(found) > 1:
        lines += ["## Comparison", "", CAUTION, ""]
    return "\n".join(lines)


def _sections(one: "Studied") -> Iterator[Section]:
    found, ds = one.analysis, one.analysis.store
    yield overview(
        found, f"Rows read at once equal those read step by step within {one.apart:.1e}."
    )
    yield masses(found)
    yield published(found)
    yield criteria(found)
    yield findings(found.findings, noise=found.noise.findings)
    if bool((ds["query_segment"] == "eot").any()):
        yield readout(ds)
    if one.knockout is not None:
        yield knockout(one.knockout)


def _markdown(section: Section) -> Iterator[str]:
    yield from (f"### {section.title}", "", section.text, "")
    if section.rows:
        rule = ["---"] * len(section.columns)
        for cells in (section.columns, rule, *section.rows):
            yield f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"
        yield ""


def overview(found: Analysis, more: str = "") -> Section:
    """Which model, how many problems, how many right."""
    ds, n = found.store, found.aggregated.attrs["n"]
    size = f"{ds.sizes['layer']} layers x {ds.sizes['head']} heads"
    latents = found.aggregated.sizes["query"]
    text = f"{n} problems, {size}, {latents} latents; {accuracy(ds)}. {more}"
    return Section(found.name, text.rstrip())


def accuracy(ds: xr.Dataset) -> str:
    """How many answers of a latent store are right, in words."""
    right = ds["correct"].values[ds["status"].values == 1]
    right = right[np.isfinite(right)]
    if not len(right):
        return "no answer was expected"
    return f"accuracy {right.mean():.3f} ({int(right.sum())} of {len(right)} answers)"


def masses(found: Analysis) -> Section:
    """Where latents look."""
    mass = found.aggregated["mass"].mean(("layer", "head")).transpose("query", "part")
    rows = [[f"z{k}", *(f"{x:.3f}" for x in row)] for k, row in enumerate(mass.values)]
    text = "Mean share of attention over problems, layers and heads; each row sums to 1."
    columns = ["row", *map(str, mass["part"].values)]
    return Section("Where latents look", text, columns, rows)


def published(found: Analysis) -> Section:
    """Document 002's scores, and the artefact of the original reading."""
    scores = {name: found.published[name] for name in ("flow", "hub", "skip", "composite")}
    spans = ", ".join(
        f"{name} {float(x.min()):.3f} to {float(x.max()):.3f}" for name, x in scores.items()
    )
    n = found.aggregated.sizes["key"]
    nulls = flow.nulls(n)
    null = (
        f"With {n} latents, uniform causal attention already has flow {nulls.flow:.3f} and, with "
        f"all of its attention in the block, hub {nulls.hub:.3f}."
    )
    artefact = ARTEFACT.format(
        low=float(found.shifted["flow"].min()),
        high=float(found.shifted["flow"].max()),
        composite=float(found.shifted["composite"].max()),
    )
    return Section("Document 002's scores", f"Of the mean block: {spans}. {null}\n\n{artefact}")


def criteria(found: Analysis) -> Section:
    """Document 002's criteria of success, of the model and of noise."""
    text = (
        "Beside the model, the same criteria on a store of the same size (at most 500 problems) "
        "whose scores are independent noise. What noise passes is no evidence."
    )
    rows = [
        [str(one.phase), one.name, _verdict(one), _verdict(other)]
        for one, other in zip(found.criteria, found.noise.criteria, strict=True)
    ]
    columns = ["phase", "criterion", "this model", "noise"]
    return Section("Document 002's criteria, and noise beside", text, columns, rows)


def _verdict(one: Criterion) -> str:
    return f"{'passed' if one.passed else 'failed'} ({one.value:.3g} against {one.threshold:.3g})"


def findings(
    table: xr.Dataset, score: str = "composite", *, top: int = 10, noise: xr.Dataset | None = None
) -> Section:
    """The heads that lead by a calibrated score, with intervals."""
    n = int(table["found"].sum())
    text = (
        f"0 is chance and 1 is perfect; intervals hold {table.attrs['level']:.0%}, over problems. "
        f"{n} of {table['found'].size} heads have a score whose interval lies above 0.3"
    )
    if noise is not None:
        text += f"; of noise, {int(noise['found'].sum())} do"
    best = latent.best(table, score, top)
    if not best:
        text += f". No head has a number for {score}, which takes more latents"
    shown = list(dict.fromkeys([*SHOWN, "composite", score]))
    rows = []
    for layer, head in best:
        one = table.sel(layer=layer, head=head)
        position, kind = int(one["hub_position"]), str(one["type"].item())
        share = float(one["p_top"].sel(score=score))
        scores = [_latent_tables.interval(one.sel(score=name)) for name in shown]
        hub = "-" if position < 0 else f"z{position}"
        rows.append([f"L{layer}H{head}", kind, *scores, hub, f"{share:.2f}"])
    columns = ["head", "type", *shown, "hub at", f"P(rank <= {table.attrs['top']})"]
    return Section("Calibrated", text + ".", columns, rows)


def readout(ds: xr.Dataset) -> Section:
    """Which latent the answer reads."""
    reads = latent.readout(ds).mean(("problem", "layer", "head"))
    reads = reads.transpose(..., "key")
    rows = [
        [str(name), *(f"{x:.3f}" for x in row)]
        for name, row in zip(reads[reads.dims[0]].values, reads.values, strict=True)
    ]
    text = "Mean attention to each latent, over problems, layers, heads and the rows of a segment."
    columns = ["row", *(f"z{k}" for k in range(reads.sizes["key"]))]
    return Section("What the answer reads", text, columns, rows)


def knockout(ds: xr.Dataset) -> Section:
    """What hiding each latent does, beside its control."""
    title, base = "Each latent hidden from all after it", ds["base_correct"].values
    if not np.isfinite(base).any():
        return Section(title, "No answer was expected, so there is no loss to compare.")
    text = (
        f"Accuracy {np.nanmean(base):.3f} with nothing hidden. The control hides as many random "
        "tokens of the question from the same rows. Loss in nats per token of the expected answer."
    )
    rows = []
    for name in ds["hidden"].values.tolist():
        one = ds.sel(hidden=name)
        losses = [interval(one[v], ".3f") for v in ("delta_loss", "control_delta_loss")]
        shares = [f"{float(one[v].mean()):.3f}" for v in ("correct", "control_correct")]
        rows.append([str(name), *losses, *shares])
    columns = ["hidden", "more loss", "control", "accuracy", "control's accuracy"]
    return Section(title, text, columns, rows)
