"""A sweep equals full forwards under hooks on a plain model, one head at a time, and costs less."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import probe
from probe.errors import InputError
from recipes.ablation import Ablate, sweep
from recipes.architectures_tiny import SPECIAL, quiet, tiny
from tests.ablated import PATTERNS, logits_of, mean_nll, nll, without, z_of
from tests.conftest import FAMILIES
from tests.edited import ByToken, watched
from tests.models import bare as bare
from tests.models import demo as demo
from tests.references import no_grad as no_grad
from tests.references import untouched


def drawn(*lengths: int, seed: int = 0) -> list[list[int]]:
    random = torch.Generator().manual_seed(seed)
    return [torch.randint(1, SPECIAL, (n,), generator=random).tolist() for n in lengths]


FIRST, SECOND = PROBLEMS = drawn(9, 9)  # each can be resampled from the other alone


def by_hand(
    family: str, mode: str, ids: list[int], other: list[int], dtype: torch.dtype = torch.float32
) -> np.ndarray[Any, Any]:
    """(layer, head, token but the first): nll without the head, less that with it.

    Args:
        family: Of the model, which runs as transformers has it.
        mode: What stands in place of the head.
        ids: A problem.
        other: From which it is resampled, and that is part of the mean.
        dtype: Of the model.
    """
    plain = untouched(family, "sdpa", dtype)
    each = [z_of(plain, some) for some in (ids, other)]
    start, tokens = torch.zeros(1, dtype=torch.long), torch.tensor([len(ids)])
    found = []
    for layer, head in np.ndindex(3, 4):
        new = torch.zeros(1)
        if mode == "mean":
            new = torch.cat([z[layer] for z in each]).double().mean(0)[head]
        elif mode == "resample":
            new = each[1][layer][: len(ids), head]
        if mode in PATTERNS:

            def step(
                la: int, p: Tensor, *at: Tensor, layer: int = layer, head: int = head
            ) -> Tensor:
                out = p.clone()
                out[:, head] = PATTERNS[mode](la, p, *at)[:, head]
                return out if la == layer else p

            hand = ByToken({"pattern": step}, start, tokens).model(family, dtype)
            found.append(nll(logits_of(hand, ids), ids))
        else:
            found.append(nll(without(plain, ids, layer, head, new), ids))
    base = np.array(nll(logits_of(plain, ids), ids))
    delta: np.ndarray[Any, Any] = np.array(found).reshape(3, 4, -1) - base
    return delta


@pytest.mark.parametrize(
    ("family", "mode"),
    [(family, mode) for family in FAMILIES for mode in ("zero", "resample", "uniform")]
    + [(family, mode) for family in ("mistral", "gpt2") for mode in ("mean", "first", "identity")],
)
def test_a_sweep_is_a_loop_of_full_forwards_with_one_head_out(family: str, mode: Any) -> None:
    ds = sweep(watched(family), PROBLEMS, mode=mode, per_token=True, progress=False)
    wanted = by_hand(family, mode, FIRST, SECOND)
    np.testing.assert_allclose(ds.delta_nll.values[0, ..., :-1], wanted, atol=2e-5)
    np.testing.assert_allclose(ds.delta_loss.values[0], wanted.mean(-1), atol=1e-5)
    assert np.isnan(ds.delta_nll.values[..., -1]).all()
    assert float(abs(ds.delta_loss).max()) > 0.01
    np.testing.assert_array_equal(ds.noop.values, 0)
    np.testing.assert_allclose(ds.random_head, ds.delta_loss.mean(("layer", "head")), rtol=1e-5)
    base = [mean_nll(logits_of(untouched(family), ids), ids) for ids in PROBLEMS]
    np.testing.assert_allclose(ds.loss, base, rtol=1e-5)
    np.testing.assert_allclose(ds.base_loss, base, rtol=1e-5)


def test_on_eager_attention_it_is_the_same(family: str) -> None:
    got = sweep(watched(family, "eager"), PROBLEMS, progress=False).delta_loss
    np.testing.assert_allclose(got[0], by_hand(family, "zero", FIRST, SECOND).mean(-1), atol=1e-5)


@pytest.mark.parametrize("mode", ["zero", "resample", "uniform"])
def test_in_bfloat16_a_sweep_is_as_close_to_float32_as_a_loop(mode: Any) -> None:
    model = watched("qwen2", "sdpa", torch.bfloat16)
    got = sweep(model, PROBLEMS, mode=mode, per_token=True, progress=False).delta_nll[0, ..., :-1]
    exact = by_hand("qwen2", mode, FIRST, SECOND)
    loop = by_hand("qwen2", mode, FIRST, SECOND, torch.bfloat16)
    own, naive = (float(abs(x - exact).mean()) for x in (got.values, loop))
    assert own < 1.2 * naive < abs(exact).mean()


def test_only_chosen_tokens_count_and_only_chosen_heads_are_ablated() -> None:
    model, plain = watched("llama"), untouched("llama")
    ds = sweep(model, PROBLEMS, tokens="last:3", layers=[0, -1], heads=[1, 3], progress=False)
    wanted = by_hand("llama", "zero", FIRST, SECOND)[..., -3:].mean(-1)
    known = np.full_like(wanted, np.nan)
    known[::2, 1::2] = wanted[::2, 1::2]
    np.testing.assert_allclose(ds.delta_loss[0], known, atol=1e-5)
    np.testing.assert_allclose(ds.random_head[0], np.nanmean(known), atol=1e-5)
    base = [mean_nll(logits_of(plain, ids), ids, range(6, 9)) for ids in PROBLEMS]
    np.testing.assert_allclose(ds.base_loss, base, rtol=1e-5)
    whole = [mean_nll(logits_of(plain, ids), ids) for ids in PROBLEMS]
    np.testing.assert_allclose(ds.loss, whole, rtol=1e-5)


def test_problems_of_any_length_are_as_each_alone_even_of_one_token() -> None:
    model, problems = watched("mistral"), drawn(1, 12, 2, 7)
    ds = sweep(model, problems, per_token=True, progress=False)
    for n, ids in enumerate(problems):
        one = sweep(model, [ids], per_token=True, progress=False)
        for name in ("delta_loss", "delta_nll", "base_loss", "noop"):
            rows = {"query": slice(len(ids))} if name == "delta_nll" else {}
            np.testing.assert_array_equal(ds[name][n].isel(rows), one[name][0])
    assert np.isnan(ds.delta_loss[0]).all()  # nothing predicts one token
    assert int(ds.delta_loss[1:].isnull().sum()) == 0
    assert ds.status.values.tolist() == [1] * 4


def test_a_longer_problem_lends_its_first_tokens_when_resampled() -> None:
    problems = drawn(5, 9, 9)
    got = sweep(watched("gpt2"), problems, mode="resample", progress=False).delta_loss
    each = [by_hand("gpt2", "resample", problems[0], other).mean(-1) for other in problems[1:]]
    assert any(np.allclose(got[0], one, atol=1e-5) for one in each)
    with pytest.raises(InputError, match=r"none is as long as '0' \(9 tokens\)\. Cut them with"):
        sweep(watched("gpt2"), drawn(9, 5), mode="resample", progress=False)


# Where the output projections of an architecture are, and whether its blocks can be skipped.
ARCHITECTURES = {
    "phi": ("self_attn.dense", True),  # attention and MLP side by side
    "gpt_neox": ("attention.dense", True),
    "gemma2": ("self_attn.o_proj", True),
    "mixtral": ("self_attn.o_proj", True),  # a mixture of experts
    "opt": ("self_attn.out_proj", True),
    "deepseek_v3": ("self_attn.o_proj", True),  # values wider than keys
    "gpt_oss": ("self_attn.o_proj", True),  # sinks
    "jamba": ("self_attn.o_proj", True),  # layers without attention between
    "falcon": ("self_attention.dense", False),  # adds in place
    "bloom": ("self_attention.dense", False),
    "gptj": ("attn.out_proj", False),
    "gpt_bigcode": ("attn.c_proj", False),
    "bamba": ("self_attn.o_proj", False),
    "zamba2": ("self_attn.o_proj", False),
}


@contextmanager
def zeroed(projection: nn.Module, head: int, heads: int) -> Iterator[None]:
    def hook(_: nn.Module, args: Any) -> Any:
        z = args[0].unflatten(-1, (heads, -1)).clone()
        z[..., head, :] = 0
        return (z.flatten(-2), *args[1:])

    handle = projection.register_forward_pre_hook(hook)
    yield
    handle.remove()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_blocks_are_skipped_where_they_can_be_and_numbers_are_those_of_whole_forwards(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    path, skips = ARCHITECTURES[name]
    plain, (ids,) = tiny(name), drawn(8)
    outs = [m for part, m in plain.named_modules() if part.endswith(path)]
    base = mean_nll(logits_of(plain, ids), ids)
    with quiet(), probe.load(tiny(name)) as model, caplog.at_level(logging.WARNING, "probe"):
        ds = sweep(model, [ids], progress=False)
        told = sweep(model, [ids], mode="uniform", progress=False)
        assert len(outs) == len(model.layers)
        ends = model.layers[0], model.layers[-1]
        for n, (layer, out) in enumerate(zip(model.layers, outs, strict=True)):
            heads = model.tap.shapes[layer].heads
            for head in {0, heads - 1} if layer in ends else ():
                with zeroed(out, head, heads):
                    alone = mean_nll(logits_of(plain, ids), ids) - base
                assert float(ds.delta_loss[0, n, head]) == pytest.approx(alone, abs=2e-5)
                with model.intervene(Ablate([(layer, head)], "uniform")):
                    whole = mean_nll(model([ids]).logits[0], ids) - base
                assert float(told.delta_loss[0, n, head]) == pytest.approx(whole, abs=2e-5)
    assert ("runs whole for every variant" not in caplog.text) == skips
    assert ds.noop.values.tolist() == [0]
