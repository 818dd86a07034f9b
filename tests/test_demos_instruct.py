"""The instruction toy: it looks at position 1, and is lost as far as it may not look there."""

import doctest
import json
import math
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, get_args

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

import probe
from probe import InputError, demos
from probe.demos import train, train_instruct

N = 10
LENGTH = 2 * N + 3
KEY = 1  # the position of the instruction
LOWEST = torch.finfo(torch.float32).min
Instruction = Literal["copy", "next"]
each_instruction = pytest.mark.parametrize("instruction", get_args(Instruction))


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    found: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        demos.path(demos.INSTRUCT), attn_implementation="eager", local_files_only=True
    )
    found.train(mode=False)
    return found


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    found = AutoTokenizer.from_pretrained(demos.path(demos.INSTRUCT), local_files_only=True)
    assert isinstance(found, PreTrainedTokenizerFast)
    return found


def scaled(factor: float, first: int) -> Tensor:
    """A causal mask, (1, 1, row, key), that adds ln factor to the key from row ``first`` on."""
    mask = torch.full((LENGTH, LENGTH), LOWEST).triu(1)
    mask[first:, KEY] = math.log(factor) if factor else LOWEST
    return mask[None, None]


def logits(model: PreTrainedModel, ids: Tensor, factor: float = 1.0, first: int = 2) -> Tensor:
    mask = scaled(factor, first).expand(len(ids), 1, LENGTH, LENGTH)
    with torch.no_grad():
        found: Tensor = model(ids, attention_mask=mask, use_cache=False).logits
    return found


def accuracy(model: PreTrainedModel, ids: Tensor, factor: float = 1.0, first: int = 2) -> float:
    guesses = logits(model, ids, factor, first)[:, N + 2 : -1].argmax(-1)
    return (guesses == ids[:, N + 3 :]).float().mean().item()


# --------------------------------------------------------------------------------- the model


@each_instruction
@pytest.mark.parametrize(("n", "least"), [(5, 0.99), (10, 0.99), (12, 0.98)])
def test_the_model_follows_either_instruction(
    model: PreTrainedModel, instruction: Instruction, n: int, least: float
) -> None:
    ids = torch.tensor(demos.instructed(instruction, n, seed=2024))
    with torch.no_grad():
        guesses = model(ids).logits[:, n + 2 : -1].argmax(-1)
    assert (guesses == ids[:, n + 3 :]).float().mean().item() >= least


@pytest.mark.parametrize("seed", [0, 2024])
@pytest.mark.parametrize("first", [1, 2])  # whether the instruction's own row is scaled too
def test_the_less_the_instruction_is_seen_the_worse_the_copy(
    model: PreTrainedModel, seed: int, first: int
) -> None:
    ids = torch.tensor(demos.instructed("copy", N, seed=seed))
    curve = [accuracy(model, ids, factor, first) for factor in (1.0, 0.5, 0.1, 0.01, 0.0)]
    assert curve == pytest.approx([0.998, 0.973, 0.670, 0.255, 0.226], abs=0.02)


def test_a_hidden_instruction_leaves_no_trace_in_later_rows(model: PreTrainedModel) -> None:
    copy = torch.tensor(demos.instructed("copy", N, count=64))
    other = copy.clone()
    other[:, KEY] = demos.INSTRUCTIONS["next"]
    hidden = [logits(model, ids, 0.0)[:, 2:] for ids in (copy, other)]
    assert torch.equal(*hidden)
    seen = [logits(model, ids)[:, 2:] for ids in (copy, other)]
    assert (seen[0] - seen[1]).abs().max() > 1


def test_the_model_has_the_promised_shape(model: PreTrainedModel) -> None:
    config = model.config
    assert (config.model_type, config.num_hidden_layers, config.hidden_size) == ("llama", 3, 64)
    assert (config.num_attention_heads, config.num_key_value_heads) == (4, 2)
    assert (config.vocab_size, config.max_position_embeddings) == (40, 128)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (0, None, None)


def test_the_model_loads_by_its_name_and_reads_text() -> None:
    with probe.load(demos.INSTRUCT, device="cpu") as model:
        assert (model.n_layers, model.n_heads, model.n_kv_heads) == (3, 4, 2)
        assert (model.context, model.vocabulary) == (128, 40)
        for text, answer in ("=hello|", "h"), ("+hello|", "i"):
            assert model.text.decode([int(model(text).logits[0, -1].argmax())]) == [answer]


def test_whoever_asks_for_no_such_model_is_told_of_this_one() -> None:
    for ask in (lambda: demos.path("demo-bert"), lambda: probe.load("no/such-model")):
        with pytest.raises(InputError, match="demo-qwen3, demo-instruct"):
            ask()
    nothing: Any = 7
    with pytest.raises(InputError, match="demo-qwen3, demo-instruct"):
        probe.load(nothing)


# ----------------------------------------------------------------------------- the tokenizer


@each_instruction
def test_the_tokenizer_round_trips_the_stimulus(
    tokenizer: PreTrainedTokenizerFast, instruction: Instruction
) -> None:
    for ids in demos.instructed(instruction, count=8):
        text = tokenizer.decode(ids, skip_special_tokens=True)
        assert tokenizer.encode(text) == ids
        shown, _, output = str(text).partition("|")
        assert shown[0] == {"copy": "=", "next": "+"}[instruction]
        assert len(shown[1:]) == len(output) == N


def test_the_tokenizer_reads_what_one_would_type(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(tokenizer) == 40
    assert tokenizer.encode("=az09|") == [0, 1, 4, 29, 30, 39, 3]
    assert tokenizer.encode("+") == [0, 2]
    assert tokenizer.decode([0, 2, 4, 3, 5]) == "<bos>+a|b"
    assert tokenizer.model_max_length == 128


@pytest.mark.parametrize("text", ["=a b", "=A", "=a\n", "é", "<", "-"])
def test_the_tokenizer_refuses_a_character_that_it_does_not_know(
    tokenizer: PreTrainedTokenizerFast, text: str
) -> None:
    with pytest.raises(Exception, match=r"Missing \[UNK\] token"):
        tokenizer.encode(text)


# ------------------------------------------------------------------------------ the stimulus


@each_instruction
@pytest.mark.parametrize("n", [1, 10, 36])
def test_the_stimulus_is_an_instruction_its_contents_and_its_output(
    instruction: Instruction, n: int
) -> None:
    sequences = demos.instructed(instruction, n, count=20, seed=3)
    assert len(sequences) == 20
    shift = {"copy": 0, "next": 1}[instruction]
    for ids in sequences:
        contents, output = ids[2 : n + 2], ids[n + 3 :]
        assert (ids[0], ids[1], ids[n + 2]) == (0, shift + 1, 3)
        assert len(set(contents)) == len(contents) == n
        assert set(contents) <= set(range(4, 40))
        assert output == [4 + (token - 4 + shift) % 36 for token in contents]


def test_the_stimulus_depends_on_its_seed_alone() -> None:
    copy, again, other = (demos.instructed(seed=seed) for seed in (1, 1, 2))
    assert copy == again != other
    following = demos.instructed("next", seed=1)
    assert [ids[2 : N + 3] for ids in copy] == [ids[2 : N + 3] for ids in following]


def test_an_impossible_stimulus_says_what_is_possible() -> None:
    unknown: Any = "reverse"
    with pytest.raises(InputError, match="'reverse'; use one of copy, next"):
        demos.instructed(unknown)
    for n in (0, 37):
        with pytest.raises(InputError, match=f"n={n} distinct contents; choose n from 1 to 36"):
            demos.instructed(n=n)
    with pytest.raises(InputError, match="count=-1"):
        demos.instructed(count=-1)


# ------------------------------------------------------------------------------ the training


def test_training_draws_what_the_stimulus_is() -> None:
    generator = torch.Generator().manual_seed(0)
    seen = set()
    for _ in range(40):
        ids, given = train_instruct.batch(generator)
        n = given - 3
        seen.add(n)
        assert ids.shape == (48, 2 * n + 3)
        assert torch.equal(ids[:, [0, n + 2]], torch.tensor([[0, 3]]).expand(48, 2))
        shift = ids[:, [1]] - 1
        assert set(shift.flatten().tolist()) == {0, 1}
        assert torch.equal(ids[:, given:] - 4, (ids[:, 2 : n + 2] - 4 + shift) % 36)
        assert all(len(set(row)) == n for row in ids[:, 2 : n + 2].tolist())
    assert seen == set(range(5, 13))


@pytest.mark.parametrize("module", [train, train_instruct])
def test_the_examples_of_the_training_run(module: ModuleType) -> None:
    found = doctest.testmod(module)
    assert found.attempted > 0
    assert found.failed == 0


def test_training_twice_gives_the_same_bits_and_the_shipped_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(train.FAMILIES, "instruct", replace(train.FAMILIES["instruct"], steps=20))
    for run in ("once", "again"):
        train.main(["instruct", "--out", str(tmp_path / run)])
    once, again = (tmp_path / run / "instruct" for run in ("once", "again"))
    weights = "model.safetensors"
    assert (once / weights).read_bytes() == (again / weights).read_bytes()
    assert (once / weights).read_bytes() != (demos.path(demos.INSTRUCT) / weights).read_bytes()
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        fresh, kept = (
            json.loads((folder / file).read_text()) for folder in (once, demos.path(demos.INSTRUCT))
        )
        # The installed version may be newer than the one that wrote the shipped folder.
        fresh.pop("transformers_version", None)
        kept.pop("transformers_version", None)
        assert fresh == kept
