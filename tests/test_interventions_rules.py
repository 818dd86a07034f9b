"""The rules of interventions: the order in which they act, and what they leave alone."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from probe.attention import AttentionCall
from probe.interventions import SITES, Bias, Edit, Site
from tests.edited import EVERYTHING, KINDS, cache_of, left, watched
from tests.models import Bare
from tests.models import bare as bare
from tests.references import batch_of, each_kernel, real_rows
from tests.references import no_grad as no_grad

IDS = [5, 6, 7, 8, 9, 1, 2, 3]
each_site = pytest.mark.parametrize("site", SITES)


# ------------------------------------------------------------------------------------- order


def noting(log: list[str], name: str) -> Any:
    def function(x: Tensor, call: AttentionCall) -> None:
        if call.layer == 0:
            log.append(name)

    return function


def test_sites_act_in_the_order_of_the_model_and_within_a_site_as_they_are_given() -> None:
    log: list[str] = []
    given = [Edit(site=s, function=noting(log, f"{s}{n}")) for n in (1, 2) for s in reversed(SITES)]
    with watched("llama").intervene(*given) as model:
        model(IDS)
    assert log == [f"{site}{n}" for site in SITES for n in (1, 2)]


def test_outer_contexts_act_before_inner_ones_and_a_trace_of_the_users_own_last() -> None:
    model = watched("llama")
    log: list[str] = []
    seen: list[Tensor] = []

    def hook(name: str) -> Any:
        return lambda pattern, hook: log.append(name)

    def double(p: Tensor, _: AttentionCall) -> Tensor:
        log.append("double")
        return 2 * p

    _, cache = model.run_with_cache(IDS, "pattern", layers=0)
    with (
        model.hooks([(("pattern", 0), hook("outer"))]),
        model.intervene(Edit(site="pattern", function=double, layers=0)),
        model.hooks([(("pattern", 0), hook("inner"))]),
        model.envoy.trace(input_ids=torch.tensor([IDS])),
    ):
        seen.append(model.tap.layers[0].pattern)
        log.append("trace")
    assert log == ["outer", "double", "inner", "trace"]
    torch.testing.assert_close(seen[0], 2 * cache["pattern", 0])


@each_kernel
def test_two_functions_on_a_site_act_one_after_the_other(family: str, kernel: str) -> None:
    model = watched(family, kernel)
    batch = batch_of(family, "no")

    def add(p: Tensor, _: AttentionCall) -> Tensor:
        return p + 0.01

    def double(p: Tensor, _: AttentionCall) -> None:
        p *= 2

    def both(p: Tensor, _: AttentionCall) -> Tensor:
        return 2 * (p + 0.01)

    one, two = Edit(site="pattern", function=add), Edit(site="pattern", function=double)
    with model.intervene(Edit(site="pattern", function=both)):
        wanted = model(batch).logits
    with model.intervene(one), model.intervene(two):
        nested = model(batch).logits
    with model.intervene(one, two):
        together = model(batch).logits
    with model.intervene(two, one):
        swapped = model(batch).logits
    torch.testing.assert_close(nested, wanted, atol=1e-5, rtol=1e-5)
    assert torch.equal(nested, together)
    assert float((swapped - wanted).abs().max()) > 1e-4


def test_biases_add_up_and_an_edit_of_the_scores_sees_their_sum() -> None:
    model = watched("llama")
    seen: list[Tensor] = []
    plain: list[Tensor] = []
    look = Edit(site="scores", function=lambda s, _: seen.append(s.clone()), layers=0)
    before = Edit(site="scores", function=lambda s, _: plain.append(s.clone()), layers=0)
    with model.intervene(before):
        model(IDS)
    with model.intervene(Bias(value=1.5, keys=1), look, Bias(value=-0.5, keys=[0, 1])):
        model(IDS)
    wanted = plain[0].clone()
    wanted[..., 0] -= 0.5
    wanted[..., 1] += 1.0
    torch.testing.assert_close(seen[0], wanted)


@each_kernel
def test_a_bias_is_added_to_the_numbers_of_a_mask_that_the_user_gives(kernel: str) -> None:
    model = watched("llama", kernel)
    mask = torch.full((1, 1, 8, 8), torch.finfo(torch.float32).min).triu(1)
    distance = torch.arange(8)[:, None] - torch.arange(8)
    mask = torch.where(distance >= 0, -0.3 * distance, mask)
    given = {"input_ids": torch.tensor([IDS]), "attention_mask": mask}
    given["position_ids"] = torch.arange(8)[None]
    with model.intervene(Bias(value=1.5, keys=2)):
        got = model(given).logits
    both = torch.where((distance >= 0) & (torch.arange(8) == 2), mask + 1.5, mask)
    wanted = model(given | {"attention_mask": both}).logits
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)
    assert float((got - model(given).logits).abs().max()) > 1e-3


def test_what_a_trace_reads_and_the_cache_keeps_is_what_was_edited() -> None:
    model = watched("qwen3")
    with model.intervene(*EVERYTHING):
        _, cache = model.run_with_cache(IDS, SITES)
    call: list[AttentionCall] = []
    with model.intervene(*EVERYTHING), model.envoy.trace(input_ids=torch.tensor([IDS])):
        call.append(model.tap.layers[1].call)
    one = call[0]
    for site, x in (("q", one.query), ("k", one.key), ("v", one.value)):
        assert torch.equal(cache[f"blocks.1.attn.hook_{site}"], x.transpose(1, 2))
    p, v = cache["pattern", 0], cache["v", 0].repeat_interleave(2, dim=2)
    z = torch.einsum("bhqk,bkhd->bqhd", p, v)
    z[:, :, 1] = z[:, :, 1] * (1 + 0.05 * torch.arange(8))[:, None] + 0.1  # the edit of z
    torch.testing.assert_close(cache["z", 0], z, atol=1e-5, rtol=1e-5)


# ------------------------------------------------------------------------- what is left alone


@each_site
@pytest.mark.parametrize("heads", [None, [1]], ids=["all", "one"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@each_kernel
def test_a_function_that_does_nothing_leaves_every_bit(
    site: Site, heads: list[int] | None, mode: Any, kernel: str
) -> None:
    model, batch = watched("qwen3", kernel), batch_of("qwen3", "left")
    with mode():
        plain = model(batch).logits
        for nothing in (lambda x, _: None, lambda x, _: x):
            with model.intervene(Edit(site=site, function=nothing, heads=heads)):
                got = model(batch).logits
            # Returning some heads as they are is no edit either.
            assert torch.equal(got, plain)


def test_interventions_that_name_nothing_leave_every_bit(family: str) -> None:
    model, batch = watched(family), batch_of(family, "right")
    plain = model(batch).logits
    with model.intervene(), model.hooks([]), model.intervene(Bias(value=9.0, keys=slice(20, None))):
        assert torch.equal(model(batch).logits, plain)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@each_kernel
def test_the_key_cache_is_never_written_to(kind: str, cache: str, kernel: str) -> None:
    batch, model = left("qwen3"), watched("qwen3", kernel)
    edits = [replace(one, layers=2) for one in KINDS[kind][0]]  # type: ignore[type-var]
    filled = []
    for some in ([], edits):  # in the last layer, so that nothing that is cached may change
        store = cache_of(cache, model.module)
        with model.intervene(*some):
            model.module(**batch, past_key_values=store, use_cache=True)
            token = torch.tensor([[3], [4]])
            mask = torch.cat([batch["attention_mask"], torch.ones(2, 1).long()], 1)
            model.module(input_ids=token, attention_mask=mask, past_key_values=store)
        filled.append([(layer.keys.clone(), layer.values.clone()) for layer in store.layers])
    for plain, under in zip(*filled, strict=True):
        assert torch.equal(plain[0], under[0])
        assert torch.equal(plain[1], under[1])


def test_an_edit_of_keys_holds_for_its_block_and_not_for_later_reads_of_the_cache() -> None:
    model = watched("llama")
    ids, store = torch.tensor([IDS]), DynamicCache(config=model.config)
    model.module(ids[:, :5], past_key_values=store)
    with model.intervene(Edit(site="k", function=lambda k, _: 0 * k, layers=-1)):
        model.module(ids[:, 5:6], past_key_values=store)
    got = model.module(ids[:, 6:], past_key_values=store).logits
    wanted = model.module(ids).logits[:, 6:]
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


@each_kernel
def test_behind_a_knock_out_nothing_depends_on_the_token_that_was_hidden(
    family: str, kernel: str
) -> None:
    model = watched(family, kernel)
    hidden = Bias(value=-torch.inf, queries=slice(4, None), keys=3)
    with model.intervene(hidden):
        logits = [model([5, 6, 7, token, 9, 1, 2, 3]).logits[0] for token in (8, 60)]
        steps = [
            model.generate(
                [5, 6, 7, token, 9],
                max_new_tokens=4,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
            ).logits
            for token in (8, 60)
        ]
    others = [0, 1, 2, 4, 5, 6, 7]
    assert torch.equal(logits[0][others], logits[1][others])
    assert not torch.equal(logits[0][3], logits[1][3])
    assert all(torch.equal(a, b) for a, b in zip(*steps, strict=True))


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_sequence_is_changed_alike_alone_and_in_a_batch_of_very_different_lengths(
    family: str, side: str, bare: Bare
) -> None:
    class Padder:
        padding_side, pad_token_id = side, 9

    model = bare(family)
    model.tokenizer = Padder()
    rows = [list(range(1, 31)), [4], [3, 8, 2]]
    with model.intervene(
        Bias(value=2.0, keys="first:2"),
        Bias(value=-1.0, queries=-1, keys="last:2"),
        Edit(site="z", function=lambda z, call: z * (1 + call.where.query[:, :, None, None])),  # type: ignore[union-attr]
    ):
        batch, mask = model(rows).logits, real_rows(model.batch(rows))
        for i, row in enumerate(rows):
            alone = model([row]).logits[0]
            torch.testing.assert_close(batch[i][mask[i]], alone, atol=1e-5, rtol=1e-5)


def test_heads_of_keys_are_key_heads_and_heads_of_queries_read_theirs() -> None:
    model = watched("llama")  # 4 query heads on 2 key heads
    _, plain = model.run_with_cache(IDS, "pattern", layers=0)
    with model.intervene(Edit(site="k", function=lambda k, _: 0 * k, heads=[1], layers=0)):
        _, cache = model.run_with_cache(IDS, ("pattern", "k"), layers=0)
    assert torch.equal(cache["pattern", 0][:, :2], plain["pattern", 0][:, :2])
    flat = torch.ones(8, 8).tril() / torch.arange(1, 9)[:, None]
    torch.testing.assert_close(cache["pattern", 0][:, 2:], flat.expand(1, 2, 8, 8))
    assert float(cache["k", 0][:, :, 1].abs().max()) == 0


def test_dropout_in_training_stays_and_is_drawn_where_scores_are_edited(bare: Bare) -> None:
    model = bare("llama")
    for layer in model.base.model.layers:  # type: ignore[union-attr]
        layer.self_attn.attention_dropout = 0.5
    model.module.train()
    with model.intervene(Edit(site="pattern", function=lambda p, _: p.clone())):
        torch.manual_seed(0)
        one, two = model(IDS).logits, model(IDS).logits
        torch.manual_seed(0)
        again = model(IDS).logits
    assert torch.equal(one, again)
    assert not torch.allclose(one, two, atol=1e-3)
