import json
import random
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from probe.errors import InputError
from probe.problems import Problem, Problems, problems

GSM8K = Path(__file__).parents[2] / "shared" / "data" / "gsm8k" / "train.jsonl"


def write(path: Path, *lines: object) -> Path:
    texts = (line if isinstance(line, str) else json.dumps(line) for line in lines)
    path.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    return path


def says(text: str) -> str:
    return f"^{re.escape(text)}$"


def test_a_text_is_one_problem() -> None:
    found = problems("The keys to the cabinet")
    assert list(found) == [Problem("0", "The keys to the cabinet")]
    assert found.source == "text"


def test_a_list_may_hold_texts_fields_token_ids_and_problems() -> None:
    mine = Problem("mine", "c", fields={"answer": 3})
    found = problems(["a", {"question": "b", "id": 7, "answer": "4"}, [1, 2], mine])
    assert [item.id for item in found] == ["0", "7", "2", "mine"]
    assert [item.text for item in found] == ["a", "b", None, "c"]
    assert [item.token_ids for item in found] == [None, None, (1, 2), None]
    assert [dict(item.fields) for item in found] == [{}, {"answer": "4"}, {}, {"answer": 3}]
    assert found.source == "list"


def test_token_ids_may_be_an_array() -> None:
    assert problems([np.array([5, 6])])[0].token_ids == (5, 6)


def test_a_problem_of_token_ids_keeps_its_id_and_gets_a_tuple() -> None:
    given = Problem("x", token_ids=[4, 5])  # type: ignore[arg-type]
    assert problems([given])[0] == Problem("x", token_ids=(4, 5))


def test_a_text_file_holds_one_problem_a_line(tmp_path: Path) -> None:
    found = problems(str(write(tmp_path / "a.txt", "one", " two\u2028three ")))
    assert [item.text for item in found] == ["one", " two\u2028three "]
    assert [item.id for item in found] == ["0", "1"]
    assert found.source == "a.txt"


def test_the_last_line_needs_no_newline(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffone\r\ntwo".encode())
    assert [item.text for item in problems(path)] == ["one", "two"]


def test_the_field_is_text_then_question_then_prompt_then_the_named_one(tmp_path: Path) -> None:
    row = {"story": "s", "prompt": "p", "question": "q", "text": "t"}
    path = tmp_path / "a.jsonl"
    for name in ("text", "question", "prompt"):
        assert problems(write(path, row))[0].text == row.pop(name)
    found = problems(write(path, row | {"question": "q"}), text="story")[0]
    assert found == Problem("0", "s", None, {"question": "q"})


def test_an_id_is_the_field_or_the_line(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"id": "gsm8k/5", "text": "a"}, {"text": "b"})
    assert [item.id for item in problems(path)] == ["gsm8k/5", "1"]
    assert "id" not in problems(path)[0].fields


def test_a_seed_chooses_as_random_sample_does_after_random_seed() -> None:
    texts = [f"problem {i}" for i in range(7473)]
    random.seed(42)
    expected = random.sample(range(7473), 100)
    found = problems(texts, n=100, seed=42)
    assert [int(item.id) for item in found] == expected
    assert expected[:4] == [5238, 912, 204, 6074]
    assert problems(problems(texts), n=100, seed=42) == found


@pytest.mark.skipif(not GSM8K.exists(), reason="needs GSM8K beside the project")
def test_gsm8k_reads_as_it_is() -> None:
    found = problems(GSM8K, n=100, seed=42)
    assert [item.id for item in found][:4] == ["5238", "912", "204", "6074"]
    assert set(found[0].fields) == {"answer"}
    line = GSM8K.read_text(encoding="utf-8").split("\n")[5238]
    assert found[0].text == json.loads(line)["question"]


def test_without_a_seed_the_first_are_taken() -> None:
    assert [item.text for item in problems(["a", "b", "c"], n=2)] == ["a", "b"]


def test_problems_are_a_sequence_that_keeps_its_source() -> None:
    found = problems(["a", "b", "c"])
    assert len(found) == 3
    assert isinstance(found[1:], Problems)
    assert [item.id for item in found[1:]] == ["1", "2"]
    assert found[1:].source == "list"
    assert problems(found) == found
    assert repr(found) == "<3 problems of 'list'>"


def test_the_hash_identifies_ids_texts_and_token_ids_and_nothing_else(tmp_path: Path) -> None:
    here = problems(["a", [1, 2]])
    assert here.sha256 == problems([Problem("0", "a"), Problem("1", None, (1, 2))]).sha256
    assert here.sha256 == problems([{"text": "a", "answer": "5"}, [1, 2]]).sha256
    others = (["a", [1, 3]], ["b", [1, 2]], [[1, 2], "a"], [{"text": "a", "id": "x"}, [1, 2]])
    assert len({problems(other).sha256 for other in others} | {here.sha256}) == 5


@pytest.mark.parametrize(
    ("lines", "text", "message"),
    [
        (
            [*[{"text": "a"}] * 3, {"question": "b", "answer": "c"}],
            "text",
            "prompts.jsonl line 3 has no field 'text' (it has: question, answer). "
            "Name the field: text='question'",
        ),
        (
            [{"n": 1, "story": "b"}],
            None,
            "prompts.jsonl line 0 has no field 'text' or 'question' or 'prompt' "
            "(it has: n, story). Name the field: text='story'",
        ),
        (
            [{}],
            None,
            "prompts.jsonl line 0 has no field 'text' or 'question' or 'prompt' "
            "(it has: none). Add one.",
        ),
        (
            [{"text": "a"}, "{'text'"],
            None,
            "prompts.jsonl line 1 is not JSON (Expecting property name enclosed in double quotes: "
            "line 1 column 2 (char 1)). Write one object a line.",
        ),
        (["[1, 2]"], None, "prompts.jsonl line 0 is a JSON list. Write one object a line."),
        (
            [{"text": 5}],
            None,
            "prompts.jsonl line 0 has int 5 in its field 'text'. Write a text.",
        ),
        (
            [{"text": "a"}, {"text": " ", "id": "x"}],
            None,
            "prompts.jsonl line 1 (id 'x') has an empty text. Remove it, or fill it.",
        ),
        (
            [{"text": "a", "id": None}],
            None,
            "prompts.jsonl line 0 has the id None. Write a text or an int.",
        ),
        (
            [{"text": "a", "id": 1}, {"text": "b"}],
            None,
            "prompts.jsonl has the id '1' twice, in problems 0 and 1. Give each its own.",
        ),
        (
            [{"text": "a"}, "", {"text": "b"}],
            None,
            "prompts.jsonl line 1 is blank (lines count from 0). Remove it.",
        ),
        ([], None, "prompts.jsonl holds no problems. Give at least one."),
    ],
)
def test_a_bad_jsonl_file_says_which_line_and_why(
    tmp_path: Path, lines: list[object], text: str | None, message: str
) -> None:
    path = write(tmp_path / "prompts.jsonl", *lines)
    with pytest.raises(InputError, match=says(message)):
        problems(path, text=text)


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        (
            "no/such.txt",
            {},
            "no/such.txt cannot be read (No such file or directory). Check the path; "
            "to use these words as a text, put them in a list.",
        ),
        (
            Path("a.csv"),
            {},
            "a.csv is neither .txt nor .jsonl. Rename it, or read it into a list.",
        ),
        ("", {}, "the text (id '0') has an empty text. Remove it, or fill it."),
        (["a", " \n"], {}, "item 1 of the list (id '1') has an empty text. Remove it, or fill it."),
        ([], {}, "list holds no problems. Give at least one."),
        (
            5,
            {},
            "problems cannot be read from type int. Give a text, a list, the path of a .txt or "
            ".jsonl file, 'hf:NAME:SPLIT', or an opened store.",
        ),
        (
            [1, 2, 3],
            {},
            "item 0 of the list is 1, of type int. Give a text, a dict, a list of token ids or a "
            "Problem (one problem of token ids is [[1, 2, 3]]).",
        ),
        (
            [[]],
            {},
            "item 0 of the list has no token ids: []. Give at least one, or remove it.",
        ),
        *(
            (
                [[1, bad]],
                {},
                f"item 0 of the list has token id {bad!r} at 1. Token ids are ints from 0.",
            )
            for bad in (-1, 1.0, True, "2")
        ),
        (
            [Problem("x")],
            {},
            "item 0 of the list has neither text nor token ids. Give one of them.",
        ),
        (["a"], {"text": "q"}, "item 0 of the list has no fields to find 'q' in. Leave out text=."),
        (["a", "b"], {"n": 3}, "n=3 cannot be taken: list has 2. Use 1 to 2."),
        (["a", "b"], {"n": 0}, "n=0 cannot be taken: list has 2. Use 1 to 2."),
        (["a"], {"seed": 1}, "seed=1 chooses which problems to take. Say how many with n=."),
        (
            "hf:gsm8k",
            {},
            "'hf:gsm8k' names no dataset. Write 'hf:NAME:SPLIT', 'hf:NAME:CONFIG:SPLIT' or "
            "'hf:NAME@REVISION:SPLIT', as 'hf:openai/gsm8k:main:train'.",
        ),
    ],
)
def test_a_bad_source_says_why(source: object, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=says(message)):
        problems(source, **options)


def test_a_blank_line_of_a_text_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=re.escape("a.txt line 1 is blank")):
        problems(write(tmp_path / "a.txt", "one", "  ", "two"))


def test_a_file_that_is_not_utf_8_says_so(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"ok\n\xff\xfe")
    with pytest.raises(
        InputError, match=says("a.txt is not UTF-8 text (byte 3). Save it as UTF-8.")
    ):
        problems(tmp_path / "a.txt")


def test_a_dataset_without_its_package_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    message = (
        "'hf:openai/gsm8k:main:train' needs the package datasets, which is not installed. "
        "Install it with: pip install attn-probe[hf]"
    )
    with pytest.raises(InputError, match=says(message)):
        problems("hf:openai/gsm8k:main:train")


@pytest.mark.parametrize(
    ("source", "name", "config", "split", "revision"),
    [
        ("hf:openai/gsm8k:main:train", "openai/gsm8k", "main", "train", None),
        ("hf:imdb:test", "imdb", None, "test", None),
        ("hf:imdb:test[:100]", "imdb", None, "test[:100]", None),
        ("hf:openai/gsm8k@v2:main:test[10:20]", "openai/gsm8k", "main", "test[10:20]", "v2"),
    ],
)
def test_a_dataset_of_the_hub_is_read_by_name_config_and_split(
    monkeypatch: pytest.MonkeyPatch,
    source: str,
    name: str,
    config: str | None,
    split: str,
    revision: str | None,
) -> None:
    calls: list[object] = []

    def load_dataset(*args: object, **options: object) -> list[dict[str, str]]:
        calls.append((args, options))
        return [{"question": "a", "answer": "1"}, {"question": "b", "answer": "2"}]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    found = problems(source)
    assert calls == [((name, config), {"split": split, "revision": revision})]
    assert [item.text for item in found] == ["a", "b"]
    assert found.source == source


def test_a_dataset_that_cannot_be_loaded_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*args: object, **options: object) -> None:
        raise ValueError("Unknown split 'tran'")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    message = (
        "'hf:imdb:tran' cannot be loaded (Unknown split 'tran'). Check its name, config and split."
    )
    with pytest.raises(InputError, match=says(message)):
        problems("hf:imdb:tran")


def test_a_file_of_another_kind_is_not_taken_for_a_text(tmp_path: Path) -> None:
    file = tmp_path / "data.json"
    file.write_text("[]", encoding="utf-8")
    with pytest.raises(InputError, match=r"data\.json is a file or folder, but neither \.txt nor"):
        problems(str(file))
    assert problems("x" * 5000)[0].text == "x" * 5000  # longer than a name can be
