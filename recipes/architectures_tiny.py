"""Tiny random models of every causal language model of transformers, and what they attend with.

General rules shrink whatever config an architecture has, by the names of its fields; `SPECIFIC`
holds what single architectures demand besides. Nothing is downloaded, and nothing here is tapped.
"""

import dataclasses
import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

MODEL_TYPES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
_CRITICAL = 50  # of Python's logging
LENGTHS = (11, 7)  # tokens of two sequences, both more than a window
VOCABULARY = 64
SPECIAL = 56  # special tokens are from here on, except padding, which is 0
WINDOW = 5
LAYERS = 4

# The size of every field of these names, in every config.
_SIZES: dict[str, Any] = {
    """hidden_size n_embd d_model emb_dim lru_width embedding_size word_embed_proj_dim
    input_embedding_size output_embedding_size dim_model_base backbone_hidden_size""": 32,
    """intermediate_size moe_intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim d_inner
    n_inner dff feed_forward_size intermediate_size_mlp shared_expert_intermediate_size
    shared_intermediate_size dense_intermediate_size prefix_dense_intermediate_size
    expert_ffn_hidden_size moe_shared_expert_intermediate_size shared_experts_intermediate_size
    ffn_hidden_size""": 40,
    """num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers
    num_encoder_layers num_decoder_layers""": LAYERS,
    """num_attention_heads n_head n_heads num_heads decoder_attention_heads
    encoder_attention_heads num_encoder_attention_heads num_decoder_attention_heads
    attention_heads swa_num_attention_heads num_experts num_local_experts n_routed_experts
    moe_num_experts linear_num_value_heads linear_num_heads mamba_num_heads mamba_n_heads
    n_mamba_heads index_topk indexer_n_heads index_n_heads""": 4,
    """num_key_value_heads num_kv_heads swa_num_key_value_heads num_experts_per_tok moe_topk moe_k
    top_k_experts linear_num_key_heads heads_per_ngram""": 2,
    """n_group topk_group max_window_layers first_k_dense_replace n_groups mamba_n_groups
    mamba_ngroups""": 1,
    """head_dim swa_head_dim qk_rope_head_dim qk_nope_head_dim kv_channels index_head_dim
    indexer_head_dim linear_key_head_dim linear_value_head_dim linear_head_dim mamba_d_state
    state_size ssm_state_size mamba_head_dim d_head attention_head_size rotary_dim""": 8,
    "v_head_dim": 12,  # unlike the width of a key
    "mamba_d_head q_lora_rank kv_lora_rank o_lora_rank mamba_chunk_size chunk_size": 16,
    """max_position_embeddings n_positions n_ctx max_seq_len max_target_positions
    max_source_positions context_length vocab_size_per_layer_input""": 64,
    """sliding_window sliding_window_size attention_window_size window_size keep_window_size
    attention_chunk_size local_attention local_attention_window_len""": WINDOW,
    "is_decoder use_sliding_window causal": True,
    "vocab_size": VOCABULARY,
}
SIZES = {name: size for names, size in _SIZES.items() for name in names.split()}

_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_SHARES_ALL = {  # an assistant reads the keys of another model in every layer
    "text_config": {
        "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": 0,
        "num_kv_shared_layers": LAYERS,
    }
}

# Model type of a config -> what it demands beyond the general rules.
SPECIFIC: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    # What block-sparse attention becomes on sequences as short as these, and then reports nothing.
    "big_bird": {"attention_type": "original_full"},
    "blt": {"encoder_hash_byte_group_vocab": 64, "encoder_hash_byte_group_size": [3]},
    "blt_local_decoder": {"hidden_size_global": 32},
    "blt_local_encoder": {"hidden_size_global": 32},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "rope_parameters": {"sliding_attention": _ROPE, "full_attention": _ROPE},
    },
    "cpmant": {"dim_ff": 40, "prompt_length": 4, "dim_head": 8},
    "dbrx": {
        "attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 40, "moe_num_experts": 4, "moe_top_k": 2},
        "rope_parameters": _ROPE,
    },
    "deepseek_v4": {
        "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4}
    },
    "dots1": {"num_experts_per_tok": 2, "n_shared_experts": 1},
    "dots3_note_text": {  # half the heads in sliding layers, as in the published model
        "head_dim": 16,
        "swa_num_attention_heads": 2,
        "swa_num_key_value_heads": 2,
        "swa_q_lora_rank": 16,
        "swa_kv_lora_rank": 16,
        "swa_head_dim": 16,
        "swa_qk_nope_head_dim": 8,
        "swa_v_head_dim": 12,
    },
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma2": {"query_pre_attn_scalar": 8},
    "gemma3_text": {"query_pre_attn_scalar": 8},
    "gemma3n_text": {"num_kv_shared_layers": 2},
    "gemma4_assistant": _SHARES_ALL,
    "gemma4_unified_assistant": _SHARES_ALL,
    "gemma4_text": {"global_head_dim": 16},
    "gemma4_unified_text": {"global_head_dim": 16},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "inkling_text": {"swa_num_key_value_heads": 4},  # twice the others', as in the published model
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "laguna": {"layer_types": ["sliding_attention", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "longcat_flash": {"zero_expert_num": 2},
    "mamba2": {"num_heads": 8},
    "mellum": {"layer_types": ["sliding_attention", "full_attention"] * 2},
    # Blocks of keys are chosen by position and not by column, so that padding on the left may leave
    # a row no key at all, and kernels disagree on such a row: not with blocks as wide as this.
    "minimax_m3_vl_text": {
        "index_block_size": 8,
        "index_topk_blocks": 1,
        "layer_types": ["full_attention", "minimax_m3_sparse"] * 2,
    },
    "moshi": {"audio_vocab_size": 64, "num_codebooks": 2},
    "qwen4_exp_text": {
        "indexer_kv_heads": 1,
        "indexer_budget": 4,
        "indexer_compress_ratio": 2,
        "ngram_vocab_size_base": 100,
        "split_ngram_parts": 1,
    },
    "reformer": {
        "axial_pos_shape": (8, 8),
        "axial_pos_embds_dim": (16, 16),
        "attn_layers": ("local", "lsh") * 2,
        "local_attn_chunk_length": 4,
        "lsh_attn_chunk_length": 4,
    },
    "roc_bert": {
        "pronunciation_embed_dim": 32,
        "pronunciation_vocab_size": 64,
        "shape_embed_dim": 32,
        "shape_vocab_size": 64,
    },
    "vaultgemma": {"query_pre_attn_scalar": 8},
    "xlstm": {"hidden_size": 64, "qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zaya": {"num_experts_per_tok": 1},
}


def shrunk(kind: type[PreTrainedConfig]) -> dict[str, Any]:
    """Arguments that make a config of a class small, its sub-configs included.

    Each kind of layer that the class's default has (full, sliding, recurrent, ...) stays.
    """
    fields = {f.name: f.default for f in dataclasses.fields(kind)}
    small: dict[str, Any] = {name: SIZES[name] for name in fields if name in SIZES}
    if {"kv_lora_rank", "num_key_value_heads"} <= fields.keys():  # latent attention shares no keys
        small["num_key_value_heads"] = small["num_attention_heads"]
    for name, default in fields.items():
        if name.endswith(("_token_id", "_token_index")) and isinstance(default, int):
            small[name] = SPECIAL
    small |= {"eos_token_id": SPECIAL + 1, "bos_token_id": SPECIAL + 1, "pad_token_id": 0}
    if "layer_types" in fields:
        kinds = list(dict.fromkeys(kind().layer_types or ()))
        if len(kinds) > 1:  # one kind alone may only be the default's, which has no windows
            n = max(LAYERS, len(kinds))
            small |= {"layer_types": list(islice(cycle(kinds), n)), "num_hidden_layers": n}
    for name, spec in kind.sub_configs_defaults.items():
        inner = CONFIG_MAPPING[spec.model_type] if _is_auto(spec) else spec.config_class
        small[name] = {"model_type": inner.model_type} | shrunk(inner)
    return _merged(small, SPECIFIC.get(kind.model_type, {}))


def tiny(model_type: str, implementation: str | None = None) -> PreTrainedModel:
    """A tiny random model of a type, in evaluation mode, on the CPU, in float32.

    The same type always has the same weights. Every parameter is away from where it starts, by
    normal noise of 0.2, so that norms, sinks and whatever starts at zero matter too, and so that
    attention is not uniform.

    Args:
        model_type: One of `MODEL_TYPES`.
        implementation: "eager", "sdpa", ...; default what transformers chooses.

    Raises:
        Exception: Whatever transformers raises for a model that it cannot build.

    Example:
        >>> tiny("llama").config.num_hidden_layers
        4
    """
    family: Any
    family, kind = classes(model_type)
    options = {} if implementation is None else {"attn_implementation": implementation}
    with quiet(), torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(7)
        model: PreTrainedModel = family._from_config(kind(**shrunk(kind)), **options)
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return nn.Module.train(model, mode=False)


def classes(model_type: str) -> tuple[type[PreTrainedModel], type[PreTrainedConfig]]:
    """The model class of a type, and the class of the config that it is made from."""
    kind: type[PreTrainedConfig] = CONFIG_MAPPING[model_type]
    found: Any = MODEL_FOR_CAUSAL_LM_MAPPING[kind]
    family = found[0] if isinstance(found, tuple) else found
    if family.config_class in kind.sub_configs.values():  # the language part of a larger model
        return family, family.config_class
    return family, kind


def padded() -> list[dict[str, Tensor]]:
    """Two sequences of different length as batches, padded on the left, then on the right."""
    random = torch.Generator().manual_seed(3)
    ids = torch.randint(1, SPECIAL, (2, LENGTHS[0]), generator=random)
    present = torch.arange(LENGTHS[0]) < torch.tensor(LENGTHS)[:, None]
    return [
        {"input_ids": ids * mask, "attention_mask": mask.long()}
        for mask in (present.flip(1), present)
    ]


def references(model: PreTrainedModel, inputs: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    """What an untapped eager model reports as its attentions, and what its kernel mixes with.

    Returns:
        Two lists of (batch, head, query, key), in the order of the layers; the second is empty for
        attention code without an `eager_attention_forward`.
    """
    with _mixing(model) as mixed:
        output = model(**inputs, output_attentions=True)
    return [a for a in output.attentions or () if isinstance(a, Tensor)], mixed


@contextmanager
def _mixing(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """The patterns of a model's eager kernels: what they return when values are unit vectors."""
    patterns: list[Tensor] = []

    def listening(own: Callable[..., Any]) -> Callable[..., Any]:
        def kernel(
            module: Any, query: Tensor, key: Tensor, value: Tensor, *a: Any, **k: Any
        ) -> Any:
            unit = torch.eye(key.shape[2]).expand(*value.shape[:3], -1)
            patterns.append(own(module, query, key, unit, *a, **k)[0].transpose(1, 2))
            return own(module, query, key, value, *a, **k)

        return kernel

    name = "eager_attention_forward"
    files = {
        id(f): f for f in (inspect.unwrap(type(m).forward).__globals__ for m in model.modules())
    }
    own = [(names, names[name]) for names in files.values() if name in names]
    for names, kernel in own:
        names[name] = listening(kernel)
    try:
        yield patterns
    finally:
        for names, kernel in own:
            names[name] = kernel


@contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings and logs of models that are built and run in unusual sizes."""
    level = logging.get_verbosity()
    logging.set_verbosity(_CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)


def _is_auto(spec: Any) -> bool:
    """Whether a sub-config is named by its model type and not by its class."""
    return not issubclass(spec.config_class, PreTrainedConfig)


def _merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Two sets of arguments, the new ones over the old, and sub-configs one by one."""
    inner = {k for k in old.keys() & new if isinstance(old[k], dict) and isinstance(new[k], dict)}
    return old | new | {name: _merged(old[name], new[name]) for name in inner}
