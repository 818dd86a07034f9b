"""The command `probe`: results on stdout, progress and errors on stderr.

Exit codes: 0, 1 (one red message), 2 (usage). Heavy imports wait until a command needs them.
"""

import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text as Plain

import probe
from probe.errors import InputError, ProbeError, WiringError
from recipes import _importing, cli_changes, cli_latent, cli_stores
from recipes._cli import (
    MaxLength,
    ModelName,
    Number,
    Overwrite,
    Part,
    Seed,
    Selector,
    Text,
    echo_failures,
    parted,
    progress,
    quiet,
    save,
    selector,
    table,
)
from recipes._files import writing

if TYPE_CHECKING:
    import xarray as xr

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Read attention in any Hugging Face model, into labelled stores, and measure it.",
)

for command in (cli_changes.suppress, cli_changes.ablate, cli_changes.relevance):
    app.command()(command)
app.command()(cli_stores.info)
app.command()(cli_latent.export)
app.add_typer(cli_latent.app, name="latent")

Store = Annotated[Path, typer.Argument(help="Folder of a store.")]
Metric = Annotated[str, typer.Argument(help="heads.induction, flow.hub, or any importable one.")]


def main() -> None:
    """Run the command; an error that we raise on purpose is one red line, not a traceback."""
    warnings.showwarning = _warn
    debug = "--debug" in sys.argv
    sys.argv = [a for a in sys.argv if a != "--debug"]
    try:
        app()
    except (ProbeError, ImportError) as error:
        if debug:
            raise
        message = f"{type(error).__name__}: {error}"
        Console(stderr=True, soft_wrap=True).print(Plain(message, style="red"))
        sys.exit(1)


def _warn(message: Warning | str, *_: Any, **__: Any) -> None:
    """A warning as one line, without the source that gave it."""
    Console(stderr=True, soft_wrap=True).print(f"warning: {message}", style="yellow", markup=False)


@app.command()
def demo(
    name: Annotated[str, typer.Argument(help="A demonstration model.")] = "demo-llama",
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for the results.")] = Path(
        "demo"
    ),
) -> None:
    """Find the induction heads of a shipped model, and draw them."""
    quiet()
    from recipes import demo as recipe
    from recipes import heads

    found = recipe.run(name, out)
    both = {"induction": found.induction, "previous token": found.previous}
    rows = [
        (row.label, *(f"{float(x.sel(layer=row.layer, head=row.head)):.3f}" for x in both.values()))
        for row in heads.rank(found.induction, top=None)
    ]
    table(("head", *both), rows)
    for kind, scores in (("induction", found.induction), ("previous-token", found.previous)):
        named = [r for r in heads.rank(scores, top=None) if r.score > recipe.THRESHOLD]
        listed = ", ".join(f"{r.label} ({r.score:.2f})" for r in named) or "none"
        typer.echo(f"{kind} heads (score > {recipe.THRESHOLD}): {listed}")
    typer.echo(f"store   {found.store}\npicture {found.figure}")
    typer.echo(f"next: probe info {found.store}", err=True)


@app.command()
def check(
    model: Annotated[str | None, typer.Argument(help="Hub name, local folder or demo-...")] = None,
    every: Annotated[
        bool, typer.Option("--all", help="Every architecture of transformers, tiny and random.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="With --all: for scripts.")] = False,
    markdown: Annotated[
        Path | None, typer.Option(help="With --all: write the table here as a page.")
    ] = None,
) -> None:
    """Prove that the attention of a model can be read, or of every architecture."""
    if every == (model is not None):
        raise InputError("check what? Give a model, or --all for every architecture.")
    if not every and (as_json or markdown is not None):
        raise InputError("--json and --markdown go with --all. Leave them out, or the model.")
    quiet()
    if model is None:
        _check_all(as_json, markdown)
        return
    from importlib.metadata import version

    import recipes

    with probe.load(model) as loaded:
        typer.echo(repr(loaded))
        typer.echo(
            f"proven in layers {', '.join(map(str, loaded.layers))}: rows sum to 1, no future, and "
            "pattern @ value is what the model's own kernel returned"
        )
    names = ("attn-probe", "nnsight", "transformers", "torch", "zarr", "xarray")
    typer.echo(", ".join(f"{name} {version(name)}" for name in names))
    typer.echo(f"recipes {Path(recipes.__file__).parent}")


@app.command()
def capture(
    model: ModelName,
    problems: Annotated[str, typer.Argument(help="Text, .txt, .jsonl or hf:NAME:CONFIG:SPLIT.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder of the store.")],
    text: Text = None,
    n: Number = None,
    seed: Seed = None,
    sites: Annotated[
        str, typer.Option(help="pattern, scores, z, or several: pattern,z.")
    ] = "pattern",
    layers: Selector = None,
    heads: Selector = None,
    queries: Selector = None,
    keys: Selector = None,
    dtype: Annotated[str, typer.Option(help="float16, float32, uint16 or uint8.")] = "float16",
    batch_size: Annotated[int | None, typer.Option(help="Problems in a batch at most.")] = None,
    max_length: MaxLength = None,
    max_new_tokens: Annotated[int, typer.Option(help="Let the model go on so far.")] = 0,
    on_error: Annotated[str, typer.Option(help="record or raise.")] = "record",
    overwrite: Overwrite = False,
    part: Part = "1/1",
    fsync: Annotated[bool, typer.Option(help="Force each file to the disk at once.")] = False,
    reduce: Annotated[
        str | None,
        typer.Option(help="Keep only moments over problems; or metrics: heads.entropy,flow.flow."),
    ] = None,
    plan: Annotated[bool, typer.Option(help="Only say what would be done.")] = False,
) -> None:
    """Run problems through a model into a store; the same command again resumes."""
    quiet()
    chosen = probe.problems(problems, text=text, n=n, seed=seed)
    options: dict[str, Any] = {
        "sites": tuple(sites.split(",")),
        "layers": selector(layers),
        "heads": selector(heads),
        "queries": selector(queries),
        "keys": selector(keys),
        "dtype": dtype,
        "batch_size": batch_size,
        "max_length": max_length,
        "max_new_tokens": max_new_tokens,
        "reduce": reduce if reduce in (None, "moments") else _metrics(reduce),
    }
    with probe.load(model) as loaded:
        if plan:
            typer.echo(str(probe.plan(loaded, chosen, **options)))
            return
        more: dict[str, Any] = {"on_error": on_error, "overwrite": overwrite}
        more |= {"part": parted(part), "fsync": fsync}
        ds = probe.capture(loaded, chosen, out, **options, **more)
    typer.echo(f"{progress(ds)}: {out}")
    echo_failures(ds)


@app.command()
def rank(
    metric: Metric,
    store: Store,
    top: Annotated[int, typer.Option(min=1, help="How many heads.")] = 10,
    ascending: Annotated[bool, typer.Option(help="Lowest first.")] = False,
) -> None:
    """Rank heads by a metric, averaged over the problems of a store."""
    from recipes import heads

    scores = _scores(metric, probe.open(store))
    rows = heads.rank(scores, top=top, descending=not ascending)
    if not rows:
        raise InputError(
            f"{metric} gives no head a number: the store has no done problem that it can measure."
        )
    table(("head", metric), [(row.label, f"{row.score:.4f}") for row in rows])


@app.command()
def plot(
    store: Store,
    out: Annotated[Path, typer.Option("-o", "--out", help="Picture: .png, .svg or .pdf.")],
    metric: Annotated[str, typer.Option(help="For a map of all heads.")] = "heads.previous_token",
    problem: Annotated[str | None, typer.Option(help="Id; default the first one.")] = None,
    layer: Annotated[int | None, typer.Option(help="Draw the patterns of a layer.")] = None,
    head: Annotated[int | None, typer.Option(help="And of one head.")] = None,
) -> None:
    """Draw a map of all heads, the heads of a layer, or one pattern."""
    from recipes import plots

    ds = probe.open(store)
    if layer is None and head is None and problem is None:
        scores = _scores(metric, ds)
        by_head = scores.mean([d for d in scores.dims if d not in ("layer", "head")])
        figure = plots.head_map(by_head, title=f"{metric}, {ds.attrs['model']}").get_figure(
            root=True
        )
    else:
        figure = _draw_patterns(ds, problem, layer, head)
    save(figure, out)


def _check_all(as_json: bool, markdown: Path | None) -> None:
    from tqdm import tqdm

    from recipes import architectures
    from recipes.architectures_tiny import MODEL_TYPES

    rows = list(tqdm(architectures.table(), total=len(MODEL_TYPES), unit="model", leave=False))
    if markdown is not None:
        with writing(markdown):
            markdown.write_text(architectures.markdown(rows), encoding="utf-8")
    if as_json:
        typer.echo(json.dumps([architectures.as_json(row) for row in rows], indent=2))
    else:
        captured = [architectures.cells(row) for row in rows if row.outcome == "captured"]
        others = [architectures.cells(row) for row in rows if row.outcome != "captured"]
        table(architectures.HEADINGS, captured)
        typer.echo()
        table(architectures.OTHER_HEADINGS, others)
    typer.echo(architectures.summary(rows), err=as_json)
    if wrong := [row.model_type for row in rows if row.outcome == "WRONG"]:
        raise WiringError(
            f"what is read of {', '.join(wrong)} is not what the model computes. Do not capture "
            "such models with these versions."
        )


def _scores(metric: str, ds: "xr.Dataset") -> "xr.DataArray":
    """A metric of a store's patterns, (problem, layer, head)."""
    _require_patterns(ds)
    function = _metric(metric)
    try:
        scores = function(ds.pattern)
    except Exception as error:  # anybody's function
        raise InputError(f"{metric} failed with {type(error).__name__}: {error}.") from error
    dims = tuple(getattr(scores, "dims", ()))
    if {"layer", "head"} - set(dims) or set(dims) - {"problem", "layer", "head"}:
        raise InputError(
            f"{metric} returns {dims or type(scores).__name__}. A metric of heads returns a "
            "DataArray with dims layer and head, and perhaps problem."
        )
    return scores  # type: ignore[no-any-return]


def _require_patterns(ds: "xr.Dataset") -> None:
    if "pattern" not in ds:
        raise InputError(
            f"this needs patterns, and the store holds {', '.join(map(str, ds.data_vars))}. "
            "Capture it with sites=('pattern',)."
        )
    if not ds.sizes["problem"]:
        raise InputError("the store has no finished problem yet. Wait, or resume its capture.")


def _metric(name: str) -> Callable[..., Any]:
    """heads.entropy, flow.hub, or any importable package.module.function."""
    if (found := _importing.metric(name)) is not None:
        return found
    raise InputError(
        f"there is no metric {name!r}. Name one like heads.induction, heads.entropy or flow.hub, "
        "or a function of your own as package.module.function."
    )


def _metrics(names: str) -> dict[str, Callable[..., Any]]:
    """Several, by what comes last in each name."""
    found: dict[str, Callable[..., Any]] = {}
    for name in map(str.strip, names.split(",")):
        last = name.rpartition(".")[2]
        if last in found:
            raise InputError(f"two of --reduce {names} are called {last}. Keep them in two stores.")
        found[last] = _metric(name)
    return found


def _draw_patterns(
    ds: "xr.Dataset", problem: str | None, layer: int | None, head: int | None
) -> Any:
    from recipes import plots

    if layer is None:
        raise InputError("patterns of which layer? Add --layer.")
    _require_patterns(ds)
    names = [str(name) for name in ds.problem.values]
    chosen = names[0] if problem is None else problem
    for what, value, known in (
        ("problem", chosen, names),
        ("layer", layer, ds.layer.values.tolist()),
        ("head", head, [None, *ds["head"].values.tolist()]),
    ):
        if value not in known:
            listed = ", ".join(map(str, [k for k in known if k is not None][:12]))
            raise InputError(f"the store has no {what} {value!r}. It has {listed}, ...")
    patterns = ds.pattern.sel(problem=chosen, layer=layer)
    title = f"{ds.attrs['model']}, problem {chosen}, layer {layer}"
    if head is None:
        return plots.head_grid(patterns, title=title)
    axes = plots.pattern(patterns.sel(head=head), title=f"{title}, head {head}")
    return axes.get_figure(root=True)
