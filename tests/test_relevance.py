"""Relevance against a loop that suppresses one token at a time on a plain transformers model."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

import probe
from probe import demos
from probe.errors import InputError, StoreError
from probe.model import Model
from recipes import relevance as module
from recipes.suppression import relevance
from tests.conftest import tiny_model
from tests.models import Bare
from tests.models import bare as bare
from tests.references import no_grad as no_grad

LOWEST = torch.finfo(torch.float32).min
COPY = demos.instructed("copy")
PROMPTS = [ids[:14] for ids in COPY[:3]] + [COPY[3][:7]]  # to the separator, and one that is cut
QUIET: Any = {"progress": False}


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    with probe.load(demos.INSTRUCT, device="cpu") as found:
        yield found


@pytest.fixture(scope="module")
def eager() -> PreTrainedModel:
    found: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        demos.path(demos.INSTRUCT), attn_implementation="eager", local_files_only=True
    )
    found.train(mode=False)
    return found


def loss(
    eager: PreTrainedModel, ids: Sequence[int], answer: Sequence[int], keys: Mapping[int, float]
) -> float:
    """Mean NLL of an answer with ln of these factors on the mask of these keys."""
    whole = [*ids, *answer]
    mask = torch.full((len(whole), len(whole)), LOWEST).triu(1)
    for key, factor in keys.items():
        mask[key:, key] = math.log(factor) if factor else LOWEST
        if not factor and bool((mask[key] == LOWEST).all()):
            mask[key, key] = 0.0
    out = eager(torch.tensor([whole]), attention_mask=mask[None, None], use_cache=False)
    each: Tensor = out.logits[0].double().log_softmax(-1)
    rows = range(len(ids) - 1, len(whole) - 1)
    return float(-sum(each[row, whole[row + 1]] for row in rows) / len(answer))


def said(eager: PreTrainedModel, ids: Sequence[int], n: int) -> list[int]:
    """What the plain model says, greedily."""
    whole = list(ids)
    for _ in range(n):
        whole.append(int(eager(torch.tensor([whole])).logits[0, -1].argmax()))
    return whole[len(ids) :]


@pytest.mark.parametrize(("factor", "n"), [(0.1, 1), (0.0, 3), (3.0, 2)])
def test_relevance_is_a_loop_over_tokens(
    model: Model, eager: PreTrainedModel, factor: float, n: int
) -> None:
    options: Any = {"similarity": None, "factor": factor, "max_new_tokens": n, **QUIET}
    ds = relevance(model, PROMPTS, **options)
    assert ds.relevance.dims == ("problem", "key")
    for i, ids in enumerate(PROMPTS):
        answer = said(eager, ids, n)
        assert ds.target.values[i] == "".join(model.text.decode(answer))
        base = loss(eager, ids, answer, {})
        assert float(ds.target_loss[i]) == pytest.approx(base, abs=2e-5)
        each = [loss(eager, ids, answer, {j: factor}) - base for j in range(len(ids))]
        np.testing.assert_allclose(ds.relevance.values[i, : len(ids)], each, atol=1e-4)
        assert np.isnan(ds.relevance.values[i, len(ids) :]).all()
    assert not ds.noop.values.any()


@pytest.mark.parametrize(
    ("similarity", "factor"), [(0.6, 0.1), (0.05, 0.3), (-1, 0.0), (-0.2, 2.5), (1, 0.1)]
)
def test_similar_tokens_are_suppressed_too_by_their_cosine(
    model: Model, eager: PreTrainedModel, similarity: float, factor: float
) -> None:
    ids = [0, 1, 10, 9, 10, 21, 9, 15, 15, 3]
    answer = [4, 9]
    table: Any = eager.get_input_embeddings().weight
    text = "".join(model.text.decode(answer))
    options: Any = {"similarity": similarity, "factor": factor, "target": text, **QUIET}
    ds = relevance(model, [ids], **options)
    base = loss(eager, ids, answer, {})
    for j, token in enumerate(ids):
        keys = {}
        for k, other in enumerate(ids):
            a, b = table[token].double(), table[other].double()
            cosine = float(a @ b / (a.norm() * b.norm()))
            if token == other or cosine >= similarity:
                weight = (1 - factor) * (1 - cosine) + factor
                ends = sorted([factor, 1.0])
                keys[k] = factor if k == j else min(max(weight, ends[0]), ends[1])
        wanted = loss(eager, ids, answer, keys) - base
        assert float(ds.relevance[0, j]) == pytest.approx(wanted, abs=1e-4)


def test_hiding_the_instruction_makes_the_answer_less_likely(model: Model) -> None:
    copy = [ids[:13] for ids in COPY[:12]]
    ds = relevance(model, copy, similarity=None, factor=0.0, **QUIET)
    answers = "".join(model.text.decode([ids[13] for ids in COPY[:12]]))
    assert "".join(ds.target.values) == answers
    mean = ds.relevance.mean("problem")
    assert float(mean[1]) > 1
    assert bool((ds.relevance[:, 1] > 0).all())
    assert bool((abs(mean[4:12]) < 0.1).all())


def test_the_answer_may_be_a_text_or_a_field(model: Model, eager: PreTrainedModel) -> None:
    rows = [{"text": "=abc|", "answer": "abc"}, {"text": "+abcd|", "answer": "b"}]
    by_field = relevance(model, rows, target="field:answer", **QUIET)
    assert by_field.target.values.tolist() == ["abc", "b"]
    by_text = relevance(model, [row["text"] for row in rows], target="abc", **QUIET)
    np.testing.assert_array_equal(by_field.relevance.values[0], by_text.relevance.values[0])
    assert by_field.relevance.values[1, 1] != by_text.relevance.values[1, 1]
    ids, answer = [0, 1, 4, 5, 6, 3], [4, 5, 6]
    assert float(by_text.target_loss[0]) == pytest.approx(loss(eager, ids, answer, {}), abs=2e-5)


@pytest.mark.parametrize(
    ("keys", "named"), [([1, -1], [1, 13]), ("text:|", [12]), (slice(2, 4), [2, 3])]
)
def test_only_the_keys_that_are_asked_for_have_a_number(
    model: Model, keys: Any, named: list[int]
) -> None:
    whole = relevance(model, PROMPTS[:3], **QUIET)
    part = relevance(model, PROMPTS[:3], keys=keys, **QUIET)
    for some, every in zip(part.relevance.values, whole.relevance.values, strict=True):
        assert np.flatnonzero(~np.isnan(some)).tolist() == named
        np.testing.assert_allclose(some[named], every[named], atol=2e-5)


def test_how_many_variants_run_together_changes_no_number(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = relevance(model, PROMPTS, **QUIET)
    for tokens in (1, 40):
        monkeypatch.setattr(module, "_TOKENS", tokens)
        apart = relevance(model, PROMPTS, **QUIET)
        np.testing.assert_allclose(apart.relevance, together.relevance, atol=2e-5)


def test_in_16_bits_the_noise_of_a_batch_is_no_relevance(tmp_path: Path) -> None:
    with probe.load(demos.INSTRUCT, dtype="bfloat16", device="cpu") as half:

        def larger_batches_are_rounded_otherwise(_: Any, __: Any, output: Tensor) -> Tensor:
            return output * (1 + 0.01 * len(output))

        embedding = half.base.get_input_embeddings()  # type: ignore[operator]
        embedding.register_forward_hook(larger_batches_are_rounded_otherwise)
        ds = relevance(half, PROMPTS, factor=1 - 1e-9, similarity=None, target="z", **QUIET)
    assert not ds.relevance.fillna(0).values.any()


def test_in_bfloat16_relevance_is_that_of_float32_up_to_rounding(model: Model) -> None:
    with probe.load(demos.INSTRUCT, dtype="bfloat16", device="cpu") as half:
        ds = relevance(half, PROMPTS, similarity=None, target="z", **QUIET)
    wide = relevance(model, PROMPTS, similarity=None, target="z", **QUIET)
    np.testing.assert_allclose(ds.relevance, wide.relevance, atol=0.3)


def test_a_prompt_of_one_token_has_a_relevance(model: Model) -> None:
    ds = relevance(model, [[0], [0, 1, 4, 3]], factor=0.0, **QUIET)
    assert float(ds.relevance[0, 0]) == 0  # it keeps itself
    assert np.isnan(ds.loss.values[0])
    assert ds.status.values.tolist() == [1, 1]


def test_without_a_tokenizer_the_model_may_still_answer(bare: Bare) -> None:
    ds = relevance(bare("gpt2"), [[1, 2, 3]], max_new_tokens=2, **QUIET)
    assert np.isfinite(ds.relevance.values).all()
    assert ds.target.values.tolist() == [""]


def test_a_character_of_several_tokens_is_told_whole() -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    kept = {letter: n for n, letter in enumerate(alphabet) if n < 60}
    spelt = [t for t, _ in pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str("日")]
    kept |= {letter: 60 + n for n, letter in enumerate(dict.fromkeys(spelt[0])) if letter}
    tokens = Tokenizer(models.BPE(vocab=kept, merges=[]))
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    bytewise: Any = PreTrainedTokenizerFast(tokenizer_object=tokens)  # type: ignore[no-untyped-call]
    with probe.load(tiny_model("llama"), bytewise) as model:
        ds = relevance(model, [[5, 6, 7]], target="日", **QUIET)
        assert "\ufffd" in "".join(model.text.decode(bytewise("日")["input_ids"]))
    assert ds.target.values.tolist() == ["日"]


def test_other_answers_under_the_same_field_are_another_run(model: Model, tmp_path: Path) -> None:
    store = tmp_path / "s"
    row = {"text": "=abc|", "answer": "abc"}
    relevance(model, [row], store, target="field:answer", **QUIET)
    with pytest.raises(StoreError, match=r"recipe.target_ids \[\[4, 5, 6\]\], now \[\[4\]\]"):
        relevance(model, [row | {"answer": "a"}], store, target="field:answer", **QUIET)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "similarity": ({"similarity": 1.5}, "similarity=1.5. Give a cosine, from -1 to 1, or None."),
    "similarity nan": ({"similarity": math.nan}, "similarity=nan. Give a cosine"),
    "similarity text": ({"similarity": "0.6"}, "similarity='0.6'. Give a cosine"),
    "no tokens": ({"max_new_tokens": 0}, "max_new_tokens=0. It must be an int of at least 1."),
    "too many": ({"max_new_tokens": 120}, "it would pass the context of demo-instruct, 128"),
    "a number": ({"target": 5}, "target=5 gives no text for problem '0'"),
    "an empty text": ({"target": ""}, "target='' gives no text for problem '0'"),
    "no field": ({"target": "field:answer"}, "target='field:answer' gives no text for problem '0'"),
    "no such letter": (
        {"target": "É"},
        "the tokenizer of demo-instruct cannot encode 'É', the target of problem '0': ",
    ),
    "mode": ({"mode": "add"}, "mode='add'. Choose from log_add"),
    "factors": ({"factor": [0.1]}, "factor=[0.1] does not fit keys=0"),
    "a negative factor": ({"factor": -1}, "factor holds -1. Give numbers of at least 0"),
    "a layer": ({"layers": 3}, "layers=3 is out of range: the model has 3 layers"),
    "a head": ({"heads": [(0, 4)]}, "heads=4 is out of range: the model has 4 heads"),
    "keys": ({"keys": 7}, "keys=7 is out of range: problem '3' has 7 tokens, 0 to 6"),
    "words": ({"keys": "text:z"}, "problem '1' has no token that carries it"),
    "a long answer": ({"target": "a" * 120}, "problem '0' with its target has 134 tokens"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_makes_no_sense_is_refused_before_the_model_runs(model: Model, what: str) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("the model ran")

    options, message = REFUSED[what]
    hook = model.module.register_forward_pre_hook(refuse)
    try:
        with pytest.raises(InputError, match=re.escape(message)):
            relevance(model, PROMPTS, **options, **QUIET)
    finally:
        hook.remove()
