"""The commands that change attention: suppress, ablate, relevance."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import probe
from probe.errors import InputError
from recipes._cli import (
    MaxLength,
    ModelName,
    Number,
    Overwrite,
    Seed,
    Selector,
    Text,
    quiet,
    require_picture,
    save,
    selector,
)

if TYPE_CHECKING:
    import xarray as xr

Source = Annotated[str, typer.Argument(help="A store, text, .txt, .jsonl or hf:NAME:CONFIG:SPLIT.")]
Out = Annotated[Path | None, typer.Option("-o", "--out", help="Folder to keep the results in.")]
Plot = Annotated[Path | None, typer.Option(help="Picture: .png, .svg or .pdf.")]
Tokens = Annotated[
    str | None, typer.Option(help="Whose predictions count: 20:, last:10, regex:[0-9]+.")
]
Keys = Annotated[
    str, typer.Option(help="Tokens: 1, 2:5, last:3, 'text: not', 'regex:[0-9]+', segment:bos.")
]
Heads = Annotated[str | None, typer.Option(help="L1H0,L1H3, or 0,3 of each layer.")]
SCALED = "Attention is multiplied by it: 0 hides, 1 is a no-op."


def suppress(
    model: ModelName,
    problems: Source,
    keys: Keys,
    factor: Annotated[
        float | None,
        typer.Option(help=f"{SCALED} Default 0.1, and 0 for prob_zero_no_renorm."),
    ] = None,
    factors: Annotated[
        str | None, typer.Option(help="Several, for a dose-response curve: 1,0.5,0.1,0.01,0.")
    ] = None,
    mode: Annotated[
        str, typer.Option(help="log_add, logit_mul, logit_mul_shifted, prob_zero_no_renorm.")
    ] = "log_add",
    layers: Selector = None,
    heads: Heads = None,
    queries: Selector = None,
    tokens: Tokens = None,
    target: Annotated[
        str | None, typer.Option(help="A next token to follow: its text, or field:NAME.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Let the model go on, before and after.")] = 0,
    draws: Annotated[
        int | None, typer.Option(min=0, help="Random controls of each problem. Default 1.")
    ] = None,
    out: Out = None,
    plot: Plot = None,
    text: Text = None,
    n: Number = None,
    seed: Seed = None,
    max_length: MaxLength = None,
    overwrite: Overwrite = False,
) -> None:
    """Scale the attention that chosen tokens get, and say what changes."""
    if plot is not None and factors is None:
        raise InputError("--plot draws a dose-response curve. Add --factors 1,0.5,0.1,0.01,0.")
    more: dict[str, Any] = {"target": target, "max_new_tokens": max_new_tokens, "draws": draws}
    given = {"factor": factor, **more, "max_new_tokens": max_new_tokens or None}
    other = [f"--{name.replace('_', '-')}" for name, value in given.items() if value is not None]
    if factors is not None and other:
        raise InputError(f"--factors and {', '.join(other)} exclude each other. Leave one out.")
    require_picture(plot)
    quiet()
    from recipes import _telling, plots, suppression
    from recipes.summaries import estimate

    chosen = {"layers": selector(layers), "heads": pairs(heads), "queries": selector(queries)}
    one = suppression.Suppress(keys=selector(keys), factor=factor, mode=mode, **chosen)  # type: ignore[arg-type]
    doses = None if factors is None else _floats(factors)
    options: dict[str, Any] = {"max_length": max_length, "overwrite": overwrite}
    options["tokens"] = selector(tokens)
    source = _source(problems, text, n, seed)
    with probe.load(model) as loaded:
        if doses is not None:
            ds = suppression.dose_response(loaded, source, one, doses, out, **options)
        else:
            more["draws"] = 1 if draws is None else draws
            ds = suppression.effect(loaded, source, one, store=out, **more, **options)
    if doses is not None:
        _telling.doses(ds)
        if plot is not None:
            title = f"{ds.attrs['model']}: keys {keys}"
            axes = plots.dose_response(doses, estimate(ds.accuracy), title=title)
            save(axes.get_figure(root=True), plot)
    else:
        _telling.effect(ds)
    _telling.store(ds, out)


def ablate(
    model: ModelName,
    problems: Source,
    heads: Annotated[
        str | None, typer.Option(help="Ablate these together: L1H0,L1H3. Default: each alone.")
    ] = None,
    mode: Annotated[
        str, typer.Option(help="zero, mean, resample, uniform, first or identity.")
    ] = "zero",
    layers: Selector = None,
    tokens: Tokens = None,
    gradient: Annotated[bool, typer.Option(help="Put gradient importance beside it.")] = True,
    together: Annotated[
        int, typer.Option(min=0, help="Then ablate so many of the top together.")
    ] = 0,
    top: Annotated[int, typer.Option(min=1, help="How many heads to list.")] = 10,
    draws: Annotated[int, typer.Option(min=0, help="Random groups of as many heads.")] = 3,
    out: Out = None,
    plot: Plot = None,
    text: Text = None,
    n: Number = None,
    seed: Seed = None,
    max_length: MaxLength = None,
    overwrite: Overwrite = False,
) -> None:
    """Ablate every head on its own, or some together, and say what it costs."""
    group, some = pairs(heads), selector(layers)
    if group is not None and (plot is not None or together):
        raise InputError("--plot and --together go with a sweep. Leave them out, or --heads.")
    require_picture(plot)
    quiet()
    from recipes import _telling, ablation, plots
    from recipes._placing import heads_of
    from recipes.summaries import estimate

    options: dict[str, Any] = {"tokens": selector(tokens), "max_length": max_length}
    source = _source(problems, text, n, seed)
    with probe.load(model) as loaded:
        if group is not None:
            heads_of(ablation.Ablate(group, layers=some), loaded)  # before the long work on means
            reference = _reference(loaded, source, mode, max_length)
            one = ablation.Ablate(group, mode=mode, reference=reference, layers=some)  # type: ignore[arg-type]
            more: dict[str, Any] = {"draws": draws, "overwrite": overwrite}
            ds = ablation.effect(loaded, source, one, store=out, **more, **options)
            _telling.effect(ds)
            _telling.store(ds, out)
            return
        how: dict[str, Any] = {"mode": mode, "layers": some, "overwrite": overwrite}
        ds = ablation.sweep(loaded, source, out, **how, **options)
        done = set(ds.problem.values[(ds.status == 1).values])
        same = [one for one in source if one.id in done]  # what failed would fail again
        local = ablation.importance(loaded, same, **options) if gradient and same else None
        _telling.sweep(ds, local, top)
        if plot is not None:
            title = f"{ds.attrs['model']}: heads ablated ({mode})"
            axes = plots.effect_map(estimate(ds.delta_loss), title=title)
            save(axes.get_figure(root=True), plot)
        _telling.store(ds, out)
        if together:
            _tell_together(loaded, source, ds, together, mode, draws, options)


def relevance(
    model: ModelName,
    problems: Source,
    target: Annotated[
        str | None,
        typer.Option(help="The answer: a text, or field:NAME. Default: the model's own."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of the model's own answer.")] = 1,
    factor: Annotated[float, typer.Option(help=SCALED)] = 0.1,
    mode: Annotated[str, typer.Option(help="As for probe suppress.")] = "log_add",
    similarity: Annotated[
        float, typer.Option(help="Suppress tokens of so similar embeddings too; above 1: none.")
    ] = 0.6,
    layers: Selector = None,
    heads: Heads = None,
    top: Annotated[int, typer.Option(min=1, help="Tokens to list of each problem.")] = 5,
    problem: Annotated[str | None, typer.Option(help="Id to draw; default the first.")] = None,
    out: Out = None,
    plot: Plot = None,
    text: Text = None,
    n: Number = None,
    seed: Seed = None,
    max_length: MaxLength = None,
    overwrite: Overwrite = False,
) -> None:
    """Suppress each token in turn: which does the answer depend on?"""
    if problem is not None and plot is None:
        raise InputError(f"--problem {problem!r} names what --plot draws. Add --plot, or leave it.")
    require_picture(plot)
    quiet()
    from recipes import _telling, plots, suppression

    options: dict[str, Any] = {"max_length": max_length, "overwrite": overwrite}
    options |= {"layers": selector(layers), "heads": pairs(heads), "mode": mode, "factor": factor}
    source = _source(problems, text, n, seed)
    names = [one.id for one in source]
    chosen = names[0] if problem is None else problem
    if chosen not in names:
        raise InputError(f"there is no problem {chosen!r}. There are {', '.join(names[:12])}.")
    with probe.load(model) as loaded:
        ds = suppression.relevance(
            loaded,
            source,
            out,
            target=target,
            max_new_tokens=max_new_tokens,
            similarity=None if similarity > 1 else similarity,
            **options,
        )
    _telling.relevances(ds, top)
    if plot is not None:
        title = f"{ds.attrs['model']}, problem {chosen}: {ds.target.sel(problem=chosen).item()!r}"
        axes = plots.token_strip(ds.relevance.sel(problem=chosen), title=title)
        save(axes.get_figure(root=True), plot)
    _telling.store(ds, out)


def pairs(text: str | None) -> Any:
    """Heads as typed: L1H0,L1H3 as pairs, else a selection.

    Example:
        >>> pairs("L1H0,L0H3"), pairs("0,3")
        ([(1, 0), (0, 3)], [0, 3])
    """
    if text is None or not text.upper().startswith("L"):
        return selector(text)
    found = [re.fullmatch(r"L([0-9]+)H([0-9]+)", part.strip().upper()) for part in text.split(",")]
    if None in found:
        raise InputError(f"--heads {text!r} names no heads. Write L1H0,L1H3, or 0,3 of each layer.")
    return [(int(m[1]), int(m[2])) for m in found if m is not None]


def _floats(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"--factors {text!r} are no numbers. Write 1,0.5,0.1,0.01,0.") from None


def _source(problems: str, text: str | None, n: int | None, seed: int | None) -> Any:
    """Problems as typed: of a store, or read."""
    from recipes._jobs import opened

    return probe.problems(opened(problems), text=text, n=n, seed=seed)


def _reference(model: Any, source: Any, mode: str, max_length: int | None) -> Any:
    """What mode mean puts in place of a head: over the same tokens as the run."""
    from recipes import ablation

    return ablation.reference(model, source, max_length=max_length) if mode == "mean" else None


def _tell_together(
    model: Any,
    source: Any,
    ds: "xr.Dataset",
    count: int,
    mode: str,
    draws: int,
    options: dict[str, Any],
) -> None:
    from recipes import _telling, ablation, heads

    ranked = heads.rank(ds.delta_loss, top=count)
    if not ranked:
        raise InputError(
            "--together takes the heads that cost most, and none was measured: no problem that is "
            "done has a token with another before it. Give longer ones."
        )
    order = [(row.layer, row.head) for row in ranked]
    reference = _reference(model, source, mode, options["max_length"])
    how: dict[str, Any] = {"mode": mode, "reference": reference, "draws": draws}
    found = ablation.cumulative(model, source, order, **how, **options)
    _telling.groups(found, ranked)
