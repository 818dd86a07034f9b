"""Tables and lines that tell on stdout what experiments found."""

from collections.abc import Sequence
from pathlib import Path

import typer
import xarray as xr

from recipes import stats
from recipes._cli import echo_failures, progress, table
from recipes.gradients import pruning_score
from recipes.ranking import Ranked, rank
from recipes.summaries import interval, missed, together


def effect(ds: xr.Dataset) -> None:
    """What `effects.effect` found."""
    rows = [
        ("Δ loss (nats a token)", interval(ds.delta_loss)),
        ("loss before (nats a token)", interval(ds.base_loss)),
        ("accuracy before", interval(ds.base_accuracy, ".3f")),
        ("accuracy after", interval(ds.accuracy, ".3f")),
        ("KL (nats a token)", interval(ds.kl.mean("query"))),
        ("target: probability before", interval(ds.target_base_p, ".3f")),
        ("target: probability after", interval(ds.target_p, ".3f")),
        ("target: Δ logit", interval(ds.target_delta_logit, ".3f")),
        ("control: no-op, Δ loss", interval(ds.noop)),
    ]
    if bool(ds.named.notnull().any()):
        rows.append(("tokens that the keys name", interval(ds.named, ".1f")))
        rows.append(("problems without any", str(int((ds.named == 0).sum()))))
    if "control" in ds:
        rows.append(("control: elsewhere at random, Δ loss", interval(ds.control.mean("draw"))))
    table(("", "mean over problems [95 % interval]"), rows)
    if "text" in ds:
        texts = zip(ds.problem.values, ds.base_text.values, ds.text.values, strict=True)
        table(("problem", "before", "after"), [tuple(map(repr, row)) for row in texts][:20])


def doses(ds: xr.Dataset) -> None:
    """What `dose_response` found."""
    rows = [
        (
            f"{float(factor):g}",
            interval(ds.accuracy.sel(factor=factor), ".3f"),
            interval(ds.delta_loss.sel(factor=factor)),
        )
        for factor in ds.factor.values
    ]
    rows.append(("unchanged", interval(ds.base_accuracy, ".3f"), interval(ds.noop)))
    table(("factor", "accuracy [95 % interval]", "Δ loss (nats a token)"), rows)


def sweep(ds: xr.Dataset, local: xr.DataArray | None, top: int) -> None:
    """What `sweep` found, with gradient importance beside it."""
    enough = ds.delta_loss.dropna("problem", how="all").sizes["problem"] > 1
    found = stats.bootstrap(ds.delta_loss) if enough else None
    tests = stats.sign_flip(ds.delta_loss) if enough else None
    score = None if local is None else pruning_score(local, normalised=False)
    rows = []
    for row in rank(ds.delta_loss, top=top):
        at = {"layer": row.layer, "head": row.head}
        line = [row.label, f"{row.score:.4f}"]
        if found is not None and tests is not None:
            low, high = (float(found[name].sel(at)) for name in ("low", "high"))
            line += [f"[{low:.4f}, {high:.4f}]", f"{float(tests.p_family.sel(at)):.4f}"]
        rows.append((*line, *([] if score is None else [f"{float(score.sel(at)):.4f}"])))
    names = ["head", "Δ loss (nats a token)"]
    names += ["95 % interval", "p (family-wise)"] if enough else []
    table((*names, *([] if score is None else ["gradient |I|"])), rows)
    noop, every = float(abs(ds.noop).max()), float(ds.random_head.mean())
    typer.echo(f"controls: no-op {noop:g} nats, a head at random {every:.4f}")
    if local is not None and score is not None and enough:
        for sentence in missed(ds.delta_loss, local):
            typer.echo(sentence)
        agreement = stats.agreement(ds.delta_loss.mean("problem"), score)
        typer.echo(f"rank correlation of ablation and gradient over all heads: {agreement:.2f}")


def groups(ds: xr.Dataset, ranked: Sequence[Ranked]) -> None:
    """What `cumulative` found of ranked heads."""
    rows = [
        (
            f"+{row.label}",
            interval(ds.delta_loss.sel(size=size)),
            interval(ds.accuracy.sel(size=size), ".3f"),
            f"{float(ds.control.sel(size=size).mean()):.4f}" if "control" in ds else "-",
        )
        for size, row in enumerate(ranked, start=1)
    ]
    table(("together", "Δ loss (nats a token)", "accuracy", "random heads"), rows)
    names, alone = [row.label for row in ranked], [row.score for row in ranked]
    line = together(names, alone, float(ds.delta_loss.isel(size=-1).mean()))
    if line is not None:
        typer.echo(line)


def relevances(ds: xr.Dataset, top: int) -> None:
    """What `relevance` found, of 50 problems at most."""
    rows = []
    for name in ds.problem.values[:50]:
        one = ds.sel(problem=name)
        values = one.relevance.dropna("key")
        most = values.sortby(values, ascending=False)[:top]
        listed = [f"{str(x.token.item())!r} {float(x):.2f}" for x in most]
        rows.append((str(name), str(one.target.item()), ", ".join(listed)))
    table(("problem", "answer", "most relevant tokens (nats)"), rows)


def store(ds: xr.Dataset, out: Path | None) -> None:
    """How much was done, where it is, and what failed."""
    typer.echo(progress(ds) + (f": {out}" if out is not None else ""))
    echo_failures(ds)
