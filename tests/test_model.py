"""Loading a model, the text of its tokens, its fingerprint."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, T5Config

import probe
from probe import demos
from probe.errors import InputError, UnsupportedModelError
from probe.loading import load
from probe.model import Model
from tests.conftest import Tiny
from tests.models import Bare
from tests.models import bare as bare
from tests.models import demo as demo
from tests.references import Wrapper
from tests.references import no_grad as no_grad

STORIES = Path(__file__).parent.parent.parent / "shared" / "data" / "stories260K-hf"
TEXT = "abcabc"


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
        assert model.text.decode([1, 2]) == ["", ""]
        assert "LlamaForCausalLM" in repr(model)
        assert "3 layers x 4 heads, 2 key heads, sdpa" in repr(model)
        assert model.tap.layers[0].path.endswith("layers.0.self_attn")
        assert model.envoy is model.tap.envoy


def test_a_wrapped_model_is_found_in_its_wrapper(tiny: Tiny) -> None:
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


def test_a_module_that_reads_no_token_ids_is_unsupported() -> None:
    with pytest.raises(UnsupportedModelError, match=r"Linear is not a transformers .*vocabulary="):
        load(nn.Linear(2, 2))


def test_a_module_is_not_loaded_twice_at_once(bare: Bare) -> None:
    model = bare("llama")
    with pytest.raises(UnsupportedModelError, match="tapped already"):
        load(model.module)
    assert model([1, 2]).logits.shape == (1, 2, 64)


# ------------------------------------------------------------------------------------ tokens


def test_decode_gives_the_text_of_each_token(demo: Model) -> None:
    assert "".join(demo.text.decode(demo.text.encode(TEXT))).endswith(TEXT)
    assert demo.text.decode([]) == []


@pytest.mark.skipif(not STORIES.exists(), reason="the optional data is not there")
def test_decode_keeps_the_space_before_a_word() -> None:
    with load(STORIES, device="cpu") as model:
        text = "Once upon a time, there was a little girl."
        ids = model.text.encode(text)
        tokens = model.text.decode(ids)
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
        ids = torch.tensor([model.text.encode("Once upon a time, there was a little girl.")])
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


def test_fingerprints_of_models_differ(bare: Bare) -> None:
    prints = {bare(family).fingerprint() for family in ("llama", "mistral", "qwen2", "gpt2")}
    prints.add(bare("llama", "sdpa", torch.bfloat16).fingerprint())
    assert len(prints) == 5


@pytest.mark.parametrize("at", [0, 1, 17, 700, 1023])
def test_a_fingerprint_differs_after_one_weight_changes_wherever_it_is(at: int, bare: Bare) -> None:
    model = bare("llama")
    before = model.fingerprint()
    weight = model.module.get_parameter("model.layers.1.self_attn.q_proj.weight")
    weight.view(-1)[at] += 0.5
    assert model.fingerprint() != before
    weight.view(-1)[at] -= 0.5


def test_a_fingerprint_differs_after_a_head_is_wiped_or_two_are_swapped(
    bare: Bare,
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
