import json
import random
from pathlib import Path
from typing import Any

import pytest

from probe.answers import expected
from probe.errors import InputError
from recipes import latent_data

ROWS = [
    {"question": f"What is {i} + 1?", "answer": f"{i} + 1 is <<{i}+1={i + 1}>>.\n#### {i + 1}"}
    for i in range(300)
]
GSM8K = Path(__file__).parents[2] / "shared" / "data" / "gsm8k" / "train.jsonl"


def jsonl(folder: Path, rows: list[dict[str, Any]], name: str = "train.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_the_draw_is_that_of_the_document(tmp_path: Path) -> None:
    state = random.getstate()
    random.seed(42)
    wanted = [f"train_{i}" for i in random.sample(range(300), 100)]
    random.setstate(state)
    chosen = latent_data.sample(jsonl(tmp_path, ROWS), n=100, seed=42)
    assert [problem.id for problem in chosen] == wanted
    assert random.getstate() == state


@pytest.mark.skipif(not GSM8K.exists(), reason="needs GSM8K")
def test_gsm8k_gives_the_questions_that_the_document_names() -> None:
    chosen = latent_data.sample(GSM8K)
    numbers = (5238, 912, 204, 6074, 2253, 2006, 1828, 1143, 6033, 839)
    assert [problem.id for problem in chosen][:10] == [f"train_{n}" for n in numbers]
    assert len(latent_data.sample(GSM8K, n=None)) == 7473


def test_what_is_written_is_the_documents_file_and_reads_back(tmp_path: Path) -> None:
    chosen = latent_data.sample(jsonl(tmp_path, ROWS), n=5)
    path = tmp_path / "data" / latent_data.name(chosen, every=False)
    latent_data.write(chosen, path)
    assert path.name == "attention_dataset_5_train.json"
    rows = json.loads(path.read_text(encoding="utf-8"))
    assert set(rows[0]) == {"gsm8k_id", "question", "answer", "full_solution"}
    assert rows[0]["answer"] == rows[0]["full_solution"].split("#### ")[1]
    again = latent_data.sample(path, n=None)
    assert [(p.id, p.text, expected(p)) for p in again] == [
        (p.id, p.text, expected(p)) for p in chosen
    ]
    twice = tmp_path / "twice.json"
    latent_data.write(again, twice)
    assert twice.read_bytes() == path.read_bytes()


def test_all_questions_keep_their_order(tmp_path: Path) -> None:
    chosen = latent_data.sample(jsonl(tmp_path, ROWS, "test.jsonl"), n=None)
    assert [problem.id for problem in chosen][:2] == ["test_0", "test_1"]
    assert latent_data.name(chosen, every=True) == "attention_dataset_full_test.json"


def test_ids_of_the_source_are_kept() -> None:
    rows = [{"id": "a7", **ROWS[0]}, {"id": "b1", **ROWS[1]}]
    assert [problem.id for problem in latent_data.sample(rows, n=None)] == ["a7", "b1"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([ROWS[0], ROWS[1], ROWS[0]], r"problems list_0, list_2 ask the same\. Keep one of them"),
        ([{"question": "1+1?"}], r"problem 'list_0' has no answer: its fields are none\. Give it"),
        ([{"question": "1+1?", "answer": ""}], r"problem 'list_0' has no answer: its fields are a"),
        ([{"question": " ", "answer": "1"}], r"empty text"),
    ],
)
def test_questions_that_spoil_a_study_are_refused(rows: list[dict[str, str]], message: str) -> None:
    with pytest.raises(InputError, match=message):
        latent_data.sample(rows, n=None)


def test_token_ids_ask_nothing() -> None:
    with pytest.raises(InputError, match=r"problem 'list_0' asks nothing: it has no text"):
        latent_data.sample([[1, 2, 3]], n=None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"holds no questions \(JSONDecodeError"),
        ('[{"question": "1?"}]', r"holds no questions \(KeyError: 'gsm8k_id'\)\. Each needs"),
        ("[1]", r"holds no questions \(TypeError"),
    ],
)
def test_a_file_of_something_else_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "data.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=message):
        latent_data.sample(path)


def test_files_that_cannot_be_read_or_written_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.json cannot be read"):
        latent_data.read(tmp_path / "none.json")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot be written"):
        latent_data.write(latent_data.sample(ROWS, n=2), tmp_path / "file" / "data.json")
