"""The study of document 002 in a folder: every file, equal to what the stores hold."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import probe
from probe import stitching
from probe.errors import InputError
from recipes import latent, latent_report, latent_study, latent_tracking
from recipes.latent_analysis import analyse
from recipes.latent_export import export
from recipes.latent_study import Settings, Studied

MODELS = {"codi": "demo-codi", "coconut": "demo-coconut"}
FEW = Settings(n=12, draws=100, max_new_tokens=4, dpi=40)
FIGURES = [
    "1_top_heads_attention",
    "2_attention_by_layer",
    "3_hub_analysis",
    "4_top_heads_visualization",
    "5_critical_head_detail_L",
    "knockout",
    "masses",
    "readout",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("study") / "out"


@pytest.fixture(scope="module")
def told() -> list[str]:
    return []


@pytest.fixture(scope="module")
def study(folder: Path, told: list[str]) -> dict[str, Studied]:
    return latent_study.run(MODELS, "demo:chains", folder, FEW, tell=told.append)


def naive(mean: Any) -> dict[str, Any]:
    """Document 002's scores of mean blocks (layer, head, query, key), by loops over cells."""
    found = {name: np.zeros(mean.shape[:2]) for name in ("flow", "hub", "skip", "composite")}
    for at in np.ndindex(mean.shape[:2]):
        block, n = mean[at], len(mean[at])
        below = sum(block[i, j] for i in range(n) for j in range(i))
        found["flow"][at] = below / (below + sum(block[i, i] for i in range(n)))
        received = [sum(block[i, j] for i in range(n)) for j in range(n)]
        found["hub"][at] = sum((x - sum(received) / n) ** 2 for x in received) / n
        found["skip"][at] = sum(block[5, j] for j in range(3)) / 3
    hub, skip = ((x - x.min()) / (x.max() - x.min()) for x in (found["hub"], found["skip"]))
    found["composite"] = 0.4 * found["flow"] + 0.4 * hub + 0.2 * skip
    return found


def files(folder: Path) -> Iterator[str]:
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not any(one.suffix == ".zarr" for one in path.parents):
            yield str(path.relative_to(folder))


def test_every_file_of_the_document_is_written(
    study: dict[str, Studied], folder: Path, told: list[str]
) -> None:
    found = list(files(folder))
    for name in study:
        pictures = [Path(x).stem for x in found if x.startswith(f"figures/{name}/")]
        assert [a.startswith(b) for a, b in zip(pictures, FIGURES, strict=True)] == [True] * 8
        assert {Path(x).name for x in found if x.startswith(f"results/{name}/")} == {
            "attention_patterns_avg.npy",
            "attention_patterns_raw.npy",
            "attention_stats.json",
            "attention_summary.json",
            "calibrated_heads.csv",
            "failed_problems.json",
            "heads_ranked_by_flow.csv",
            "heads_ranked_by_hub.csv",
            "heads_ranked_by_skip.csv",
            "ranked_heads.csv",
        }
    assert "data/attention_dataset_12_chains.json" in found
    assert "results/comparison/codi_vs_coconut_comparison.json" in found
    assert [Path(x).stem for x in found if x.startswith("figures/comparison/")] == [
        "6_model_comparison_hubs",
        "7_model_comparison_flow",
        "8_model_comparison_critical_heads",
    ]
    assert "report.md" in found
    assert len(found) == 2 * 18 + 6
    assert "12 questions" in told[0]


def test_arrays_and_tables_are_those_of_the_store(study: dict[str, Studied], folder: Path) -> None:
    ds = study["codi"].analysis.store
    results = folder / "results" / "codi"
    raw = np.load(results / "attention_patterns_raw.npy")
    assert (raw.shape, raw.dtype) == ((12, 2, 4, 6, 6), np.float16)
    for n in range(12):
        rows = np.flatnonzero(ds["query_segment"].values[n] == "latent")
        columns = np.flatnonzero(ds["segment"].values[n] == "latent")
        block = ds["pattern"].values[n][:, :, rows][..., columns]
        np.testing.assert_array_equal(raw[n], block)
    average = np.load(results / "attention_patterns_avg.npy")
    np.testing.assert_allclose(average, raw.astype("float64").mean(0), atol=1e-6)
    stats = json.loads((results / "attention_stats.json").read_text())
    assert stats["shape"] == [12, 2, 4, 6, 6]
    assert stats["mean_attention"] == pytest.approx(average.mean(), abs=1e-6)
    assert sum(stats["mass"].values()) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("score", ["flow", "hub", "skip", "composite"])
def test_rankings_are_the_documents_scores_in_order(
    score: str, study: dict[str, Studied], folder: Path
) -> None:
    results = folder / "results" / "codi"
    name = "ranked_heads.csv" if score == "composite" else f"heads_ranked_by_{score}.csv"
    with (results / name).open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["rank"]) for row in rows] == list(range(1, 9))
    values = [float(row[f"{score}_score"]) for row in rows]
    assert values == sorted(values, reverse=True)
    wanted = naive(np.load(results / "attention_patterns_avg.npy").astype("float64"))
    for row in rows:
        at = int(row["layer"]), int(row["head"])
        assert float(row[f"{score}_score"]) == pytest.approx(wanted[score][at], abs=1e-5)


def test_the_report_names_the_artefact_and_what_noise_passes(
    study: dict[str, Studied], folder: Path
) -> None:
    text = (folder / "report.md").read_text()
    for name, one in study.items():
        assert f"## {name}\n" in text
        assert one.apart < 1e-5
        analysis = one.analysis
        np.testing.assert_allclose(analysis.shifted["flow"], 1.0, atol=1e-6)
        assert float(analysis.shifted["composite"].max()) <= 0.6 + 1e-6
        assert not analysis.noise.findings["found"].any()
        assert [c.name for c in analysis.criteria] == [c.name for c in analysis.noise.criteria]
    assert text.count("flow is 1.000 to 1.000 for every head") == 2
    assert text.count("This is an artefact of the reading") == 2
    assert text.count("of noise, 0 do") == 2
    assert "one model per arm" in text
    lines = text.splitlines()
    assert "| phase | criterion | this model | noise |" in lines


def test_a_study_goes_on_where_it_stopped(
    study: dict[str, Studied], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nothing(*arguments: object, **options: object) -> None:
        raise AssertionError("it thought again")

    before = (folder / "report.md").read_text()
    monkeypatch.setattr("probe.latent.read", nothing)
    monkeypatch.setattr(latent_study, "check", lambda *_: study["codi"].apart)
    again = latent_study.run({"codi": "demo-codi"}, "demo:chains", folder, FEW)
    np.testing.assert_array_equal(
        again["codi"].analysis.aggregated["mean"], study["codi"].analysis.aggregated["mean"]
    )
    section = before.split("## coconut")[0]
    assert (folder / "report.md").read_text().rstrip() == section.rstrip()


def test_blocks_alone_are_little_and_give_the_same_scores(
    study: dict[str, Studied], tmp_path: Path
) -> None:
    few = FEW._replace(blocks=True, knockout=False)
    one = latent_study.run({"codi": "demo-codi"}, "demo:chains", tmp_path, few)["codi"].analysis
    assert one.store.sizes["key"] == one.store.sizes["query"] == 6
    for name in ("flow", "hub", "skip", "composite"):
        np.testing.assert_allclose(
            one.published[name], study["codi"].analysis.published[name], atol=1e-5
        )
    assert not (tmp_path / "figures/codi/readout.png").exists()
    assert "What the answer reads" not in (tmp_path / "report.md").read_text()


def test_failed_problems_are_listed_and_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = stitching.read

    def fails(reasoner: Any, todo: Any, batch: Any, *, proof: bool) -> Any:
        if any(todo.items[n].problem.id == "chains_163" for n in batch):
            raise FloatingPointError("the latents are not finite")
        return real(reasoner, todo, batch, proof=proof)

    monkeypatch.setattr("probe.latent.read", fails)
    few = FEW._replace(knockout=False)
    found = latent_study.run({"codi": "demo-codi"}, "demo:chains", tmp_path, few)["codi"]
    listed = json.loads((tmp_path / "results/codi/failed_problems.json").read_text())
    assert [one["id"] for one in listed] == ["chains_163"]
    assert "not finite" in listed[0]["error"]
    assert np.load(tmp_path / "results/codi/attention_patterns_raw.npy").shape[0] == 11
    assert "11 problems" in latent_report.overview(found.analysis).text


def test_all_questions_have_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recipes.latent_export.CHECKPOINT", 5)
    rows = probe.demos.chains(12)
    few = FEW._replace(n=None, knockout=False)
    latent_study.run({"codi_full": "demo-codi"}, rows, tmp_path, few)
    raw = np.load(tmp_path / "results/codi_full/attention_patterns_raw.npy")
    for count in (5, 10):
        path = tmp_path / f"results/codi_full/checkpoints/attention_checkpoint_{count}.npy"
        np.testing.assert_array_equal(np.load(path), raw[:count])
    assert (tmp_path / "data/attention_dataset_full_list.json").exists()


@pytest.mark.parametrize("name", ["", "..", "a/b", "comparison", "codi_knockout"])
def test_names_that_are_no_folders_are_refused_before_anything_runs(
    name: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="cannot be the name of a folder"):
        latent_study.run({"codi": "demo-codi", name: "demo-codi"}, "demo:chains", tmp_path / "out")
    with pytest.raises(InputError, match="needs 2 questions"):
        latent_study.run(MODELS, "demo:chains", tmp_path / "out", FEW._replace(n=1))
    with pytest.raises(InputError, match="a study of no model"):
        latent_study.run({}, "demo:chains", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_wandb_gets_the_documents_numbers_and_the_figures_offline(
    study: dict[str, Studied], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logged: list[dict[str, Any]] = []
    real = wandb.init

    def init(**options: Any) -> Any:
        run = real(**options)
        log = run.log

        def both(data: dict[str, Any]) -> None:
            logged.append(data)
            log(data)

        monkeypatch.setattr(run, "log", both)
        return run

    monkeypatch.setattr(wandb, "init", init)
    latent_tracking.log("tests", {"codi": study["codi"]}, folder)
    counted = [one for one in logged if "problems_processed" in one]
    assert [one["problems_processed"] for one in counted] == list(range(1, 13))
    raw = np.load(folder / "results/codi/attention_patterns_raw.npy").astype("float32")
    assert counted[3]["max_attention"] == pytest.approx(raw[3].max(), abs=1e-3)
    names = {key for one in logged for key in one}
    assert {"top_flow_score", "n_critical_heads", "hub_position", "calibrated_findings"} <= names
    assert {"1_top_heads_attention", "knockout"} <= names
    assert list((folder / "wandb").glob("offline-run-*/*.wandb"))


def test_a_missing_wandb_is_named_with_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    with pytest.raises(InputError, match=r"pip install attn-probe\[wandb\]"):
        latent_tracking.require()


def test_readout_and_masses_are_means_of_rows(study: dict[str, Studied]) -> None:
    ds = study["coconut"].analysis.store
    read, mass = latent.readout(ds), latent.masses(ds)
    assert mass["row"].values.tolist() == ["z0", "z1", "z2", "z3", "z4", "z5", "eot", "answer"]
    for n in range(3):
        names, segment = ds["query_segment"].values[n], ds["segment"].values[n]
        for row in ("eot", "answer"):
            own = [q for q, name in enumerate(names) if name == row]
            for layer in range(2):
                for head in range(4):
                    p = ds["pattern"].values[n, layer, head].astype("float64")
                    for k, column in enumerate(np.flatnonzero(segment == "latent")):
                        wanted = np.mean([p[q, column] for q in own])
                        cell = read.isel(problem=n, layer=layer, head=head, key=k).sel(row=row)
                        assert float(cell) == pytest.approx(wanted, abs=1e-6)
            wanted = np.mean([ds["mass"].values[n, :, :, q] for q in own], axis=(0, 1, 2))
            np.testing.assert_allclose(mass.isel(problem=n).sel(row=row), wanted, atol=1e-6)
    np.testing.assert_allclose(mass.sum("part"), 1.0, atol=1e-4)


def test_top_tokens_are_the_question_tokens_that_latents_look_at(study: dict[str, Studied]) -> None:
    ds = study["codi"].analysis.store
    rows = latent.top_tokens(ds, k=2)
    assert len(rows) == 12 * 6 * 2
    first = next(row for row in rows if row["latent"] == 1 and row["rank"] == 1)
    p = ds["pattern"].values[0].astype("float64").mean((0, 1))[1]
    question = np.flatnonzero(ds["segment"].values[0] == "question")
    best = question[p[question].argmax()]
    assert (first["position"], first["token"]) == (best, ds["token"].values[0, best])
    assert first["attention"] == pytest.approx(p[best], abs=1e-6)
    with pytest.raises(InputError, match="k=0 gives no tokens"):
        latent.top_tokens(ds, k=0)


def test_the_problems_of_a_latent_store_are_its_questions(
    study: dict[str, Studied], folder: Path
) -> None:
    ds = study["codi"].analysis.store
    again = probe.problems(ds)
    with probe.latent.load("demo-codi", device="cpu") as reasoner:
        thoughts = probe.latent.think(reasoner, again, max_new_tokens=4)
        assert [one.text for one in thoughts] == ds["answer"].values.tolist()
        assert np.mean([one.correct for one in thoughts]) == float(ds["correct"].mean())
        rows = json.loads((folder / "data/attention_dataset_12_chains.json").read_text())
        wrong = [{"id": r["gsm8k_id"], "question": r["question"], "answer": "9"} for r in rows]
        with pytest.raises(probe.StoreError, match="expected"):
            latent_study.extract(reasoner, probe.problems(wrong), folder / "stores/codi.zarr", FEW)


@pytest.mark.parametrize("n_latents", [1, 2, 3])
def test_fewer_latents_have_the_numbers_and_figures_that_there_are(
    n_latents: int, tmp_path: Path
) -> None:
    with probe.latent.load("demo-codi", device="cpu", n_latents=n_latents) as reasoner:
        rows = probe.problems("demo:chains", n=4)
        ds = latent_study.extract(reasoner, rows, tmp_path / "few.zarr", FEW)
    analysis = analyse(ds, draws=50)
    written = latent_study.draw(latent_study.figures(analysis, None), tmp_path, dpi=40)
    names = [path.stem for path in written]
    assert names == ["2_attention_by_layer", "3_hub_analysis", "masses", "readout"]
    export(analysis, tmp_path / "files")
    raw = np.load(tmp_path / "files" / "attention_patterns_raw.npy")
    assert raw.shape == (4, 2, 4, n_latents, n_latents)
    text = latent_report.findings(analysis.findings).text
    assert "No head has a number for composite, which takes more latents" in text
    for section in ("overview", "masses", "published", "criteria"):
        assert getattr(latent_report, section)(analysis).text
