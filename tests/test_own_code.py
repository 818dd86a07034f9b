"""Attention in a module's own code, against transformers' own eager attentions."""

import copy
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from probe.envoys import AttentionEnvoy
from probe.errors import InputError, UnsupportedModelError, WiringError
from probe.interventions import Bias, Edit
from probe.loading import load
from probe.tap import Tap, run
from tests.own_models import CASES, N_HEADS, WINDOW, own
from tests.references import (
    batch_of,
    each_padding,
    photograph,
    real_rows,
    same,
    unchanged,
    watch,
)
from tests.references import no_grad as no_grad

each_case = pytest.mark.parametrize(("name", "kernel"), CASES)
SOFTMAX = ("bloom", "gpt_neo", "mpt", "falcon, multi-query")
each_softmax = pytest.mark.parametrize("name", SOFTMAX)


def batch(name: str, padding: str) -> dict[str, Tensor]:
    return batch_of("gpt2" if name.startswith("gpt2") else name, padding)


def eager(name: str, inputs: dict[str, Any], dtype: torch.dtype = torch.float32) -> Any:
    return own(name, "eager", dtype)(**inputs, output_attentions=True)


# ------------------------------------------------------------------------------------ reading


@each_padding
@each_case
def test_patterns_are_those_that_the_model_itself_returns(
    name: str, kernel: str, padding: str
) -> None:
    inputs = batch(name, padding)
    tap = Tap(own(name, kernel))
    output, seen = watch(tap, inputs, "scores", "pattern")
    rows = real_rows(inputs)[:, None, :, None]
    wanted = eager(name, inputs).attentions
    if kernel == "eager":
        assert all(
            torch.equal(a * rows, b * rows) for a, b in zip(seen["pattern"], wanted, strict=True)
        )
    same(seen["pattern"], wanted, 2e-6, rows)
    assert torch.equal(output.logits, own(name, kernel)(**inputs).logits)
    assert (tap.shapes[0].heads, tap.causal, len(tap.layers)) == (N_HEADS, True, 2)
    for scores, pattern in zip(seen["scores"], seen["pattern"], strict=True):
        assert pattern.dtype == scores.dtype == torch.float32
        assert torch.equal(scores == -torch.inf, pattern == 0)
        keep = torch.ones(11, 11).tril().bool() & real_rows(inputs)[:, None, None]
        if name == "gpt_neo" and scores is seen["scores"][1]:  # its local layer
            keep &= torch.ones(11, 11).triu(1 - WINDOW).bool()
        assert torch.equal(scores > -torch.inf, keep.expand_as(scores))
        assert float(scores[scores > -torch.inf].abs().max()) < 100


@each_case
def test_patterns_in_bfloat16_are_those_that_the_model_itself_returns(
    name: str, kernel: str
) -> None:
    inputs = batch(name, "left")
    output, seen = watch(Tap(own(name, kernel, torch.bfloat16)), inputs, "pattern")
    rows = real_rows(inputs)[:, None, :, None]
    wanted = [a.float() for a in eager(name, inputs, torch.bfloat16).attentions]
    # Eager returns a pattern that it has rounded to 8 bits.
    same(seen["pattern"], wanted, 2**-8 if kernel == "eager" else 0.1, rows)
    plain = own(name, kernel, torch.bfloat16)(**inputs).logits
    assert torch.equal(output.logits, plain)


@each_case
def test_z_is_what_goes_into_the_output_projection(name: str, kernel: str) -> None:
    inputs = batch(name, "right")
    model = own(name, kernel)
    into: list[Tensor] = []
    names = ("dense", "out_proj", "c_proj")
    for path, module in model.named_modules():
        if path.split(".")[-1] in names and "mlp" not in path:
            module.register_forward_pre_hook(lambda _, args: into.append(args[0]))
    model(**inputs)
    _, seen = watch(Tap(own(name, kernel)), inputs, "z")
    assert len(into) == 2
    for z, want in zip(seen["z"], into, strict=True):
        assert z.shape == (2, 11, N_HEADS, 8)
        assert torch.equal(z.flatten(2), want)


@pytest.mark.parametrize(("name", "kernel"), [c for c in CASES if c[0] != "openai"])  # no cache
def test_each_step_of_cached_generation_reads_as_the_model_itself_returns_it(
    name: str, kernel: str
) -> None:
    inputs = batch(name, "left")
    inputs.pop("position_ids", None)
    steps: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "use_cache": True}
    reference: Any = own(name)
    wanted = reference.generate(
        **inputs, **steps, output_attentions=True, return_dict_in_generate=True
    )
    tap = Tap(own(name, kernel))
    seen: list[list[Tensor]] = []
    with tap.envoy.trace(fn="generate", **inputs, **steps) as tracer:
        for _ in tracer.iter[:4]:
            seen.append([envoy.pattern for envoy in tap.layers.values()])
    assert [tuple(p[0].shape[-2:]) for p in seen] == [(11, 11), (1, 12), (1, 13), (1, 14)]
    rows = real_rows(inputs)[:, None, :, None]
    same(seen[0], wanted.attentions[0], 2e-6, rows)
    for got, want in zip(seen[1:], wanted.attentions[1:], strict=True):
        same(got, want, 2e-6)


def test_dropout_comes_after_the_pattern_that_is_read() -> None:
    model = own("bloom")
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    tap = Tap(model)
    model.train()
    _, seen = watch(tap, batch("bloom", "no"), "pattern", "z")
    wanted = eager("bloom", batch("bloom", "no")).attentions[0]
    assert torch.equal(seen["pattern"][0], wanted)
    _, still = watch(Tap(own("bloom")), batch("bloom", "no"), "z")
    assert not torch.allclose(seen["z"][0], still["z"][0], atol=1e-2)


@each_softmax
def test_gradients_of_patterns_are_those_of_the_models_own(name: str) -> None:
    inputs = batch(name, "right")
    rows = real_rows(inputs)[:, None, :, None]
    with torch.enable_grad():
        reference, tap = own(name), Tap(own(name))
        attentions = reference(**inputs, output_attentions=True).attentions
        sum((a * rows).square().sum() for a in attentions).backward()
        _, seen = watch(tap, inputs, "pattern")
        sum((p * rows).square().sum() for p in seen["pattern"]).backward()
    pairs = zip(tap.module.parameters(), reference.parameters(), strict=True)
    for got, want in pairs:
        if want.grad is not None:
            torch.testing.assert_close(got.grad, want.grad, atol=1e-6, rtol=1e-5)


# ------------------------------------------------------------------------------------ editing


def edited_by_hand(name: str, inputs: dict[str, Tensor], site: str, edit: Any) -> Tensor:
    """Logits of a copy whose softmax, or whose projection, is replaced."""
    model, layer = own(name), -1
    real = torch.nn.functional.softmax

    def softmax(x: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
        nonlocal layer
        layer += 1
        if site == "scores":
            x = edit(layer, x)
        p = real(x, dim=dim, dtype=dtype)
        return edit(layer, p) if site == "pattern" else p

    def project(index: int, args: tuple[Tensor, ...]) -> Any:
        z = args[0].view(*args[0].shape[:-1], N_HEADS, -1)
        return (edit(index, z).flatten(2), *args[1:])

    projections = [
        module
        for path, module in model.named_modules()
        if path.split(".")[-1] in ("dense", "out_proj") and "mlp" not in path
    ]
    if site == "z":
        for i, module in enumerate(projections):
            module.register_forward_pre_hook(lambda _, args, i=i: project(i, args))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "softmax", softmax)
        logits: Tensor = model(**inputs).logits
    assert layer == 1
    return logits


def tilt(layer: int, s: Tensor) -> Tensor:
    return s * (0.5 + layer) + torch.linspace(-1, 1, s.shape[-1])


def halve(layer: int, p: Tensor) -> Tensor:
    return p * torch.linspace(0.5, 1.5, p.shape[1]).view(1, -1, 1, 1) * (1 + layer)


def scale(layer: int, z: Tensor) -> Tensor:
    return z * torch.linspace(0, 1 + layer, z.shape[2]).view(1, 1, -1, 1)


EDITS: dict[str, Callable[[int, Tensor], Tensor]] = {
    "scores": tilt,
    "pattern": halve,
    "z": scale,
}


@pytest.mark.parametrize("way", ["trace", "trace in place", "intervention"])
@pytest.mark.parametrize("site", EDITS)
@each_softmax
def test_an_edit_changes_the_logits_as_a_replaced_function_does(
    name: str, site: Any, way: str
) -> None:
    inputs, edit = batch(name, "no"), EDITS[site]
    tap = Tap(own(name))
    plain = tap.module(**inputs).logits

    def visit(layer: int, envoy: AttentionEnvoy) -> None:
        value = getattr(envoy, site)
        if way == "trace":
            setattr(envoy, site, edit(layer, value))
        else:
            value.copy_(edit(layer, value))

    if way == "intervention":
        change = Edit(site=site, function=lambda x, call: edit(call.layer, x))
        with tap.watch.on(change):
            got = tap.module(**inputs).logits
    else:
        got = run(tap, visit, inputs, layers=tuple(tap.layers)).logits
    wanted = edited_by_hand(name, inputs, site, edit)
    torch.testing.assert_close(got, wanted, atol=2e-5, rtol=1e-5)
    assert float((got - plain).abs().max()) > 1e-2
    assert torch.equal(tap.module(**inputs).logits, plain)


@each_case
def test_a_bias_multiplies_edges_and_renormalises_their_rows(name: str, kernel: str) -> None:
    inputs = batch(name, "left")
    tap = Tap(own(name, kernel))
    _, before = watch(tap, inputs, "pattern")
    bias = Bias(value=float(torch.tensor(3.0).log()), queries=-1, keys=1, layers=0)
    hide = Bias(value=-float("inf"), queries=-2, keys=0, layers=0, heads=[2])
    with tap.watch.on(bias, hide):
        output, after = watch(tap, inputs, "scores", "pattern", "z")
        alone = tap.module(**inputs).logits
    wanted = before["pattern"][0].clone()
    for item, start in enumerate((0, 4)):
        wanted[item, :, -1, start + 1] *= 3
        wanted[item, 2, -2, start] = 0
    wanted /= wanted.sum(-1, keepdim=True).clamp_min(1e-30)
    same([after["pattern"][0]], [wanted], 1e-6)
    assert float(after["scores"][0][1, 2, -2, 4]) == -float("inf")
    torch.testing.assert_close(output.logits, alone, atol=1e-6, rtol=1e-6)
    assert not torch.allclose(after["pattern"][1], before["pattern"][1], atol=1e-3)


@each_softmax
def test_gradients_flow_through_an_edited_pattern(name: str) -> None:
    inputs = batch(name, "no")
    with torch.enable_grad():
        tap = Tap(own(name))
        double = Edit(site="scores", function=lambda s, _: 2 * s)
        with tap.watch.on(double):
            tap.module(**inputs).logits.square().sum().backward()
        got = [p.grad for p in tap.module.parameters()]
        model, real = own(name), torch.nn.functional.softmax
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                torch.nn.functional, "softmax", lambda x, *args, **kw: real(2 * x, *args, **kw)
            )
            model(**inputs).logits.square().sum().backward()
    for a, b in zip(got, model.parameters(), strict=True):
        assert a is not None
        torch.testing.assert_close(a, b.grad, atol=1e-3, rtol=1e-4)


@each_softmax
def test_gradient_checkpointing_repeats_the_edits_or_refuses(name: str) -> None:
    inputs = batch(name, "no")
    halved = Edit(site="pattern", function=lambda p, _: p / 2)
    grads = []
    with torch.enable_grad():
        for checkpointing in (False, True):
            tap = Tap(own(name))
            model: Any = tap.module
            model.train()
            for module in model.modules():
                if isinstance(module, nn.Dropout):
                    module.p = 0.0
            if checkpointing:
                model.activation_checkpointing_enable({"use_reentrant": False})
            with tap.watch.on(halved):
                model(**inputs, use_cache=False).logits.square().sum().backward()
            grads.append([p.grad for p in model.parameters()])
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
        with tap.watch.on(halved):
            loss = model(**inputs, use_cache=False).logits.square().sum()
        with pytest.raises(WiringError, match="runs again for its gradients"):
            loss.backward()


# ------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("site", ["q", "k", "v"])
def test_q_k_and_v_of_own_code_cannot_be_changed(site: Any) -> None:
    tap = Tap(own("bloom"))
    change = Edit(site=site, function=lambda x, _: x)
    with (
        tap.watch.on(change),
        pytest.raises(InputError, match=f"the Edit of {site} cannot be read or changed in layer 0"),
    ):
        tap.module(**batch("bloom", "no"))


def test_the_call_of_own_code_cannot_be_read() -> None:
    tap = Tap(own("bloom"))
    with pytest.raises(InputError, match=r"\.call \(q, k and v\) cannot be read"):
        watch(tap, batch("bloom", "no"), "call")


@pytest.mark.parametrize("site", ["q", "k", "v"])
def test_q_k_and_v_given_to_the_fused_kernel_can_be_changed(site: Any) -> None:
    inputs = batch("falcon", "no")
    tap = Tap(own("falcon", "sdpa"))
    _, before = watch(tap, inputs, "call", "z")
    with tap.watch.on(Edit(site=site, function=lambda x, _: 2 * x, layers=0)):
        _, after = watch(tap, inputs, "call", "z")
    field = {"q": "query", "k": "key", "v": "value"}[site]
    call = before["call"][0]
    call = replace(call, **{field: 2 * getattr(call, field)})
    torch.testing.assert_close(after["z"][0], call.mix(call.pattern()), atol=1e-5, rtol=1e-5)


def test_a_forward_that_takes_another_path_is_refused_while_it_is_watched() -> None:
    inputs = batch("falcon", "no")
    tap = Tap(own("falcon", "sdpa"))
    tap.module(**inputs, output_attentions=True)  # nobody watches
    with (
        tap.watch.on(Bias(value=-1.0)),
        pytest.raises(WiringError, match=r"did not call its scaled_dot_.*output_attentions"),
    ):
        tap.module(**inputs, output_attentions=True)


def test_a_module_is_not_tapped_twice() -> None:
    model = own("bloom")
    tap = Tap(model)
    with pytest.raises(UnsupportedModelError, match="this BloomForCausalLM is tapped already"):
        Tap(model)
    watch(tap, batch("bloom", "no"), "pattern")


# --------------------------------------------------------------------------------- left as it was


@each_case
def test_closing_restores_the_model_exactly(name: str, kernel: str) -> None:
    model = own(name, kernel)
    before, modes = photograph(model), [m.training for m in model.modules()]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    tap = Tap(model)
    watch(tap, batch(name, "no"), "pattern")
    tap.close()
    unchanged(model, before)
    assert [m.training for m in model.modules()] == modes
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks


def test_a_tapped_model_can_be_copied_and_pickled_without_its_tap() -> None:
    model, inputs = own("bloom"), batch("bloom", "right")
    wanted = model(**inputs).logits
    tap = Tap(model)
    zero = Edit(site="z", function=lambda z, _: 0 * z)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with tap.watch.on(zero):
            assert torch.equal(twin(**inputs).logits, wanted)
    with tap.watch.on(zero):
        assert not torch.equal(model(**inputs).logits, wanted)


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_a_forward_that_fails_leaves_nothing_on_torchs_stack(error: type[BaseException]) -> None:
    tap = Tap(own("bloom"))
    inputs = batch("bloom", "no")
    wanted = tap.module(**inputs).logits

    def fail(pattern: Tensor, _: Any) -> None:
        raise error("on purpose")

    depth = torch._C._len_torch_function_stack()
    with (
        pytest.raises(error, match="on purpose"),
        tap.watch.on(Edit(site="pattern", function=fail, layers=1)),
    ):
        tap.module(**inputs)
    assert torch._C._len_torch_function_stack() == depth
    output, seen = watch(tap, inputs, "pattern")
    assert torch.equal(output.logits, wanted)
    assert len(seen["pattern"]) == 2


def test_while_nobody_watches_torch_shows_its_functions_to_nobody() -> None:
    tap, depths = Tap(own("bloom")), []

    def look(*_: Any) -> None:
        depths.append(torch._C._len_torch_function_stack())

    for layer in tap.layers.values():
        layer._module.query_key_value.register_forward_pre_hook(look)
    tap.module(**batch("bloom", "no"))
    watch(tap, batch("bloom", "no"), "pattern")
    assert depths == [0, 0, 1, 1]


def test_softmaxes_of_a_traces_body_are_not_taken_for_the_models() -> None:
    tap, inputs = Tap(own("bloom")), batch("bloom", "no")
    wanted = tap.module(**inputs).logits
    found = []
    with tap.envoy.trace(**inputs):
        inner = tap.layers[0].query_key_value.output  # parked inside the attention's forward
        mine = torch.zeros(2, N_HEADS, 11, 11).softmax(-1)
        pattern = tap.layers[0].pattern
        found.append((inner.shape, mine, pattern, pattern.softmax(-1)))
    _, mine, pattern, again = found[0]
    assert torch.equal(mine, torch.full((2, N_HEADS, 11, 11), 1 / 11))
    assert torch.equal(pattern, eager("bloom", inputs).attentions[0])
    assert torch.equal(again, pattern.softmax(-1))
    assert torch.equal(tap.module(**inputs).logits, wanted)


def test_a_loaded_model_reads_and_says_what_it_runs_on() -> None:
    with load(own("falcon, multi-query", "sdpa")) as fused, load(own("bloom")) as model:
        assert (fused.n_kv_heads, fused.tap.implementation) == (1, "own code: sdpa")
        assert (model.n_kv_heads, model.tap.implementation) == (4, "own code: softmax")
        _, cache = model.run_with_cache([[1, 2, 3], [4, 5]], sites=("pattern", "z"))
        assert cache["pattern", 1].shape == (2, 4, 3, 3)
        with pytest.raises(InputError, match="cannot be read"):
            model.run_with_cache([1, 2, 3], sites="q")
