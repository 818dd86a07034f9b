import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from probe import InputError, demos
from probe.demos import train

N = 20


@dataclass(frozen=True)
class Measured:
    accuracy: float
    first_copy_loss: float
    induction: Tensor  # (layer, head)
    previous: Tensor  # (layer, head)


def loaded(folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", local_files_only=True
    )
    model.train(mode=False)
    return model


def tokenizer_of(name: str) -> PreTrainedTokenizerFast:
    found = AutoTokenizer.from_pretrained(demos.path(name), local_files_only=True)
    assert isinstance(found, PreTrainedTokenizerFast)
    return found


def patterns(model: PreTrainedModel, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The eager reference: logits (problem, position, vocab), (layer, problem, head, q, k)."""
    with torch.no_grad():
        out = model(ids, output_attentions=True)
    return out.logits, torch.stack(out.attentions)


def measured(model: PreTrainedModel) -> Measured:
    """Index arithmetic for two copies of N, independent of any metric in the package."""
    ids = torch.tensor(demos.repeated(N, count=64, seed=2024))
    logits, pattern = patterns(model, ids)
    loss = torch.nn.functional.cross_entropy(logits[:, :N].flatten(0, 1), ids[:, 1 : N + 1].ravel())
    second = torch.arange(N + 1, 2 * N + 1)  # every position of the second copy
    later = torch.arange(1, 2 * N + 1)
    return Measured(
        accuracy=(logits[:, N + 1 : -1].argmax(-1) == ids[:, N + 2 :]).float().mean().item(),
        first_copy_loss=loss.item(),
        induction=pattern[..., second, second - N + 1].mean((1, 3)),
        previous=pattern[..., later, later - 1].mean((1, 3)),
    )


@pytest.fixture(scope="module", params=demos.NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def shipped(name: str) -> PreTrainedModel:
    return loaded(demos.path(name))


@pytest.fixture(scope="module")
def heads(shipped: PreTrainedModel) -> Measured:
    return measured(shipped)


def test_a_shipped_model_copies_the_second_of_two_copies(heads: Measured) -> None:
    assert heads.accuracy > 0.99


def test_a_shipped_model_knows_that_it_cannot_guess_the_first_copy(heads: Measured) -> None:
    assert heads.first_copy_loss == pytest.approx(torch.tensor(63.0).log().item(), abs=0.1)


def test_every_head_of_the_second_layer_is_an_induction_head(heads: Measured) -> None:
    assert heads.induction[1].max() > 0.92
    assert heads.induction[1].min() > 0.88
    assert heads.induction[0].max() < 0.1


def test_a_previous_token_head_sits_in_the_first_layer(heads: Measured, name: str) -> None:
    # GPT-2 spreads the work over several heads; its positions are learned, not rotary.
    assert heads.previous[0].max() > (0.55 if name == "demo-gpt2" else 0.85)
    assert heads.previous[1].max() < 0.1


def test_a_shipped_model_has_the_promised_shape(shipped: PreTrainedModel, name: str) -> None:
    config = shipped.config
    grouped = name in ("demo-mistral", "demo-qwen2", "demo-qwen3")
    assert 75_000 < sum(weight.numel() for weight in shipped.parameters()) < 95_000
    assert (config.num_hidden_layers, config.num_attention_heads, config.hidden_size) == (2, 4, 64)
    assert getattr(config, "num_key_value_heads", 4) == (2 if grouped else 4)
    assert (config.vocab_size, config.max_position_embeddings) == (64, 128)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (0, None, None)


@pytest.mark.parametrize("name", [*demos.SHIPPED, *demos.LATENT])
def test_a_shipped_folder_names_no_place_on_any_machine(name: str) -> None:
    for file in demos.path(name).glob("*.json"):
        text = file.read_text()
        assert "_name_or_path" not in text
        assert str(Path.home()) not in text
        assert str(Path.cwd()) not in text


def test_the_sliding_window_of_mistral_hides_all_that_is_beyond_it() -> None:
    model = loaded(demos.path("demo-mistral"))
    window = model.config.sliding_window
    ids = torch.randint(1, 64, (8, 64), generator=torch.Generator().manual_seed(5))
    _, pattern = patterns(model, ids)
    distance = torch.arange(64)[:, None] - torch.arange(64)
    assert 2 * N + 1 < window < 64
    assert torch.all(pattern[..., distance >= window] == 0)
    assert torch.all(pattern[..., (distance >= 0) & (distance < window)] > 0)


def test_no_model_but_mistral_has_a_window(name: str, shipped: PreTrainedModel) -> None:
    assert (getattr(shipped.config, "sliding_window", None) is None) == (name != "demo-mistral")


def test_the_tokenizer_is_one_character_one_token_after_bos(name: str) -> None:
    tokenizer = tokenizer_of(name)
    assert len(tokenizer) == 64
    assert tokenizer.encode("abzAZ09.") == [0, 1, 2, 26, 27, 52, 53, 62, 63]
    assert tokenizer.decode([1, 2]) == "ab"
    assert tokenizer.decode([0, 1, 2]) == "<bos>ab"
    assert tokenizer.convert_ids_to_tokens([0, 1, 63]) == ["<bos>", "a", "."]
    assert tokenizer.model_max_length == 128


def test_the_tokenizer_round_trips_the_stimulus(name: str) -> None:
    tokenizer = tokenizer_of(name)
    for ids in demos.repeated(count=8):
        text = tokenizer.decode(ids, skip_special_tokens=True)
        assert len(text) == 2 * N
        assert tokenizer.encode(text) == ids


@pytest.mark.parametrize("text", ["a b", "a\n\nb", "é", "<", "a-b"])
def test_the_tokenizer_refuses_a_character_that_it_does_not_know(name: str, text: str) -> None:
    with pytest.raises(Exception, match=r"Missing \[UNK\] token"):
        tokenizer_of(name).encode(text)


def test_the_stimulus_is_bos_and_distinct_tokens_twice() -> None:
    sequences = demos.repeated(n=5, count=100, seed=3, vocab=9)
    assert len(sequences) == 100
    for bos, *tokens in sequences:
        assert bos == 0
        assert tokens[:5] == tokens[5:]
        assert len(set(tokens)) == 5
        assert set(tokens) <= set(range(1, 9))


def test_the_stimulus_depends_on_its_seed_alone() -> None:
    assert demos.repeated(seed=1) == demos.repeated(seed=1)
    assert demos.repeated(seed=1) != demos.repeated(seed=2)


@pytest.mark.parametrize("n", [0, 64])
def test_an_impossible_stimulus_says_what_is_possible(n: int) -> None:
    with pytest.raises(InputError, match=f"n={n} distinct tokens from vocab=64.*1 to 63"):
        demos.repeated(n)


def test_a_negative_number_of_sequences_is_refused() -> None:
    with pytest.raises(InputError, match="count=-1"):
        demos.repeated(count=-1)


def test_an_unknown_demonstration_model_is_answered_with_the_names() -> None:
    with pytest.raises(InputError, match=r"'demo-bert'.*demo-llama.*demo-qwen3"):
        demos.path("demo-bert")


def test_finding_a_demonstration_model_imports_no_torch() -> None:
    code = (
        "import sys; from probe import demos; demos.path('demo-llama'); demos.repeated();"
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'numpy')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_shipped_model_has_its_recipe() -> None:
    assert tuple(f"demo-{family}" for family in train.FAMILIES) == demos.SHIPPED


def test_training_twice_gives_the_same_bits(tmp_path: Path) -> None:
    for run in ("once", "again"):
        train.save(train.train("mistral", steps=30), tmp_path / run)
    once, again = (tmp_path / run / "model.safetensors" for run in ("once", "again"))
    assert once.read_bytes() == again.read_bytes()
    before, after = load_file(demos.path("demo-mistral") / "model.safetensors"), load_file(once)
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[key], after[key]) for key in before)


def test_training_leaves_the_random_state_and_the_threads_alone() -> None:
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    train.train("qwen3", steps=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads


def test_a_model_trained_from_scratch_is_as_good_as_the_shipped_one(tmp_path: Path) -> None:
    train.main(["mistral", "--out", str(tmp_path)])
    found = measured(loaded(tmp_path / "mistral"))
    assert found.accuracy > 0.99
    assert found.induction.max() > 0.9
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        fresh, kept = (
            json.loads((folder / file).read_text())
            for folder in (tmp_path / "mistral", demos.path("demo-mistral"))
        )
        # The installed version may be newer than the one that wrote the shipped folder.
        fresh.pop("transformers_version", None)
        kept.pop("transformers_version", None)
        assert fresh == kept
