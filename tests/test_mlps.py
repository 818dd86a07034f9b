"""MLPs found beside attention, frozen and taken out, against hooks by hand on plain models."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import probe
from probe.errors import InputError, UnsupportedModelError
from probe.mlps import frozen, mlps, without
from recipes.ablation import Ablate, sweep
from recipes.architectures_tiny import quiet, tiny
from tests.ablated import logits_of
from tests.edited import watched
from tests.references import no_grad as no_grad
from tests.references import untouched

IDS, OTHER = [5, 9, 2, 7, 1, 8, 3], [5, 9, 4, 7, 6, 8, 2]
TOLERANCE: dict[str, Any] = {"atol": 1e-5, "rtol": 1e-5}
NEURONS: Any = {0: [3, 17], 2: slice(None, None, 2)}


def parts(plain: Any) -> list[Any]:
    gpt2 = plain.config.model_type == "gpt2"
    return [block.mlp for block in (plain.transformer.h if gpt2 else plain.model.layers)]


def last(mlp: Any) -> nn.Module:
    module: nn.Module = mlp.c_proj if hasattr(mlp, "c_proj") else mlp.down_proj
    return module


@contextmanager
def hooked(module: nn.Module, function: Callable[[Tensor], Tensor], at: str) -> Iterator[None]:
    """A function on what a module is given ("in") or returns ("out")."""
    if at == "out":
        handle = module.register_forward_hook(lambda _, __, output: function(output))
    else:
        handle = module.register_forward_pre_hook(lambda _, args: (function(args[0]),))
    yield
    handle.remove()


def seen(module: nn.Module, at: str, plain: Any, ids: list[int]) -> Tensor:
    """What a module is given or returns for one input: (position, width)."""
    found: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        found.append(x[0].clone())
        return x

    with hooked(module, keep, at):
        logits_of(plain, ids)
    return found[0]


def test_they_are_found_beside_the_attention(family: str) -> None:
    model = watched(family)
    found = mlps(model)
    assert list(found) == [0, 1, 2]
    assert all(a is b for a, b in zip(found.values(), parts(model.module), strict=True))


def test_frozen_they_return_what_they_returned_whatever_they_are_given(family: str) -> None:
    model, plain = watched(family), untouched(family)
    kept = [seen(m, "out", plain, IDS) for m in parts(plain)]
    with frozen(model, IDS):
        got = model([OTHER]).logits[0]
        again = model([IDS]).logits[0]
    first, second, third = (
        hooked(m, partial(torch.Tensor.expand_as, x), "out")
        for m, x in zip(parts(plain), kept, strict=True)
    )
    with first, second, third:
        torch.testing.assert_close(got, logits_of(plain, OTHER), **TOLERANCE)
    assert torch.equal(again, model([IDS]).logits[0])
    torch.testing.assert_close(model([OTHER]).logits[0], logits_of(plain, OTHER), **TOLERANCE)


def test_a_block_that_adds_to_what_its_mlp_returns_does_not_change_what_is_frozen() -> None:
    with quiet(), probe.load(tiny("falcon")) as model:
        plain = model([IDS]).logits
        with frozen(model, IDS):
            for _ in range(3):
                assert torch.equal(model([IDS]).logits, plain)
            with model.intervene(Ablate([(0, 1)])):
                direct = model([IDS]).logits
        with model.intervene(Ablate([(0, 1)])):
            assert not torch.equal(direct, model([IDS]).logits)


@pytest.mark.parametrize("mean", [False, True])
def test_without_one_its_output_is_zero_or_its_mean(family: str, mean: bool) -> None:
    model, plain = watched(family), untouched(family)
    reference = [[4, 2, 4, 6, 1], [3, 1, 4]]  # padded, and padding is no token
    mlp = parts(plain)[1]
    value = torch.zeros(32)
    if mean:
        each = [seen(mlp, "out", plain, ids) for ids in reference]
        value = torch.cat(each).mean(0)
    with without(model, {-2: None}, reference if mean else None):
        got = model([IDS]).logits[0]
    with hooked(mlp, lambda x: value.expand_as(x), "out"):
        torch.testing.assert_close(got, logits_of(plain, IDS), **TOLERANCE)
    plainly = model([IDS]).logits[0]
    torch.testing.assert_close(plainly, logits_of(plain, IDS), **TOLERANCE)
    assert float((got - plainly).abs().max()) > 0.01


@pytest.mark.parametrize("mean", [False, True])
def test_without_some_neurons_the_last_matrix_is_given_others(family: str, mean: bool) -> None:
    model, plain = watched(family), untouched(family)
    reference = [[4, 2, 4, 6, 1], [3, 1, 4]]
    values = {}
    for layer in NEURONS:
        module = last(parts(plain)[layer])
        each = [seen(module, "in", plain, ids) for ids in reference]
        values[layer] = torch.cat(each).mean(0) if mean else torch.zeros(each[0].shape[-1])

    def put(layer: int) -> Callable[[Tensor], Tensor]:
        def function(x: Tensor) -> Tensor:
            x, neurons = x.clone(), NEURONS[layer]
            x[..., neurons] = values[layer][neurons]
            return x

        return function

    with without(model, NEURONS, reference if mean else None):
        got = model([IDS]).logits[0]
    first, second = (hooked(last(parts(plain)[la]), put(la), "in") for la in NEURONS)
    with first, second:
        torch.testing.assert_close(got, logits_of(plain, IDS), **TOLERANCE)
    torch.testing.assert_close(model([IDS]).logits[0], logits_of(plain, IDS), **TOLERANCE)


def test_padded_batches_and_generation_are_without_them_too() -> None:
    model = watched("llama")
    with without(model, {1: None, 2: [0, 1]}):
        both = model([IDS, IDS[:4]]).logits
        alone = model([IDS[:4]]).logits
        ids = model.generate([IDS], max_new_tokens=4, do_sample=False)
        for step in range(len(IDS), len(IDS) + 4):
            assert int(model(ids[:, :step]).logits[0, -1].argmax()) == int(ids[0, step])
    torch.testing.assert_close(both[1, :4], alone[0], **TOLERANCE)


def test_a_sweep_inside_is_of_the_model_without_them() -> None:
    model = watched("gpt2")
    with without(model, {0: None, 1: [1, 2]}):
        got = sweep(model, [IDS], layers=1, heads=[0, 2], progress=False).delta_loss[0, 1]
        losses = []
        for one in ([], [Ablate([(1, 0)])], [Ablate([(1, 2)])]):
            with model.intervene(*one):
                losses.append(float(model.run_with_hooks([IDS], return_type="loss")))
    assert float(got[0]) == pytest.approx(losses[1] - losses[0], abs=1e-5)
    assert float(got[2]) == pytest.approx(losses[2] - losses[0], abs=1e-5)


UNKNOWN = {
    "opt": r"cannot be told: beside its attention the block has Linear, Linear\. Use hooks on",
    "bert": r"cannot be told: .* the block has BertIntermediate, BertOutput",
    "longcat_flash": r"cannot be found: its layers are not blocks of one list",
    # Zero, or frozen, would be the whole residual stream.
    "bloom": r"the BloomMLP of BloomForCausalLM adds the residual stream itself, so that",
    "mpt": r"the MptMLP of MptForCausalLM adds the residual stream itself",
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_is_not_one_module_or_more_than_an_mlp_is_refused(name: str) -> None:
    with quiet(), probe.load(tiny(name)) as model:
        with pytest.raises(UnsupportedModelError, match=UNKNOWN[name]):
            mlps(model)
        with pytest.raises(UnsupportedModelError), without(model, {0: None}):
            pass
        with pytest.raises(UnsupportedModelError), frozen(model, IDS):
            pass


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "mimo_v2_flash", "deepseek_v3"])
def test_a_mixture_of_experts_goes_as_a_whole_and_has_no_neurons(name: str) -> None:
    with quiet(), probe.load(tiny(name)) as model:
        layer = model.layers[-1]
        with (
            pytest.raises(UnsupportedModelError, match=r"has no neurons that one matrix reads"),
            without(model, {layer: [0]}),
        ):
            pass
        paths = {module: path for path, module in model.module.named_modules()}
        path = paths[mlps(model)[layer]]
        with without(model, {layer: None}):
            got = model([IDS]).logits[0]
        plainly = model([IDS]).logits[0]
    plain = tiny(name)

    def off(_: nn.Module, __: Any, output: Any) -> Any:  # some also return what the router chose
        return (0 * output[0], *output[1:]) if isinstance(output, tuple) else 0 * output

    handle = plain.get_submodule(path).register_forward_hook(off)
    torch.testing.assert_close(got, logits_of(plain, IDS), **TOLERANCE)
    handle.remove()
    torch.testing.assert_close(plainly, logits_of(plain, IDS), **TOLERANCE)
    assert not torch.equal(got, plainly)


def test_layers_and_neurons_that_are_not_there_are_refused() -> None:
    wrong: list[tuple[Any, str]] = [
        ({3: None}, r"layers=3 is out of range: the model has 3 layers"),
        ({0: [48]}, r"neurons=48 is out of range: the model has 48 neurons"),
        ({0: []}, r"neurons"),
        ({0: "all"}, r"neurons='all' is not a selection"),
    ]
    for layers, words in wrong:
        with pytest.raises(InputError, match=words), without(watched("llama"), layers):
            pass
    with (
        quiet(),
        probe.load(tiny("jamba")) as model,
        pytest.raises(InputError, match=r"layer 0 has no attention, and so no MLP"),
        without(model, {0: None}),
    ):
        pass
