"""The commands `probe latent ...` and `probe export`: what they say, write and refuse."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import probe
from recipes import cli_latent, latent
from tests.test_cli import command as command


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("latent")
    paths = {}
    for name in ("codi", "coconut"):
        paths[name] = folder / f"{name}.zarr"
        with probe.latent.load(f"demo-{name}", device="cpu") as reasoner:
            rows = probe.demos.chains(8)
            probe.latent.capture(reasoner, rows, paths[name], max_new_tokens=3, progress=False)
    return paths


def test_sample_extract_and_knockout(command: Any, tmp_path: Path) -> None:
    code, out, _ = command("latent", "sample", "demo:chains", "-n", 6, "-o", tmp_path)
    assert code == 0
    assert "6 questions, all different, each with an answer" in out
    assert "the first: chains_163, chains_28, chains_6" in out
    data = tmp_path / "attention_dataset_6_chains.json"
    assert len(json.loads(data.read_text())) == 6
    extract = ("latent", "extract", "demo-codi", data, "-o", tmp_path / "a.zarr")
    code, out, _ = command(*extract, "--max-new-tokens", 3)
    assert code == 0
    assert "6 problems done, 0 failed of 6" in out
    assert "accuracy 1.000 (6 of 6 answers)" in out
    ds = probe.open(tmp_path / "a.zarr")
    assert ds["problem"].values.tolist()[:2] == ["chains_163", "chains_28"]
    code, out, _ = command(
        "latent", "knockout", "demo-codi", data, "-o", tmp_path / "k.zarr", "--max-new-tokens", 3
    )
    assert code == 0
    found = probe.open(tmp_path / "k.zarr")
    row = next(line for line in out.splitlines() if line.strip().startswith("z1 "))
    assert f"{float(found['delta_loss'].sel(hidden='z1').mean()):.3f}" in row


def test_aggregate_shows_the_artefact_and_noise(command: Any, stores: dict[str, Path]) -> None:
    code, out, _ = command("latent", "aggregate", stores["codi"])
    flat = " ".join(out.split())
    assert code == 0
    assert "flow is 1.000 to 1.000 for every head" in flat
    assert "What noise passes is no evidence" in flat
    code, out, _ = command("latent", "aggregate", stores["codi"], "--json")
    mean = latent.aggregate(probe.open(stores["codi"]))["mean"]
    assert json.loads(out)["mean_attention"] == pytest.approx(float(mean.mean()))


def test_rank_names_the_hub(command: Any, stores: dict[str, Path]) -> None:
    options = ("--score", "hub", "--top", "2", "--draws", "99")
    code, out, _ = command("latent", "rank", stores["codi"], *options)
    assert code == 0
    first = next(line for line in out.splitlines() if line.strip().startswith("L"))
    assert first.split()[0] == "L1H3"
    assert "z1" in first


def test_compare_and_figures_take_several_stores(
    command: Any, stores: dict[str, Path], tmp_path: Path
) -> None:
    pairs = [f"{name}={path}" for name, path in stores.items()]
    out_file = tmp_path / "new" / "comparison.json"
    code, out, _ = command("latent", "compare", *pairs, "-o", out_file, "--draws", 99)
    assert code == 0
    assert "codi" in out
    assert json.loads(out_file.read_text())
    code, out, _ = command(
        "latent", "figures", *stores.values(), "-o", tmp_path / "f", "--draws", 99
    )
    assert code == 0
    pictures = [Path(line) for line in out.split()]
    assert len(pictures) == 2 * 7 + 3
    assert all(path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" for path in pictures)


def test_export_writes_the_documents_files(
    command: Any, stores: dict[str, Path], tmp_path: Path
) -> None:
    options = ("--layout", "codi", "--no-pictures", "--draws", 99)
    code, out, _ = command("export", stores["coconut"], "-o", tmp_path / "x", *options)
    assert code == 0
    assert len(out.split()) == 10
    assert np.load(tmp_path / "x" / "attention_patterns_raw.npy").shape == (8, 2, 4, 6, 6)


def test_run_prints_what_it_does(command: Any, tmp_path: Path) -> None:
    study = ("latent", "run", "--model", "demo-codi", "--problems", "demo:chains", "-n", 4)
    code, out, _ = command(*study, "--draws", 99, "--no-knockout", "-o", tmp_path / "s")
    assert code == 0
    assert "4 questions" in out
    assert "rows read at once equal those read step by step within" in out
    assert (tmp_path / "s" / "results" / "codi" / "ranked_heads.csv").exists()
    assert cli_latent._name("/a/b/CODI-gpt2", every=True) == "CODI-gpt2_full"


def test_info_says_how_many_answers_are_right(command: Any, stores: dict[str, Path]) -> None:
    code, out, _ = command("info", stores["codi"], "--json")
    assert code == 0
    assert json.loads(out)["accuracy"] == 1.0


REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "two of one name": (
        ("latent", "run", "--model", "demo-codi", "--model", "demo-codi", "--problems", "x"),
        "2 models have the names codi, codi",
    ),
    "no such problems": (
        ("latent", "run", "--model", "demo-codi", "--problems", "nowhere.jsonl"),
        "nowhere.jsonl cannot be read",
    ),
    "no such model": (
        ("latent", "extract", "demo-cody", "demo:chains", "-o", "o.zarr"),
        "'demo-cody' cannot be loaded",
    ),
    "a plain model": (
        ("latent", "extract", str(probe.demos.path("demo-llama")), "demo:chains", "-o", "o.zarr"),
        "is neither CODI nor Coconut",
    ),
    "no answers": (("latent", "sample", "abc", "-o", "s", "--all"), "has no answer"),
    "too many": (("latent", "sample", "demo:chains", "-n", "999", "-o", "s"), "n=999 cannot"),
    "no store": (("latent", "aggregate", "nowhere.zarr"), "nowhere.zarr"),
    "one store": (("latent", "compare", "a=STORE"), "1 stores have 1 names"),
    "no such score": (("latent", "rank", "STORE", "--score", "x", "--draws", "9"), "score='x'"),
    "no such layout": (
        ("export", "STORE", "-o", "x", "--layout", "csv"),
        "there is no such layout",
    ),
    "one name twice": (("latent", "figures", "STORE", "STORE", "-o", "f"), "names codi, codi"),
    "no folder": (("latent", "figures", "STORE", "-o", "plain.txt"), "plain.txt cannot be written"),
    "no knockout": (
        ("latent", "figures", "STORE", "-o", "f", "--knockout", "STORE"),
        "is not what `probe latent knockout` writes",
    ),
    "junk": (
        ("latent", "extract", "plain.txt", "demo:chains", "-o", "o"),
        "cannot be read as tensors",
    ),
    "question of a number": (
        ("latent", "extract", "demo-codi", "bad.json", "-o", "o.zarr"),
        "the question 5 is no text",
    ),
    "a second model that is not there": (
        ("latent", "run", "--model", "demo-codi", "--model", "nope", "--problems", "demo:chains"),
        "'nope' cannot be loaded",
    ),
    "another store to rank": (("latent", "rank", "PLAIN"), "no store of a latent reasoner"),
    "another store": (("latent", "aggregate", "PLAIN"), "no store of a latent reasoner"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_done_is_one_clear_line(
    name: str,
    command: Any,
    stores: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments, message = REFUSED[name]
    if "PLAIN" in arguments:
        with probe.load("demo-llama", device="cpu") as model:
            probe.capture(model, ["abcabc"], tmp_path / "plain.zarr", progress=False)
    (tmp_path / "plain.txt").write_text("hi\n")
    (tmp_path / "bad.json").write_text('[{"gsm8k_id": "a", "question": 5, "answer": "3"}]')
    places = {"STORE": stores["codi"], "a=STORE": f"a={stores['codi']}"}
    places["PLAIN"] = tmp_path / "plain.zarr"
    code, _, err = command(*(places.get(str(x), x) for x in arguments))
    assert code == 1
    assert message in err
    assert "Traceback" not in err
    assert len([line for line in err.splitlines() if "error" in line.lower()]) == 1
    assert not (tmp_path / "study" / "stores").exists()


def test_a_knockout_is_drawn_with_its_own_model_alone(
    command: Any, stores: dict[str, Path], tmp_path: Path
) -> None:
    with probe.latent.load("demo-codi", device="cpu") as reasoner:
        rows = probe.demos.chains(4)
        latent.knockout(reasoner, rows, tmp_path / "k.zarr", max_new_tokens=2, progress=False)
    options = ("--knockout", tmp_path / "k.zarr", "--draws", 50, "-o", tmp_path / "f")
    code, out, _ = command("latent", "figures", stores["codi"], *options)
    assert code == 0
    assert "knockout.png" in out
    code, _, err = command("latent", "figures", stores["coconut"], *options)
    assert code == 1
    assert "is of demo-codi, and the stores of demo-coconut" in err


@pytest.mark.filterwarnings("always:5 of 9 problems are left out")
def test_stores_of_different_lists_are_compared_over_what_both_have(
    command: Any, stores: dict[str, Path], tmp_path: Path
) -> None:
    with probe.latent.load("demo-coconut", device="cpu") as reasoner:
        rows = [*probe.demos.chains(4), {"id": "x", "question": "1+1+1+1+m=", "answer": "6"}]
        probe.latent.capture(reasoner, rows, tmp_path / "b.zarr", max_new_tokens=3, progress=False)
    pairs = [f"a={stores['codi']}", f"b={tmp_path / 'b.zarr'}"]
    code, out, err = command("latent", "compare", *pairs, "--draws", 50)
    assert code == 0
    assert "5 of 9 problems are left out" in err
    assert "4 problems" in out
