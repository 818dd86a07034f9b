"""Hooks and interventions in training, with and without gradient checkpointing."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import probe
from probe.errors import UnsupportedModelError, WiringError
from probe.interventions import Bias, Edit, Intervention
from probe.model import Model
from tests.conftest import tiny_model
from tests.references import batch_of, real_rows

# names that change in transformers 6, which peft uses as well
pytestmark = [
    pytest.mark.filterwarnings("ignore:`.*gradient_checkpointing.*` is:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*use_reentrant.*"),
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad"),
]
Gradients = dict[str, Tensor]
NOT_UNDER = r"layer \d runs again for its gradients .*not under the hooks and interventions of its"

EDITS: dict[str, list[Intervention]] = {
    "bias": [Bias(value=-1.0, queries="last:3", keys=0)],
    "knock-out": [Bias(value=-torch.inf, queries=slice(2, None), keys=1, heads=[0, 2])],
    "q": [Edit(site="q", function=lambda q, _: 1.5 * q, heads=0)],
    "k": [Edit(site="k", function=lambda k, call: k * (1 + call.where.key[:, :, None, None]))],  # type: ignore[union-attr]
    "v": [Edit(site="v", function=lambda v, _: v.mul_(0.5))],
    "scores": [Edit(site="scores", function=lambda s, _: 0.5 * s)],
    "pattern": [Edit(site="pattern", function=lambda p, _: p.square())],
    "z": [Edit(site="z", function=lambda z, _: 0.5 * z, layers=[0, 2])],
}


def model_of(family: str, *, again: bool, reentrant: bool = False, train: Any = None) -> Model:
    """A model in training; `again` runs each layer twice, `train` says which weights learn."""
    module: Any = tiny_model(family)
    for part in module.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
    for name, p in module.named_parameters():
        p.requires_grad_(train is None or train in name)
    module.train()
    if again:
        module.gradient_checkpointing_enable({"use_reentrant": reentrant})
        if not reentrant:  # which needs inputs that require gradients; this does not
            module.disable_input_require_grads()
    return probe.load(module)


def loss_of(model: Model, batch: dict[str, Tensor]) -> Tensor:
    labels = batch["input_ids"].masked_fill(~real_rows(batch), -100)
    loss = model.module(**batch, labels=labels, use_cache=False).loss
    assert isinstance(loss, Tensor)
    return loss


def gradients(model: Model) -> Gradients:
    out = {n: p.grad.clone() for n, p in model.module.named_parameters() if p.grad is not None}
    model.module.zero_grad()
    return out


def same(got: Gradients, wanted: Gradients) -> None:
    assert got.keys() == wanted.keys()
    assert max(float(g.abs().max()) for g in wanted.values()) > 1e-4
    for name, grad in wanted.items():
        torch.testing.assert_close(got[name], grad, atol=1e-6, rtol=1e-5)


def backward(loss: Tensor) -> None:
    loss.backward()  # type: ignore[no-untyped-call]


Step = Callable[[Model, dict[str, Tensor]], None]


def twice(family: str, step: Step, train: str | None = None) -> None:
    """The gradients with checkpointing are those without."""
    found = []
    for again in (False, True):
        with model_of(family, again=again, train=train) as model:
            step(model, batch_of(family, "right"))
            found.append(gradients(model))
    same(found[1], found[0])


@pytest.mark.parametrize("edit", EDITS)
def test_gradients_under_an_intervention_are_those_without_checkpointing(
    family: str, edit: str
) -> None:
    def step(model: Model, batch: dict[str, Tensor]) -> None:
        with model.intervene(*EDITS[edit]):
            backward(loss_of(model, batch))

    twice(family, step)


# Where only weights above the attention of a layer learn, its attention has no gradient at all.
@pytest.mark.parametrize("train", ["layers.2.mlp", "layers.0.mlp", "v_proj", "norm"])
def test_gradients_are_right_whichever_weights_learn(train: str) -> None:
    def step(model: Model, batch: dict[str, Tensor]) -> None:
        with model.intervene(*EDITS["z"]):
            backward(loss_of(model, batch))

    twice("llama", step, train)


@pytest.mark.parametrize("train", [None, "layers.2.mlp", "layers.0.mlp", "v_proj"])
@pytest.mark.parametrize("inside", ["forward", "backward"])
def test_half_a_step_outside_the_block_is_an_error_and_never_a_wrong_gradient(
    train: str | None, inside: str
) -> None:
    edits, batch = EDITS["z"], batch_of("llama", "no")
    with model_of("llama", again=True, train=train) as model:
        with model.intervene(*(edits if inside == "forward" else [])):
            loss = loss_of(model, batch)
        with (
            pytest.raises(WiringError, match=NOT_UNDER),
            model.intervene(*(edits if inside == "backward" else [])),
        ):
            backward(loss)
        del loss
        model.module.zero_grad()
        with model.intervene(*edits):  # and the model can be trained on
            backward(loss_of(model, batch))


def test_without_checkpointing_backward_may_come_after_the_block() -> None:
    batch = batch_of("llama", "no")
    found = []
    for outside in (False, True):
        with model_of("llama", again=False) as model:
            with model.intervene(*EDITS["pattern"]):
                loss = loss_of(model, batch)
                if not outside:
                    backward(loss)
            if outside:
                backward(loss)
            found.append(gradients(model))
    same(found[1], found[0])


def test_a_forward_under_other_interventions_is_not_run_again_under_these() -> None:
    batch = batch_of("llama", "no")
    with model_of("llama", again=True) as model:
        with model.intervene(*EDITS["z"]):
            loss = loss_of(model, batch)
        with model.intervene(*EDITS["bias"]), pytest.raises(WiringError, match=NOT_UNDER):
            backward(loss)


def test_backward_after_another_batch_was_read_is_an_error() -> None:
    one, other = batch_of("llama", "no"), batch_of("llama", "right")
    message = r"layer \d runs again .*after another batch was read.*Call backward\(\) after each"
    with model_of("llama", again=True) as model, model.intervene(*EDITS["bias"]):
        loss = loss_of(model, one)
        loss_of(model, other)
        with pytest.raises(WiringError, match=message):
            backward(loss)


@pytest.mark.parametrize("edit", ["bias", "pattern", "z"])
def test_reentrant_checkpointing_is_refused(edit: str) -> None:
    batch = batch_of("llama", "no")
    with model_of("llama", again=True, reentrant=True) as model:
        message = r"reentrant gradient checkpointing, in which edits lose their gradients\. Use"
        with model.intervene(*EDITS[edit]), pytest.raises(UnsupportedModelError, match=message):
            loss_of(model, batch)
        with torch.no_grad(), model.intervene(*EDITS[edit]):
            loss_of(model, batch)  # nothing to lose
        loss_of(model, batch)  # nobody watches
        model.module.train(mode=False)
        with model.intervene(*EDITS[edit]):
            backward(loss_of(model, batch))


def test_gradients_accumulate_over_batches() -> None:
    def step(model: Model, _: dict[str, Tensor]) -> None:
        for padding in ("right", "no", "right"):
            with model.intervene(*EDITS["bias"], *EDITS["v"]):
                backward(loss_of(model, batch_of("qwen3", padding)) / 3)

    twice("qwen3", step)


def test_two_forwards_of_one_batch_have_one_backward() -> None:
    def step(model: Model, batch: dict[str, Tensor]) -> None:
        with model.intervene(*EDITS["z"]):
            backward(loss_of(model, batch) + 2 * loss_of(model, batch))

    twice("llama", step)


def test_a_captured_pattern_in_the_loss_has_its_gradients(family: str) -> None:
    def step(model: Model, batch: dict[str, Tensor]) -> None:
        kept: dict[str, Tensor] = {}
        rows = real_rows(batch)[:, None, :, None]

        def keep(p: Tensor, hook: Any) -> None:
            kept.setdefault(hook.name, p)

        with model.hooks([(("pattern", None), keep)]):
            loss = loss_of(model, batch)
            loss = loss + sum((p.square() * rows).sum() for p in kept.values())
            backward(loss)
        assert len(kept) == 3

    twice(family, step)


@pytest.mark.parametrize("site", ["scores", "pattern", "z", "q", "k", "v"])
def test_backward_hooks_hear_and_replace_the_same_gradients(site: Any) -> None:
    heard: list[dict[str, Tensor]] = []

    def step(model: Model, batch: dict[str, Tensor]) -> None:
        heard.append({})

        def hear(grad: Tensor, hook: Any) -> Tensor:
            assert hook.name not in heard[-1]
            heard[-1][hook.name] = grad.clone()
            return 0.5 * grad

        with model.hooks(bwd_hooks=[((site, None), hear)]):
            backward(loss_of(model, batch))

    twice("llama", step)
    same(heard[1], heard[0])
    assert len(heard[0]) == 3


def test_dropout_draws_the_same_in_the_second_forward() -> None:
    found = []
    for again in (False, True):
        with model_of("gpt2", again=again) as model:
            for part in model.module.modules():
                if isinstance(part, torch.nn.Dropout):
                    part.p = 0.3
            torch.manual_seed(0)
            with model.intervene(*EDITS["pattern"]):
                backward(loss_of(model, batch_of("gpt2", "no")))
            found.append(gradients(model))
    same(found[1], found[0])


def test_an_adapter_learns_under_interventions_with_and_without_checkpointing() -> None:
    found = []
    for again in (False, True):
        torch.manual_seed(1)
        config = LoraConfig(target_modules=["q_proj", "v_proj"], r=4, init_lora_weights=False)
        module: Any = get_peft_model(tiny_model("llama"), config).train()
        if again:
            module.gradient_checkpointing_enable({"use_reentrant": False})
        with probe.load(module) as model:
            for name in ("bias", "pattern", "z"):
                with model.intervene(*EDITS[name]):
                    backward(loss_of(model, batch_of("llama", "left")))
            found.append(gradients(model))
    assert all("lora" in name for name in found[0])
    same(found[1], found[0])


def test_checkpointing_of_the_users_own_is_right_inside_and_an_error_outside() -> None:
    batch = batch_of("llama", "no")

    def loss_again(model: Model) -> Tensor:
        loss = checkpoint(lambda: loss_of(model, batch), use_reentrant=False)
        assert isinstance(loss, Tensor)
        return loss

    with model_of("llama", again=False) as model:
        with model.intervene(*EDITS["z"]):
            backward(loss_of(model, batch))
        wanted = gradients(model)
        with model.intervene(*EDITS["z"]):
            backward(loss_again(model))
        same(gradients(model), wanted)
        with model.intervene(*EDITS["z"]):
            loss = loss_again(model)
        with pytest.raises(WiringError, match=NOT_UNDER):
            backward(loss)
