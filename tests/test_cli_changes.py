"""The commands suppress, ablate and relevance: what they print, draw, keep and refuse."""

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import probe
from probe import demos
from probe.errors import InputError
from recipes import ablation, suppression
from recipes.cli_changes import pairs
from recipes.ranking import rank
from tests.test_cli import command as command

QUIET: Any = {"progress": False}
TEXTS = ["abcabcab", "xyzxyzxy", "kkk"]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "texts.jsonl"
    rows = [{"text": text, "answer": text[2], "id": f"p{n}"} for n, text in enumerate(TEXTS)]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("changes") / "run.zarr"
    with probe.load("demo-llama", device="cpu") as model:
        probe.capture(model, demos.repeated(count=4), path, max_new_tokens=2, **QUIET)
    return path


def table(out: str) -> dict[str, list[str]]:
    """The cells of each row behind its first one, where columns are two blanks apart."""
    rows = [
        [cell.strip() for cell in line.split("  ") if cell.strip()] for line in out.splitlines()
    ]
    return {row[0]: row[1:] for row in rows if row}


def is_picture(path: Path) -> bool:
    """Whether this is a PNG of a size that can be looked at."""
    head = path.read_bytes()[:24]
    wide, high = struct.unpack(">II", head[16:])
    return head[:8] == b"\x89PNG\r\n\x1a\n" and 300 < wide < 3000 and 200 < high < 3000


def test_suppress_tells_what_the_recipe_measures(command: Any, file: Path, tmp_path: Path) -> None:
    arguments = ("--keys", "regex:[bk]", "--factor", "0.2", "--layers", "1", "--heads", "0,2")
    more = ("--tokens", "3:", "--target", "field:answer", "--max-new-tokens", "2", "--draws", "2")
    out = tmp_path / "out"
    code, said, _ = command("suppress", "demo-llama", file, *arguments, *more, "-o", out)
    assert code == 0
    one = suppression.Suppress(keys="regex:[bk]", factor=0.2, layers=1, heads=[0, 2])
    with probe.load("demo-llama", device="cpu") as model:
        ds = suppression.effect(
            model, file, one, tokens=slice(3, None), target="field:answer", max_new_tokens=2,
            draws=2, **QUIET,
        )  # fmt: skip
    rows = table(said)
    mean = float(ds.delta_loss.mean())
    assert rows["Δ loss (nats a token)"][0].startswith(f"{mean:.4f} [")
    assert rows["accuracy before"][0].startswith(f"{float(ds.base_accuracy.mean()):.3f}")
    assert rows["target: probability after"][0].startswith(f"{float(ds.target_p.mean()):.3f}")
    assert rows["control: no-op, Δ loss"] == ["0.0000 [0.0000, 0.0000]"]
    control = float(ds.control.mean())
    assert rows["control: elsewhere at random, Δ loss"][0].startswith(f"{control:.4f} [")
    assert rows["'p0'"] == [repr(ds.base_text.values[0]), repr(ds.text.values[0])]
    assert said.endswith(f"3 problems done, 0 failed of 3: {out}\n")
    kept = probe.open(out)
    np.testing.assert_array_equal(kept.delta_loss.values, ds.delta_loss.values)
    again = command("suppress", "demo-llama", file, *arguments, *more, "-o", out)
    assert again[:2] == (0, said)


def test_a_dose_response_is_told_and_drawn(command: Any, tmp_path: Path) -> None:
    picture = tmp_path / "dose"
    arguments = ("suppress", "demo-instruct", "demo:copy", "-n", "12", "--keys", "1")
    more = ("--tokens", "last:10", "--factors", "1,0.1,0", "--plot", picture)
    code, said, _ = command(*arguments, *more)
    assert code == 0
    rows = table(said)
    assert rows["1"][1] == "0.0000 [0.0000, 0.0000]"
    accuracies = [float(rows[factor][0].split()[0]) for factor in ("1", "0.1", "0", "unchanged")]
    assert accuracies[0] == accuracies[3] > 0.95 > accuracies[1] > 0.4 > accuracies[2]
    assert f"{picture}.png" in said
    assert is_picture(tmp_path / "dose.png")


def test_the_default_factor_is_that_of_the_mode(command: Any) -> None:
    base = ("suppress", "demo-llama", "abcabc", "--keys", "1", "--draws", "0")
    mode = ("--mode", "prob_zero_no_renorm")
    assert command(*base)[1] == command(*base, "--factor", "0.1")[1]
    assert command(*base, *mode)[1] == command(*base, *mode, "--factor", "0")[1]
    assert command(*base, *mode)[1] != command(*base, *mode, "--factor", "0.1")[1]


def test_ablate_tells_draws_and_groups(command: Any, store: Path, tmp_path: Path) -> None:
    picture, out = tmp_path / "map.png", tmp_path / "costs"
    arguments = ("--tokens", "22:", "--together", "3", "--draws", "2", "--top", "4")
    files = ("-o", out, "--plot", picture)
    code, said, _ = command("ablate", "demo-llama", store, *arguments, *files)
    assert code == 0
    with probe.load("demo-llama", device="cpu") as model:
        costs = ablation.sweep(model, store, tokens=slice(22, None), **QUIET)
        ranked = rank(costs.delta_loss, top=4)
        order = [(row.layer, row.head) for row in ranked[:3]]
        tokens: Any = {"tokens": slice(22, None), "draws": 2}
        group = ablation.cumulative(model, store, order, **tokens, **QUIET)
    rows = table(said)
    assert [label for label in rows if label[0] == "L"] == [row.label for row in ranked]
    cost = float(costs.delta_loss.sel(layer=0, head=3).mean())
    assert rows["L0H3"][0] == f"{cost:.4f}"
    assert "gradient importance misses L0H3" in said
    assert "controls: no-op 0 nats, a head at random " in said
    assert "rank correlation of ablation and gradient over all heads: " in said
    last = rows[f"+{ranked[2].label}"]
    assert last[0].startswith(f"{float(group.delta_loss[:, 2].mean()):.4f} [")
    assert last[2] == f"{float(group.control.sel(size=3).mean()):.4f}"
    assert f"4 problems done, 0 failed of 4: {out}" in said
    assert is_picture(picture)
    np.testing.assert_array_equal(probe.open(out).delta_loss.values, costs.delta_loss.values)


def test_without_gradients_of_one_layer_and_of_one_problem(command: Any, tmp_path: Path) -> None:
    picture = tmp_path / "one.png"
    arguments = ("--no-gradient", "--layers", "-1", "--mode", "uniform", "--plot", picture)
    code, said, _ = command("ablate", "demo-llama", "abcabc", *arguments)
    assert code == 0
    assert said.splitlines()[0].split("  ")[0] == "head"
    assert "interval" not in said
    assert "gradient |I|" not in said
    assert sorted(row[:4] for row in said.splitlines()[1:5]) == ["L1H0", "L1H1", "L1H2", "L1H3"]
    assert is_picture(picture)
    dose = ("--factors", "1,0", "--plot", picture)
    assert command("suppress", "demo-llama", "abcabc", "--keys", "0", *dose)[0] == 0
    assert command("ablate", "demo-llama", "abcabc", "--together", "99", "--draws", "0")[0] == 0
    short = ("--max-length", "1", "--together", "2")
    code, _, errors = command("ablate", "demo-llama", "abcabc", *short)
    assert code == 1
    assert "--together takes the heads that cost most, and none was measured" in errors


@pytest.mark.parametrize("mode", ["zero", "mean"])
def test_heads_are_ablated_together(command: Any, file: Path, mode: str) -> None:
    arguments = ("--mode", mode, "--max-length", "4", "--draws", "1")
    code, said, _ = command("ablate", "demo-llama", file, "--heads", "L1H0,l0h3", *arguments)
    assert code == 0
    with probe.load("demo-llama", device="cpu") as model:
        means = ablation.reference(model, file, max_length=4) if mode == "mean" else None
        one = ablation.Ablate([(1, 0), (0, 3)], mode=mode, reference=means)  # type: ignore[arg-type]
        ds = ablation.effect(model, file, one, max_length=4, **QUIET)
    wanted = float(ds.delta_loss.mean())
    assert table(said)["Δ loss (nats a token)"][0].startswith(f"{wanted:.4f} [")
    both = ("--heads", "0,3", "--layers", "1", "--draws", "0")
    assert command("ablate", "demo-llama", "abcabc", *both)[0] == 0


def test_relevance_lists_and_draws_the_tokens(command: Any, file: Path, tmp_path: Path) -> None:
    picture = tmp_path / "strip.png"
    arguments = ("--target", "field:answer", "--factor", "0", "--similarity", "2", "--top", "2")
    drawn = ("--problem", "p1", "--plot", picture)
    code, said, _ = command("relevance", "demo-llama", file, *arguments, *drawn)
    assert code == 0
    with probe.load("demo-llama", device="cpu") as model:
        ds = suppression.relevance(
            model, file, target="field:answer", factor=0.0, similarity=None, **QUIET
        )
    for n, text in enumerate(TEXTS):
        answer, listed = table(said)[f"p{n}"]
        assert answer == text[2]
        one = ds.relevance[n].dropna("key").sortby(ds.relevance[n].dropna("key"), ascending=False)
        first, second = one[:2]
        assert listed == ", ".join(
            f"{str(x.token.item())!r} {float(x):.2f}" for x in (first, second)
        )
    assert is_picture(picture)


def test_a_store_brings_its_problems_without_what_was_generated(command: Any, store: Path) -> None:
    code, said, _ = command("relevance", "demo-llama", store, "-n", "1", "--max-new-tokens", "2")
    assert code == 0
    generated = probe.open(store).token.values[0, 41:43]
    assert table(said)["0"][0] == "".join(generated)
    assert "1 problems done, 0 failed of 1" in said


def test_keys_that_a_problem_does_not_have_are_refused_before_any_runs(
    command: Any, tmp_path: Path
) -> None:
    (tmp_path / "t.txt").write_text("abcabc\nabc\n", encoding="utf-8")
    code, _, errors = command("suppress", "demo-llama", tmp_path / "t.txt", "--keys", "5")
    assert code == 1
    assert "keys=5 is out of range: problem '1' has 4 tokens" in errors


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model of every command fails on problems with a k."""

    def fail(_: Any, __: Any, named: dict[str, Any]) -> None:
        if bool((named["input_ids"] == 11).any()):  # k
            raise ArithmeticError("too large")

    model = probe.load("demo-llama", device="cpu")
    model.module.register_forward_pre_hook(fail, with_kwargs=True)
    monkeypatch.setattr(probe, "load", lambda _: model)


@pytest.mark.usefixtures("failing")
def test_what_failed_is_told_on_stderr(command: Any, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("abk\nabcabc\n", encoding="utf-8")
    keys = ("--keys", "2", "--factors", "1,0", "--plot", tmp_path / "p.png")
    code, said, errors = command("suppress", "demo-llama", tmp_path / "t.txt", *keys)
    assert code == 0
    assert "1 problems done, 1 failed of 2" in said
    assert "failed: 0: ArithmeticError: too large" in errors
    assert is_picture(tmp_path / "p.png")


@pytest.mark.usefixtures("failing")
def test_gradients_are_those_of_the_problems_that_did_not_fail(command: Any, file: Path) -> None:
    code, said, errors = command("ablate", "demo-llama", file)
    assert code == 0
    assert "failed: p2: ArithmeticError: too large" in errors
    assert "rank correlation of ablation and gradient" in said
    assert "2 problems done, 1 failed of 3" in said


LLAMA = ("demo-llama", "abcabc")
MISTAKES: list[tuple[tuple[str, ...], str]] = [
    (("suppress", *LLAMA, "--keys", "1", "--plot", "x.png"), "Add --factors 1,0.5,0.1,0.01,0."),
    (("suppress", *LLAMA, "--keys", "1", "--factors", "1,x"), "--factors '1,x' are no numbers"),
    (("suppress", *LLAMA, "--keys", "1", "--factors", ""), "--factors '' are no numbers"),
    (("suppress", *LLAMA, "--keys", "1", "--factors", "1,1"), "Give numbers, each once"),
    (("suppress", *LLAMA, "--keys", "", "--factors", "1"), "keys='' is not a selection"),
    (("suppress", *LLAMA, "--keys", "regex:("), "is not a regular expression"),
    (("suppress", *LLAMA, "--keys", "1", "--mode", "x"), "mode='x'. Choose from log_add"),
    (("suppress", *LLAMA, "--keys", "1", "--heads", "L1"), "--heads 'L1' names no heads"),
    (("suppress", "nowhere.zarr", "abc", "--keys", "1"), "'nowhere.zarr' cannot be loaded"),
    (("suppress", "demo-llama", "nowhere.zarr", "--keys", "1"), "there is no store at nowhere"),
    (("suppress", "demo-llama", "STORE", "--text", "q", "--keys", "1"), "no fields to find 'q'"),
    (("ablate", *LLAMA, "--heads", "L0H9"), "heads=9 is out of range: the model has 4 heads"),
    (("ablate", *LLAMA, "--heads", "0,3"), "heads=[0, 3] of which layers?"),
    (("ablate", *LLAMA, "--heads", "L0H1", "--layers", "1"), "name their layers, and layers=1"),
    (("ablate", *LLAMA, "--heads", "L0H1", "--together", "2"), "--together go with a sweep"),
    (("ablate", *LLAMA, "--heads", "L0H1", "--plot", "x.png"), "--plot and --together go with"),
    (("ablate", *LLAMA, "--heads", "L0H1", "--mode", "frozen"), "mode='frozen' needs reference"),
    (("ablate", *LLAMA, "--mode", "frozen"), "mode='frozen' cannot be swept"),
    (("ablate", *LLAMA, "--plot", "x.foo"), "x.foo cannot be written: no picture is a .foo."),
    (("ablate", *LLAMA, "--plot", "no/x.png"), "no/x.png cannot be written: there is no folder no"),
    (("relevance", *LLAMA, "--problem", "0"), "--problem '0' names what --plot draws."),
    (("relevance", *LLAMA, "--problem", "z", "--plot", "x.png"), "there is no problem 'z'"),
    (("relevance", *LLAMA, "--similarity", "-2"), "similarity=-2.0. Give a cosine"),
    (("relevance", *LLAMA, "--target", "É"), "cannot encode 'É', the target of problem '0'"),
]
for name, value in {"target": "a", "max-new-tokens": "2", "draws": "0", "factor": "0"}.items():
    words = ("suppress", *LLAMA, "--keys", "1", "--factors", "1,0", f"--{name}", value)
    MISTAKES.append((words, f"--factors and --{name} exclude each other."))


@pytest.mark.parametrize(("arguments", "said"), MISTAKES)
def test_a_mistake_is_one_line_told_before_the_model_runs_and_leaves_nothing(
    arguments: tuple[str, ...],
    said: str,
    command: Any,
    store: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the model ran")

    monkeypatch.setattr("probe.reading.inputs", refuse)
    monkeypatch.setattr("recipes.sweeps.grow", refuse)
    monkeypatch.chdir(tmp_path)
    code, out, errors = command(*(str(store) if word == "STORE" else word for word in arguments))
    assert (code, out) == (1, "")
    assert errors.count("\n") == 1
    assert said in errors
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [
        ("suppress", *LLAMA),
        ("suppress", *LLAMA, "--keys", "1", "--draws", "-1"),
        ("suppress", *LLAMA, "--keys", "1", "--factor", "much"),
        ("ablate", *LLAMA, "--together", "-1"),
        ("ablate", *LLAMA, "--top", "0"),
        ("ablate", "demo-llama"),
        ("relevance", *LLAMA, "--keys", "1"),
    ],
)
def test_wrong_usage_has_exit_code_2(command: Any, arguments: tuple[str, ...]) -> None:
    assert command(*arguments)[0] == 2


@pytest.mark.parametrize(
    ("text", "heads"),
    [
        (None, None),
        ("L1H0", [(1, 0)]),
        ("l1h0 , L12H3", [(1, 0), (12, 3)]),
        ("3", 3),
        ("0,3", [0, 3]),
        ("1:", slice(1, None)),
        ("-1", -1),
    ],
)
def test_heads_are_typed_as_pairs_or_as_a_selection(text: str | None, heads: object) -> None:
    assert pairs(text) == heads


@pytest.mark.parametrize("text", ["L1H", "L1H0,", "L1H0,3", "LH", "L-1H0", "last:2"])
def test_what_looks_like_heads_and_is_none_is_refused(text: str) -> None:
    with pytest.raises(InputError, match=f"--heads '{text}' names no heads. Write L1H0,L1H3"):
        pairs(text)
