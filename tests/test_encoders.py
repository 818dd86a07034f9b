"""Models without causality, by way of the same tap."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BartModel,
    BertConfig,
    BertForMaskedLM,
    DistilBertConfig,
    DistilBertModel,
    ModernBertConfig,
    ModernBertForMaskedLM,
    RobertaConfig,
    RobertaModel,
)

import probe
from probe.errors import UnsupportedModelError
from tests.references import each_kernel
from tests.references import no_grad as no_grad

SHAPE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
SPECIAL: dict[str, Any] = {
    "cls_token_id": 1,
    "sep_token_id": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
BART: dict[str, Any] = {
    "vocab_size": 64,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "init_std": 0.2,
}
MODELS: dict[str, tuple[Any, Any]] = {
    "bert": (BertForMaskedLM, BertConfig(**SHAPE)),
    "roberta": (RobertaModel, RobertaConfig(**SHAPE)),
    "modernbert": (ModernBertForMaskedLM, ModernBertConfig(**SHAPE, **SPECIAL, local_attention=6)),
    "distilbert": (
        DistilBertModel,
        DistilBertConfig(
            vocab_size=64, dim=32, hidden_dim=48, n_layers=2, n_heads=4, initializer_range=0.2
        ),
    ),
}
SENTENCES = [[3, 4, 5, 6, 7, 8, 9, 10], [5, 6, 7]]


def built(name: str, kernel: str) -> nn.Module:
    make, config = MODELS[name]
    torch.manual_seed(0)
    model: nn.Module = make._from_config(config, attn_implementation=kernel)
    return model.train(mode=False)


@pytest.mark.parametrize("name", MODELS)
@each_kernel
def test_an_encoder_is_read_like_its_eager_copy(name: str, kernel: str) -> None:
    eager: Any = built(name, "eager")
    with probe.load(built(name, kernel)) as model:
        assert not model.tap.causal
        _, cache = model.run_with_cache(SENTENCES, sites="pattern", return_type=None)
        batch = model.batch(SENTENCES)
    wanted = eager(**batch, output_attentions=True).attentions
    rows = batch["attention_mask"][:, None, :, None]
    for layer, one in enumerate(wanted):
        got = cache["pattern", layer]
        assert bool((got[0].triu(1) > 0).any())
        torch.testing.assert_close(got * rows, one * rows, atol=2e-6, rtol=0)


def test_a_token_knocked_out_of_an_encoder_is_seen_by_nobody_on_either_side() -> None:
    with probe.load(built("bert", "sdpa")) as model:
        with model.intervene(probe.Bias(value=-torch.inf, keys=1)):
            _, cache = model.run_with_cache(SENTENCES, sites="pattern", return_type=None)
        real = model.batch(SENTENCES)["attention_mask"][:, None, :].bool()
    for pattern in cache.values():
        assert bool((pattern[..., 1].masked_select(real) == 0).all())
        sums = pattern.sum(-1).masked_select(real)
        torch.testing.assert_close(sums, torch.ones_like(sums))


def test_a_model_with_two_stacks_is_refused_and_its_encoder_is_read() -> None:
    whole = BartForConditionalGeneration(BartConfig(**BART))
    with pytest.raises(UnsupportedModelError, match=r"encoder and a decoder.*get_encoder"):
        probe.load(whole)
    stack: Any = BartModel(BartConfig(**BART)).encoder
    stack.train(mode=False)
    with probe.load(stack) as model:
        _, cache = model.run_with_cache(SENTENCES, sites="pattern", return_type=None)
        with model.intervene(probe.Bias(value=-1.0, keys=0)):
            _, changed = model.run_with_cache(SENTENCES, sites="pattern", return_type=None)
    assert len(cache) == 2
    assert float((changed["pattern", 0] - cache["pattern", 0]).abs().max()) > 1e-3
