"""Under the tap a model computes what it computes without: logits, gradients, dropout."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from probe.tap import Tap
from tests.conftest import Tiny
from tests.references import batch_of, each_dtype, each_kernel, each_padding, tapped, watch
from tests.references import no_grad as no_grad


@each_dtype
@each_padding
@each_kernel
def test_logits_are_the_same_bits_with_and_without_the_tap_and_inside_a_trace(
    family: str, kernel: str, padding: str, dtype: torch.dtype, tiny: Tiny
) -> None:
    batch = batch_of(family, padding)
    model = tiny(family, kernel, dtype)
    wanted = model(**batch).logits
    tap = Tap(model)
    assert torch.equal(model(**batch).logits, wanted)
    sites = ("call", "scores", "pattern", "z")
    for some in (sites, *((site,) for site in sites)):
        assert torch.equal(watch(tap, batch, *some)[0].logits, wanted)
    assert torch.equal(model(**batch).logits, wanted)
    tap.close()
    assert torch.equal(model(**batch).logits, wanted)


def test_reading_works_in_inference_mode_and_leaves_the_logits(family: str) -> None:
    tap = tapped(family)
    batch = batch_of(family, "left")
    wanted = tap.module(**batch).logits
    with torch.inference_mode():
        output, seen = watch(tap, batch, "pattern", "z")
    torch.testing.assert_close(output.logits, wanted, atol=1e-5, rtol=1e-5)
    _, outside = watch(tap, batch, "pattern")
    torch.testing.assert_close(seen["pattern"], outside["pattern"], atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # its name changes in transformers 6
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_under_checkpointing_are_right_or_refused_but_never_silently_wrong(
    reentrant: bool, tiny: Tiny
) -> None:
    def gradient(tap: Tap) -> Tensor:
        with torch.enable_grad():
            output, seen = watch(tap, batch_of("llama", "no"), "pattern")
            loss = sum(p.square().sum() for p in seen["pattern"]) + output.logits.square().mean()
            loss.backward()
        grad = tap.module.get_parameter("model.layers.0.self_attn.q_proj.weight").grad
        assert isinstance(grad, Tensor)
        return grad

    wanted = gradient(Tap(tiny("llama")))
    tap = Tap(tiny("llama"))
    module: Any = tap.module
    module.train()
    module.gradient_checkpointing_enable({"use_reentrant": reentrant})
    module.enable_input_require_grads()
    try:
        got = gradient(tap)
    except Exception:  # loud is right
        return
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4)


@each_kernel
def test_dropout_in_training_is_the_models_own_and_not_in_the_pattern(
    kernel: str, tiny: Tiny
) -> None:
    tap = Tap(tiny("gpt2", kernel))
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
    tap = Tap(model)
    assert torch.equal(watch(tap, batch, "pattern")[0].logits, wanted)
