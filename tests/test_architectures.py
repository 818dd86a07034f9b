"""Every causal language model of transformers: captured and right, or refused with a reason.

The page docs/architectures.md is what is expected; each row is computed here again.
"""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.utils import logging
from typer.testing import CliRunner

from probe.attention import AttentionCall
from probe.errors import InputError, WiringError
from recipes import architectures, cli
from recipes.architectures import Row, check
from recipes.architectures_tiny import MODEL_TYPES

PAGE = Path(__file__).parent.parent / "docs" / "architectures.md"
RENEW = "if this is meant, run: probe check --all --markdown docs/architectures.md"
LEAST = 140  # architectures captured


def page() -> dict[str, tuple[str, ...]]:
    """Model type -> its cells on the page."""
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line[:2] == "| "]
    rows = [tuple(cell.strip() for cell in line[2:-1].split(" | ")) for line in lines]
    return {row[0]: row for row in rows if row[0] not in ("model type", "---")}


PAGE_ROWS = page()


def test_the_page_has_every_model_type_and_enough_are_captured() -> None:
    assert sorted(PAGE_ROWS) == sorted(MODEL_TYPES)
    outcomes = [row[1] if len(row) == 3 else "captured" for row in PAGE_ROWS.values()]
    assert set(outcomes) <= {"captured", "refused", "unbuilt"}
    assert outcomes.count("captured") >= LEAST
    said = re.search(r"^(\d+) architectures: (\d+) captured", PAGE.read_text(), re.MULTILINE)
    assert said is not None
    assert [int(n) for n in said.groups()] == [len(MODEL_TYPES), outcomes.count("captured")]


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_an_architecture_is_what_the_page_says(model_type: str) -> None:
    row = check(model_type)
    assert row.outcome != "WRONG", row.reason
    expected = PAGE_ROWS[model_type]
    if row.outcome != "captured":
        assert architectures.cells(row) == expected, RENEW
        return
    assert architectures.cells(row)[:-1] == expected[:-1], RENEW
    assert row.difference <= 2e-5
    assert row.contrast > 1.1, "attention is so even that wrong patterns would pass"


@pytest.mark.parametrize("model_type", [m for m, row in PAGE_ROWS.items() if row[1] == "refused"])
def test_a_refusal_says_what_to_do(model_type: str) -> None:
    reason = PAGE_ROWS[model_type][2]
    assert reason.startswith(("UnsupportedModelError: ", "WiringError: "))
    assert re.search(r"([Gg]ive|Load|load) (a|the) model|layout=probe\.Layout", reason), reason


def test_only_post_scaled_sinks_are_not_in_what_a_model_reports() -> None:
    odd = {m for m, row in PAGE_ROWS.items() if "before the sinks" in row[-2]}
    assert odd == {"granite_swa", "granitemoe_swa"}
    others = {m for m, row in PAGE_ROWS.items() if "reports other attentions" in row[-2]}
    assert others == {"minimax"}


# ------------------------------------------------------------------- the check itself can fail


def spoilt(change: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch) -> Row:
    """The row of a model whose patterns are changed as they are read."""
    own = AttentionCall.pattern
    monkeypatch.setattr(
        AttentionCall, "pattern", lambda self, **kwargs: change(own(self, **kwargs))
    )
    return check("mistral")


@pytest.mark.parametrize(
    "change",
    [
        lambda p: p * (1 + 1e-4),
        lambda p: p.roll(1, dims=1),
        lambda p: p.roll(1, dims=-1),
        lambda p: p * math.nan,
        lambda p: p[:, :, :, :-1],
    ],
    ids=["scaled", "other heads", "shifted", "not a number", "a key less"],
)
def test_patterns_that_are_read_wrongly_make_a_wrong_row(
    change: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    row = spoilt(change, monkeypatch)
    assert row.outcome == "WRONG"
    assert row.difference > 2e-5


def test_a_tapped_model_that_fails_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(pattern: Tensor) -> Tensor:
        raise ZeroDivisionError("on purpose")

    row = spoilt(fail, monkeypatch)
    assert (row.outcome, row.reason) == (
        "WRONG",
        "fails once it is tapped: ZeroDivisionError: on purpose",
    )


# --------------------------------------------------------------------------------- its parts


def test_a_difference_counts_in_real_rows_only_and_shapes_must_agree() -> None:
    a, rows = torch.zeros(2, 3, 4, 4), torch.ones(2, 4, dtype=torch.bool)
    b = a.clone()
    b[1, 2, 3, 0] = 0.5
    assert architectures.largest_difference([a, a], [a, b], rows) == 0.5
    rows[1, 3] = False
    assert architectures.largest_difference([a, a], [a, b], rows) == 0
    for wrong in ([a], [a, a[:, :1]], [a, a * math.nan]):
        assert architectures.largest_difference([a, a], wrong, rows) == math.inf
    assert architectures.largest_difference([], [], rows) == math.inf


def pattern_of(keep: Tensor) -> Tensor:
    return (keep / keep.sum(-1, keepdim=True).clamp_min(1))[None, None]


def test_what_is_special_is_seen_in_the_patterns() -> None:
    config: Any = type("Config", (), {"get_text_config": lambda self: self})()
    causal = torch.ones(11, 11).tril()
    place = torch.arange(11)
    chunks = causal * (place[:, None] // 4 == place // 4)
    sparse = causal.clone()
    sparse[9, 3] = 0
    for keep, name in (
        (causal, []),
        (causal.triu(-4), ["window"]),
        (chunks, ["chunks"]),
        (sparse, ["sparse"]),
        (torch.ones(11, 11), ["sees the future"]),
    ):
        assert list(architectures.special(config, [pattern_of(keep)])) == name
    assert list(architectures.special(config, [pattern_of(causal) / 2])) == ["sinks"]
    config.num_hidden_layers, config.kv_lora_rank, config.attn_logit_softcapping = 3, 8, 50.0
    named = list(architectures.special(config, [pattern_of(causal)]))
    assert named == ["hybrid", "latent attention", "softcap"]


def test_a_model_that_cannot_be_built_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise ImportError("\n no timm here\nat all")

    monkeypatch.setattr(architectures, "tiny", fail)
    assert check("llama") == pytest.approx(Row("llama", "unbuilt", "ImportError: no timm here"))


def test_the_table_runs_on_one_thread_and_puts_the_threads_back() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    level = logging.get_verbosity()
    seen = [(row.outcome, torch.get_num_threads()) for row in architectures.table(["mamba"])]
    assert seen == [("refused", 1)]
    assert torch.get_num_threads() == 2
    assert logging.get_verbosity() == level
    torch.set_num_threads(threads)


# ------------------------------------------------------------------------------- the command

ROWS = [
    Row("llama", "captured", "", "sdpa", 4, "4", "2", ("window",), 3e-7, 2.0),
    Row("mamba", "refused", "it | has none", "eager"),
]


def command(
    *args: str, monkeypatch: pytest.MonkeyPatch, rows: list[Row] | None = None
) -> tuple[int, str, str]:
    monkeypatch.setattr(architectures, "table", lambda: iter(ROWS if rows is None else rows))
    result = CliRunner().invoke(cli.app, ["check", *args])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def test_check_all_prints_the_table_and_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, err = command("--all", monkeypatch=monkeypatch)
    assert code == 0
    lines = out.splitlines()
    assert lines[0].split() == " ".join(architectures.HEADINGS).split()
    assert lines[1].split() == ["llama", "sdpa", "4", "4", "2", "window", "3e-07"]
    assert any(line.split()[:2] == ["mamba", "refused"] for line in lines)
    assert lines[-1] == "2 architectures: 1 captured, 1 refused"
    assert "model/s" in err or "189" in err


def test_check_all_as_json_is_only_json(monkeypatch: pytest.MonkeyPatch) -> None:
    _, out, err = command("--all", "--json", monkeypatch=monkeypatch)
    first, second = json.loads(out)
    assert (first["model_type"], first["layers"], first["difference"]) == ("llama", 4, 3e-7)
    assert (second["reason"], second["difference"]) == ("it | has none", None)
    assert "2 architectures" in err


def test_check_all_writes_the_page(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "page.md"
    command("--all", "--markdown", str(file), monkeypatch=monkeypatch)
    text = file.read_text()
    assert text == architectures.markdown(ROWS)
    assert "| llama | sdpa | 4 | 4 | 2 | window | 3e-07 |" in text
    assert "| mamba | refused | it / has none |" in text
    with pytest.raises(InputError, match=r"nowhere.* cannot be written"):
        command("--all", "--markdown", str(tmp_path / "nowhere" / "x"), monkeypatch=monkeypatch)


def test_a_wrong_row_is_an_error_after_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(WiringError, match="what is read of llama is not what"):
        command("--all", monkeypatch=monkeypatch, rows=[Row("llama", "WRONG", "differs")])


@pytest.mark.parametrize("args", [(), ("demo-llama", "--all")])
def test_check_takes_a_model_or_all(args: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"check what\? Give a model, or --all"):
        command(*args, monkeypatch=monkeypatch)


@pytest.mark.parametrize("args", [("--json",), ("--markdown", "x.md")])
def test_options_of_the_table_need_all(
    args: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="--json and --markdown go with --all"):
        command("demo-llama", *args, monkeypatch=monkeypatch)
