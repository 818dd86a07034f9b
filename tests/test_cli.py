import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import probe
from recipes import _cli, cli


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cli") / "run.zarr"
    with probe.load("demo-llama") as model:
        probe.capture(model, ["abcabc", "xyz.xyz.", "q"], path, progress=False)
    return path


def run(
    *arguments: object, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the command."""
    monkeypatch.setattr(sys, "argv", ["probe", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    out = capsys.readouterr()
    return int(caught.value.code or 0), out.out, out.err


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    return lambda *arguments: run(*arguments, monkeypatch=monkeypatch, capsys=capsys)


def test_the_demo_names_the_induction_heads_and_draws_them(command: Any, tmp_path: Path) -> None:
    code, out, _ = command("demo", "-o", tmp_path / "new" / "demo")
    assert code == 0
    named = next(line for line in out.splitlines() if line.startswith("induction heads"))
    assert sorted(word for word in named.split() if word.startswith("L")) == [
        "L1H0",
        "L1H1",
        "L1H2",
        "L1H3",
    ]
    assert "previous-token heads (score > 0.5): L0H3" in out
    picture = tmp_path / "new" / "demo" / "demo-llama.png"
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    ds = probe.open(tmp_path / "new" / "demo" / "demo-llama.zarr")
    assert dict(ds.sizes) == {"problem": 64, "layer": 2, "head": 4, "query": 41, "key": 41}


def test_the_installed_command_reports_an_error_in_one_red_line_with_exit_code_1() -> None:
    script = Path(sys.executable).parent / "probe"
    done = subprocess.run(
        [script, "info", "nowhere.zarr"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.strip() == (
        "StoreError: there is no store at nowhere.zarr. "
        "Check the path, or make one with probe.capture."
    )


def test_wrong_usage_has_exit_code_2(command: Any) -> None:
    assert command("capture", "demo-llama")[0] == 2
    assert command("ranks")[0] == 2


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["probe", "info", "nowhere.zarr", "--debug"])
    with pytest.raises(probe.StoreError):
        cli.main()


def test_check_says_what_is_proven(command: Any) -> None:
    code, out, _ = command("check", "demo-qwen3")
    assert code == 0
    assert "Qwen3ForCausalLM, 2 layers x 4 heads, 2 key heads, sdpa" in out
    assert "proven in layers 0, 1" in out
    assert "nnsight 0.8" in out
    assert f"recipes {Path(cli.__file__).parent}" in out


def test_capture_writes_a_store_and_its_plan_writes_none(command: Any, tmp_path: Path) -> None:
    lines = [{"question": "abab", "id": "first"}, {"question": "cdcd"}]
    file = tmp_path / "p.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    out = tmp_path / "s.zarr"
    options = ("--queries", "last:2", "--heads", "0,3", "--layers", "-1", "--dtype", "float32")
    code, said, _ = command("capture", "demo-llama", file, "-o", out, *options, "--plan")
    assert code == 0
    assert said.startswith("2 problems, 10 tokens (longest 5), 1 batches")
    assert not out.exists()
    code, said, _ = command("capture", "demo-llama", file, "-o", out, *options)
    assert (code, said) == (0, f"2 problems done, 0 failed of 2: {out}\n")
    ds = probe.open(out)
    assert ds.problem.values.tolist() == ["first", "1"]
    assert ds.pattern.shape == (2, 1, 2, 2, 5)
    assert ds.attrs["selection"] == {
        "layers": [1],
        "heads": [0, 3],
        "queries": "last:2",
        "keys": None,
    }
    assert ds.attrs["problems"]["source"] == "p.jsonl"


def test_capture_reports_what_failed_on_stderr(
    command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from probe import capturing

    def refuse(*arguments: Any, **named: Any) -> None:
        raise ArithmeticError("too large")

    monkeypatch.setattr(capturing, "read", refuse)
    out = tmp_path / "s.zarr"
    code, said, errors = command("capture", "demo-llama", "abc", "-o", out)
    assert (code, said) == (0, f"0 problems done, 1 failed of 1: {out}\n")
    assert "failed: 0: ArithmeticError: too large" in errors


def test_info_tells_what_a_store_holds(command: Any, store: Path) -> None:
    code, out, _ = command("info", store)
    assert code == 0
    assert "3 problems done, 0 failed of 3" in out
    assert "layer 2, head 4, query 9, key 9" in out
    facts = json.loads(command("info", store, "--json")[1])
    assert facts["model"] == "demo-llama"
    assert facts["tokens"] == 7 + 9 + 2
    assert facts["dims"]["problem"] == 3
    assert facts["bytes"] == sum(f.stat().st_size for f in store.rglob("*") if f.is_file())


def test_rank_lists_the_heads_that_the_metric_puts_first(command: Any, store: Path) -> None:
    from recipes import heads

    code, out, _ = command("rank", "heads.previous_token", store, "--top", "3")
    assert code == 0
    expected = heads.rank(heads.previous_token(probe.open(store).pattern), top=3)
    assert [line.split()[0] for line in out.splitlines()[1:]] == [row.label for row in expected]
    assert expected[0].label == "L0H3"
    lowest = command("rank", "flow.flow", store, "--top", "1", "--ascending")[1].splitlines()[1]
    assert (
        lowest.split()[0]
        == heads.rank(cli._metric("flow.flow")(probe.open(store).pattern), top=1, descending=False)[
            0
        ].label
    )


def test_a_metric_that_measures_nothing_says_so(command: Any, tmp_path: Path) -> None:
    with probe.load("demo-llama") as model:
        probe.capture(model, ["abc"], tmp_path / "s", progress=False)  # no token twice
    code, out, errors = command("rank", "heads.induction", tmp_path / "s")
    assert (code, out) == (1, "")
    assert "heads.induction gives no head a number" in errors
    assert command("rank", "heads.induction", tmp_path / "s", "--top", "0")[0] == 2


def test_a_picture_without_suffix_is_a_png_and_named_so(
    command: Any, store: Path, tmp_path: Path
) -> None:
    assert command("plot", store, "-o", tmp_path / "map")[1] == f"{tmp_path / 'map.png'}\n"
    assert (tmp_path / "map.png").exists()


def test_a_store_of_scores_alone_cannot_be_ranked_or_drawn(command: Any, tmp_path: Path) -> None:
    with probe.load("demo-llama") as model:
        probe.capture(model, ["abc"], tmp_path / "s", sites="scores", progress=False)
    for arguments in (
        ("rank", "heads.entropy", tmp_path / "s"),
        ("plot", tmp_path / "s", "-o", tmp_path / "x.png", "--layer", "0"),
    ):
        code, _, errors = command(*arguments)
        assert code == 1
        assert "this needs patterns, and the store holds" in errors


def test_any_importable_function_is_a_metric(
    command: Any, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.py").write_text("def first(p): return p[..., 0, 0]\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    code, out, _ = command("rank", "mine.first", store, "--top", "1")
    assert (code, out.splitlines()[1].split()) == (0, ["L0H0", "1.0000"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("rank", "heads.nothing", "STORE"), "there is no metric 'heads.nothing'."),
        (("rank", "flow.composites", "STORE"), "there is no metric 'flow.composites'."),
        (("plot", "STORE", "-o", "x.png", "--layer", "7"), "the store has no layer 7."),
        (("plot", "STORE", "-o", "x.png", "--head", "1"), "patterns of which layer? Add --layer."),
        (("plot", "STORE", "-o", "x.png", "--problem", "0"), "patterns of which layer?"),
        (("plot", "STORE", "-o", "x.foo"), "x.foo cannot be written: Format 'foo'"),
        (("plot", "STORE", "-o", "no/x.png"), "no/x.png cannot be written"),
        (("rank", "flow.lift", "STORE"), "flow.lift returns ('problem', 'layer', 'head', 'key')"),
        (("rank", "os.path.join", "STORE"), "os.path.join failed with TypeError"),
        (("rank", "numpy.shape", "STORE"), "numpy.shape returns tuple. A metric of heads"),
        (("capture", "demo-llama", "abc", "-o", "s", "--queries", "0:1:2:3"), "'0:1:2:3'"),
        (("demo", "-o", "/dev/null"), "/dev/null cannot be made"),
        (
            ("plot", "STORE", "-o", "x.png", "--layer", "0", "--problem", "zz"),
            "the store has no problem 'zz'.",
        ),
        (("capture", "demo-llama", "no.jsonl", "-o", "s"), "no.jsonl cannot be read"),
        (("capture", "demo-llama", "abc", "-o", "s", "--layers", "a"), "layers"),
        (("check", "demo-lama"), "No demonstration model is named 'demo-lama'"),
        (("demo", "demo-lama"), "'demo-lama' is no model made for that. Use one of demo-llama"),
        (("demo", "demo-instruct"), "'demo-instruct' is no model made for that. Use one of"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(
    arguments: tuple[str, ...],
    said: str,
    command: Any,
    store: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, errors = command(*(str(store) if a == "STORE" else a for a in arguments))
    assert (code, out) == (1, "")
    assert errors.count("\n") == 1
    assert said in errors
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [(), ("--metric", "heads.entropy"), ("--layer", "1"), ("--layer", "1", "--head", "2")],
)
def test_plot_draws(arguments: tuple[str, ...], command: Any, store: Path, tmp_path: Path) -> None:
    picture = tmp_path / "p.svg"
    code, out, _ = command("plot", store, "-o", picture, *arguments)
    assert (code, out) == (0, f"{picture}\n")
    text = picture.read_text(encoding="utf-8")
    assert "<svg" in text


@pytest.mark.parametrize(
    ("text", "selected"),
    [
        (None, None),
        ("3", 3),
        ("-1", -1),
        ("0,2,5", [0, 2, 5]),
        ("2:8", slice(2, 8)),
        (":-1", slice(None, -1)),
        ("::2", slice(None, None, 2)),
        ("last:6", "last:6"),
        ("segment:text", "segment:text"),
    ],
)
def test_selections_are_typed_as_in_python(text: str | None, selected: object) -> None:
    assert _cli.selector(text) == selected
