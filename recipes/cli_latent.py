"""The commands `probe latent ...` and `probe export`: document 002's pipeline, step by step."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import probe
from probe.errors import InputError
from recipes._cli import (
    ModelName,
    Overwrite,
    Text,
    echo_failures,
    progress,
    quiet,
    table,
)
from recipes._files import write

if TYPE_CHECKING:
    import xarray as xr

    from probe.latent import Reasoner
    from recipes.latent_report import Section

app = typer.Typer(no_args_is_help=True, help="Study how a latent reasoner looks at its latents.")

Questions = Annotated[
    str, typer.Argument(help=".jsonl, hf:NAME:CONFIG:SPLIT, demo:chains, or what sample wrote.")
]
Store = Annotated[Path, typer.Argument(help="Folder of a latent store.")]
Count = Annotated[int, typer.Option("-n", help="Questions to draw.")]
Every = Annotated[bool, typer.Option("--all", help="Take all questions, in their order.")]
Seed = Annotated[int, typer.Option(help="Of the draw of questions and all else that is drawn.")]
Draws = Annotated[int, typer.Option(min=1, help="Of the bootstrap over problems.")]
Top = Annotated[int, typer.Option(min=1, help="How many heads are the best.")]
New = Annotated[int, typer.Option(min=1, help="Tokens of an answer at most.")]
Batch = Annotated[int | None, typer.Option(help="Problems in a batch at most.")]
Blocks = Annotated[bool, typer.Option(help="Store the latents' own block alone.")]
Base = Annotated[str | None, typer.Option(help="Model that the checkpoint was trained from.")]
Latents = Annotated[int | None, typer.Option(help="Latents to read; default 6.")]


@app.command()
def run(
    problems: Annotated[str, typer.Option(help="See sample.")],
    model: Annotated[list[str], typer.Option(help="Checkpoint; several to compare them.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder of the study.")] = Path("study"),
    name: Annotated[
        list[str] | None, typer.Option(help="Of each model's files; default its own.")
    ] = None,
    n: Count = 100,
    every: Every = False,
    seed: Seed = 42,
    text: Text = None,
    draws: Draws = 2000,
    top: Top = 10,
    max_new_tokens: New = 32,
    batch_size: Batch = None,
    blocks: Blocks = False,
    knockout: Annotated[bool, typer.Option(help="Hide each latent in turn too.")] = True,
    wandb: Annotated[
        str | None, typer.Option(help="Log to this Weights & Biases project too.")
    ] = None,
) -> None:
    """Sample, extract, aggregate, rank, compare, draw and report; the same command resumes."""
    quiet()
    from recipes import latent_study, latent_tracking

    names = name or [_name(one, every) for one in model]
    if len(names) != len(model) or len(set(names)) < len(names):
        raise InputError(
            f"{len(model)} models have the names {', '.join(names)}. Give each one of its own, "
            "as --name gpt2 --name llama."
        )
    settings = latent_study.Settings(
        n=None if every else n,
        seed=seed,
        draws=draws,
        top=top,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        blocks=blocks,
        knockout=knockout,
    )
    if wandb is not None:
        latent_tracking.require()
    models = dict(zip(names, model, strict=True))
    found = latent_study.run(models, problems, out, settings, text=text, tell=typer.echo)
    if wandb is not None:
        latent_tracking.log(wandb, found, out)
    for one in found.values():
        echo_failures(one.analysis.store)


def _name(model: str, every: bool) -> str:
    """What a model's files are called: demo-codi is codi, and codi_full over all questions."""
    name = Path(model).name.removeprefix("demo-")
    return f"{name}_full" if every else name


@app.command()
def sample(
    problems: Questions,
    out: Annotated[Path, typer.Option("-o", "--out", help="File (.json), or a folder.")],
    n: Count = 100,
    every: Every = False,
    seed: Seed = 42,
    text: Text = None,
) -> None:
    """Draw questions as `random.seed(seed); random.sample(...)` does, check and write them."""
    from recipes import latent_data

    chosen = latent_data.sample(problems, n=None if every else n, seed=seed, text=text)
    path = out if out.suffix == ".json" else out / latent_data.name(chosen, every=every)
    latent_data.write(chosen, path)
    first = ", ".join(problem.id for problem in chosen[:3])
    typer.echo(f"{len(chosen)} questions, all different, each with an answer: {path}")
    typer.echo(f"the first: {first}")


@app.command()
def extract(
    model: ModelName,
    problems: Questions,
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder of the store.")],
    n: Annotated[int | None, typer.Option("-n", help="Questions to draw; default all.")] = None,
    seed: Seed = 42,
    text: Text = None,
    base: Base = None,
    latents: Latents = None,
    dtype: Annotated[str, typer.Option(help="float16 or float32.")] = "float16",
    max_new_tokens: New = 32,
    batch_size: Batch = None,
    blocks: Blocks = False,
    overwrite: Overwrite = False,
) -> None:
    """Let a reasoner answer, and store its attention; the same command resumes."""
    quiet()
    from recipes import latent_data, latent_report

    chosen = latent_data.sample(problems, n=n, seed=seed, text=text)
    options: dict[str, Any] = {"dtype": dtype, "batch_size": batch_size, "overwrite": overwrite}
    if blocks:
        options |= {"queries": "segment:latent", "keys": "segment:latent"}
    with _load(model, base, latents) as reasoner:
        ds = probe.latent.capture(reasoner, chosen, out, max_new_tokens=max_new_tokens, **options)
    typer.echo(f"{progress(ds)}: {out}")
    typer.echo(latent_report.accuracy(ds))
    echo_failures(ds)


@app.command()
def knockout(
    model: ModelName,
    problems: Questions,
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder of the results.")],
    n: Annotated[int | None, typer.Option("-n", help="Questions to draw; default all.")] = None,
    seed: Seed = 42,
    text: Text = None,
    base: Base = None,
    latents: Latents = None,
    max_new_tokens: New = 32,
    batch_size: Batch = None,
    overwrite: Overwrite = False,
) -> None:
    """Hide each latent from all after it, and as many tokens of the question as a control."""
    quiet()
    from recipes import latent, latent_data, latent_report

    chosen = latent_data.sample(problems, n=n, seed=seed, text=text)
    with _load(model, base, latents) as reasoner:
        ds = latent.knockout(
            reasoner,
            chosen,
            out,
            seed=seed,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            overwrite=overwrite,
        )
    _tell(latent_report.knockout(ds))
    typer.echo(f"{progress(ds)}: {out}")
    echo_failures(ds)


def _load(model: str, base: str | None, latents: int | None) -> "Reasoner":
    return probe.latent.load(model, base=base, n_latents=latents)


@app.command()
def aggregate(store: Store, as_json: Annotated[bool, typer.Option("--json")] = False) -> None:
    """Average over problems: where latents look, the document's scores, its criteria and noise."""
    from recipes import latent_analysis, latent_export, latent_report

    found = latent_analysis.analyse(probe.open(store))
    if as_json:
        typer.echo(json.dumps(latent_export.statistics(found), indent=2))
        return
    for section in ("overview", "masses", "published", "criteria"):
        _tell(getattr(latent_report, section)(found))


@app.command()
def rank(
    store: Store,
    score: Annotated[str, typer.Option(help="composite, sequential, hub, long_range, ...")] = (
        "composite"
    ),
    top: Top = 10,
    draws: Draws = 2000,
    seed: Seed = 42,
) -> None:
    """Rank heads by a calibrated score, with intervals of score and rank, and types."""
    from recipes import latent, latent_report

    scores = latent.scores(probe.open(store))
    found = latent.findings(scores, top=top, draws=draws, seed=seed)
    _tell(latent_report.findings(found, score, top=top))


@app.command()
def compare(
    stores: Annotated[list[str], typer.Argument(help="Stores of the same questions, NAME=STORE.")],
    out: Annotated[Path | None, typer.Option("-o", "--out", help="File (.json).")] = None,
    draws: Draws = 2000,
    seed: Seed = 42,
) -> None:
    """Compare models over the same questions, by relative depth, against each one's own null."""
    from recipes import compare as recipe

    pairs = [one.split("=", 1) if "=" in one else [Path(one).stem, one] for one in stores]
    opened = {name: probe.open(path) for name, path in pairs}
    if len(opened) < max(2, len(pairs)):
        raise InputError(
            f"{len(pairs)} stores have {len(opened)} names. Give at least two, each with one of "
            "its own: gpt2=a.zarr llama=b.zarr."
        )
    tree = recipe.compare(opened, draws=draws, seed=seed)
    typer.echo(recipe.summary(tree))
    if out is not None:
        write(out, json.dumps(recipe.as_json(tree), indent=2) + "\n")
        typer.echo(out)


@app.command()
def figures(
    stores: Annotated[list[Path], typer.Argument(help="Latent stores; several are compared.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder of the pictures.")],
    knocked_out: Annotated[
        Path | None, typer.Option("--knockout", help="What `probe latent knockout` wrote.")
    ] = None,
    draws: Draws = 2000,
    seed: Seed = 42,
) -> None:
    """Draw document 002's figures: 1 to 5 of each store, and 6 to 8 of several."""
    from recipes import latent_analysis, latent_study

    if len({path.stem for path in stores}) < len(stores):
        names = ", ".join(path.stem for path in stores)
        raise InputError(f"{len(stores)} stores have the names {names}. Rename one.")
    hidden = None if knocked_out is None else _hidden(knocked_out, stores)
    found = {
        path.stem: latent_analysis.analyse(probe.open(path), draws=draws, seed=seed)
        for path in stores
    }
    for name, one in found.items():
        folder = out / name if len(found) > 1 else out
        for path in latent_study.draw(latent_study.figures(one, hidden), folder):
            typer.echo(path)
    if len(found) > 1:
        for path in latent_study.draw(latent_study.compared(found), out / "comparison"):
            typer.echo(path)


def _hidden(path: Path, stores: list[Path]) -> "xr.Dataset":
    """What a knock-out wrote, of the one store that is drawn."""
    ds = probe.open(path)
    if "delta_loss" not in ds or "hidden" not in ds.dims:
        raise InputError(f"--knockout {path} is not what `probe latent knockout` writes.")
    models = [str(probe.open(store).attrs["model"]) for store in stores]
    if models != [ds.attrs["model"]]:
        raise InputError(
            f"--knockout {path} is of {ds.attrs['model']}, and the stores of {', '.join(models)}. "
            "Draw the store of that model alone."
        )
    return ds


def export(
    store: Store,
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder of the files.")],
    layout: Annotated[str, typer.Option(help="codi: document 002's files.")] = "codi",
    draws: Draws = 2000,
    seed: Seed = 42,
    checkpoints: Annotated[
        bool, typer.Option(help="Also attention_checkpoint_1000.npy, ...")
    ] = False,
    pictures: Annotated[bool, typer.Option(help="Also the figures.")] = True,
) -> None:
    """Write a latent store as other programs keep it: npy, json, csv and png."""
    if layout != "codi":
        raise InputError(f"--layout {layout}: there is no such layout. Choose codi.")
    from recipes import latent_analysis, latent_export, latent_study

    found = latent_analysis.analyse(probe.open(store), draws=draws, seed=seed)
    written = latent_export.export(found, out, checkpoints=checkpoints)
    if pictures:
        written += latent_study.draw(latent_study.figures(found, None), out / "figures")
    for path in written:
        typer.echo(path)


def _tell(section: "Section") -> None:
    typer.echo(f"{section.title}: {section.text}")
    if section.rows:
        table(section.columns, section.rows)
    typer.echo()
