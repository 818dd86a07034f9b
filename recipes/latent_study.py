"""The whole study of document 002 in a folder: questions, stores, results, figures, a report.

OUT/data/attention_dataset_100_train.json     the questions, the same for every model
OUT/stores/NAME.zarr, NAME_knockout.zarr      what the models did; runs resume here
OUT/results/NAME/...                          document 002's files: see `latent_export`
OUT/results/comparison/A_vs_B_comparison.json
OUT/figures/NAME/1_...png to 5_...png, OUT/figures/comparison/6_...png to 8_...png
OUT/report.md                                 what was found, and what noise passes as well
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import xarray as xr

import probe
from probe.errors import InputError
from probe.latent import ROWS
from probe.problems import Problem, Problems
from probe.schema import DONE
from recipes import compare, latent, latent_data
from recipes._files import write, writing
from recipes.latent_analysis import Analysis, analyse
from recipes.latent_export import export
from recipes.latent_report import report

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from probe.latent import Reasoner

Tell = Callable[[str], None]
CHECKED = 4  # problems whose rows are read step by step too


class Settings(NamedTuple):
    """How a study runs.

    Attributes:
        n: Questions; None for all.
        seed: Of the draw of questions, of controls, of the bootstrap and of the noise.
        draws: Of the bootstrap.
        top: Rank up to which a head counts as one of the best.
        max_new_tokens: Tokens of an answer at most.
        batch_size: Problems in a batch at most.
        blocks: Whether to store the latents' own block alone: little, for many problems.
        knockout: Whether to hide each latent in turn: some 15 times the time of the answers.
        dpi: Of the figures.
    """

    n: int | None = 100
    seed: int = 42
    draws: int = 2000
    top: int = 10
    max_new_tokens: int = 32
    batch_size: int | None = None
    blocks: bool = False
    knockout: bool = True
    dpi: int = 160


DEFAULT = Settings()


class Studied(NamedTuple):
    """What was found about one model: its numbers, what hiding latents did, and the check."""

    analysis: Analysis
    knockout: xr.Dataset | None
    apart: float  # greatest difference of a row read at once from the same read step by step


def run(
    models: Mapping[str, str],
    problems: object,
    out: Path,
    settings: Settings = DEFAULT,
    *,
    text: str | None = None,
    tell: Tell = lambda line: None,
) -> dict[str, Studied]:
    """Run the study, or go on with it where it stopped.

    Args:
        models: By the name that their files get: a published checkpoint, a folder, "demo-codi".
        problems: See `recipes.latent_data.sample`.
        out: The folder; it is made.
        settings: How.
        text: The field that holds the question.
        tell: Called with a line for each thing that is done.

    Returns:
        By name, what was found.

    Raises:
        InputError: Something cannot be used.
        StoreError: A store in the folder is of another run.

    Example:
        >>> few = Settings(n=8, draws=100, knockout=False, dpi=40)
        >>> found = run({"codi": "demo-codi"}, "demo:chains", Path("study"), few)
        >>> sorted(path.name for path in Path("study/results/codi").iterdir())[:2]
        ['attention_patterns_avg.npy', 'attention_patterns_raw.npy']
    """
    require_names(models)
    chosen = latent_data.sample(problems, n=settings.n, seed=settings.seed, text=text)
    if len(chosen) < 2:
        raise InputError("the spread over problems needs 2 questions, and there is 1. Take more.")
    data = out / "data" / latent_data.name(chosen, every=settings.n is None)
    latent_data.write(chosen, data)
    tell(f"{len(chosen)} questions: {data}")
    if len(models) > 1:  # what cannot be loaded shows before hours are spent on another
        for source in list(models.values())[1:]:
            probe.latent.load(source).close()
    found = {}
    for name, source in models.items():
        with probe.latent.load(source) as reasoner:
            tell(repr(reasoner))
            found[name] = _study(reasoner, name, chosen, out, settings, tell)
    analyses = {name: one.analysis for name, one in found.items()}
    for some in combinations(found, 2):
        _compare({name: analyses[name] for name in some}, out, settings, tell)
    if len(found) > 1:
        draw(compared(analyses), out / "figures" / "comparison", settings.dpi)
    path = out / "report.md"
    write(path, report(found))
    tell(f"report: {path}")
    return found


def require_names(models: Mapping[str, str]) -> None:
    """Refuse names that cannot be names of folders.

    Raises:
        InputError: Which.
    """
    if not models:
        raise InputError("a study of no model finds nothing. Name one, as demo-codi.")
    for name in models:
        taken = name == "comparison" or name.removesuffix("_knockout") in {*models} - {name}
        if not name or Path(name).name != name or name in (".", "..") or taken:
            raise InputError(f"{name!r} cannot be the name of a folder. Give another with --name.")


def _study(
    reasoner: "Reasoner",
    name: str,
    problems: Problems,
    out: Path,
    settings: Settings,
    tell: Tell,
) -> Studied:
    ds = extract(reasoner, problems, out / "stores" / f"{name}.zarr", settings)
    done = ds["problem"].values[ds["status"].values == DONE]
    apart = check(reasoner, [problem for problem in problems if problem.id in done][:CHECKED])
    tell(f"{name}: rows read at once equal those read step by step within {apart:.1e}")
    hidden = None
    if settings.knockout:
        hidden = latent.knockout(
            reasoner,
            problems,
            out / "stores" / f"{name}_knockout.zarr",
            max_new_tokens=settings.max_new_tokens,
            batch_size=settings.batch_size,
            seed=settings.seed,
        )
    analysis = analyse(ds, top=settings.top, draws=settings.draws, seed=settings.seed)
    written = export(analysis, out / "results" / name, checkpoints=settings.n is None)
    written += draw(figures(analysis, hidden), out / "figures" / name, settings.dpi)
    tell(f"{name}: {len(written)} files in {out / 'results' / name} and {out / 'figures' / name}")
    return Studied(analysis, hidden, apart)


def extract(
    reasoner: "Reasoner", problems: Problems, store: Path, settings: Settings
) -> xr.Dataset:
    """Capture what a study needs: latents, what closes and the answer, against all keys."""
    latents = "segment:latent" if settings.blocks else None
    return probe.latent.capture(
        reasoner,
        problems,
        store,
        max_new_tokens=settings.max_new_tokens,
        batch_size=settings.batch_size,
        queries=latents or ROWS,
        keys=latents,
    )


def check(reasoner: "Reasoner", problems: Iterable[Problem]) -> float:
    """The greatest difference between rows of latents read at once and read step by step."""
    apart = 0.0
    for problem in problems:
        steps = probe.latent.stepwise(reasoner, [problem])
        once = probe.latent.rows(reasoner, [problem])
        apart = max(apart, float(abs(steps - once).max()))
    return apart


def figures(found: Analysis, hidden: xr.Dataset | None) -> Iterator[tuple[str, "Figure"]]:
    """Document 002's figures 1 to 5 of one model, and what each latent is read from and worth.

    A composite beyond chance takes four latents: with fewer there are no figures 1, 4 and 5.
    """
    from recipes import plots_latent as plots

    best = latent.best(found.findings, "composite", 1)
    if best:
        yield "1_top_heads_attention", plots.top_heads(found.aggregated, found.findings)
    yield "2_attention_by_layer", plots.by_layer(found.aggregated)
    yield "3_hub_analysis", plots.hub_analysis(found.aggregated, found.findings)
    if best:
        yield "4_top_heads_visualization", plots.ranking(found.findings, found.published)
    for layer, head in best:
        detail = plots.critical_head_detail(found.aggregated, found.findings, layer, head)
        yield f"5_critical_head_detail_L{layer}H{head}", detail
    yield "masses", plots.latent_masses(latent.masses(found.store))
    if (found.store["query_segment"] == "answer").any():
        yield "readout", plots.latent_readout(latent.readout(found.store))
    if hidden is not None:
        yield "knockout", plots.latent_knockout(hidden)


def draw(figures: Iterator[tuple[str, "Figure"]], folder: Path, dpi: int = 160) -> list[Path]:
    """Write figures as png, one at a time.

    Raises:
        InputError: They cannot be written.
    """
    written = []
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name, figure in figures:
            written.append(folder / f"{name}.png")
            figure.savefig(written[-1], dpi=dpi)
    return written


def _compare(found: Mapping[str, Analysis], out: Path, settings: Settings, tell: Tell) -> None:
    stores = {name: one.store for name, one in found.items()}
    tree = compare.compare(stores, draws=settings.draws, seed=settings.seed)
    path = out / "results" / "comparison" / f"{'_vs_'.join(found)}_comparison.json"
    write(path, json.dumps(compare.as_json(tree), indent=2) + "\n")
    tell(compare.summary(tree))
    tell(f"comparison: {path}")


def compared(found: Mapping[str, Analysis]) -> Iterator[tuple[str, "Figure"]]:
    """Document 002's figures 6 to 8 of several models."""
    from recipes import plots_compare as plots

    tables = {name: (one.aggregated, one.findings) for name, one in found.items()}
    yield "6_model_comparison_hubs", plots.model_comparison_hubs(tables)
    yield "7_model_comparison_flow", plots.model_comparison_flow(tables)
    yield "8_model_comparison_critical_heads", plots.model_comparison_critical_heads(tables)
