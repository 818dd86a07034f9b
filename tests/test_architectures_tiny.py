"""The builder of tiny models, and the references that they are compared with."""

import inspect
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.utils import logging

from recipes.architectures_tiny import (
    LENGTHS,
    MODEL_TYPES,
    SIZES,
    SPECIAL,
    SPECIFIC,
    WINDOW,
    _is_auto,
    classes,
    padded,
    quiet,
    references,
    shrunk,
    tiny,
)
from tests.references import no_grad as no_grad


def kinds(kind: type[PreTrainedConfig]) -> set[type[PreTrainedConfig]]:
    """A class of configs and those inside it."""
    inner = kind.sub_configs_defaults.values()
    found = {kind}
    for spec in inner:
        found |= kinds(CONFIG_MAPPING[spec.model_type] if _is_auto(spec) else spec.config_class)
    return found


def test_every_rule_is_of_some_architecture() -> None:
    every = set().union(*(kinds(CONFIG_MAPPING[name]) for name in MODEL_TYPES))
    fields = {field for kind in every for field in kind.__dataclass_fields__}
    assert SIZES.keys() <= fields
    assert SPECIFIC.keys() <= {kind.model_type for kind in every}


def test_a_config_is_shrunk_by_the_names_of_its_fields() -> None:
    small = shrunk(CONFIG_MAPPING["llama"])
    assert (small["hidden_size"], small["num_attention_heads"], small["vocab_size"]) == (32, 4, 64)
    assert "layer_types" not in small
    assert small["pad_token_id"] == 0
    assert small["eos_token_id"] > SPECIAL


def test_every_kind_of_layer_stays() -> None:
    small = shrunk(CONFIG_MAPPING["gemma2"])
    assert small["layer_types"] == ["sliding_attention", "full_attention"] * 2
    assert small["sliding_window"] == WINDOW
    assert len(set(shrunk(CONFIG_MAPPING["qwen3_next"])["layer_types"])) == 2


def test_configs_inside_a_config_are_shrunk_and_single_fields_of_them_set() -> None:
    small = shrunk(CONFIG_MAPPING["gemma4_assistant"])["text_config"]
    assert small["hidden_size"] == 32
    assert small["model_type"] == "gemma4_text"
    assert small["hidden_size_per_layer_input"] == 0
    assert shrunk(CONFIG_MAPPING["dbrx"])["attn_config"]["kv_n_heads"] == 2


def test_latent_attention_shares_no_key_heads() -> None:
    config = tiny("deepseek_v3").config
    assert config.num_key_value_heads == config.num_attention_heads
    assert config.v_head_dim != config.qk_head_dim


def test_the_language_part_of_a_larger_model_has_its_own_config() -> None:
    family, kind = classes("qwen3_5")
    assert (family.__name__, kind.__name__) == ("Qwen3_5ForCausalLM", "Qwen3_5TextConfig")
    family, kind = classes("internlm3")  # a class under another name, not a part
    assert (family.__name__, kind.__name__) == ("LlamaForCausalLM", "InternLM3Config")


@pytest.mark.parametrize("model_type", ["llama", "granite_swa", "jamba"])
def test_a_tiny_model_is_small_ready_and_always_the_same(model_type: str) -> None:
    state = torch.random.get_rng_state()
    model, again = tiny(model_type), tiny(model_type, "eager")
    assert torch.equal(torch.random.get_rng_state(), state)
    assert sum(p.numel() for p in model.parameters()) < 200_000
    assert not any(m.training for m in model.modules())
    assert again.config._attn_implementation == "eager"
    for (name, a), b in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b), name
        assert bool((a != 0).all()), name  # sinks, biases and whatever starts at zero


def test_batches_are_padded_on_both_sides() -> None:
    left, right = padded()
    assert left["attention_mask"].sum(1).tolist() == right["attention_mask"].sum(1).tolist()
    assert right["attention_mask"].sum(1).tolist() == list(LENGTHS)
    assert right["attention_mask"][1].tolist() == [1] * 7 + [0] * 4
    assert left["attention_mask"][1].tolist() == [0] * 4 + [1] * 7
    for batch in (left, right):
        assert torch.equal(batch["input_ids"] != 0, batch["attention_mask"].bool())
        assert int(batch["input_ids"].max()) < SPECIAL


def test_what_a_kernel_mixes_with_is_what_the_model_reports() -> None:
    model = tiny("mistral", "eager")
    names: Any = inspect.unwrap(type(model.model.layers[0].self_attn).forward).__globals__
    kernel = names["eager_attention_forward"]
    wanted = model(**padded()[1], use_cache=False).logits
    reported, mixed = references(model, {**padded()[1], "use_cache": False})
    assert len(reported) == len(mixed) == 4
    for a, b in zip(reported, mixed, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)
    assert names["eager_attention_forward"] is kernel
    assert torch.equal(model(**padded()[1], use_cache=False).logits, wanted)


def test_a_kernel_that_scales_afterwards_mixes_with_less_than_it_reports() -> None:
    reported, mixed = references(tiny("granite_swa", "eager"), padded()[1])
    assert float((reported[0].sum(-1) - 1).abs().max()) < 1e-5
    assert float(mixed[0].sum(-1)[0].max()) < 1


def test_quiet_puts_logging_back_also_after_an_error() -> None:
    level = logging.get_verbosity()
    with quiet():
        assert logging.get_verbosity() == 50
    with pytest.raises(KeyError), quiet():
        raise KeyError
    assert logging.get_verbosity() == level
