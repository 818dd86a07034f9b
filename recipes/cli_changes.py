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
Factor = Annotated[
    float, typer.Option(help="Attention is multiplied by it: 0 hides, 1 is a no-op.")
]


def suppress(
    model: ModelName,
    problems: Source,
    keys: Keys,
    factor: Factor = 0.1,
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
    draws: Annotated[int, typer.Option(help="Random controls of each problem.")] = 1,
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
    quiet()
    from recipes import _telling, plots, stats, suppression

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
            more: dict[str, Any] = {"target": target, "max_new_tokens": max_new_tokens}
            ds = suppression.effect(loaded, source, one, store=out, draws=draws, **more, **options)
    if doses is not None:
        _telling.doses(ds)
        if plot is not None:
            found = stats.bootstrap(ds.accuracy)
            title = f"{ds.attrs['model']}: keys {keys}"
            save(plots.dose_response(doses, found, title=title).get_figure(root=True), plot)
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
    together: Annotated[int, typer.Option(help="Then ablate so many of the top together.")] = 0,
    top: Annotated[int, typer.Option(min=1, help="How many heads to list.")] = 10,
    draws: Annotated[int, typer.Option(help="Random groups of as many heads.")] = 3,
    out: Out = None,
    plot: Plot = None,
    text: Text = None,
    n: Number = None,
    seed: Seed = None,
    max_length: MaxLength = None,
    overwrite: Overwrite = False,
) -> None:
    """Ablate every head on its own, or some together, and say what it costs."""
    quiet()
    from recipes import _telling, ablation, plots, stats

    group = pairs(heads)
    if group is not None and (plot is not None or together or layers is not None):
        raise InputError("--plot, --together and --layers go with a sweep. Leave out --heads.")
    options: dict[str, Any] = {"tokens": selector(tokens), "max_length": max_length}
    source = _source(problems, text, n, seed)
    with probe.load(model) as loaded:
        if group is not None:
            reference = ablation.reference(loaded, source) if mode == "mean" else None
            one = ablation.Ablate(group, mode=mode, reference=reference)  # type: ignore[arg-type]
            more: dict[str, Any] = {"draws": draws, "overwrite": overwrite}
            ds = ablation.effect(loaded, source, one, store=out, **more, **options)
            _telling.effect(ds)
            _telling.store(ds, out)
            return
        how: dict[str, Any] = {"mode": mode, "layers": selector(layers), "overwrite": overwrite}
        ds = ablation.sweep(loaded, source, out, **how, **options)
        local = ablation.importance(loaded, source, **options) if gradient else None
        _telling.sweep(ds, local, top)
        if together:
            _tell_together(loaded, source, ds, together, mode, draws, options)
    if plot is not None:
        title = f"{ds.attrs['model']}: heads ablated ({mode})"
        axes = plots.effect_map(stats.bootstrap(ds.delta_loss), title=title)
        save(axes.get_figure(root=True), plot)
    _telling.store(ds, out)


def relevance(
    model: ModelName,
    problems: Source,
    target: Annotated[
        str | None,
        typer.Option(help="The answer: a text, or field:NAME. Default: the model's own."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of the model's own answer.")] = 1,
    factor: Factor = 0.1,
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
    quiet()
    from recipes import _telling, plots, suppression

    options: dict[str, Any] = {"max_length": max_length, "overwrite": overwrite}
    options |= {"layers": selector(layers), "heads": pairs(heads), "mode": mode, "factor": factor}
    source = _source(problems, text, n, seed)
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
        names = [str(name) for name in ds.problem.values]
        chosen = names[0] if problem is None else problem
        if chosen not in names:
            raise InputError(f"there is no problem {chosen!r}. There are {', '.join(names[:12])}.")
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
    if (Path(problems).expanduser() / "zarr.json").is_file():
        return probe.problems(probe.open(problems), n=n, seed=seed)
    return probe.problems(problems, text=text, n=n, seed=seed)


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
    order = [(row.layer, row.head) for row in ranked]
    reference = ablation.reference(model, source) if mode == "mean" else None
    how: dict[str, Any] = {"mode": mode, "reference": reference, "draws": draws}
    found = ablation.cumulative(model, source, order, **how, **options)
    _telling.groups(found, ranked)
