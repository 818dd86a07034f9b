"""What closing gives back, and what an open tap leaves alone."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from nnsight import NNsight
from transformers import PreTrainedModel

from probe.envoys import AttentionEnvoy
from probe.errors import InputError
from probe.tap import Tap, run
from tests.conftest import Tiny
from tests.references import (
    Wrapper,
    batch_of,
    each_kernel,
    eager,
    photograph,
    projections,
    same,
    unchanged,
    watch,
)
from tests.references import no_grad as no_grad


@each_kernel
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
        run(tap, fail, batch, layers=(0, 1, 2))
    with pytest.raises(InputError, match=r"pattern was assigned .* Assign a tensor of shape"):
        run(tap, break_shape, batch, layers=(0, 1, 2))
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
    tiny: Tiny, tmp_path: Path
) -> None:
    tap = Tap(tiny("llama"))
    assert isinstance(tap.module, PreTrainedModel)
    tap.module.save_pretrained(tmp_path)
    assert "probe-" not in (tmp_path / "config.json").read_text()
    tap.close()


def test_attention_inside_a_wrapper_is_found(tiny: Tiny) -> None:
    wrapper = Wrapper(tiny("llama"))
    before = photograph(wrapper)
    tap = Tap(wrapper)
    batch = batch_of("llama", "no")
    _, seen = watch(tap, batch, "pattern")
    same(seen["pattern"], eager("llama", batch), 1e-6)
    tap.close()
    unchanged(wrapper, before)
