"""Interventions on architectures of every kind: nothing more than asked changes, padded or cached.

Grouped heads, softcap, sinks, latent attention whose values are wider than its keys, attention code
of a model's own, recurrent layers beside attention, and models without position_ids.
"""

import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import probe
from probe.interventions import Intervention, Site
from probe.model import Model
from recipes.architectures_tiny import padded, quiet, tiny
from tests.references import no_grad as no_grad

ATTENTION_ONLY = ("llama", "gemma2", "gpt_oss", "deepseek_v3", "bloom", "gptj", "mixtral")
RECURRENT = ("jamba", "recurrent_gemma")
WITHOUT_POSITIONS = ("trocr", "roformer")
ALL = (*ATTENTION_ONLY, *RECURRENT, *WITHOUT_POSITIONS)
HIDDEN_KEY = 2
STEPS = 4

knocked_out = probe.Bias(value=-torch.inf, keys=HIDDEN_KEY, queries=slice(HIDDEN_KEY + 1, None))
raised = probe.Bias(value=2.0, keys=slice(1, None, 2), queries=slice(3, None))

each_side = pytest.mark.parametrize("side", ["left", "right"])


@pytest.fixture
def model(request: pytest.FixtureRequest) -> Iterator[Model]:
    with quiet(), probe.load(tiny(request.param)) as loaded:
        yield loaded


def batch_of(model: Model, side: str) -> dict[str, Any]:
    return {**model.batch(padded()[side == "right"]), "use_cache": False}


def forward(model: Model, batch: dict[str, Any], *edits: Intervention) -> Tensor:
    """Logits of the real tokens, in one row."""
    with model.intervene(*edits):
        logits: Tensor = model(batch).logits
    return logits[batch["attention_mask"].bool()]


@each_side
@pytest.mark.parametrize("site", ["scores", "pattern", "z"])
@pytest.mark.parametrize("model", ALL, indirect=True)
def test_copies_of_what_is_there_change_no_logit(model: Model, site: Site, side: str) -> None:
    batch = batch_of(model, side)
    plain = forward(model, batch)
    seen: list[int] = []

    def copy(value: Tensor, call: Any) -> Tensor:
        seen.append(call.layer)
        return value.clone()

    edited = forward(model, batch, probe.Edit(site=site, function=copy))
    assert tuple(seen) == model.layers
    torch.testing.assert_close(edited, plain, atol=3e-5, rtol=1e-5)


@each_side
@pytest.mark.parametrize("model", ALL, indirect=True)
def test_a_bias_of_zero_changes_no_logit_and_one_of_two_does(model: Model, side: str) -> None:
    batch = batch_of(model, side)
    plain = forward(model, batch)
    nothing = forward(model, batch, probe.Bias(value=0.0, keys=0))
    torch.testing.assert_close(nothing, plain, atol=3e-5, rtol=1e-5)
    assert (forward(model, batch, raised) - plain).abs().max() > 1e-3


@each_side
@pytest.mark.parametrize("model", ATTENTION_ONLY, indirect=True)
def test_a_token_that_nobody_sees_may_be_any_other(model: Model, side: str) -> None:
    batch = batch_of(model, side)
    first = batch["attention_mask"].argmax(1)
    other = {**batch, "input_ids": batch["input_ids"].clone()}
    hidden = (torch.arange(len(first)), first + HIDDEN_KEY)
    other["input_ids"][hidden] = batch["input_ids"][hidden] % 50 + 1
    itself = torch.zeros_like(batch["attention_mask"])
    itself[hidden] = 1
    apart = itself[batch["attention_mask"].bool()] == 0
    one, two = (forward(model, some, knocked_out)[apart] for some in (batch, other))
    torch.testing.assert_close(one, two, atol=3e-5, rtol=1e-5)
    one, two = (forward(model, some)[apart] for some in (batch, other))
    assert (one - two).abs().max() > 1e-3


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("edit", [knocked_out, raised], ids=["knocked out", "raised"])
@pytest.mark.parametrize("model", ["llama", "gpt_oss", *WITHOUT_POSITIONS], indirect=True)
def test_cached_generation_is_changed_at_the_tokens_of_each_sequence(
    model: Model, edit: Intervention, cache: str
) -> None:
    prompt = padded()[0]
    options: dict[str, Any] = {} if cache == "dynamic" else {"cache_implementation": cache}
    with model.intervene(edit):
        steps = model.generate(
            prompt,
            max_new_tokens=STEPS,
            do_sample=False,
            eos_token_id=None,
            return_dict_in_generate=True,
            output_logits=True,
            **options,
        )
    generated = torch.ones(2, STEPS, dtype=torch.long)
    mask = torch.cat([prompt["attention_mask"], generated], dim=1)
    whole = {"input_ids": steps.sequences, "attention_mask": mask, "use_cache": False}
    if "position_ids" in inspect.signature(type(model.base).forward).parameters:
        whole["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)
    with model.intervene(edit):
        wanted = model(whole).logits[:, -STEPS - 1 : -1]
    got = torch.stack(steps.logits, dim=1)
    torch.testing.assert_close(got, wanted, atol=3e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("model_type", ["bloom", "gptj", "gpt_neo"])
def test_code_of_a_models_own_is_read_in_every_dtype(model_type: str, dtype: torch.dtype) -> None:
    bare: Any = tiny(model_type)
    with quiet(), probe.load(bare.to(dtype)) as model:
        batch = batch_of(model, "right")
        plain = forward(model, batch)
        with model.intervene(probe.Edit(site="pattern", function=lambda p, _: p.clone())):
            copied = model(batch).logits[batch["attention_mask"].bool()]
    assert plain.dtype == dtype
    torch.testing.assert_close(copied, plain)
