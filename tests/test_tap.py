"""The tap against eager copies of the same model, in five families."""

import copy
import pickle
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast

import pytest
import torch
from nnsight import NNsight
from nnsight.intervention.interleaver import OutOfOrderError
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    BloomConfig,
    BloomForCausalLM,
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    StaticCache,
)
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

import probe.interface
import probe.tap
from probe.attention import AttentionCall
from probe.envoys import AttentionEnvoy, LazyEnvoy, RootEnvoy
from probe.errors import UnsupportedModelError, WiringError
from probe.tap import Tap, run

Tiny = Callable[..., PreTrainedModel]
Seen = dict[str, list[Any]]

LENGTHS = (11, 7)
WINDOW = 5
PADDINGS = ("no", "left", "right")
KERNELS = ("sdpa", "eager")


def batch_of(family: str, padding: str) -> dict[str, Tensor]:
    """Two sequences, as a careful user would give them."""
    random = torch.Generator().manual_seed(3)
    ids = torch.randint(1, 64, (2, LENGTHS[0]), generator=random)
    if padding == "no":
        return {"input_ids": ids}
    mask = torch.ones_like(ids)
    where = slice(0, LENGTHS[0] - LENGTHS[1]) if padding == "left" else slice(LENGTHS[1], None)
    ids[1, where] = 0
    mask[1, where] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    if family == "gpt2":
        batch["position_ids"] = (mask.cumsum(-1) - 1).clamp_min(0)
    return batch


def allowed(model: Any, layer: int, batch: Mapping[str, Tensor]) -> Tensor:
    """What a layer may attend to, from its config alone: (batch, query, key)."""
    n = LENGTHS[0]
    behind = torch.arange(n)[:, None] - torch.arange(n)
    keep = (behind >= 0)[None].repeat(2, 1, 1)
    kind = model.config.model_type
    if kind == "mistral" or (kind.startswith("qwen") and layer >= 1):
        keep &= behind < WINDOW
    if "attention_mask" in batch:
        keep &= batch["attention_mask"].bool()[:, None]
    return keep


def real_rows(batch: Mapping[str, Tensor]) -> Tensor:
    """(batch, query)."""
    return batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()


def projections(model: Any) -> list[nn.Module]:
    """The output projection of each layer."""
    if model.config.model_type == "gpt2":
        return [layer.attn.c_proj for layer in model.transformer.h]
    return [layer.self_attn.o_proj for layer in model.model.layers]


def watch(tap: Tap, batch: Mapping[str, Any], *sites: str) -> tuple[Any, Seen]:
    """(output, site -> one value per layer) of one traced forward."""
    seen: Seen = {site: [] for site in sites}

    def visit(layer: int, envoy: AttentionEnvoy) -> None:
        assert layer == len(seen[sites[0]])
        for site in sites:
            seen[site].append(getattr(envoy, site))

    output = run(tap, visit, batch, layers=tuple(tap.layers))
    return output, seen


def edited(
    tap: Tap, batch: Mapping[str, Any], visit: Callable[[int, AttentionEnvoy], None]
) -> Tensor:
    logits = run(tap, visit, batch, layers=tuple(tap.layers)).logits
    assert isinstance(logits, Tensor)
    return logits


@pytest.fixture
def tapped(tiny: Tiny) -> Iterator[Callable[..., Tap]]:
    """Taps that are closed whatever happens."""
    taps: list[Tap] = []

    def make(*args: Any, **kwargs: Any) -> Tap:
        taps.append(Tap(tiny(*args, **kwargs)))
        return taps[-1]

    yield make
    for tap in taps:
        tap.close()


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


# ---------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_patterns_are_those_of_an_eager_copy(
    family: str, kernel: str, padding: str, tiny: Tiny, tapped: Callable[..., Tap]
) -> None:
    batch = batch_of(family, padding)
    wanted = tiny(family, "eager")(**batch, output_attentions=True).attentions
    _, seen = watch(tapped(family, kernel), batch, "pattern")
    rows = real_rows(batch)[:, None, :, None]
    for layer, (got, want) in enumerate(zip(seen["pattern"], wanted, strict=True)):
        assert got.dtype == torch.float32
        # after the first layer sdpa hands on other last bits than eager does
        tolerance = 3e-6 if kernel == "sdpa" and layer > 0 else 1e-6
        torch.testing.assert_close(got * rows, want * rows, atol=tolerance, rtol=0)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_patterns_of_a_bfloat16_model_differ_from_an_eager_copy_by_its_rounding_alone(
    family: str, kernel: str, padding: str, tiny: Tiny, tapped: Callable[..., Tap]
) -> None:
    # Eager rounds scores to 8 bits (in the product, the factor and the mask) and the pattern once
    # more; d pattern <= d score / 2. Under sdpa later layers also start from other roundings.
    batch = batch_of(family, padding)
    wanted = tiny(family, "eager", torch.bfloat16)(**batch, output_attentions=True).attentions
    _, seen = watch(tapped(family, kernel, torch.bfloat16), batch, "scores", "pattern")
    rows = real_rows(batch)[:, None, :, None]
    unit = 2.0**-9
    for layer, want in enumerate(wanted):
        scores, got = seen["scores"][layer], seen["pattern"][layer]
        assert got.dtype == torch.float32
        size = scores.masked_fill(scores == -torch.inf, 0).abs().max()
        tolerance = 3 * unit * float(size) / 2 * 2 + unit
        if kernel == "sdpa" and layer > 0:
            tolerance *= 3
        torch.testing.assert_close(got * rows, want.float() * rows, atol=tolerance, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_scores_are_minus_infinity_exactly_where_nothing_is_attended(
    family: str, kernel: str, padding: str, dtype: torch.dtype, tapped: Callable[..., Tap]
) -> None:
    batch = batch_of(family, padding)
    tap = tapped(family, kernel, dtype)
    _, seen = watch(tap, batch, "scores", "pattern")
    rows = real_rows(batch)
    for layer in tap.layers:
        scores, pattern = seen["scores"][layer], seen["pattern"][layer]
        keep = allowed(tap.module, layer, batch)[:, None].expand_as(scores)
        for b in range(2):
            finite = scores[b, :, rows[b]] > -torch.inf
            assert torch.equal(finite, keep[b, :, rows[b]])
            torch.testing.assert_close(
                scores[b, :, rows[b]].softmax(-1), pattern[b, :, rows[b]], atol=1e-7, rtol=1e-6
            )
        assert bool((scores[scores > -torch.inf].abs() < 1e4).all())
        assert torch.equal(scores == -torch.inf, pattern == 0)
        if padding == "left":  # a row before the text sees nothing
            assert bool((pattern[1, :, : LENGTHS[0] - LENGTHS[1]] == 0).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_logits_are_the_same_bits_with_and_without_the_tap_and_inside_a_trace(
    family: str, kernel: str, padding: str, dtype: torch.dtype, tiny: Tiny
) -> None:
    batch = batch_of(family, padding)
    model = tiny(family, kernel, dtype)
    wanted = model(**batch).logits
    tap = Tap(model)
    assert torch.equal(model(**batch).logits, wanted)
    output, _ = watch(tap, batch, "call", "scores", "pattern", "z")
    assert torch.equal(output.logits, wanted)
    for site in ("call", "scores", "pattern", "z"):
        assert torch.equal(watch(tap, batch, site)[0].logits, wanted)
    assert torch.equal(model(**batch).logits, wanted)
    tap.close()
    assert torch.equal(model(**batch).logits, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_z_is_what_goes_into_the_output_projection(
    family: str, kernel: str, dtype: torch.dtype, tiny: Tiny, tapped: Callable[..., Tap]
) -> None:
    batch = batch_of(family, "left")
    untouched = tiny(family, kernel, dtype)
    inputs: list[Tensor] = []
    for module in projections(untouched):
        module.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    untouched(**batch)
    _, seen = watch(tapped(family, kernel, dtype), batch, "z")
    for got, want in zip(seen["z"], inputs, strict=True):
        assert got.shape == (2, LENGTHS[0], 4, 8)
        assert torch.equal(got.flatten(2), want)


def test_calls_hold_the_keys_unrepeated_and_the_layer(
    family: str, tapped: Callable[..., Tap]
) -> None:
    tap = tapped(family)
    _, seen = watch(tap, batch_of(family, "right"), "call")
    kv = 4 if family == "gpt2" else 2
    assert [call.layer for call in seen["call"]] == [0, 1, 2]
    assert {call.key.shape for call in seen["call"]} == {(2, kv, LENGTHS[0], 8)}
    assert {call.query.shape for call in seen["call"]} == {(2, 4, LENGTHS[0], 8)}
    assert (tap.n_heads, tap.n_kv_heads, tap.causal) == (4, kv, True)
    assert list(tap.layers) == [0, 1, 2]


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_sequence_alone_reads_as_it_does_in_a_padded_batch(
    family: str, kernel: str, padding: str, tapped: Callable[..., Tap]
) -> None:
    batch = batch_of(family, padding)
    tap = tapped(family, kernel)
    rows = real_rows(batch)[1]
    _, together = watch(tap, batch, "scores", "pattern", "z")
    _, alone = watch(tap, {"input_ids": batch["input_ids"][1:, rows]}, "scores", "pattern", "z")
    for layer in tap.layers:
        for site in ("scores", "pattern"):
            got = together[site][layer][1][:, rows][:, :, rows]
            torch.testing.assert_close(got, alone[site][layer][0], atol=5e-6, rtol=1e-5)
            rest = together[site][layer][1][:, rows][:, :, ~rows]
            assert bool((rest == (0 if site == "pattern" else -torch.inf)).all())
        z = together["z"][layer][1, rows]
        torch.testing.assert_close(z, alone["z"][layer][0], atol=5e-6, rtol=1e-5)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_single_token_can_be_read(family: str, kernel: str, tapped: Callable[..., Tap]) -> None:
    tap = tapped(family, kernel)
    _, seen = watch(tap, {"input_ids": torch.tensor([[5]])}, "scores", "pattern")
    assert all(torch.equal(p, torch.ones(1, 4, 1, 1)) for p in seen["pattern"])


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_mask_that_the_user_made_is_read_as_the_model_uses_it(
    family: str, kernel: str, tiny: Tiny, tapped: Callable[..., Tap]
) -> None:
    ids = batch_of(family, "no")["input_ids"]
    bias = torch.zeros(2, 1, 11, 11).masked_fill(
        torch.ones(11, 11).triu(1).bool(), torch.finfo(torch.float32).min
    )
    bias[0, 0, 4:, 2] = torch.finfo(torch.float32).min
    bias[1, 0, :, 0] = -1.5
    batch = {"input_ids": ids, "attention_mask": bias}
    wanted = tiny(family, "eager")(**batch, output_attentions=True).attentions
    _, seen = watch(tapped(family, kernel), batch, "pattern")
    for got, want in zip(seen["pattern"], wanted, strict=True):
        torch.testing.assert_close(got, want, atol=1e-6, rtol=0)


@pytest.mark.parametrize("order", [("pattern", "scores"), ("z", "pattern"), ("scores", "call")])
def test_sites_are_read_in_the_order_in_which_they_happen(
    order: tuple[str, str], tapped: Callable[..., Tap]
) -> None:
    tap = tapped("llama")
    batch = batch_of("llama", "no")
    with pytest.raises(OutOfOrderError):
        watch(tap, batch, *order)
    watch(tap, batch, *reversed(order))  # the model can be used on


def test_a_layer_before_the_last_one_read_is_refused(tapped: Callable[..., Tap]) -> None:
    tap = tapped("llama")
    with pytest.raises(OutOfOrderError):
        run(tap, lambda _, envoy: envoy.pattern, batch_of("llama", "no"), layers=(2, 0))


def test_sites_can_be_read_in_a_trace_of_the_users_own(tapped: Callable[..., Tap]) -> None:
    tap = tapped("llama")
    batch = batch_of("llama", "no")
    seen: list[Tensor] = []
    with tap.envoy.trace(**batch):
        seen.append(tap.envoy.model.layers[0].self_attn.pattern)
        seen.append(tap.envoy.model.layers[0].mlp.output)  # not wrapped before
        seen.append(tap.envoy.model.layers[2].self_attn.z)
    _, wanted = watch(tap, batch, "pattern", "z")
    assert torch.equal(seen[0], wanted["pattern"][0])
    assert seen[1].shape == (2, 11, 32)
    assert torch.equal(seen[2], wanted["z"][2])


def test_gradients_of_patterns_are_those_of_an_eager_copy(
    family: str, tiny: Tiny, tapped: Callable[..., Tap]
) -> None:
    batch = batch_of(family, "right")
    with torch.enable_grad():
        eager = tiny(family, "eager")
        attentions = eager(**batch, output_attentions=True).attentions
        rows = real_rows(batch)[:, None, :, None]
        sum((a * rows).square().sum() for a in attentions).backward()
        tap = tapped(family)
        output, seen = watch(tap, batch, "pattern")
        loss = sum((p * rows).square().sum() for p in seen["pattern"]) + 0 * output.logits.sum()
        loss.backward()
    for (name, got), want in zip(tap.module.named_parameters(), eager.parameters(), strict=True):
        if want.grad is not None:
            torch.testing.assert_close(got.grad, want.grad, atol=1e-5, rtol=1e-4, msg=name)


def test_reading_works_in_inference_mode_and_leaves_the_logits(
    family: str, tapped: Callable[..., Tap]
) -> None:
    tap = tapped(family)
    batch = batch_of(family, "left")
    wanted = tap.module(**batch).logits
    with torch.inference_mode():
        output, seen = watch(tap, batch, "pattern", "z")
    torch.testing.assert_close(output.logits, wanted, atol=1e-5, rtol=1e-5)
    _, outside = watch(tap, batch, "pattern")
    for got, want in zip(seen["pattern"], outside["pattern"], strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # its name changes in transformers 6
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_under_checkpointing_are_right_or_refused_but_never_silently_wrong(
    reentrant: bool, tapped: Callable[..., Tap]
) -> None:
    batch = batch_of("llama", "no")

    def gradient(tap: Tap) -> Tensor:
        with torch.enable_grad():
            output, seen = watch(tap, batch, "pattern")
            loss = sum(p.square().sum() for p in seen["pattern"]) + output.logits.square().mean()
            loss.backward()
        grad = tap.module.get_parameter("model.layers.0.self_attn.q_proj.weight").grad
        assert isinstance(grad, Tensor)
        return grad

    wanted = gradient(tapped("llama"))
    tap = tapped("llama")
    module: Any = tap.module
    module.train()
    module.gradient_checkpointing_enable({"use_reentrant": reentrant})
    module.enable_input_require_grads()
    try:
        got = gradient(tap)
    except Exception:  # loud is right
        return
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kernel", KERNELS)
def test_dropout_in_training_is_the_models_own_and_not_in_the_pattern(
    kernel: str, tapped: Callable[..., Tap]
) -> None:
    tap = tapped("gpt2", kernel)
    tap.module.train()
    batch = batch_of("gpt2", "no")
    torch.manual_seed(1)
    wanted = tap.module(**batch).logits
    torch.manual_seed(1)
    output, seen = watch(tap, batch, "call", "scores", "pattern")
    assert torch.equal(output.logits, wanted)
    for call, pattern in zip(seen["call"], seen["pattern"], strict=True):
        assert call.dropout == 0.1
        torch.testing.assert_close(pattern.sum(-1), torch.ones(2, 4, 11))


def test_an_eager_gpt2_that_upcasts_keeps_its_bits() -> None:
    config = GPT2Config(
        vocab_size=64,
        n_embd=32,
        n_layer=2,
        n_head=4,
        initializer_range=0.2,
        reorder_and_upcast_attn=True,
    )
    config._attn_implementation = "eager"
    model = GPT2LMHeadModel(config)
    nn.Module.to(model, torch.bfloat16)
    model.train(mode=False)
    batch = batch_of("gpt2", "no")
    wanted = model(**batch).logits
    try:
        tap = Tap(model)
    except UnsupportedModelError:
        assert torch.equal(model(**batch).logits, wanted)
        return
    assert torch.equal(watch(tap, batch, "pattern")[0].logits, wanted)
    tap.close()


@pytest.mark.parametrize("kernel", KERNELS)
def test_asking_transformers_for_attentions_gives_what_it_gives_without_the_tap(
    family: str, kernel: str, tiny: Tiny, tapped: Callable[..., Tap]
) -> None:
    batch = batch_of(family, "right")
    wanted = tiny(family, kernel)(**batch, output_attentions=True).attentions
    got = tapped(family, kernel).module(**batch, output_attentions=True).attentions
    assert len(got) == len(wanted)
    for a, b in zip(got, wanted, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)


def others() -> dict[str, PreTrainedModel]:
    """Models with a softcap and with sinks."""
    shape: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "sliding_window": WINDOW,
        "initializer_range": 0.2,
    }
    torch.manual_seed(0)
    gemma = Gemma2Config(**shape, attn_logit_softcapping=2.0, query_pre_attn_scalar=5)
    oss = GptOssConfig(**shape, num_local_experts=2, num_experts_per_tok=1)
    return {"gemma2": Gemma2ForCausalLM(gemma), "gpt_oss": GptOssForCausalLM(oss)}


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss"])
@pytest.mark.parametrize("padding", PADDINGS)
def test_softcaps_and_sinks_are_read_as_the_model_uses_them(name: str, padding: str) -> None:
    model = others()[name]
    model.train(mode=False)
    model.set_attn_implementation("eager")
    batch = batch_of("llama", padding)
    plain = model(**batch, output_attentions=True)
    tap = Tap(model)
    output, seen = watch(tap, batch, "call", "pattern")
    assert torch.equal(output.logits, plain.logits)
    rows = real_rows(batch)[:, None, :, None]
    for call, got, want in zip(seen["call"], seen["pattern"], plain.attentions, strict=True):
        assert (call.softcap, call.sinks is None) == (
            (2.0, True) if name == "gemma2" else (None, False)
        )
        torch.testing.assert_close(got * rows, want[..., :11] * rows, atol=1e-6, rtol=0)
    tap.close()


# -------------------------------------------------------------------------------- generation


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("cache", ["static", "dynamic"])
def test_a_prefill_in_two_pieces_into_a_cache_is_read_like_an_eager_copy(
    family: str, kernel: str, cache: str, tiny: Tiny, tapped: Callable[..., Tap]
) -> None:
    ids = batch_of(family, "no")["input_ids"]

    def pieces(model: PreTrainedModel, forward: Callable[..., Any]) -> list[Any]:
        options: dict[str, Any] = {"config": model.config}
        store = (
            StaticCache(**options, max_cache_len=16)
            if cache == "static"
            else DynamicCache(**options)
        )
        return [
            forward({"input_ids": part, "past_key_values": store, "use_cache": True})
            for part in (ids[:, :4], ids[:, 4:10], ids[:, 10:])
        ]

    eager, tap = tiny(family, "eager"), tapped(family, kernel)
    assert isinstance(tap.module, PreTrainedModel)
    wanted = pieces(eager, lambda batch: eager(**batch, output_attentions=True).attentions)
    got = pieces(tap.module, lambda batch: watch(tap, batch, "pattern")[1]["pattern"])
    for a, b in zip(got, wanted, strict=True):
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(x, y, atol=3e-6, rtol=0)


def test_one_step_of_generate_can_be_read_alone(tapped: Callable[..., Tap]) -> None:
    tap = tapped("llama")
    batch = batch_of("llama", "no")
    seen: list[Tensor] = []
    with tap.envoy.trace(fn="generate", **batch, max_new_tokens=4, do_sample=False) as tracer:
        for _ in tracer.iter[2]:
            seen.append(tap.layers[1].pattern)
    assert [tuple(p.shape) for p in seen] == [(2, 4, 1, 13)]


def test_a_pattern_edited_in_every_step_changes_what_is_generated_like_attention_by_hand(
    family: str, tiny: Tiny, tapped: Callable[..., Tap]
) -> None:
    batch = batch_of(family, "no")
    tap, steps = tapped(family), {"max_new_tokens": 4, "do_sample": False}
    box: dict[str, Any] = {}

    def generate(**kwargs: Any) -> Any:
        box["out"] = cast(Any, tap.module).generate(
            **kwargs, return_dict_in_generate=True, output_logits=True
        )
        return box["out"]

    def first(layer: int, p: Tensor) -> Tensor:
        return p * (0.5 + layer)

    with tap.envoy.trace(fn=generate, **batch, **steps) as tracer:
        for _ in tracer.iter[:4]:
            for layer, envoy in tap.layers.items():
                envoy.pattern = first(layer, envoy.pattern)
    model = tiny(family, "eager")
    Reference(pattern=first).logits(model, batch)  # leaves it registered
    wanted = cast(Any, model).generate(
        **batch, **steps, return_dict_in_generate=True, output_logits=True
    )
    for a, b in zip(box["out"].logits, wanted.logits, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kernel", KERNELS)
def test_each_step_of_generate_reads_as_in_an_eager_copy(
    family: str, kernel: str, tiny: Tiny, tapped: Callable[..., Tap]
) -> None:
    ids = batch_of(family, "left")["input_ids"]
    batch = {"input_ids": ids, "attention_mask": batch_of(family, "left")["attention_mask"]}
    steps = {"max_new_tokens": 4, "do_sample": False}
    wanted = cast(Any, tiny(family, "eager")).generate(
        **batch, **steps, output_attentions=True, return_dict_in_generate=True
    )
    tap = tapped(family, kernel)
    seen: list[list[Tensor]] = []
    box: dict[str, Tensor] = {}

    def generate(**kwargs: Any) -> Tensor:
        box["ids"] = cast(Any, tap.module).generate(**kwargs)
        return box["ids"]

    with tap.envoy.trace(fn=generate, **batch, **steps) as tracer:
        for _ in tracer.iter[:4]:
            seen.append([envoy.pattern for envoy in tap.layers.values()])
    assert torch.equal(box["ids"], wanted.sequences)
    assert len(seen) == len(wanted.attentions) == 4
    for step, (got, want) in enumerate(zip(seen, wanted.attentions, strict=True)):
        rows = real_rows(batch)[:, None, :, None] if step == 0 else torch.ones(2, 1, 1, 1)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a * rows, b * rows, atol=2e-6, rtol=0)


def test_generate_can_be_traced_by_its_name(tiny: Tiny, tapped: Callable[..., Tap]) -> None:
    tap = tapped("llama")
    batch = batch_of("llama", "no")
    shapes = []
    with tap.envoy.trace(fn="generate", **batch, max_new_tokens=3, do_sample=False) as tracer:
        for _ in tracer.iter[:3]:
            shapes.append(tap.layers[1].pattern.shape)
    assert [tuple(shape) for shape in shapes] == [(2, 4, 11, 11), (2, 4, 1, 12), (2, 4, 1, 13)]


# ----------------------------------------------------------------------------------- editing


@dataclass
class Reference:
    """Attention by hand, registered with transformers, with room for an edit in each place."""

    scores: Callable[[int, Tensor], Tensor] = lambda _, s: s
    hidden: Callable[[int, Tensor], Tensor] = lambda _, hidden: hidden
    pattern: Callable[[int, Tensor], Tensor] = lambda _, p: p
    z: Callable[[int, Tensor], Tensor] = lambda _, z: z
    layers: list[int] = field(default_factory=list)

    def forward(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor,
        *,
        scaling: float,
        **_: Any,
    ) -> tuple[Tensor, Tensor]:
        layer = module.layer_idx
        assert isinstance(layer, int)
        self.layers.append(layer)
        share = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(share, dim=1) for x in (key, value))
        hidden = self.hidden(layer, (attention_mask < -1e30).expand(-1, 4, -1, -1).clone())
        s = self.scores(layer, query @ key.transpose(-1, -2) * scaling)
        p = s.masked_fill(hidden, -torch.inf).softmax(-1).nan_to_num(0.0)
        p = self.pattern(layer, p)
        return self.z(layer, (p @ value).transpose(1, 2).contiguous()), p

    def logits(self, model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Tensor:
        AttentionInterface.register("test-by-hand", self.forward)
        AttentionMaskInterface.register("test-by-hand", ALL_MASK_ATTENTION_FUNCTIONS["eager"])
        model.set_attn_implementation("test-by-hand")
        logits = model(**batch).logits
        assert self.layers == [0, 1, 2]
        assert isinstance(logits, Tensor)
        return logits


def halve(layer: int, p: Tensor) -> Tensor:
    """A pattern that no softmax would give, different in each head and row."""
    factor = torch.linspace(0.5, 1.5, p.shape[1]).view(1, -1, 1, 1) + layer
    return p * factor * torch.linspace(1, 2, p.shape[-1])


def tilt(layer: int, s: Tensor) -> Tensor:
    return s * (0.5 + layer) + torch.linspace(-1, 1, s.shape[-1])


def knock(_: int, hidden: Tensor) -> Tensor:
    """One edge of one head, for a row that keeps others."""
    hidden[:, 1, 9:, 8] = True
    return hidden


def scale_z(layer: int, z: Tensor) -> Tensor:
    return z * torch.linspace(0, 1 + layer, z.shape[2]).view(1, 1, -1, 1)


def assign_pattern(layer: int, attn: AttentionEnvoy) -> None:
    attn.pattern = halve(layer, attn.pattern)


def overwrite_pattern(layer: int, attn: AttentionEnvoy) -> None:
    p = attn.pattern
    p[:] = halve(layer, p)


def assign_scores(layer: int, attn: AttentionEnvoy) -> None:
    attn.scores = tilt(layer, attn.scores)


def overwrite_scores(layer: int, attn: AttentionEnvoy) -> None:
    s = attn.scores
    s.copy_(tilt(layer, s))


def assign_scores_and_read_on(layer: int, attn: AttentionEnvoy) -> None:
    attn.scores = tilt(layer, attn.scores)
    p = attn.pattern
    assert attn.z.shape[:2] == p.shape[:3:2]


def assign_both(layer: int, attn: AttentionEnvoy) -> None:
    attn.scores = tilt(layer, attn.scores)
    attn.pattern = halve(layer, attn.pattern)


def assign_mask(layer: int, attn: AttentionEnvoy) -> None:
    call = attn.call
    n = call.n_queries
    keep = call.keep().expand(2, 4, n, n).clone()
    knock(layer, ~keep)
    keep = ~knock(layer, ~keep)
    attn.call = replace(call, mask=torch.zeros(keep.shape).masked_fill(~keep, -1e38 * 3))


def assign_bool_mask(layer: int, attn: AttentionEnvoy) -> None:
    call = attn.call
    n = call.n_queries
    attn.call = replace(call, mask=~knock(layer, ~call.keep().expand(2, 4, n, n).clone()))


def assign_query(layer: int, attn: AttentionEnvoy) -> None:
    attn.call = replace(attn.call, query=attn.call.query * (1.2 + layer / 4))


def assign_value(layer: int, attn: AttentionEnvoy) -> None:
    call = attn.call
    attn.call = replace(call, value=call.value * (1.2 + layer / 4))


def assign_z(layer: int, attn: AttentionEnvoy) -> None:
    attn.z = scale_z(layer, attn.z)


def overwrite_z(layer: int, attn: AttentionEnvoy) -> None:
    z = attn.z
    z.copy_(scale_z(layer, z))


EDITS: dict[str, tuple[Callable[[int, AttentionEnvoy], None], Callable[[], Reference]]] = {
    "pattern": (assign_pattern, lambda: Reference(pattern=halve)),
    "pattern in place": (overwrite_pattern, lambda: Reference(pattern=halve)),
    "scores": (assign_scores, lambda: Reference(scores=tilt)),
    "scores in place": (overwrite_scores, lambda: Reference(scores=tilt)),
    "scores, then reading": (assign_scores_and_read_on, lambda: Reference(scores=tilt)),
    "scores and pattern": (assign_both, lambda: Reference(scores=tilt, pattern=halve)),
    "float mask": (assign_mask, lambda: Reference(hidden=knock)),
    "bool mask": (assign_bool_mask, lambda: Reference(hidden=knock)),
    "query": (assign_query, lambda: Reference(scores=lambda layer, s: s * (1.2 + layer / 4))),
    "value": (assign_value, lambda: Reference(z=lambda layer, z: z * (1.2 + layer / 4))),
    "z": (assign_z, lambda: Reference(z=scale_z)),
    "z in place": (overwrite_z, lambda: Reference(z=scale_z)),
}


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("padding", ["no", "right"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_an_edit_changes_the_logits_as_attention_by_hand_does(
    family: str, kernel: str, padding: str, edit: str, tiny: Tiny, tapped: Callable[..., Tap]
) -> None:
    batch = batch_of(family, padding)
    visit, reference = EDITS[edit]
    tap = tapped(family, kernel)
    plain = tap.module(**batch).logits
    got = edited(tap, batch, visit)
    wanted = reference().logits(tiny(family, "eager"), batch)
    rows = real_rows(batch)
    torch.testing.assert_close(got[rows], wanted[rows], atol=1e-5, rtol=1e-5)
    assert float((got[rows] - plain[rows]).abs().max()) > 1e-2
    assert torch.equal(tap.module(**batch).logits, plain)  # an edit lasts as long as its trace


def test_attention_by_hand_without_an_edit_is_the_model(family: str, tiny: Tiny) -> None:
    batch = batch_of(family, "right")
    got = Reference().logits(tiny(family, "eager"), batch)[real_rows(batch)]
    wanted = tiny(family, "eager")(**batch).logits[real_rows(batch)]
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_pattern_assigned_unchanged_leaves_the_logits(
    family: str, kernel: str, tapped: Callable[..., Tap]
) -> None:
    batch = batch_of(family, "left")
    tap = tapped(family, kernel)

    def same(_: int, attn: AttentionEnvoy) -> None:
        attn.pattern = attn.pattern.clone()

    rows = real_rows(batch)
    wanted = tap.module(**batch).logits[rows]
    torch.testing.assert_close(edited(tap, batch, same)[rows], wanted, atol=1e-5, rtol=1e-5)


def test_a_pattern_is_assigned_without_being_read(family: str, tapped: Callable[..., Tap]) -> None:
    batch = batch_of(family, "no")
    tap = tapped(family)
    eye = torch.eye(LENGTHS[0]).expand(2, 4, -1, -1)

    def blind(_: int, attn: AttentionEnvoy) -> None:
        attn.pattern = eye

    def look(_: int, attn: AttentionEnvoy) -> None:
        attn.pattern = 0 * attn.pattern + eye

    got = edited(tap, batch, blind)
    torch.testing.assert_close(got, edited(tap, batch, look), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kernel", KERNELS)
def test_scores_that_hide_a_whole_row_give_zero_and_never_nan(
    family: str, kernel: str, tapped: Callable[..., Tap]
) -> None:
    tap = tapped(family, kernel)
    seen: list[Tensor] = []

    def blind(_: int, attn: AttentionEnvoy) -> None:
        attn.scores = torch.full_like(attn.scores, -torch.inf)
        seen.append(attn.pattern)

    logits = edited(tap, batch_of(family, "left"), blind)
    assert bool(logits.isfinite().all())
    assert all(bool((p == 0).all()) for p in seen)


def test_edits_in_bfloat16_keep_the_dtype_of_the_model(
    family: str, tapped: Callable[..., Tap]
) -> None:
    batch = batch_of(family, "right")
    tap = tapped(family, "sdpa", torch.bfloat16)
    logits = edited(tap, batch, assign_both)
    assert logits.dtype == torch.bfloat16
    assert bool(logits.isfinite().all())


@pytest.mark.parametrize("change", [{"scaling": 0.05}, {"softcap": 0.5}, {"window": 2}])
def test_a_changed_factor_of_a_call_is_obeyed_or_refused_but_never_dropped(
    change: dict[str, Any], tapped: Callable[..., Tap]
) -> None:
    batch = batch_of("llama", "no")
    tap = tapped("llama")
    plain = tap.module(**batch).logits

    def visit(_: int, attn: AttentionEnvoy) -> None:
        attn.call = replace(attn.call, **change)

    try:
        logits = edited(tap, batch, visit)
    except Exception:
        return
    assert not torch.equal(logits, plain)


# --------------------------------------------------------------------------- leaving no trace


def photograph(module: nn.Module) -> dict[str, dict[str, Any]]:
    return {name: dict(m.__dict__) for name, m in module.named_modules()}


def unchanged(module: nn.Module, before: dict[str, dict[str, Any]]) -> None:
    after = photograph(module)
    assert after.keys() == before.keys()
    for name, state in before.items():
        assert after[name].keys() == state.keys(), name
        for key, value in state.items():
            assert after[name][key] is value, (name, key)


@pytest.mark.parametrize("kernel", KERNELS)
def test_closing_restores_the_model_exactly(family: str, kernel: str, tiny: Tiny) -> None:
    model = tiny(family, kernel)
    before, config = photograph(model), copy.deepcopy(model.config.__dict__)
    keys = list(model.state_dict())
    tap = Tap(model)
    assert model.config._attn_implementation != kernel
    assert list(model.state_dict()) == keys
    watch(tap, batch_of(family, "no"), "pattern")
    str(tap.envoy)
    tap.close()
    unchanged(model, before)
    assert model.config.__dict__ == config
    assert model.config._attn_implementation == kernel
    assert list(model.state_dict()) == keys


def test_closing_twice_and_opening_again_works(tiny: Tiny) -> None:
    model = tiny("llama")
    before = photograph(model)
    for _ in range(2):
        tap = Tap(model)
        watch(tap, batch_of("llama", "no"), "pattern")
        tap.close()
        tap.close()
        unchanged(model, before)


def test_closing_a_tap_again_leaves_a_newer_tap_alone(tiny: Tiny) -> None:
    model = tiny("llama")
    old = Tap(model)
    old.close()
    new = Tap(model)
    old.close()
    _, seen = watch(new, batch_of("llama", "no"), "pattern")
    assert len(seen["pattern"]) == 3
    new.close()


def test_closing_after_an_error_in_a_trace_restores_the_model(family: str, tiny: Tiny) -> None:
    model = tiny(family)
    before = photograph(model)
    batch = batch_of(family, "left")
    wanted = model(**batch).logits
    tap = Tap(model)

    def fail(layer: int, attn: AttentionEnvoy) -> None:
        attn.pattern  # noqa: B018
        if layer == 1:
            raise ZeroDivisionError("on purpose")

    def break_shape(_: int, attn: AttentionEnvoy) -> None:
        attn.pattern = attn.pattern[..., :3]

    with pytest.raises(ZeroDivisionError, match="on purpose"):
        edited(tap, batch, fail)
    with pytest.raises(RuntimeError, match=r"shape|size"):
        edited(tap, batch, break_shape)
    assert torch.equal(watch(tap, batch, "pattern")[0].logits, wanted)
    tap.close()
    unchanged(model, before)
    assert torch.equal(model(**batch).logits, wanted)


def test_a_forward_of_a_modules_own_is_put_back(family: str, tiny: Tiny) -> None:
    model = tiny(family)
    calls: list[int] = []
    for module in (model, *projections(model)):
        inner = module.forward

        def counted(*args: Any, _inner: Any = inner, **kwargs: Any) -> Any:
            calls.append(1)
            return _inner(*args, **kwargs)

        module.forward = counted  # as accelerate and friends do it
    before = photograph(model)
    batch = batch_of(family, "no")
    wanted = model(**batch).logits
    tap = Tap(model)
    calls.clear()
    assert torch.equal(watch(tap, batch, "pattern", "z")[0].logits, wanted)
    assert len(calls) == 4
    tap.close()
    unchanged(model, before)
    calls.clear()
    assert torch.equal(model(**batch).logits, wanted)
    assert len(calls) == 4


def test_a_model_that_nnsight_wraps_already_keeps_its_wrapping(tiny: Tiny) -> None:
    model = tiny("llama")
    mine = NNsight(model)
    batch = batch_of("llama", "no")
    first: list[Any] = []
    with mine.trace(**batch):
        first.append(mine.model.layers[1].mlp.output)
    tap = Tap(model)
    watch(tap, batch, "pattern")
    tap.close()
    second: list[Any] = []
    with mine.trace(**batch):
        second.append(mine.model.layers[1].mlp.output)
    assert torch.equal(first[0], second[0])


def test_training_mode_is_left_as_it_was_module_by_module(family: str, tiny: Tiny) -> None:
    model = tiny(family)
    model.train()
    projections(model)[1].train(mode=False)
    modes = [m.training for m in model.modules()]
    tap = Tap(model)
    assert [m.training for m in model.modules()] == modes
    tap.close()
    assert [m.training for m in model.modules()] == modes


def test_a_closed_model_can_be_copied_and_pickled(family: str, tiny: Tiny) -> None:
    model = tiny(family)
    batch = batch_of(family, "right")
    wanted = model(**batch).logits
    tap = Tap(model)
    watch(tap, batch, "pattern")
    tap.close()
    assert torch.equal(copy.deepcopy(model)(**batch).logits, wanted)
    assert torch.equal(pickle.loads(pickle.dumps(model))(**batch).logits, wanted)


def test_a_tapped_model_can_be_copied_and_pickled_without_its_tap(tiny: Tiny) -> None:
    model = tiny("llama")
    batch = batch_of("llama", "right")
    wanted = model(**batch).logits
    tap = Tap(model)
    assert torch.equal(copy.deepcopy(model)(**batch).logits, wanted)
    assert torch.equal(pickle.loads(pickle.dumps(model))(**batch).logits, wanted)
    tap.close()


def test_a_tapped_model_saves_the_implementation_that_it_came_with(
    tiny: Tiny, tmp_path: Any
) -> None:
    tap = Tap(tiny("llama"))
    assert isinstance(tap.module, PreTrainedModel)
    tap.module.save_pretrained(tmp_path)
    assert "probe-" not in (tmp_path / "config.json").read_text()
    tap.close()


def test_an_idle_tap_builds_no_call(
    family: str, tapped: Callable[..., Tap], monkeypatch: pytest.MonkeyPatch
) -> None:
    tap = tapped(family)
    batch = batch_of(family, "left")
    wanted = watch(tap, batch, "pattern")[0].logits

    def refuse(*_: Any, **__: Any) -> AttentionCall:
        raise AssertionError("a call was built")

    monkeypatch.setattr(probe.interface, "AttentionCall", refuse)
    assert torch.equal(tap.module(**batch).logits, wanted)
    with pytest.raises(AssertionError, match="a call was built"):
        watch(tap, batch, "pattern")


def test_a_trace_computes_only_what_is_asked(
    tapped: Callable[..., Tap], monkeypatch: pytest.MonkeyPatch
) -> None:
    tap = tapped("llama")
    computed: list[tuple[str, int]] = []
    for name in ("scores", "pattern"):
        own = getattr(AttentionCall, name)

        def counted(call: AttentionCall, _own: Any = own, _name: str = name, **kwargs: Any) -> Any:
            computed.append((_name, call.layer))
            return _own(call, **kwargs)

        monkeypatch.setattr(AttentionCall, name, counted)
    batch = batch_of("llama", "no")
    watch(tap, batch, "call", "z")
    assert computed == []
    run(tap, lambda _, envoy: envoy.scores, batch, layers=(1,))
    assert computed == [("scores", 1)]


# ------------------------------------------------------------------------ what cannot be tapped


def test_the_model_receives_its_padding_mask(family: str, tapped: Callable[..., Tap]) -> None:
    for kernel in KERNELS:
        tap = tapped(family, kernel)
        name = cast(Any, tap.module).config._attn_implementation
        assert "sdpa" not in name
        assert "flash" not in name
        assert ALL_MASK_ATTENTION_FUNCTIONS[name] is ALL_MASK_ATTENTION_FUNCTIONS[kernel]
        _, seen = watch(tap, batch_of(family, "right"), "call")
        for call in seen["call"]:
            assert not bool(call.keep().expand(2, 4, 11, 11)[1, :, :, LENGTHS[1] :].any())


def test_a_module_is_not_tapped_twice(tiny: Tiny) -> None:
    model = tiny("llama")
    tap = Tap(model)
    with pytest.raises(
        UnsupportedModelError, match=r"this LlamaForCausalLM is tapped already\. Close the first"
    ):
        Tap(model)
    _, seen = watch(tap, batch_of("llama", "no"), "pattern")
    assert len(seen["pattern"]) == 3
    tap.close()


def test_a_plain_module_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="Linear is not a transformers model"):
        Tap(nn.Linear(2, 2))


def test_a_model_with_attention_code_of_its_own_is_refused_by_name_and_left_alone() -> None:
    config = BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4)
    model = BloomForCausalLM(config)
    model.train(mode=False)
    before = photograph(model)
    ids = torch.arange(8)[None]
    wanted = model(ids).logits
    with pytest.raises(
        UnsupportedModelError, match="BloomForCausalLM has attention code of its own"
    ):
        Tap(model)
    unchanged(model, before)
    assert torch.equal(model(ids).logits, wanted)


def test_a_model_without_attention_is_refused() -> None:
    class Still(LlamaForCausalLM):  # type: ignore[no-untyped-call]
        def forward(self, input_ids: Tensor, **_: Any) -> Tensor:
            return input_ids

    shape: dict[str, Any] = {
        "vocab_size": 8,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
    }
    model = Still(LlamaConfig(**shape, num_attention_heads=1))
    before = photograph(model)
    with pytest.raises(UnsupportedModelError, match="nothing to read"):
        Tap(model)
    unchanged(model, before)


def test_a_model_that_cannot_run_is_refused_with_its_own_error(tiny: Tiny) -> None:
    model = tiny("llama")
    model.lm_head = nn.Linear(3, 3)
    before = photograph(model)
    with pytest.raises(UnsupportedModelError, match=r"a forward of LlamaForCausalLM over 16 token"):
        Tap(model)
    unchanged(model, before)


def test_a_kernel_that_does_something_else_is_a_wiring_error(tiny: Tiny) -> None:
    def odd(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, m: Any, **_: Any) -> Any:
        return 2 * q.transpose(1, 2).contiguous(), None

    AttentionInterface.register("test-odd", odd)
    AttentionMaskInterface.register("test-odd", ALL_MASK_ATTENTION_FUNCTIONS["eager"])
    model = tiny("gpt2")
    model.set_attn_implementation("test-odd")
    before = photograph(model)
    with pytest.raises(WiringError, match="layer 0: "):
        Tap(model)
    unchanged(model, before)
    assert model.config._attn_implementation == "test-odd"


def test_a_kernel_without_a_mask_function_is_refused(tiny: Tiny) -> None:
    AttentionInterface.register("test-bare", lambda *_, **__: None)
    model = tiny("llama")
    model.set_attn_implementation("test-bare")
    with pytest.raises(UnsupportedModelError, match="'test-bare' has no mask function"):
        Tap(model)
    assert model.config._attn_implementation == "test-bare"


@pytest.mark.parametrize("extra", [{"position_bias": torch.zeros(1)}, {"cache": object()}])
def test_arguments_that_change_attention_unseen_are_refused(extra: dict[str, Any]) -> None:
    q = torch.zeros(1, 1, 2, 2)
    with pytest.raises(UnsupportedModelError, match=f"passes '{next(iter(extra))}' to its"):
        probe.interface._call("sdpa", nn.Linear(1, 1), q, q, q, None, extra)


def test_a_mask_that_is_no_tensor_is_refused() -> None:
    q = torch.zeros(1, 1, 2, 2)
    with pytest.raises(UnsupportedModelError, match="Linear under 'flex' gives its kernel a str"):
        probe.interface._call("flex", nn.Linear(1, 1), q, q, q, "block mask", {})


def test_flash_attention_without_a_mask_is_aligned_at_the_bottom_right_with_its_window() -> None:
    q, k = torch.randn(1, 2, 2, 4), torch.randn(1, 2, 5, 4)
    call = probe.interface._call(
        "flash_attention_2", nn.Linear(1, 1), q, k, k, None, {"sliding_window": 3}
    )
    assert call.keep()[0, 0].int().tolist() == [[0, 1, 1, 1, 0], [0, 0, 1, 1, 1]]
    call = probe.interface._call("sdpa", nn.Linear(1, 1), q, k, k, None, {"sliding_window": 3})
    assert call.keep()[0, 0].int().tolist() == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0]]


def test_a_module_or_a_kernel_that_is_not_causal_sees_everything() -> None:
    q = torch.randn(1, 2, 3, 4)
    module = nn.Linear(1, 1)
    call = probe.interface._call("sdpa", module, q, q, q, None, {"is_causal": False})
    assert bool(call.keep().all())
    module.is_causal = False  # type: ignore[assignment]
    assert bool(probe.interface._call("sdpa", module, q, q, q, None, {}).keep().all())
    assert not bool(
        probe.interface._call("sdpa", module, q, q, q, None, {"is_causal": True}).keep().all()
    )
    assert bool(probe.interface._call("eager", nn.Linear(1, 1), q, q, q, None, {}).keep().all())


# ------------------------------------------------------------------------------ the lazy tree


def test_the_lazy_tree_lists_every_module_like_a_plain_one(
    family: str, tiny: Tiny, tapped: Callable[..., Tap]
) -> None:
    plain, lazy = NNsight(tiny(family)), tapped(family).envoy
    assert [path for path, _ in lazy.named_modules()] == [p for p, _ in plain.named_modules()]
    fresh = tapped(family).envoy
    assert [e.path for e in fresh.modules()] == [e.path for e in plain.modules()]
    assert [e.path for e in tapped(family).envoy] == [e.path for e in plain]


def test_the_lazy_tree_is_sliced_and_indexed_like_a_plain_one(
    tiny: Tiny, tapped: Callable[..., Tap]
) -> None:
    plain, lazy = NNsight(tiny("llama")), tapped("llama").envoy
    for cut in (slice(None), slice(1, None), slice(None, None, 2)):
        wanted = [e.path for e in plain.model.layers[cut]]
        assert [e.path for e in lazy.model.layers[cut]] == wanted
    assert lazy.model.layers[-1].path == plain.model.layers[-1].path
    assert len(lazy.model.layers) == 3
    assert lazy.get("model.layers.1.mlp").path == "model.model.layers.1.mlp"
    assert lazy.lm_head.path == "model.lm_head"


def test_the_lazy_tree_prints_like_a_plain_one_with_what_can_be_read(
    tiny: Tiny, tapped: Callable[..., Tap]
) -> None:
    plain, lazy = str(NNsight(tiny("llama"))), str(tapped("llama").envoy)
    for name in ("embed_tokens", "self_attn", "q_proj", "mlp", "input_layernorm", "lm_head"):
        assert name in lazy
        assert lazy.count(f"({name})") == plain.count(f"({name})")
    for line in ("what the kernel is given", "before softmax", "after softmax"):
        assert line in lazy


def test_the_lazy_tree_keeps_the_order_of_the_model_whatever_is_touched_first(tiny: Tiny) -> None:
    # as in a hybrid model, where only some layers have attention
    tree = RootEnvoy(tiny("llama"), envoys={nn.Module: LazyEnvoy})
    tree.model.layers[2].mlp  # noqa: B018
    paths = [f"model.model.layers.{i}" for i in range(3)]
    assert [e.path for e in tree.model.layers] == paths
    assert [e.path for e in tree.model.layers[:2]] == paths[:2]


def test_attention_inside_a_wrapper_is_found(tiny: Tiny) -> None:
    class Wrapper(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, **kwargs: Any) -> Any:
            return self.inner(**kwargs)

    wrapper = Wrapper(tiny("llama"))
    before = photograph(wrapper)
    tap = Tap(wrapper)
    batch = batch_of("llama", "no")
    wanted = tiny("llama", "eager")(**batch, output_attentions=True).attentions
    _, seen = watch(tap, batch, "pattern")
    for got, want in zip(seen["pattern"], wanted, strict=True):
        torch.testing.assert_close(got, want, atol=1e-6, rtol=0)
    tap.close()
    unchanged(wrapper, before)
