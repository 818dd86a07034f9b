"""One thread at a time, one forward at a time; and models in training."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import probe
from probe.errors import InputError
from probe.interventions import Bias, Edit
from probe.model import Model
from probe.tap import run
from tests.models import Bare
from tests.models import bare as bare
from tests.references import no_grad as no_grad

IDS = [5, 6, 7, 8, 9, 1, 2, 3]
OTHERS = [[i, 7, 8] for i in range(1, 9)]
INSIDE = r"this model was called inside its own forward, by a hook, an intervention or the body"


def close(got: Tensor, wanted: Tensor) -> None:
    """Another thread may split its sums otherwise."""
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


def halve(z: Tensor, hook: Any) -> Tensor:
    return 0.5 * z


def test_a_thread_with_hooks_and_one_without_do_not_disturb_each_other(bare: Bare) -> None:
    model = bare("llama")
    plain = {tuple(ids): model(ids).logits for ids in OTHERS}
    hooked = {tuple(i): model.run_with_hooks(i, [(("z", None), halve)]) for i in OTHERS}

    def with_hooks(ids: list[int]) -> Tensor:
        with torch.no_grad():
            logits = model.run_with_hooks(ids, [(("z", None), halve)])
        assert isinstance(logits, Tensor)
        return logits

    def without(ids: list[int]) -> Tensor:
        with torch.no_grad():
            logits = model(ids).logits
        assert isinstance(logits, Tensor)
        return logits

    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            some = [pool.submit(with_hooks, ids) for ids in OTHERS]
            rest = [pool.submit(without, ids) for ids in OTHERS]
            for ids, one, other in zip(OTHERS, some, rest, strict=True):
                close(one.result(), hooked[tuple(ids)])
                close(other.result(), plain[tuple(ids)])


def elsewhere(function: Callable[[], Any]) -> Any:
    """What another thread returns or raises."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result(timeout=20)


def test_a_raw_call_from_another_thread_is_refused_while_somebody_watches(bare: Bare) -> None:
    model = bare("llama")
    plain = model(IDS).logits
    raw = torch.tensor([IDS])
    with model.hooks([(("z", None), halve)]):
        wanted = model(IDS).logits
        with pytest.raises(InputError, match=r"is watched by another thread now\. Call it through"):
            elsewhere(lambda: model.module(raw))
        assert torch.equal(model(IDS).logits, wanted)
    with torch.no_grad():
        close(elsewhere(lambda: model.module(raw).logits.detach()), plain)


def test_a_raw_call_from_another_thread_in_the_middle_of_a_forward_changes_nothing(
    bare: Bare,
) -> None:
    model = bare("llama")
    raw = torch.tensor([IDS])
    errors: list[str] = []

    def disturb(z: Tensor, hook: Any) -> Tensor:
        with pytest.raises(InputError) as caught:
            elsewhere(lambda: model.module(raw))
        errors.append(str(caught.value))
        with pytest.raises(InputError, match=INSIDE):  # the forward is known to run all the same
            model.module(raw)
        return 0.5 * z

    wanted = model.run_with_hooks(IDS, [(("z", None), halve)])
    assert torch.equal(model.run_with_hooks(IDS, [(("z", None), disturb)]), wanted)
    assert len(errors) == 3


def test_layers_called_by_another_thread_are_not_edited(bare: Bare) -> None:
    model = bare("llama")
    attention = model.base.get_submodule("model.layers.0.self_attn")
    x = torch.randn(1, 5, 32)
    rotary: Any = model.base.get_submodule("model.rotary_emb")
    inputs = {"position_embeddings": rotary(x, torch.arange(5)[None]), "attention_mask": None}
    plain = attention(x, **inputs)[0]

    def call() -> Tensor:
        with torch.no_grad():
            out = attention(x, **inputs)[0]
        assert isinstance(out, Tensor)
        return out

    with model.intervene(Edit(site="z", function=lambda z, _: 0 * z)):
        close(elsewhere(call), plain)
        assert float(call().abs().max()) == 0


def test_another_threads_interventions_are_neither_run_nor_recorded(
    bare: Bare, tmp_path: Path
) -> None:
    model = bare("llama")
    entered, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with model.intervene(Bias(value=-5.0, keys=0)):
            entered.set()
            leave.wait(20)

    def run() -> Any:
        return probe.capture(model, [IDS], tmp_path / "a", dtype="float32", progress=False).load()

    with ThreadPoolExecutor(2) as pool:
        holder = pool.submit(hold)
        entered.wait(20)
        running = pool.submit(run)
        timer = threading.Timer(0.3, leave.set)
        timer.start()
        holder.result(20)
        ds = running.result(20)
    assert ds.attrs["interventions"] == []
    _, cache = model.run_with_cache(IDS, "pattern")
    torch.testing.assert_close(torch.tensor(ds.pattern.values[0, 1]), cache["pattern", 1][0])


CALLS: dict[str, Callable[[Model], Any]] = {
    "itself": lambda model: model(IDS),
    "its module": lambda model: model.module(torch.tensor([IDS])),
    "run_with_cache": lambda model: model.run_with_cache(IDS),
    "generate": lambda model: model.generate(IDS, max_new_tokens=1),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_model_called_inside_its_own_hook_is_refused_as_often_as_it_is(
    call: str, bare: Bare
) -> None:
    model = bare("llama")
    wanted = model(IDS).logits

    def again(p: Tensor, hook: Any) -> None:
        for _ in range(2):
            with pytest.raises((InputError, ValueError)):
                CALLS[call](model)

    assert torch.equal(model.run_with_hooks(IDS, [(("pattern", 1), again)]), wanted)
    with pytest.raises(InputError, match=INSIDE):
        model.run_with_hooks(IDS, [(("pattern", 1), lambda p, _: model(IDS))])
    assert torch.equal(model(IDS).logits, wanted)
    assert not model.tap.watch.awake


def test_a_model_called_inside_the_body_of_its_trace_is_refused(bare: Bare) -> None:
    model = bare("llama")
    wanted = model(IDS).logits

    def visit(layer: int, envoy: Any) -> None:
        envoy.pattern.sum()
        model(IDS)

    with pytest.raises(InputError, match=INSIDE):
        run(model.tap, visit, {"input_ids": torch.tensor([IDS])}, layers=(0,))
    assert torch.equal(model(IDS).logits, wanted)


def test_a_forward_that_fails_is_over(bare: Bare) -> None:
    model = bare("llama")
    wanted = model(IDS).logits
    with model.intervene(Bias(value=0.5, keys=0)):
        under = model(IDS).logits
        for _ in range(2):
            with pytest.raises(IndexError):
                model.module(torch.tensor([[99]]))
        assert torch.equal(model(IDS).logits, under)
    assert torch.equal(model(IDS).logits, wanted)


def test_contexts_may_be_left_in_any_way(bare: Bare) -> None:
    model = bare("llama")
    wanted = model(IDS).logits
    with (
        pytest.raises(ZeroDivisionError),
        model.intervene(Bias(value=1.0, keys=0)),
        model.hooks([(("z", 0), halve)]),
    ):
        raise ZeroDivisionError
    assert model.tap.watch.interventions == ()
    assert torch.equal(model(IDS).logits, wanted)
    elsewhere(lambda: model(IDS))  # the lock is free


def test_a_closed_model_takes_no_interventions(bare: Bare) -> None:
    model = bare("llama")
    model.close()
    with (
        pytest.raises(InputError, match=r"this model was closed"),
        model.intervene(Bias(value=1.0)),
    ):
        pass
