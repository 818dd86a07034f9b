"""Models whose attention is code of their own: those of transformers, and hand-written ones."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    CodeGenConfig,
    FalconConfig,
    GPT2Config,
    GPTJConfig,
    GPTNeoConfig,
    MptConfig,
    OpenAIGPTConfig,
    PreTrainedModel,
)

N_LAYERS, N_HEADS, WIDTH, VOCABULARY, CONTEXT = 2, 4, 32, 64, 40
WINDOW = 5

_FALCON: dict[str, Any] = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4}
_GPT: dict[str, Any] = {"n_embd": WIDTH, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT}

# name -> (config class, its arguments, the implementations that it has)
FAMILIES: dict[str, tuple[Any, dict[str, Any], tuple[str, ...]]] = {
    "bloom": (BloomConfig, {"hidden_size": WIDTH, "n_layer": 2, "n_head": 4}, ("eager",)),
    "gpt_neo": (
        GPTNeoConfig,
        {
            "hidden_size": WIDTH,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "window_size": WINDOW,
            "max_position_embeddings": CONTEXT,
        },
        ("eager",),
    ),
    "gptj": (GPTJConfig, _GPT | {"rotary_dim": 4}, ("eager",)),
    "codegen": (CodeGenConfig, _GPT | {"rotary_dim": 4}, ("eager",)),
    "mpt": (MptConfig, {"d_model": WIDTH, "n_layers": 2, "n_heads": 4}, ("eager",)),
    "openai": (OpenAIGPTConfig, _GPT, ("eager",)),
    "gpt2 that upcasts": (GPT2Config, _GPT | {"reorder_and_upcast_attn": True}, ("eager",)),
    "falcon": (
        FalconConfig,
        _FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2},
        ("eager", "sdpa"),
    ),
    "falcon, multi-query": (FalconConfig, _FALCON, ("eager", "sdpa")),
    "falcon with alibi": (FalconConfig, _FALCON | {"alibi": True}, ("eager",)),
}
CASES = [(name, kernel) for name, (_, _, kernels) in FAMILIES.items() for kernel in kernels]


def own(name: str, kernel: str = "eager", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A random model of transformers; the same name always has the same weights."""
    kind, arguments, _ = FAMILIES[name]
    tokens = {"bos_token_id": 0, "eos_token_id": None, "pad_token_id": 0}
    config = kind(vocab_size=VOCABULARY, initializer_range=0.2, **tokens, **arguments)
    with torch.random.fork_rng():
        torch.manual_seed(7)
        make: Callable[..., PreTrainedModel] = AutoModelForCausalLM.from_config
        model = make(config, attn_implementation=kernel)
    if name == "openai":  # whose weights ignore the range
        for weight in model.parameters():
            weight.data *= 5
    nn.Module.to(model, dtype)
    model.train(mode=False)
    return model


class MultiHeadAttention(nn.Module):
    """As in a widely read book on writing a GPT."""

    mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.head_dimension = N_HEADS, WIDTH // N_HEADS
        self.W_query = nn.Linear(WIDTH, WIDTH, bias=False)
        self.W_key = nn.Linear(WIDTH, WIDTH, bias=False)
        self.W_value = nn.Linear(WIDTH, WIDTH, bias=False)
        self.out_projection = nn.Linear(WIDTH, WIDTH)
        self.dropout = nn.Dropout(0.1)
        future = torch.triu(torch.ones(CONTEXT, CONTEXT), diagonal=1).bool()
        self.register_buffer("mask", future)

    def heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.num_heads, self.head_dimension).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[1]
        queries, keys = self.heads(self.W_query(x)), self.heads(self.W_key(x))
        values = self.heads(self.W_value(x))
        scores = queries @ keys.transpose(2, 3)
        scores.masked_fill_(self.mask[:n, :n], -torch.inf)
        weights = self.dropout(torch.softmax(scores / self.head_dimension**0.5, dim=-1))
        z = (weights @ values).transpose(1, 2).contiguous().view(x.shape)
        projected: Tensor = self.out_projection(z)
        return projected


class FusedAttention(nn.Module):
    """As in nanoGPT: one matrix for q, k and v, and PyTorch's own kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.c_attn = nn.Linear(WIDTH, 3 * WIDTH)
        self.c_proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.c_attn(x).split(WIDTH, dim=2)
        q, k, v = (part.view(*x.shape[:2], N_HEADS, -1).transpose(1, 2) for part in parts)
        dropout = 0.1 if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        projected: Tensor = self.c_proj(y.transpose(1, 2).contiguous().view(x.shape))
        return projected


class Block(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention = attention
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 48), nn.GELU(), nn.Linear(48, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        mixed: Tensor = x + self.mlp(self.norm2(x))
        return mixed


class Body(nn.Module):
    """A GPT without a forward."""

    def __init__(self, attention: Callable[[], nn.Module] = MultiHeadAttention) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.position_embedding = nn.Embedding(CONTEXT, WIDTH)
        self.transformer_blocks = nn.ModuleList(Block(attention()) for _ in range(N_LAYERS))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def logits(self, idx: Tensor) -> Tensor:
        x = self.token_embedding(idx)
        x = x + self.position_embedding(torch.arange(idx.shape[1], device=idx.device))
        for block in self.transformer_blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


class GPT(Body):
    """One whose forward takes token ids alone and returns logits."""

    def forward(self, idx: Tensor) -> Any:
        return self.logits(idx)


class NanoGPT(Body):
    """One that returns (logits, loss), and whose attention is fused."""

    def __init__(self) -> None:
        super().__init__(FusedAttention)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        logits = self.logits(idx)
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    @torch.no_grad()
    def generate(self, idx: Tensor, max_new_tokens: int) -> Tensor:
        for _ in range(max_new_tokens):
            idx = torch.cat([idx, self(idx)[0][:, -1].argmax(-1, keepdim=True)], dim=1)
        return idx


def hand_written(kind: Callable[[], nn.Module] = GPT) -> Any:
    """A random hand-written model with sharp attention, in eval mode."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = kind()
        for name, weight in model.named_parameters():
            if "attention" in name and weight.ndim == 2:
                nn.init.normal_(weight, std=2 / math.sqrt(WIDTH))
    model.train(mode=False)
    return model


def by_hand(model: Any, ids: Tensor) -> list[dict[str, Tensor]]:
    """What a hook on each attention module recomputes from its input: scores, pattern, z."""
    out: list[dict[str, Tensor]] = []

    def hook(module: MultiHeadAttention, args: tuple[Tensor], _: Tensor) -> None:
        x = args[0]
        queries, keys = module.heads(module.W_query(x)), module.heads(module.W_key(x))
        mask = module.mask[: x.shape[1], : x.shape[1]]
        scores = (queries @ keys.transpose(-2, -1)).masked_fill(mask, -torch.inf)
        scores = scores / module.head_dimension**0.5
        pattern = torch.softmax(scores, dim=-1)
        z = (pattern @ module.heads(module.W_value(x))).transpose(1, 2)
        out.append({"scores": scores, "pattern": pattern, "z": z})

    handles = [b.attention.register_forward_hook(hook) for b in model.transformer_blocks]
    model(ids)
    for handle in handles:
        handle.remove()
    return out


class Numbers:
    """A tokenizer of texts of numbers."""

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [int(word) for word in text.split()]}

    def decode(self, ids: list[int]) -> str:
        return "".join(f" {i}" for i in ids)
