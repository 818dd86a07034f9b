"""Which models can be tapped, with what messages others are refused, and what a call is made of."""

from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    BloomConfig,
    BloomForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from probe import interface
from probe.attention import AttentionCall
from probe.errors import UnsupportedModelError, WiringError
from probe.tap import Tap
from tests.conftest import Tiny
from tests.references import KERNELS, LENGTHS, batch_of, photograph, tapped, unchanged, watch
from tests.references import no_grad as no_grad


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


# ------------------------------------------------------------------------------- what a call is


def test_the_model_receives_its_padding_mask(family: str) -> None:
    for kernel in KERNELS:
        tap = tapped(family, kernel)
        name = cast(Any, tap.module).config._attn_implementation
        assert "sdpa" not in name
        assert "flash" not in name
        assert ALL_MASK_ATTENTION_FUNCTIONS[name] is ALL_MASK_ATTENTION_FUNCTIONS[kernel]
        _, seen = watch(tap, batch_of(family, "right"), "call")
        for call in seen["call"]:
            assert not bool(call.keep().expand(2, 4, 11, 11)[1, :, :, LENGTHS[1] :].any())


def test_an_idle_tap_builds_no_call(
    family: str, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    tap = Tap(tiny(family))
    batch = batch_of(family, "left")
    wanted = watch(tap, batch, "pattern")[0].logits

    def refuse(*_: Any, **__: Any) -> AttentionCall:
        raise AssertionError("a call was built")

    monkeypatch.setattr(interface, "AttentionCall", refuse)
    assert torch.equal(tap.module(**batch).logits, wanted)
    with pytest.raises(AssertionError, match="a call was built"):
        watch(tap, batch, "pattern")


@pytest.mark.parametrize("extra", [{"position_bias": torch.zeros(1)}, {"cache": object()}])
def test_arguments_that_change_attention_unseen_are_refused(extra: dict[str, Any]) -> None:
    q = torch.zeros(1, 1, 2, 2)
    with pytest.raises(UnsupportedModelError, match=f"passes '{next(iter(extra))}' to its"):
        interface._call("sdpa", nn.Linear(1, 1), q, q, q, None, extra)


def test_a_mask_that_is_no_tensor_is_refused() -> None:
    q = torch.zeros(1, 1, 2, 2)
    with pytest.raises(UnsupportedModelError, match="Linear under 'flex' gives its kernel a str"):
        interface._call("flex", nn.Linear(1, 1), q, q, q, "block mask", {})


def test_flash_attention_without_a_mask_is_aligned_at_the_bottom_right_with_its_window() -> None:
    q, k = torch.randn(1, 2, 2, 4), torch.randn(1, 2, 5, 4)
    call = interface._call(
        "flash_attention_2", nn.Linear(1, 1), q, k, k, None, {"sliding_window": 3}
    )
    assert call.keep()[0, 0].int().tolist() == [[0, 1, 1, 1, 0], [0, 0, 1, 1, 1]]
    call = interface._call("sdpa", nn.Linear(1, 1), q, k, k, None, {"sliding_window": 3})
    assert call.keep()[0, 0].int().tolist() == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0]]


def test_a_module_or_a_kernel_that_is_not_causal_sees_everything() -> None:
    q = torch.randn(1, 2, 3, 4)
    module = nn.Linear(1, 1)
    call = interface._call("sdpa", module, q, q, q, None, {"is_causal": False})
    assert bool(call.keep().all())
    module.is_causal = False  # type: ignore[assignment]
    assert bool(interface._call("sdpa", module, q, q, q, None, {}).keep().all())
    assert not bool(
        interface._call("sdpa", module, q, q, q, None, {"is_causal": True}).keep().all()
    )
    assert bool(interface._call("eager", nn.Linear(1, 1), q, q, q, None, {}).keep().all())


def test_layers_of_unequal_heads_are_refused_and_left_alone(tiny: Tiny) -> None:
    model = tiny("gpt2")
    last = cast(Any, model).transformer.h[-1].attn
    last.num_heads, last.head_dim = last.num_heads // 2, last.head_dim * 2  # the same widths
    before = photograph(model)
    with pytest.raises(
        UnsupportedModelError, match=r"differ in their \(query, key\) heads: \(2, 2\), \(4, 4\)"
    ):
        Tap(model)
    unchanged(model, before)
