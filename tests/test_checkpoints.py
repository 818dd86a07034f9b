import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import probe
from probe import checkpoints, latent
from probe.errors import InputError
from tests.conftest import tiny_config
from tests.reasoners import projection

TARGETS = {
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj", "gate_proj"],
}
FAMILIES = ("gpt2", "llama", "mistral", "qwen2")


def codi(family: str) -> tuple[Any, nn.Module, dict[str, Tensor]]:
    """A model as CODI trains it, its projection, and the state dict that is published."""
    make: Any = AutoModelForCausalLM.from_config
    with torch.random.fork_rng():
        torch.manual_seed(1)
        base = make(tiny_config(family))
        base.resize_token_embeddings(67, mean_resizing=False)
        targets = TARGETS.get(family, TARGETS["llama"])
        model: Any = get_peft_model(base, LoraConfig(r=3, lora_alpha=32, target_modules=targets))
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(weight, std=0.1)
    model.train(mode=False)
    prj = projection(32)
    state = {f"codi.{k}": v for k, v in model.state_dict().items()}
    return model, prj, state | {f"prj.{k}": v for k, v in prj.state_dict().items()}


def folder(path: Path, family: str, state: dict[str, Tensor], **settings: object) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    tiny_config(family).save_pretrained(path)
    AutoTokenizer.from_pretrained(str(probe.demos.path("demo-llama"))).save_pretrained(path)
    torch.save({k: v.clone() for k, v in state.items()}, path / "pytorch_model.bin")
    if settings:
        (path / "latent.json").write_text(json.dumps(settings), encoding="utf-8")
    return path


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_a_codi_checkpoint_is_what_peft_computes(family: str, tmp_path: Path) -> None:
    model, prj, state = codi(family)
    ids = torch.tensor([[3, 1, 4, 1, 5, 65]])
    with latent.load(folder(tmp_path / family, family, state)) as found:
        assert (found.kind, found.n_latents, found.opens, found.closes) == ("codi", 6, (65,), (66,))
        assert found.words == 66
        torch.testing.assert_close(
            found.model.base(ids).logits, model(ids).logits, atol=2e-5, rtol=0
        )
        x = torch.randn(1, 1, 32)
        torch.testing.assert_close(found.following(x), prj(x))


@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_files_in_parts_and_safetensors_hold_the_same(tmp_path: Path) -> None:
    _, _, state = codi("gpt2")
    whole = folder(tmp_path / "a", "gpt2", state)
    parts = folder(tmp_path / "b", "gpt2", state)
    (parts / "pytorch_model.bin").unlink()
    names, where = sorted(state), dict[str, str]()
    for n, some in enumerate((names[::2], names[1::2])):
        save_file({k: state[k].clone() for k in some}, parts / f"part{n}.safetensors")
        where |= dict.fromkeys(some, f"part{n}.safetensors")
    index = {"weight_map": where}
    (parts / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    first, second = checkpoints.read(whole), checkpoints.read(parts)
    assert set(first) == set(second)
    assert all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_a_coconut_state_dict_needs_only_its_base(tmp_path: Path) -> None:
    make: Any = AutoModelForCausalLM.from_config
    base = make(tiny_config("gpt2"))
    base.resize_token_embeddings(67, mean_resizing=False)
    base.train(mode=False)
    state = {f"base_causallm.{k}": v for k, v in base.state_dict().items()}
    state["embedding.weight"] = base.get_input_embeddings().weight.detach()
    home = folder(tmp_path / "base", "gpt2", {})
    file = tmp_path / "checkpoint_33"
    torch.save(state, file)
    with latent.load(file, base=str(home), n_latents=2) as found:
        assert (found.kind, found.n_latents, found.opens, found.closes) == (
            "coconut",
            2,
            (64,),
            (65,),
        )
        ids = torch.tensor([[3, 1, 4]])
        torch.testing.assert_close(found.model.base(ids).logits, base(ids).logits)
        x = torch.randn(1, 1, 32)
        assert found.following(x) is x


@pytest.mark.filterwarnings("ignore")
def test_settings_beside_a_checkpoint_count_unless_others_are_given(tmp_path: Path) -> None:
    _, _, state = codi("llama")
    path = folder(tmp_path / "a", "llama", state, n_latents=3, lora_alpha=1, answer="It is {}")
    with latent.load(path) as found:
        assert (found.n_latents, found.answer, found.question) == (3, "It is {}", "{}")
    with latent.load(path, n_latents=5) as found:
        assert found.n_latents == 5
    (path / "latent.json").write_text("{", encoding="utf-8")
    with pytest.raises(InputError, match=r"latent\.json is not JSON"):
        latent.load(path)


@pytest.mark.filterwarnings("ignore")
def test_missing_and_unexpected_weights_are_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _, _, state = codi("llama")
    lost = "codi.base_model.model.model.layers.1.input_layernorm.weight"
    some = {k: v for k, v in state.items() if k != lost}
    with pytest.raises(
        InputError, match=r"lacks model\.layers\.1\.input_layernorm\.weight \(1 wei"
    ):
        latent.load(folder(tmp_path / "missing", "llama", some))
    half = {k: v for k, v in state.items() if "layers.0.mlp.up_proj.lora_B" not in k}
    with pytest.raises(
        InputError, match=r"an adapter of model\.layers\.0\.mlp\.up_proj\.weight wi"
    ):
        latent.load(folder(tmp_path / "half", "llama", half))
    more = state | {"decoder.x": torch.zeros(2), "codi.base_model.model.model.y": torch.zeros(1)}
    with caplog.at_level(logging.WARNING, logger="probe"):
        latent.load(folder(tmp_path / "more", "llama", more)).close()
    assert "2 tensors that have no place here: decoder.x, model.y" in caplog.text
    with pytest.raises(InputError, match=r"Give the base model that it was trained on"):
        latent.load(folder(tmp_path / "other", "gpt2", state))


class Bomb:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("boom"),))


def test_a_pickle_of_something_else_is_not_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"codi.x": Bomb()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"cannot be read as tensors.* which is not opened"):
        latent.load(tmp_path)
    assert not Path("boom").exists()
    torch.save([torch.zeros(1)], tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"it holds no state dict"):
        latent.load(tmp_path)


def test_what_is_no_reasoner_is_refused_with_advice(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"is neither CODI nor Coconut: .* loaded with probe\.load"
    ):
        latent.load(probe.demos.path("demo-llama"))
    with pytest.raises(InputError, match=r"holds no checkpoint: neither model\.safetensors nor"):
        latent.load(tmp_path)
    with pytest.raises(InputError, match=r"'no/such-name' cannot be loaded"):
        latent.load("no/such-name")
    with pytest.raises(InputError, match=r"the projection of x holds 1\.weight, and CODI's holds"):
        checkpoints.projection({"1.weight": torch.zeros(2, 2)}, "x")
