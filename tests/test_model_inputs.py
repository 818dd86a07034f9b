"""Every form of an input, how batches are padded, and what is refused."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from probe.errors import InputError
from probe.model import Model
from probe.text import pad
from tests.models import Bare
from tests.models import bare as bare
from tests.models import demo as demo
from tests.references import no_grad as no_grad

TEXT = "abcabc"


def test_every_form_of_one_input_gives_the_same_logits(demo: Model) -> None:
    ids = demo.text.encode(TEXT)
    wanted = demo.module(torch.tensor([ids])).logits
    forms: list[Any] = [
        TEXT,
        [TEXT],
        ids,
        tuple(ids),
        [ids],
        np.array(ids),
        torch.tensor(ids),
        torch.tensor([ids]),
        [torch.tensor(ids)],
        {"input_ids": torch.tensor([ids])},
        demo.tokenizer(TEXT, return_tensors="pt"),
        demo.tokenizer([TEXT], return_tensors="pt"),
    ]
    for form in forms:
        torch.testing.assert_close(demo(form).logits, wanted, atol=1e-5, rtol=0)


def test_what_a_tokenizer_returns_by_default_can_be_given(demo: Model) -> None:
    wanted = demo(TEXT).logits
    for form in (demo.tokenizer(TEXT), demo.tokenizer([TEXT]), dict(demo.tokenizer([TEXT]))):
        torch.testing.assert_close(demo(form).logits, wanted, atol=1e-5, rtol=0)


def test_further_arguments_reach_the_model(demo: Model) -> None:
    assert len(demo(TEXT, output_hidden_states=True).hidden_states) == 3


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_gives_each_text_the_logits_that_it_has_alone(
    family: str, side: str, bare: Bare
) -> None:
    class Padder:
        padding_side, pad_token_id = side, 9

    model = bare(family)
    model.tokenizer = Padder()
    rows = [[5, 6, 7, 8, 9, 1, 2], [3, 4, 5], [2]]
    batch = model.batch(rows)
    assert batch["attention_mask"].sum(-1).tolist() == [7, 3, 1]
    assert set(batch["input_ids"][batch["attention_mask"] == 0].tolist()) == {9}
    logits = model(rows).logits
    for i, row in enumerate(rows):
        where = slice(7 - len(row), None) if side == "left" else slice(len(row))
        alone = model.module(torch.tensor([row])).logits[0]
        torch.testing.assert_close(logits[i, where], alone, atol=1e-5, rtol=1e-5)


def test_a_left_padded_dict_for_gpt2_gets_the_positions_that_transformers_forgets(
    bare: Bare,
) -> None:
    model = bare("gpt2")
    batch = pad([[5, 6, 7, 8], [3, 4]], 0, side="left")
    assert set(batch) == {"input_ids", "attention_mask"}
    alone = model.module(torch.tensor([[3, 4]])).logits[0]
    torch.testing.assert_close(model(batch).logits[1, 2:], alone, atol=1e-5, rtol=1e-5)
    naive = model.module(**batch).logits[1, 2:]
    assert float((naive - alone).abs().max()) > 0.01  # what happens without
    assert set(batch) == {"input_ids", "attention_mask"}  # the user's dict is left alone


def test_positions_that_the_user_gives_are_kept(bare: Bare) -> None:
    model = bare("gpt2")
    batch = pad([[5, 6, 7, 8], [3, 4]], 0, side="left")
    positions = torch.tensor([[0, 1, 2, 3], [9, 9, 4, 5]])
    got = model.batch({**batch, "position_ids": positions})
    assert torch.equal(got["position_ids"], positions)


def test_right_padding_and_no_padding_need_no_positions(bare: Bare) -> None:
    model = bare("gpt2")
    assert set(model.batch([[1, 2], [3]])) == {"input_ids", "attention_mask"}


def test_pad_fills_on_either_side() -> None:
    right = pad([[1, 2, 3], [4]], 9)
    assert right["input_ids"].tolist() == [[1, 2, 3], [4, 9, 9]]
    assert right["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    left = pad([[1, 2, 3], [4]], 9, side="left")
    assert left["input_ids"].tolist() == [[1, 2, 3], [9, 9, 4]]
    assert left["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]


@pytest.mark.parametrize("form", [list, torch.tensor, lambda ids: [ids], lambda ids: [[1], ids]])
def test_an_input_longer_than_the_context_is_refused(
    form: Callable[[list[int]], Any], bare: Bare
) -> None:
    model = bare("llama")
    with pytest.raises(InputError, match=r"has 65 tokens, and the context of .* is 64\. Shorten"):
        model(form([1] * 65))
    assert model(form([1] * 64)).logits.shape[1] == 64


@pytest.mark.parametrize("form", [list, torch.tensor, lambda ids: [ids], lambda ids: [[1], ids]])
def test_a_token_id_outside_the_vocabulary_is_refused(
    form: Callable[[list[int]], Any], bare: Bare
) -> None:
    model = bare("llama")
    with pytest.raises(InputError, match=r"token id 64, and the vocabulary .* has 64 \(0 to 63\)"):
        model(form([1, 64]))
    with pytest.raises(InputError, match=r"token id -1"):
        model(form([1, -1]))


def test_a_dict_is_checked_like_every_other_input(bare: Bare) -> None:
    model = bare("gpt2")
    with pytest.raises(InputError, match="has 65 tokens"):
        model({"input_ids": torch.ones(1, 65, dtype=torch.long)})
    with pytest.raises(InputError, match="token id 64"):
        model({"input_ids": torch.tensor([[1, 64]])})


@pytest.mark.parametrize("nothing", [[], [[]], [[1], []], torch.ones(0, dtype=torch.long)], ids=str)
def test_an_empty_input_is_refused(nothing: Any, bare: Bare) -> None:
    with pytest.raises(InputError, match=r"holds no tokens\. Give at least one"):
        bare("llama")(nothing)


def test_text_without_a_tokenizer_is_refused(bare: Bare) -> None:
    with pytest.raises(InputError, match=r"without a tokenizer.*'hello'.*tokenizer="):
        bare("llama")("hello")


ODD: dict[str, Any] = {
    "number": 3.5,
    "object": object(),
    "scalar": torch.tensor(3),
    "fractions": [1.5, 2.5],
    "three dimensions": torch.ones(1, 2, 3),
}


@pytest.mark.parametrize("odd", ODD)
def test_an_input_of_another_kind_is_an_input_error(odd: str, bare: Bare) -> None:
    with pytest.raises(InputError):
        bare("llama")(ODD[odd])


WRONG: dict[str, tuple[Any, str]] = {
    "nothing": (None, r"input_ids=None are no token ids"),
    "text": ("abc", r"input_ids='abc' are no token ids"),
    "a number": (3, r"input_ids=3 are no token ids"),
    "fractions": ([[1.5]], r"input_ids=\[\[1\.5\]\] are no token ids .*float"),
    "a tensor of fractions": (torch.tensor([[1.5]]), r"are no token ids .*float.* Give lists of"),
    "no rows": ([], r"input_ids=\[\] hold no tokens\. Give at least one of each"),
    "an empty row": ([[1], []], r"hold no tokens"),
    "no columns": (torch.ones(1, 0, dtype=torch.long), r"hold no tokens"),
}


@pytest.mark.parametrize("what", WRONG)
def test_input_ids_that_are_none_are_refused(what: str, bare: Bare) -> None:
    ids, message = WRONG[what]
    with pytest.raises(InputError, match=message):
        bare("llama")({"input_ids": ids})


@pytest.mark.parametrize(
    "mapping",
    [
        {"input_ids": torch.tensor([5, 6, 7])},
        {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": [[1, 1, 1]]},
        {"input_ids": [5, 6, 7], "attention_mask": [1, 1, 1]},
        {"input_ids": np.array([5, 6, 7]), "attention_mask": np.array([[1, 1, 1]])},
    ],
    ids=str,
)
def test_a_dict_may_hold_lists_arrays_and_one_sequence(mapping: Any, bare: Bare) -> None:
    model = bare("llama")
    assert torch.equal(model(mapping).logits, model([5, 6, 7]).logits)
