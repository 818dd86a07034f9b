"""Loading a model and giving it inputs."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, T5Config

import probe
from probe import demos
from probe.errors import InputError, UnsupportedModelError
from probe.model import Model, load, pad

Tiny = Callable[..., PreTrainedModel]
STORIES = Path(__file__).parent.parent.parent / "shared" / "data" / "stories260K-hf"
TEXT = "abcabc"


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def demo() -> Iterator[Model]:
    with load("demo-llama", device="cpu") as model:
        yield model


@pytest.fixture
def bare(tiny: Tiny) -> Iterator[Callable[..., Model]]:
    """Models without a tokenizer, closed whatever happens."""
    models: list[Model] = []

    def make(*args: Any, **kwargs: Any) -> Model:
        models.append(load(tiny(*args, **kwargs)))
        return models[-1]

    yield make
    for model in models:
        model.close()


def folder(place: Path, config: dict[str, Any] | str) -> Path:
    text = config if isinstance(config, str) else json.dumps(config)
    (place / "config.json").write_text(text)
    return place


# ----------------------------------------------------------------------------------- loading


@pytest.mark.parametrize("name", demos.NAMES)
def test_a_demonstration_model_loads_by_its_name(name: str) -> None:
    with probe.load(name, device="cpu") as model:
        assert (model.n_layers, model.n_heads, model.layers) == (2, 4, (0, 1))
        assert model.n_kv_heads in (2, 4)
        assert (model.context, model.vocabulary) == (128, 64)
        assert model.name == name
        assert name in repr(model)
        logits = model([1, 2, 3]).logits
        assert logits.shape == (1, 3, 64)


def test_a_model_loads_from_a_local_folder_given_as_text_or_path(demo: Model) -> None:
    wanted = demo([1, 2, 3]).logits
    place = demos.path("demo-llama")
    for source in (place, str(place)):
        with load(source, device="cpu") as model:
            assert torch.equal(model([1, 2, 3]).logits, wanted)
            assert model.tokenizer is not None


def test_a_module_is_used_in_place_and_needs_no_tokenizer(tiny: Tiny) -> None:
    module = tiny("llama")
    wanted = module(torch.tensor([[1, 2, 3]])).logits
    with load(module) as model:
        assert model.module is module
        assert model.tokenizer is None
        assert torch.equal(model([1, 2, 3]).logits, wanted)
        assert model.decode([1, 2]) == ["", ""]
        assert "LlamaForCausalLM" in repr(model)
        assert "3 layers x 4 heads, 2 key heads, sdpa" in repr(model)
        assert model.tap.layers[0].path.endswith("layers.0.self_attn")
        assert model.envoy is model.tap.envoy


def test_a_wrapped_model_is_found_in_its_wrapper(tiny: Tiny) -> None:
    class Wrapper(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, **kwargs: Any) -> Any:
            return self.inner(**kwargs)

    module = Wrapper(tiny("gpt2"))
    with load(module) as model:
        assert type(model.base).__name__ == "GPT2LMHeadModel"
        assert model([[1, 2, 3], [4]]).logits.shape == (2, 3, 64)


def test_the_implementation_and_dtype_are_those_asked_for() -> None:
    with load("demo-llama", device="cpu", attn_implementation="eager", dtype="bfloat16") as model:
        assert model.tap.implementation == "eager"
        assert model([1, 2]).logits.dtype == torch.bfloat16
    with load("demo-llama", device="cpu") as model:
        assert model.tap.implementation == "sdpa"


def test_leaving_the_model_gives_the_module_back(tiny: Tiny) -> None:
    module = tiny("llama")
    with pytest.raises(ZeroDivisionError), load(module):
        raise ZeroDivisionError
    assert module.config._attn_implementation == "sdpa"
    with load(module):
        pass


def test_the_training_mode_is_the_same_after_loading(tiny: Tiny) -> None:
    module = tiny("llama")
    module.train()
    module.model.layers[1].train(mode=False)
    modes = [m.training for m in module.modules()]
    with load(module):
        assert [m.training for m in module.modules()] == modes


def test_a_name_that_is_nowhere_is_an_input_error() -> None:
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    with pytest.raises(InputError, match=r"'no-such-model' cannot be loaded: .*demo-llama, demo-"):
        load("no-such-model")
    with pytest.raises(InputError, match=r"cannot be loaded: "):
        load("somebody/something")


def test_a_folder_that_does_not_exist_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be loaded"):
        load(tmp_path / "nothing")


def test_a_folder_without_a_model_is_refused_with_the_folders_name(tmp_path: Path) -> None:
    with pytest.raises((InputError, UnsupportedModelError), match=str(tmp_path)):
        load(tmp_path)


def test_an_unknown_model_type_is_unsupported(tmp_path: Path) -> None:
    place = folder(tmp_path, {"model_type": "never-heard-of"})
    with pytest.raises(
        UnsupportedModelError, match=r"not a causal language model.*never-heard-of.*Upgrade"
    ):
        load(place)


def test_a_model_that_is_not_a_causal_language_model_is_unsupported(tmp_path: Path) -> None:
    T5Config(d_model=8, d_ff=8, num_layers=1, num_heads=1, vocab_size=8).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match=r"not a causal language model.*T5Config"):
        load(tmp_path)


def test_a_broken_config_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be loaded"):
        load(folder(tmp_path, "{ this is no json"))


def test_broken_weights_are_an_input_error(tiny: Tiny, tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(InputError, match="cannot be loaded"):
        load(tmp_path)


def test_a_checkpoint_without_a_tokenizer_says_what_to_do(tiny: Tiny, tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"has no tokenizer that can be loaded .*tokenizer="):
        load(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(demos.path("demo-llama"))
    with load(tmp_path, tokenizer, device="cpu") as model:
        assert model(TEXT).logits.shape[0] == 1


def test_a_module_that_holds_no_transformers_model_is_unsupported() -> None:
    with pytest.raises(UnsupportedModelError, match="Linear is not a transformers model and"):
        load(nn.Linear(2, 2))


def test_a_module_is_not_loaded_twice_at_once(bare: Callable[..., Model]) -> None:
    model = bare("llama")
    with pytest.raises(UnsupportedModelError, match="tapped already"):
        load(model.module)
    assert model([1, 2]).logits.shape == (1, 2, 64)


# ------------------------------------------------------------------------------------ inputs


def test_every_form_of_one_input_gives_the_same_logits(demo: Model) -> None:
    ids = demo.encode(TEXT)
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
    family: str, side: str, bare: Callable[..., Model]
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
    bare: Callable[..., Model],
) -> None:
    model = bare("gpt2")
    batch = pad([[5, 6, 7, 8], [3, 4]], 0, side="left")
    assert set(batch) == {"input_ids", "attention_mask"}
    alone = model.module(torch.tensor([[3, 4]])).logits[0]
    torch.testing.assert_close(model(batch).logits[1, 2:], alone, atol=1e-5, rtol=1e-5)
    naive = model.module(**batch).logits[1, 2:]
    assert float((naive - alone).abs().max()) > 0.01  # what happens without
    assert set(batch) == {"input_ids", "attention_mask"}  # the user's dict is left alone


def test_positions_that_the_user_gives_are_kept(bare: Callable[..., Model]) -> None:
    model = bare("gpt2")
    batch = pad([[5, 6, 7, 8], [3, 4]], 0, side="left")
    positions = torch.tensor([[0, 1, 2, 3], [9, 9, 4, 5]])
    got = model.batch({**batch, "position_ids": positions})
    assert torch.equal(got["position_ids"], positions)


def test_right_padding_and_no_padding_need_no_positions(bare: Callable[..., Model]) -> None:
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
    form: Callable[[list[int]], Any], bare: Callable[..., Model]
) -> None:
    model = bare("llama")
    with pytest.raises(InputError, match=r"has 65 tokens, and the context of .* is 64\. Shorten"):
        model(form([1] * 65))
    assert model(form([1] * 64)).logits.shape[1] == 64


@pytest.mark.parametrize("form", [list, torch.tensor, lambda ids: [ids], lambda ids: [[1], ids]])
def test_a_token_id_outside_the_vocabulary_is_refused(
    form: Callable[[list[int]], Any], bare: Callable[..., Model]
) -> None:
    model = bare("llama")
    with pytest.raises(InputError, match=r"token id 64, and the vocabulary .* has 64 \(0 to 63\)"):
        model(form([1, 64]))
    with pytest.raises(InputError, match=r"token id -1"):
        model(form([1, -1]))


def test_a_dict_is_checked_like_every_other_input(bare: Callable[..., Model]) -> None:
    model = bare("gpt2")
    with pytest.raises(InputError, match="has 65 tokens"):
        model({"input_ids": torch.ones(1, 65, dtype=torch.long)})
    with pytest.raises(InputError, match="token id 64"):
        model({"input_ids": torch.tensor([[1, 64]])})


@pytest.mark.parametrize("nothing", [[], [[]], [[1], []], torch.ones(0, dtype=torch.long)], ids=str)
def test_an_empty_input_is_refused(nothing: Any, bare: Callable[..., Model]) -> None:
    with pytest.raises(InputError, match=r"holds no tokens\. Give at least one"):
        bare("llama")(nothing)


def test_text_without_a_tokenizer_is_refused(bare: Callable[..., Model]) -> None:
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
def test_an_input_of_another_kind_is_an_input_error(odd: str, bare: Callable[..., Model]) -> None:
    with pytest.raises(InputError):
        bare("llama")(ODD[odd])


# ------------------------------------------------------------------------------------ tokens


def test_decode_gives_the_text_of_each_token(demo: Model) -> None:
    assert "".join(demo.decode(demo.encode(TEXT))).endswith(TEXT)
    assert demo.decode([]) == []


@pytest.mark.skipif(not STORIES.exists(), reason="the optional data is not there")
def test_decode_keeps_the_space_before_a_word() -> None:
    with load(STORIES, device="cpu") as model:
        text = "Once upon a time, there was a little girl."
        ids = model.encode(text)
        tokens = model.decode(ids)
        assert len(tokens) == len(ids)
        assert " upon" in "".join(tokens)
        special = set(model.tokenizer.all_special_ids)
        words = "".join(t for t, i in zip(tokens, ids, strict=True) if i not in special)
        assert words.lstrip() == text
        assert any(t.startswith(" ") and len(t) > 1 for t in tokens)


@pytest.mark.skipif(not STORIES.exists(), reason="the optional data is not there")
def test_a_real_model_reads_like_its_eager_copy() -> None:
    eager = AutoModelForCausalLM.from_pretrained(STORIES, attn_implementation="eager")
    with load(STORIES, device="cpu") as model:
        ids = torch.tensor([model.encode("Once upon a time, there was a little girl.")])
        wanted = eager(ids, output_attentions=True).attentions
        seen: list[Tensor] = []
        with model.envoy.trace(input_ids=ids):
            seen.extend(attn.pattern for attn in model.tap.layers.values())
    for got, want in zip(seen, wanted, strict=True):
        torch.testing.assert_close(got, want, atol=5e-6, rtol=0)


# ------------------------------------------------------------------------------- fingerprint


def test_a_fingerprint_is_the_same_for_a_reloaded_copy_and_for_another_kernel(demo: Model) -> None:
    with load("demo-llama", device="cpu") as again:
        assert again.fingerprint() == demo.fingerprint()
    with load("demo-llama", device="cpu", attn_implementation="eager") as eager:
        assert eager.fingerprint() == demo.fingerprint()


def test_fingerprints_of_models_differ(bare: Callable[..., Model]) -> None:
    prints = {bare(family).fingerprint() for family in ("llama", "mistral", "qwen2", "gpt2")}
    prints.add(bare("llama", "sdpa", torch.bfloat16).fingerprint())
    assert len(prints) == 5


@pytest.mark.parametrize("at", [0, 1, 17, 700, 1023])
def test_a_fingerprint_differs_after_one_weight_changes_wherever_it_is(
    at: int, bare: Callable[..., Model]
) -> None:
    model = bare("llama")
    before = model.fingerprint()
    weight = model.module.get_parameter("model.layers.1.self_attn.q_proj.weight")
    weight.view(-1)[at] += 0.5
    assert model.fingerprint() != before
    weight.view(-1)[at] -= 0.5


def test_a_fingerprint_differs_after_a_head_is_wiped_or_two_are_swapped(
    bare: Callable[..., Model],
) -> None:
    model = bare("llama")
    prints = {model.fingerprint()}
    weight = model.module.get_parameter("model.layers.1.self_attn.o_proj.weight")
    kept = weight.clone()
    weight[:, 25:32] = 0
    prints.add(model.fingerprint())
    weight.copy_(kept)
    weight[:, 9:11] = kept[:, [10, 9]]
    prints.add(model.fingerprint())
    assert len(prints) == 3
