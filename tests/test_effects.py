"""What an intervention changes, against arithmetic on the logits of two plain forwards."""

import math
import random
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM

import probe
from probe.errors import InputError, WiringError
from probe.interventions import Bias, Edit
from probe.model import Model
from recipes.ablation import Ablate, Patch
from recipes.controls import NoOp, elsewhere, others
from recipes.effects import effect
from recipes.suppression import Knockout, Mask, Steer, Suppress
from tests.conftest import tiny_model
from tests.edited import watched
from tests.models import Bare
from tests.models import bare as bare
from tests.models import demo as demo
from tests.references import no_grad as no_grad

TEXTS = ["abcabcab", "xyzx", "kk", "q"]
ONE = Suppress(keys=1, factor=0.2)


def run(model: Model, *some: Any, problems: Any = TEXTS, **options: Any) -> Any:
    return effect(model, problems, *some, progress=False, **options)


def plain(model: Model, text: Any, *some: Any) -> Tensor:
    """Logits (position, vocabulary) of one problem alone, float64."""
    with model.intervene(*some):
        found: Tensor = model(text).logits[0].double()
    return found


def test_every_number_is_what_two_forwards_of_each_problem_alone_say(demo: Model) -> None:
    ds = run(demo, ONE, draws=0)
    for n, text in enumerate(TEXTS):
        ids = [0, *(demo.text.encode(text)[1:])]
        base, changed = plain(demo, text), plain(demo, text, ONE)
        p, q = base.log_softmax(-1), changed.log_softmax(-1)
        nll = [(-p[i, t], -q[i, t]) for i, t in enumerate(ids[1:])]
        one = ds.isel(problem=n)
        before, after = (float(torch.stack(x).mean()) for x in zip(*nll, strict=True))
        assert float(one.base_loss) == pytest.approx(before, abs=1e-5)
        assert float(one.loss) == pytest.approx(before, abs=1e-5)
        assert float(one.delta_loss) == pytest.approx(after - before, abs=2e-5)
        right = [int(base[i].argmax()) == t for i, t in enumerate(ids[1:])]
        assert float(one.base_accuracy) == pytest.approx(sum(right) / len(right))
        right = [int(changed[i].argmax()) == t for i, t in enumerate(ids[1:])]
        assert float(one.accuracy) == pytest.approx(sum(right) / len(right))
        for i, _ in enumerate(ids):
            kl = float((p[i].exp() * (p[i] - q[i])).sum())
            assert float(one.kl[i]) == pytest.approx(kl, abs=2e-5)
        for i, t in enumerate(ids[1:]):
            assert float(one.delta_nll[i]) == pytest.approx(float(p[i, t] - q[i, t]), abs=2e-5)
            moved = float(changed[i, t] - base[i, t])
            assert float(one.delta_logit[i]) == pytest.approx(moved, abs=5e-5)
            assert float(one.base_rank[i]) == int((base[i] > base[i, t]).sum())
            assert float(one["rank"][i]) == int((changed[i] > changed[i, t]).sum())
        beyond = one.isel(query=slice(len(ids) - 1, None))
        assert bool(np.isnan(beyond.delta_nll).all())
        top = int(base[-1].argmax())
        assert float(one.target) == top
        assert float(one.target_base_p) == pytest.approx(float(p[-1, top].exp()), abs=1e-5)
        assert float(one.target_p) == pytest.approx(float(q[-1, top].exp()), abs=1e-5)
        assert float(one.target_base_rank) == 0


def test_delta_loss_is_signed_and_a_problem_does_not_depend_on_its_batch(family: str) -> None:
    model = watched(family)
    problems = [[3, 17, 40, 8, 22, 9], [9, 1], [5, 6, 7, 5, 6]]
    together = run(model, ONE, problems=problems)
    alone = [run(model, ONE, problems=[p]) for p in problems]
    assert bool((together.delta_loss < 0).any())
    for n, one in enumerate(alone):
        for name in ("base_loss", "delta_loss", "target_p", "loss"):
            got, wanted = float(together[name][n]), float(one[name][0])
            assert got == pytest.approx(wanted, abs=2e-5)


def test_only_the_chosen_tokens_make_the_loss_and_the_accuracy(demo: Model) -> None:
    ds = run(demo, ONE, problems=["abcabcab"], tokens="regex:b", draws=0)
    every = run(demo, ONE, problems=["abcabcab"], draws=0)
    rows = [1, 4, 7]  # the predictions of the three b, at 2, 5 and 8
    wanted = float(every.delta_nll[0, rows].mean())
    assert float(ds.delta_loss[0]) == pytest.approx(wanted, abs=1e-6)
    assert float(ds.loss[0]) == float(every.loss[0])
    right = (every["rank"][0, rows] == 0).mean()
    assert float(ds.accuracy[0]) == pytest.approx(float(right))


@pytest.mark.parametrize("target", ["b", 2, {"0": "b", "1": 2}])
def test_a_target_is_a_text_an_id_or_one_for_each_problem(demo: Model, target: Any) -> None:
    ds = run(demo, ONE, problems=["abca", "xyzx"], target=target)
    assert ds.target.values.tolist() == [2.0, 2.0]
    base = plain(demo, "xyzx")[-1]
    assert float(ds.target_base_rank[1]) == int((base > base[2]).sum())


def test_a_target_is_a_field_of_the_problem(demo: Model) -> None:
    problems = [{"text": "abca", "answer": "b"}, {"text": "xyzx", "answer": "y"}]
    ds = run(demo, ONE, problems=problems, target="field:answer")
    assert ds.target.values.tolist() == [2.0, 25.0]


def test_what_the_model_says_before_and_after(demo: Model) -> None:
    hide = Knockout(keys=slice(1, 3))
    ds = run(demo, hide, problems=["abcab", "xyxyx"], max_new_tokens=3)
    for n, text in enumerate(["abcab", "xyxyx"]):
        for name, some in (("base_text", ()), ("text", (hide,))):
            with demo.intervene(*some):
                ids = demo.generate(text, max_new_tokens=3, do_sample=False)[0]
            assert str(ds[name][n].item()) == "".join(demo.text.decode(ids[-3:].tolist()))


Make = Callable[[], Any]
EVERY_KIND: dict[str, Make] = {
    "suppress": lambda: Suppress(keys=1, factor=0.3),
    "unrenormalised": lambda: Suppress(keys=[1, 0], mode="prob_zero_no_renorm"),
    "knockout": lambda: Knockout(keys=0, queries=-1),
    "steer": lambda: Steer(keys=[0, 1], heads=[(0, 1)]),
    "mask": lambda: Mask(torch.zeros(1, 1, 9, 9).masked_fill(torch.ones(9, 9).tril(-1) > 0, -1.0)),
    "zero": lambda: Ablate([(1, 0)]),
    "mean": lambda: Ablate([(1, 0), (0, 2)], mode="mean"),
    "uniform": lambda: Ablate([(1, 0)], mode="uniform"),
    "an edit of q": lambda: Edit(site="q", function=lambda q, _: q * 2),
    "an edit in place": lambda: Edit(site="z", function=lambda z, _: z.mul_(2)),
    "a bias": lambda: Bias(value=-3.0, keys=0, queries=-1),
}


@pytest.mark.parametrize("kind", EVERY_KIND)
@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_the_no_op_of_every_kind_is_the_model_itself_bit_for_bit(
    family: str, kernel: str, kind: str
) -> None:
    one, model = EVERY_KIND[kind](), watched(family, kernel)
    ids = [[3, 17, 40, 8, 22, 9], [9, 1, 4]]
    with model.intervene(NoOp(one)):
        idle = model(ids).logits
    assert torch.equal(idle, model(ids).logits)
    with model.intervene(one):
        assert not torch.equal(model(ids).logits, idle)
    ds = run(model, one, problems=ids, draws=0)
    assert ds.noop.values.tolist() == [0.0, 0.0]


def test_a_model_that_is_never_twice_the_same_is_refused(bare: Bare) -> None:
    model = bare("llama")
    noise = random.Random(0)
    head: Any = model.module.lm_head
    handle = head.register_forward_hook(lambda _, __, out: out + noise.random())
    with pytest.raises(WiringError, match="the no-op changed the logits of problem '0' by "):
        run(model, ONE, problems=[[3, 17, 40]])
    handle.remove()


def test_random_heads_are_as_many_and_none_of_those_that_were_chosen(bare: Bare) -> None:
    model = bare("llama")
    items = probe.plan(model, [[3, 17, 40], [5, 6, 7, 8]]).items
    chosen = [(0, 1), (2, 3)]
    for seed in map(str, range(20)):
        one: Any = elsewhere(Ablate(chosen), model, items, seed)
        assert len(set(one.heads)) == 2
        assert not set(one.heads) & set(chosen)
        two: Any = elsewhere(Suppress(keys=0, heads=[1], layers=[0, 2]), model, items, seed)
        assert two.layers is None
        assert len(two.heads) == 2
        assert not set(two.heads) & {(0, 1), (2, 1)}
    every: Any = elsewhere(Ablate(layers=[0, 1, 2]), model, items, "0")
    assert every is None  # it names no heads, and no keys
    assert len({str(elsewhere(Ablate(chosen), model, items, str(n))) for n in range(20)}) > 5


def test_random_tokens_are_as_many_in_each_problem_and_others(demo: Model) -> None:
    items = probe.plan(demo, ["abcabc", "bbxy"]).items
    for seed in map(str, range(20)):
        one: Any = elsewhere(Suppress(keys="text:b", factor=0.1), demo, items, seed)
        assert [len(own) for own in one.keys] == [2, 2]
        assert not set(one.keys[0]) & {2, 5}
        assert not set(one.keys[1]) & {1, 2}
        two: Any = elsewhere(Suppress(keys=[1, 2], factor=[0.1, 0.2]), demo, items, seed)
        assert two.factor == [[0.1, 0.2], [0.1, 0.2]]
    assert elsewhere(Bias(value=1.0, keys=1, heads=[0]), demo, items, "0") is None
    assert elsewhere(Mask(torch.zeros(1, 1, 7, 7)), demo, items, "0") is None


def test_what_cannot_be_moved_has_no_control(demo: Model) -> None:
    _, cache = demo.run_with_cache("abca", sites="z", layers=[1])
    for one in (
        Bias(value=-1.0, keys=0, heads=[0]),
        Edit(site="z", function=lambda z, _: 2 * z, heads=[0]),
        Patch(cache, heads=[(1, 0)]),
        Ablate([(1, 0)], mode="resample", reference=cache),
    ):
        assert "control" not in run(demo, one, problems=["abxa"])


def test_where_too_few_are_left_some_of_the_same_are_drawn() -> None:
    assert others(range(3), [0, 1], random.Random(0))[-1] == 2
    assert len(others(range(3), [0, 1], random.Random(0))) == 2


def test_the_control_is_the_effect_of_the_same_elsewhere(bare: Bare) -> None:
    model = bare("qwen2")
    problems = [[3, 17, 40, 8, 22], [9, 1, 30, 5, 6]]
    ds = run(model, Ablate([(0, 1)]), problems=problems, draws=3, seed=4)
    items = probe.plan(model, problems).items
    for draw in range(3):
        one: Any = elsewhere(Ablate([(0, 1)]), model, items, f"4 {draw} 0")
        wanted = run(model, one, problems=problems, draws=0).delta_loss
        np.testing.assert_allclose(ds.control.sel(draw=draw), wanted, atol=2e-6)
    again = run(model, Ablate([(0, 1)]), problems=problems, draws=3, seed=4)
    assert again.control.equals(ds.control)


def test_keys_of_each_item_are_those_of_each_problem(bare: Bare) -> None:
    model = bare("llama")
    problems = [[3, 17, 40, 8, 22, 11], [9, 1], [5, 6, 7, 5]]
    one = Suppress(keys=[[1, 3], [0], [2]], factor=[[0.1, 0.4], [0.0], [3.0]])
    ds = run(model, one, problems=problems, batch_size=2)
    each: Any = zip(one.keys, one.factor, strict=True)  # type: ignore[arg-type]
    for n, (keys, factor) in enumerate(each):
        alone = run(model, Suppress(keys=[keys], factor=[factor]), problems=[problems[n]])
        assert float(ds.delta_loss[n]) == pytest.approx(float(alone.delta_loss[0]), abs=2e-6)
    with pytest.raises(InputError, match="keys are given for 3 items, and there are 2 problems"):
        run(model, one, problems=problems[:2])


def test_one_token_has_a_target_and_no_loss(demo: Model) -> None:
    ds = run(demo, Edit(site="z", function=lambda z, _: z / 2), problems=[[5], [5, 6]])
    assert math.isnan(float(ds.delta_loss[0]))
    assert math.isfinite(float(ds.target_delta_logit[0]))
    assert math.isfinite(float(ds.delta_loss[1]))


def test_interventions_around_the_call_are_part_of_both(demo: Model) -> None:
    with demo.intervene(Ablate([(0, 3)])):
        ds = run(demo, ONE, problems=["abcabc"])
        wanted = plain(demo, "abcabc")
    nll = -wanted[:-1].log_softmax(-1)[range(6), demo.text.encode("abcabc")[1:]]
    assert float(ds.base_loss[0]) == pytest.approx(float(nll.mean()), abs=1e-5)
    assert ds.attrs["interventions"][0]["kind"] == "recipes.ablation.Ablate"
    assert ds.attrs["recipe"]["interventions"][0]["kind"] == "recipes.suppression.Suppress"


@pytest.mark.parametrize(
    ("some", "options", "message"),
    [
        ((), {}, "effect of what? Give interventions, as suppression.Suppress(keys=1)."),
        ((Suppress,), {}, "is not an intervention."),
        ((ONE,), {"draws": -1}, "draws=-1. It must be an int of at least 0."),
        ((ONE,), {"tokens": 0}, "tokens=0 chooses only the first token of problem '0', which noth"),
        ((ONE,), {"tokens": 99}, "tokens=99 is out of range: problem '0' has 9 tokens"),
        ((ONE,), {"tokens": "text:QQ"}, "tokens='text:QQ' selects nothing: problem '0' has no to"),
        ((ONE,), {"target": "ab"}, "the target of problem '0', 'ab', is 2 tokens, and one is foll"),
        ((ONE,), {"target": 64}, "the target of problem '0' holds token id 64, and the vocabular"),
        (
            (ONE,),
            {"target": "field:answer"},
            "the target of problem '0' is None, from target='field:answer'.",
        ),
        ((ONE,), {"target": True}, "the target of problem '0' is True, from target=True. Give a t"),
        ((ONE,), {"target": 1.9}, "the target of problem '0' is 1.9, from target=1.9."),
        ((ONE,), {"target": "é"}, "the tokenizer of demo-llama cannot encode 'é'"),
        ((Suppress(keys=1, layers=7),), {}, "layers=7 is out of range: the model has 2 layers"),
        ((Ablate([(0, 9)]),), {}, "heads=9 is out of range: the model has 4 heads"),
        ((Suppress(keys=5),), {}, "keys=5 is out of range: problem '1' has 5 tokens"),
        ((Suppress(keys="text:Q"),), {}, "keys='text:Q' select nothing: no problem has such a tok"),
        ((Suppress(keys=[[1], [9], [1], [1]]),), {}, "keys=9 is out of range: problem '1' has 5"),
        (
            (ONE,),
            {"target": {"0": 1}},
            "the target of problem '1' is None, from target={'0': 1}. Give",
        ),
        ((ONE,), {"max_new_tokens": -1}, "max_new_tokens=-1. It must be an int of at least 0."),
        ((ONE,), {"batchsize": 3}, "there is no option 'batchsize'. Choose from batch_size, max_"),
    ],
)
def test_mistakes_are_refused_before_anything_runs(
    demo: Model, some: Any, options: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("recipes.effects.logits", lambda *_: pytest.fail("the model ran"))
    with pytest.raises(InputError, match=re.escape(message)):
        run(demo, *some, **options)


def test_a_model_without_logits_of_every_token_is_refused() -> None:
    headless: Any = tiny_model("llama").model
    refused = pytest.raises(
        InputError, match="LlamaModel returns no logits of every token, so what"
    )
    with probe.load(headless) as model, refused:
        run(model, Ablate([(0, 0)]), problems=[[3, 4, 5]])


def test_a_model_that_sees_what_it_would_predict_is_refused() -> None:
    torch.manual_seed(0)
    size: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    module = BertForMaskedLM(BertConfig(vocab_size=64, intermediate_size=32, **size)).train(False)
    refused = pytest.raises(InputError, match="see the tokens behind them, so what it says of a ne")
    with probe.load(module) as model, refused:
        run(model, Ablate([(0, 0)]), problems=[[3, 4, 5]])
