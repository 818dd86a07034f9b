"""Which models can be tapped, with what messages others are refused, and what a call is made of."""

import copy
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import probe
from probe import interface
from probe.attention import AttentionCall
from probe.errors import InputError, UnsupportedModelError, WiringError
from probe.tap import Tap
from recipes import architectures
from recipes.architectures_tiny import tiny as tiny_of
from tests.conftest import Tiny
from tests.references import KERNELS, LENGTHS, batch_of, photograph, tapped, unchanged, watch
from tests.references import no_grad as no_grad

FLASH = ("flash_attention_2", "flex_attention")
UNREAD = ("cache", "position_bias", "indices", "block_indices")


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


@pytest.mark.parametrize(
    ("kernel", "name"),
    [("sdpa", "cache"), *((flash, name) for flash in FLASH for name in UNREAD)],
)
def test_arguments_that_change_attention_unseen_are_refused(kernel: str, name: str) -> None:
    q = torch.zeros(1, 1, 2, 2)
    with pytest.raises(UnsupportedModelError, match=f"passes '{name}' to its .* under '{kernel}'"):
        interface._call(kernel, nn.Linear(1, 1), q, q, q, None, {name: torch.zeros(1)})


def test_sinks_are_read_one_for_each_head_under_either_name() -> None:
    q = torch.randn(2, 3, 4, 8)
    sinks = torch.randn(3)
    for name in ("s_aux", "sinks"):
        call = interface._call("eager", nn.Linear(1, 1), q, q, q, None, {name: sinks})
        assert call.sinks is sinks
        with pytest.raises(UnsupportedModelError, match=r"of shape \(2, 3, 4, 1\), and the tap"):
            interface._call(
                "eager", nn.Linear(1, 1), q, q, q, None, {name: torch.zeros(2, 3, 4, 1)}
            )


def masks_of(kind: str) -> Tensor | None:
    keep = torch.ones(5, 5, dtype=torch.bool).tril().repeat(2, 1, 1, 1)
    keep[1, :, :, :2] = False  # padding on the left
    if kind == "none":
        return None
    low = torch.finfo(torch.float32).min
    return keep if kind == "bool" else torch.zeros(keep.shape).masked_fill(~keep, low)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("kind", ["none", "bool", "float"])
def test_a_bias_on_the_scores_is_part_of_the_mask(kernel: str, kind: str) -> None:
    if (kernel, kind) == ("eager", "bool"):
        return  # eager attention takes no such mask
    q, k, v = (torch.randn(2, 4, 5, 8) for _ in range(3))
    bias, mask = torch.randn(2, 4, 5, 5), masks_of(kind)
    module = nn.Linear(1, 1)
    kwargs = {"scaling": 0.3, "position_bias": bias}
    call = interface._call(kernel, module, q, k, v, mask, kwargs)
    scores = q @ k.transpose(-1, -2) * 0.3 + bias
    keep = masks_of("bool")
    if mask is None:  # then sdpa is causal, and eager attention is not
        keep = torch.ones(5, 5, dtype=torch.bool)[None, None]
        keep = keep.tril() if kernel == "sdpa" else keep
    assert keep is not None
    wanted = scores.masked_fill(~keep, -torch.inf)
    torch.testing.assert_close(call.scores(), wanted, atol=1e-6, rtol=0)
    if kernel == "sdpa":
        z = ALL_ATTENTION_FUNCTIONS["sdpa"](module, q, k, v, mask, **kwargs)[0]
        rows = keep.any(-1).expand(2, 4, 5).transpose(1, 2)
        torch.testing.assert_close(call.mix(call.pattern())[rows], z[rows], atol=1e-5, rtol=0)


def test_a_mask_that_replaces_one_with_a_bias_is_all_that_the_kernel_adds() -> None:
    q = torch.randn(2, 4, 5, 8)

    class Blind:
        """Hides the first key, on top of what there is."""

        layer, awake = 0, True

        def serve(self, call: AttentionCall, kernel: Any) -> Any:
            assert call.mask is not None
            mask = call.mask.clone()
            mask[..., 0] = torch.finfo(mask.dtype).min
            self.call = replace(call, mask=mask)
            return kernel(self.call)

    module = nn.Linear(1, 1)
    module.__dict__[interface.LISTENER] = listener = Blind()
    z, _ = interface._attend(
        "sdpa", module, q, q, q, masks_of("bool"), position_bias=torch.randn(2, 4, 5, 5)
    )
    wanted = listener.call.mix(listener.call.pattern())
    torch.testing.assert_close(z[:, 3:], wanted[:, 3:], atol=1e-5, rtol=0)


# ------------------------------------------------------------------- the name of a tapped kernel


def test_the_name_of_a_tapped_kernel_answers_to_the_kernels_own_name() -> None:
    name: Any = interface.register("sdpa")
    assert name in ("eager", "sdpa")  # as models ask
    assert "sdpa" == name  # noqa: SIM300
    assert name == str(name)
    assert name not in ("eager", "flash_attention_2")
    assert name != "sdpa"  # as transformers sees that an implementation changes
    assert {"sdpa": 1, str(name): 2}[name] == 2
    assert copy.deepcopy(name).own == pickle.loads(pickle.dumps(name)).own == "sdpa"


def test_a_model_that_asks_for_its_kernel_by_name_computes_the_same_when_it_is_tapped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # It gives its keys' indices to kernels other than eager and sdpa, and a mask to these.
    assert architectures.check("deepseek_v32").outcome == "captured"
    monkeypatch.setattr(interface.Name, "__eq__", str.__eq__)
    row = architectures.check("deepseek_v32")
    assert row.outcome == "WRONG"
    assert "the logits change when attention is read" in row.reason


def test_layers_without_a_number_of_their_own_are_numbered_by_where_they_are() -> None:
    model = tiny_of("zamba2")
    assert {m.layer_idx for m in model.modules() if "Zamba2Attention" == type(m).__name__} == {-1}  # noqa: SIM300
    tap = Tap(model)
    assert list(tap.layers) == [1, 3]
    tap.close()


def test_attention_that_is_not_from_tokens_to_tokens_is_refused_and_left_alone() -> None:
    for model_type, shape in (("blt", r"34 rows to 16 keys"), ("deepseek_v4", r"16 rows to 20")):
        model = tiny_of(model_type)
        before = photograph(model)
        with pytest.raises(UnsupportedModelError, match=f"given 16 tokens, a .* from {shape}"):
            Tap(model)
        unchanged(model, before)


def test_a_module_that_attends_more_than_once_is_refused_and_left_alone() -> None:
    model = tiny_of("diffllama")
    before = photograph(model)
    with pytest.raises(
        UnsupportedModelError, match=r"a DiffLlamaAttention calls .* 2 times in one"
    ):
        Tap(model)
    unchanged(model, before)


def test_a_model_whose_token_ids_are_not_of_one_table_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="MusicgenForCausalLM is a ModuleList and not"):
        Tap(tiny_of("musicgen"))


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


def unequal(tiny: Tiny) -> PreTrainedModel:
    """A model whose last layer has half the heads, twice as wide."""
    model = tiny("gpt2")
    last = cast(Any, model).transformer.h[-1].attn
    last.num_heads, last.head_dim = last.num_heads // 2, last.head_dim * 2
    return model


def test_layers_of_unequal_heads_are_cached_each_and_captured_alike(
    tiny: Tiny, tmp_path: Path
) -> None:
    with probe.load(unequal(tiny)) as model:
        assert model.n_heads == 4
        _, cache = model.run_with_cache([[1, 2, 3]], sites="pattern")
        assert [cache["pattern", n].shape[1] for n in range(3)] == [4, 4, 2]
        with pytest.raises(InputError, match=r"layers \[0, 1\] have 4, layer 2 has 2.*layers="):
            cache.to_xarray()
        with pytest.raises(InputError, match=r"layers \[0, 1\] have 4, layer 2 has 2.*layers="):
            probe.capture(model, [[1, 2, 3]], tmp_path / "s", progress=False)
        with pytest.raises(InputError, match="heads=3 is out of range: the model has 2 heads"):
            model.run_with_cache([[1, 2, 3]], heads=3)
        for layers, heads in (([0, 1], 4), (-1, 2)):
            path = tmp_path / str(heads)
            ds = probe.capture(model, [[1, 2, 3]], path, layers=layers, progress=False)
            assert ds.sizes["head"] == heads
            got = torch.tensor(ds.pattern.isel(problem=0, layer=-1).values).float()
            layer = int(ds.layer[-1])
            torch.testing.assert_close(got, cache["pattern", layer][0], atol=1e-3, rtol=0)


class Impatient(LlamaForCausalLM):  # type: ignore[no-untyped-call]
    """Replaces its last layer by another when an input is short, as BigBird does."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.model.layers[-1] = copy.deepcopy(self.model.layers[-1])
        return super().forward(*args, **kwargs)


def test_a_model_that_a_short_forward_rebuilds_is_refused(tiny: Tiny) -> None:
    model = Impatient(cast(Any, tiny("llama").config))
    with pytest.raises(UnsupportedModelError, match=r"Impatient.*replaced.*LlamaDecoderLayer"):
        probe.load(model)
