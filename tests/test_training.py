"""Training with a loss on patterns read through the tap: the weights of an eager copy come out."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainingArguments

from probe.envoys import AttentionEnvoy
from probe.errors import UnsupportedModelError
from probe.tap import Tap, run
from tests.conftest import tiny_model
from tests.parallel import group as group
from tests.references import batch_of, each_kernel, real_rows

# names that change in transformers 6, which peft uses as well
pytestmark = pytest.mark.filterwarnings("ignore:`.*gradient_checkpointing.*` is:FutureWarning")

STEPS, RATE = 3, 0.05
Inputs = dict[str, Tensor]


def batch(family: str) -> Inputs:
    inputs = batch_of(family, "right")
    labels = inputs["input_ids"].masked_fill(~real_rows(inputs), -100)
    return inputs | {"labels": labels}


def penalty(pattern: Tensor, inputs: Inputs) -> Tensor:
    """The mean over the rows of text of how concentrated they are."""
    rows = inputs["attention_mask"].bool()[:, None].expand(pattern.shape[:3])
    return pattern.square().sum(-1)[rows].mean()


def undropped(model: Any) -> Any:
    """In training mode without dropout, which no two kernels draw alike."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.train()


def full(family: str, kernel: str) -> Any:
    return undropped(tiny_model(family, kernel))


def lora(family: str, kernel: str) -> Any:
    return adapted(full(family, kernel))


def adapted(model: Any) -> Any:
    torch.manual_seed(1)
    gpt2 = model.config.model_type == "gpt2"
    names = ["c_attn"] if gpt2 else ["q_proj", "k_proj"]
    config = LoraConfig(target_modules=names, r=4, init_lora_weights=False, fan_in_fan_out=gpt2)
    return get_peft_model(model, config)


def by_hand(model: Any, inputs: Inputs, weight: float = 1.0) -> list[Tensor]:
    """The weights after some steps of an eager model, whose attentions transformers returns."""
    weights = [p for p in model.parameters() if p.requires_grad]
    for _ in range(STEPS):
        output = model(**inputs, output_attentions=True, use_cache=False)
        loss = output.loss + weight * sum(penalty(a, inputs) for a in output.attentions)
        grads = torch.autograd.grad(loss, weights, allow_unused=True)
        with torch.no_grad():
            for p, grad in zip(weights, grads, strict=True):
                if grad is not None:
                    p -= RATE * grad
    return weights


class Penalised(Trainer):
    """What a user writes."""

    def __init__(self, *args: Any, tap: Tap, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.tap = tap

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        penalties: list[Tensor] = []

        def visit(_: int, attention: AttentionEnvoy) -> None:
            penalties.append(penalty(attention.pattern, inputs))

        output = run(self.tap, visit, inputs | {"use_cache": False}, layers=tuple(self.tap.layers))
        return output.loss + sum(penalties)


def train(model: Any, tap: Tap, inputs: Inputs, folder: Path, **options: Any) -> list[Tensor]:
    """The weights after the same steps of transformers' Trainer."""
    rows = [{name: value[i] for name, value in inputs.items()} for i in range(2)]
    arguments = TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        max_steps=STEPS,
        per_device_train_batch_size=2,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0.0,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **options,
    )
    Penalised(model, arguments, train_dataset=rows, tap=tap).train()
    return [p for p in model.parameters() if p.requires_grad]


def equal(got: list[Tensor], wanted: list[Tensor]) -> None:
    assert len(got) == len(wanted) > 0
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=3e-6, rtol=1e-4)


def distance(some: list[Tensor], others: list[Tensor]) -> float:
    gaps = [(a - b).detach().norm() for a, b in zip(some, others, strict=True)]
    return float(torch.stack(gaps).norm())


@each_kernel
@pytest.mark.parametrize("make", [full, lora])
def test_trainer_with_a_penalty_trains_the_weights_of_an_eager_copy(
    family: str, kernel: str, make: Callable[[str, str], Any], tmp_path: Path
) -> None:
    inputs = batch(family)
    model = make(family, kernel)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    tap = Tap(model)
    got = train(model, tap, inputs, tmp_path)
    equal(got, by_hand(make(family, "eager"), inputs))
    unpenalised = by_hand(make(family, "eager"), inputs, weight=0.0)
    assert distance(got, unpenalised) > 1e-2  # the penalty made a difference
    for name, p in model.named_parameters():
        assert p.requires_grad or (p.grad is None and torch.equal(p, start[name])), name
    tap.close()


def test_an_adapter_put_on_a_tapped_model_trains_the_same(family: str, tmp_path: Path) -> None:
    inputs = batch(family)
    tap = Tap(full(family, "sdpa"))
    model = adapted(tap.module)
    equal(train(model, tap, inputs, tmp_path), by_hand(lora(family, "eager"), inputs))
    tap.close()


def test_a_trace_under_gradient_checkpointing_is_refused(tmp_path: Path) -> None:
    model = full("llama", "sdpa")
    tap = Tap(model)
    options = {"gradient_checkpointing": True}
    with pytest.raises(UnsupportedModelError, match="trains under gradient checkpointing"):
        train(model, tap, batch("llama"), tmp_path, **options)
    tap.close()


@pytest.mark.usefixtures("group")
def test_gradients_reach_a_wrapper_that_the_tap_goes_around() -> None:
    """DistributedDataParallel averages the gradients of what is called through it alone."""
    inputs = batch("llama")
    tap = Tap(full("llama", "sdpa"))
    wrapper, called = DistributedDataParallel(tap.module), []
    wrapper.register_forward_hook(lambda *_: called.append(1))
    penalties: list[Tensor] = []
    with tap.watch.on(), tap.envoy.trace(fn=wrapper.__call__, **inputs):
        for attention in tap.layers.values():
            penalties.append(penalty(attention.pattern, inputs))
        output = tap.envoy.output
        penalties.append(output.loss)
    sum(penalties).backward()  # type: ignore[union-attr]
    assert called == [1]
    got = [p - RATE * p.grad for p in tap.module.parameters() if p.grad is not None]
    copy = full("llama", "eager")
    answer = copy(**inputs, output_attentions=True)
    (answer.loss + sum(penalty(a, inputs) for a in answer.attentions)).backward()
    equal(got, [p - RATE * p.grad for p in copy.parameters() if p.grad is not None])
    tap.close()


def test_mixed_precision_reads_patterns_in_float32_and_trains(tmp_path: Path) -> None:
    inputs = batch("llama")
    model = full("llama", "sdpa")
    tap = Tap(model)
    seen: list[torch.dtype] = []
    with torch.autocast("cpu", torch.bfloat16):
        run(
            tap,
            lambda _, attention: seen.append(attention.pattern.dtype),
            inputs,
            layers=tuple(tap.layers),
        )
    assert seen == [torch.float32] * 3
    got = train(model, tap, inputs, tmp_path, bf16=True)
    wanted = by_hand(full("llama", "eager"), inputs)
    unpenalised = by_hand(full("llama", "eager"), inputs, weight=0.0)
    assert distance(got, wanted) < 0.3 * distance(got, unpenalised)  # eight bits of products
    tap.close()
