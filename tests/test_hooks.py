"""Hooks: what their names stand for, what they change, the gradients that they hear."""

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from probe.errors import InputError
from probe.hooks import Hook, full_name, resolve
from probe.interventions import SITES, Site
from probe.model import Model
from tests.edited import watched
from tests.models import Bare
from tests.models import bare as bare
from tests.references import ByHand, batch_of, each_kernel, real_rows

IDS = [5, 6, 7, 8, 9, 1, 2, 3]
LAYERS = (0, 1, 2)
NAMES = ["hook_q", "hook_k", "hook_v", "hook_attn_scores", "hook_pattern", "hook_z"]

# ------------------------------------------------------------------------------------- names


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize(("hook", "site"), list(zip(NAMES, SITES, strict=True)))
def test_names_of_transformerlens_stand_for_sites(hook: str, site: Site, layer: int) -> None:
    name = f"blocks.{layer}.attn.{hook}"
    assert resolve(name, LAYERS) == [(site, layer)]
    assert full_name(site, layer) == name
    assert resolve((site, layer), LAYERS) == [(site, layer)]
    assert resolve((site, layer - 3), LAYERS) == [(site, layer)]
    assert resolve(f"blocks.{layer - 3}.attn.{hook}", LAYERS) == [(site, layer)]


PLACES: dict[str, tuple[Any, list[tuple[str, int]]]] = {
    "every layer": (("z", None), [("z", 0), ("z", 1), ("z", 2)]),
    "some layers, in the model's order": (("z", [2, 0]), [("z", 0), ("z", 2)]),
    "a slice": (("attn_scores", slice(1, None)), [("scores", 1), ("scores", 2)]),
    "rotary names": (
        ["blocks.0.attn.hook_rot_q", "blocks.0.attn.hook_rot_k"],
        [("q", 0), ("k", 0)],
    ),
    "two names": (("blocks.1.attn.hook_z", "blocks.0.attn.hook_z"), [("z", 0), ("z", 1)]),
    "a name twice": (["blocks.1.attn.hook_z"] * 2, [("z", 1)]),
    "a regular expression": (re.compile(r"1\.attn.*(z|_k)$"), [("k", 1), ("z", 1)]),
    "a filter": (lambda name: "2" in name and "s" in name[-6:], [("scores", 2)]),
}


@pytest.mark.parametrize("what", PLACES)
def test_a_name_may_stand_for_several_places(what: str) -> None:
    name, wanted = PLACES[what]
    assert resolve(name, LAYERS) == wanted


NAMELESS: dict[str, tuple[Any, str]] = {
    "an unknown hook": ("blocks.0.attn.hook_result", r"'blocks\.0\.attn\.hook_result' names no"),
    "another module": (
        "blocks.0.hook_resid_pre",
        r"names no activation\. Names are blocks\.0\.attn",
    ),
    "an unknown site": (("heads", 0), r"\('heads', 0\) names no activation"),
    "a site in a list": ((["pattern"], 0), r"names no activation"),
    "a number": (3, r"3 names no activation.*or tuples such as \('pattern', 2\)"),
    "a layer too many": ("blocks.3.attn.hook_z", r"layers=3 is out of range: the model has 3"),
    "a negative layer too many": (("z", -4), r"layers=-4 is out of range"),
    "a regular expression of nothing": (re.compile("mlp"), r"re\.compile\('mlp'\) matches no name"),
    "a filter of nothing": (lambda name: False, r"matches no name"),
    "no names": ([], r"\[\] matches no name"),
}


@pytest.mark.parametrize("what", NAMELESS)
def test_a_name_of_nothing_is_refused(what: str) -> None:
    name, message = NAMELESS[what]
    with pytest.raises(InputError, match=message):
        resolve(name, LAYERS)
    model = watched("llama")
    with pytest.raises(InputError, match=message):
        model.run_with_hooks(IDS, [(name, lambda x, hook: x)])


def test_a_layer_without_attention_is_refused() -> None:
    with pytest.raises(InputError, match=r"layer 1 has no attention\. There is .* layers 0, 2\."):
        resolve(("pattern", 1), (0, 2))
    assert resolve(("pattern", None), (0, 2)) == [("pattern", 0), ("pattern", 2)]


@pytest.mark.parametrize("odd", ["blocks.0.attn.hook_z", ("z", 0, print), (("z", 0), 3)], ids=str)
def test_what_is_no_pair_of_name_and_function_is_refused(odd: Any) -> None:
    with pytest.raises(InputError, match=r"is not a hook\. Give pairs \(name, function\)"):
        watched("llama").run_with_hooks(IDS, [odd])


@pytest.mark.parametrize("odd", [None, 3, print])
def test_what_is_no_list_of_hooks_is_refused(odd: Any) -> None:
    for where in ("fwd_hooks", "bwd_hooks"):
        with pytest.raises(
            InputError, match=r"is no list of hooks\. Give pairs \(name, function\)"
        ):
            watched("llama").run_with_hooks(IDS, **{where: odd})


@pytest.mark.parametrize("odd", [lambda p: p, lambda: None, lambda p, head, hook: p])
def test_a_function_of_other_arguments_is_refused_before_anything_runs(odd: Any) -> None:
    for where in ("fwd_hooks", "bwd_hooks"):
        given: Any = {where: [(("pattern", 1), odd)]}
        with pytest.raises(
            InputError, match=r" takes \(.*\. Give a function of \(tensor, hook\)\."
        ):
            watched("llama").run_with_hooks(IDS, **given)


# ----------------------------------------------------------------------------------- forward


def new(p: Tensor, hook: Hook) -> Tensor:
    return p * (0.5 + hook.layer())


def in_place(p: Tensor, hook: Any) -> None:
    p *= 0.5 + hook.layer()


def both(p: Tensor, hook: Any) -> Tensor:
    p *= 0.5 + hook.layer()
    return p


@pytest.mark.parametrize("function", [new, in_place, both])
@pytest.mark.parametrize("grad", [True, False])
@each_kernel
def test_a_hook_returns_a_new_tensor_or_changes_its_own(
    family: str, kernel: str, function: Any, grad: bool
) -> None:
    batch, model = batch_of(family, "right"), watched(family, kernel)
    with torch.set_grad_enabled(grad):
        got = model.run_with_hooks(batch, [(("pattern", None), function)])
        wanted = ByHand(pattern=lambda layer, p: p * (0.5 + layer)).logits(family, batch)
    rows = real_rows(batch)
    torch.testing.assert_close(got[rows], wanted[rows], atol=1e-5, rtol=1e-5)


def test_a_hook_learns_where_it_is_called_and_keeps_what_it_wants() -> None:
    model = watched("llama")
    seen: list[Any] = []

    def forward(x: Tensor, hook: Any) -> None:
        hook.ctx["calls"] = hook.ctx.get("calls", 0) + 1
        seen.append((hook.name, hook.site, hook.layer(), tuple(x.shape), hook.ctx["calls"]))

    with model.hooks([(("k", -1), forward), ("blocks.0.attn.hook_attn_scores", forward)]):
        model(IDS)
        model(IDS)
    assert seen == [
        (name, site, layer, shape, call)
        for call in (1, 2)
        for name, site, layer, shape in (
            ("blocks.0.attn.hook_attn_scores", "scores", 0, (1, 4, 8, 8)),
            ("blocks.2.attn.hook_k", "k", 2, (1, 8, 2, 8)),
        )
    ]


def first(z: Tensor, head: int, hook: Any) -> None:
    z[:, :, head] = hook.layer()


def last(z: Tensor, hook: Any, head: int) -> None:
    first(z, head, hook)


def only(z: Tensor, head: int, *, hook: Any) -> None:
    first(z, head, hook)


def unnamed(head: int, z: Tensor, h: Any) -> None:
    first(z, head, h)


@pytest.mark.parametrize(
    "function",
    [partial(first, head=2), partial(last, head=2), partial(only, head=2), partial(unnamed, 2)],
)
def test_a_partial_may_leave_the_hook_before_or_behind_what_it_holds(function: Any) -> None:
    model = watched("llama")
    got = model.run_with_hooks(IDS, [(("z", None), function)])
    wanted = model.run_with_hooks(IDS, [(("z", None), lambda z, hook: first(z, 2, hook))])
    assert torch.equal(got, wanted)
    assert not torch.allclose(got, model(IDS).logits)
    heard: list[tuple[int, str]] = []

    def hear(grad: Tensor, number: int, hook: Any) -> None:
        heard.append((number, hook.name))

    hooks = [(("z", 1), partial(hear, number=5))]
    model.run_with_hooks(IDS, bwd_hooks=hooks, return_type="loss").backward()
    assert heard == [(5, "blocks.1.attn.hook_z")]


def test_hooks_see_each_step_of_a_generation() -> None:
    shapes: list[tuple[int, ...]] = []
    with watched("llama").hooks(
        [(("pattern", 1), lambda p, _: shapes.append(tuple(p.shape)))]
    ) as m:
        m.generate(IDS, max_new_tokens=3, do_sample=False)
    assert shapes == [(1, 4, 8, 8), (1, 4, 1, 9), (1, 4, 1, 10)]


@pytest.mark.parametrize("backward", [False, True])
def test_an_exception_in_a_hook_leaves_the_model_usable_and_without_hooks(backward: bool) -> None:
    model = watched("llama")
    plain = model(IDS).logits

    def fail(x: Tensor, hook: Any) -> None:
        raise ZeroDivisionError

    hooks = [(("pattern", 1), fail)]
    places: dict[str, Any] = {"bwd_hooks" if backward else "fwd_hooks": hooks}
    with pytest.raises(ZeroDivisionError):
        model.run_with_hooks(IDS, **places).sum().backward()
    assert torch.equal(model(IDS).logits, plain)
    assert not model.tap.watch.awake
    assert not model.base._forward_hooks
    assert not model.base._forward_pre_hooks
    with model.hooks(hooks):  # within the block the next forward is a fresh one
        for _ in range(2):
            with pytest.raises(ZeroDivisionError):
                model(IDS)


# ---------------------------------------------------------------------------------- backward


def gradients(
    hooks: Callable[[list[Any]], dict[str, Any]], model: Model, batch: Any
) -> tuple[list[Any], list[Tensor]]:
    """What hooks heard, and the gradients of the first layer's weights."""
    heard: list[Any] = []
    weights = [p for n, p in model.base.named_parameters() if ".0." in n and "attn" in n]
    loss = model.run_with_hooks(batch, return_type="loss", **hooks(heard))
    return heard, list(torch.autograd.grad(loss, weights))


@each_kernel
@pytest.mark.parametrize("padding", ["no", "right"])
def test_a_backward_hook_hears_the_gradient_of_attention_by_hand(
    family: str, kernel: str, padding: str
) -> None:
    batch, model = batch_of(family, padding), watched(family, kernel)
    heard: dict[str, Tensor] = {}

    def hear(grad: Tensor, hook: Any) -> None:
        heard[hook.name] = grad.clone()

    model.run_with_hooks(
        batch,
        bwd_hooks=[((site, None), hear) for site in ("scores", "pattern", "z")],
        return_type="loss",
    ).backward()
    kept: dict[str, list[Tensor]] = {"scores": [], "pattern": [], "z": []}

    def keep(site: str) -> Callable[[int, Tensor], Tensor]:
        def edit(_: int, x: Tensor) -> Tensor:
            kept[site].append(x)
            return x

        return edit

    hand = ByHand(scores=keep("scores"), pattern=keep("pattern"), z=keep("z"))
    rows = real_rows(batch)
    logits, ids = hand.logits(family, batch), batch["input_ids"]
    each = [
        torch.nn.functional.cross_entropy(x[r][:-1], i[r][1:], reduction="sum")
        for x, r, i in zip(logits, rows, ids, strict=True)
    ]
    loss = torch.stack(each).sum() / (rows.sum() - len(rows))
    for site, tensors in kept.items():
        for layer, wanted in enumerate(torch.autograd.grad(loss, tensors, retain_graph=True)):
            got = heard[full_name(site, layer)]  # type: ignore[arg-type]
            torch.testing.assert_close(got, wanted, atol=1e-6, rtol=1e-4)
            assert float(got.abs().max()) > 0


@each_kernel
def test_queries_keys_and_values_have_the_gradients_of_their_weights(kernel: str) -> None:
    model, ids = watched("gpt2", kernel), batch_of("gpt2", "no")
    heard: dict[str, Tensor] = {}

    def hear(grad: Tensor, hook: Any) -> None:
        heard[hook.site] = grad

    model.module.zero_grad()
    hooks = [((site, 1), hear) for site in ("q", "k", "v")]
    model.run_with_hooks(ids, bwd_hooks=hooks, return_type="loss").backward()
    bias = model.base.get_parameter("transformer.h.1.attn.c_attn.bias").grad
    wanted = torch.cat([heard[site].sum((0, 1)).flatten() for site in ("q", "k", "v")])
    torch.testing.assert_close(bias, wanted, atol=1e-6, rtol=1e-4)


def test_a_returned_gradient_replaces_the_gradient() -> None:
    model, batch = watched("llama"), batch_of("llama", "no")

    def none(heard: list[Any]) -> dict[str, Any]:
        return {"bwd_hooks": [(("z", 0), lambda grad, _: heard.append(grad))]}

    def zero(heard: list[Any]) -> dict[str, Any]:
        return {"bwd_hooks": [(("z", 0), lambda grad, _: 0 * grad)]}

    def double(heard: list[Any]) -> dict[str, Any]:
        return {"bwd_hooks": [(("z", 0), lambda grad, _: 2 * grad)]}

    heard, plain = gradients(none, model, batch)
    assert len(heard) == 1
    *_, zeroed = gradients(zero, model, batch)
    *_, doubled = gradients(double, model, batch)
    *inputs, output = range(len(plain))  # q, k and v lie below z, the output projection above
    for n in inputs:
        assert float(plain[n].abs().max()) > 0
        assert float(zeroed[n].abs().max()) == 0
        torch.testing.assert_close(doubled[n], 2 * plain[n])
    torch.testing.assert_close(zeroed[output], plain[output])


def test_backward_hooks_on_a_place_act_in_the_order_given_each_on_what_the_last_returned() -> None:
    model, batch = watched("llama"), batch_of("llama", "no")
    heard: list[Tensor] = []

    def double(grad: Tensor, hook: Any) -> Tensor:
        heard.append(grad)
        return 2 * grad

    hooks = [(("z", 1), double)] * 3
    model.run_with_hooks(batch, bwd_hooks=hooks, return_type="loss").backward()
    first, second, third = heard
    torch.testing.assert_close(second, 2 * first)
    torch.testing.assert_close(third, 4 * first)
    log: list[str] = []
    names: list[tuple[Any, Any]] = [(("z", 1), lambda g, h, n=n: log.append(n)) for n in "abc"]
    model.run_with_hooks(batch, names, names, return_type="loss").backward()
    assert "".join(log) == "abcabc"


def test_a_backward_hook_hears_the_value_that_a_forward_hook_made() -> None:
    model, batch = watched("llama"), batch_of("llama", "no")
    made: list[Tensor] = []
    heard: list[Tensor] = []

    def make(p: Tensor, hook: Any) -> Tensor:
        made.append(0.5 * p)
        made[0].retain_grad()
        hook.ctx["made"] = True
        return made[0]

    def hear(grad: Tensor, hook: Any) -> None:
        assert hook.ctx["made"]
        heard.append(grad)

    name = "blocks.1.attn.hook_pattern"
    model.run_with_hooks(batch, [(name, make)], [(name, hear)], return_type="loss").backward()
    grad = made[0].grad
    assert grad is not None
    torch.testing.assert_close(heard[0], grad)


@pytest.mark.parametrize(
    ("odd", "what"), [(lambda g, hook: 3, "int"), (lambda g, hook: g[:, :1], r"\(1, 1, 4, 8\)")]
)
def test_a_backward_hook_that_returns_something_else_is_refused(odd: Any, what: str) -> None:
    loss = watched("llama").run_with_hooks(IDS, bwd_hooks=[(("z", 1), odd)], return_type="loss")
    message = rf"the backward hook on blocks\.1\.attn\.hook_z returned {what}\. Return a tensor of "
    with pytest.raises(InputError, match=message + r"shape \(1, 8, 4, 8\), or None"):
        loss.backward()


def test_a_backward_hook_without_gradients_is_refused(bare: Bare) -> None:
    hooks = [(("pattern", 1), lambda grad, hook: None)]
    message = r"blocks\.1\.attn\.hook_pattern has no gradient, so a backward hook would never"
    with torch.no_grad(), pytest.raises(InputError, match=message):
        watched("llama").run_with_hooks(IDS, bwd_hooks=hooks)
    model = bare("llama")
    model.module.requires_grad_(False)
    with pytest.raises(InputError, match=message):
        model.run_with_hooks(IDS, bwd_hooks=hooks)


def test_what_a_run_returns_is_chosen() -> None:
    model = watched("llama")
    logits, loss = model.run_with_hooks(IDS, return_type="both")
    assert torch.equal(logits, model(IDS).logits)
    assert torch.equal(loss, model.run_with_hooks(IDS, return_type="loss"))
    assert model.run_with_hooks(IDS, return_type=None) is None
    with pytest.raises(InputError, match=r"return_type='all'\. Choose logits, loss, both or None"):
        model.run_with_hooks(IDS, return_type="all")  # type: ignore[arg-type]


def test_an_error_in_a_hook_says_in_which(bare: Bare) -> None:
    def broken(z: Tensor, hook: Hook) -> Tensor:
        raise ZeroDivisionError(hook.name)

    with pytest.raises(ZeroDivisionError) as raised:
        bare("llama").run_with_hooks([[1, 2]], [(("z", 1), broken)])
    assert raised.value.__notes__ == ["This happened in the hook on blocks.1.attn.hook_z."]
