"""Hand-written models: found by themselves or by a layout, read, edited and captured."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import probe
from probe.errors import InputError
from probe.interventions import Bias, Edit
from probe.layout import Layout
from probe.loading import load
from probe.owncode import of_sdpa
from tests.own_models import (
    CONTEXT,
    GPT,
    N_HEADS,
    VOCABULARY,
    WIDTH,
    Body,
    FusedAttention,
    NanoGPT,
    Numbers,
    by_hand,
    hand_written,
)
from tests.references import no_grad as no_grad
from tests.references import photograph, unchanged

LAYOUT = Layout(layers="transformer_blocks", attention="attention")
LAYOUTS = [None, LAYOUT, Layout(**{**vars(LAYOUT), "projection": "out_projection"})]
IDS = torch.arange(22).view(2, 11) * 7 % VOCABULARY


# ------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("layout", LAYOUTS, ids=["found", "named", "with projection"])
def test_it_reads_what_a_hook_recomputes_from_the_attentions_input(layout: Layout | None) -> None:
    assert probe.Layout is Layout
    module = hand_written()
    before, plain = photograph(module), module(IDS)
    model = load(module, layout=layout)
    assert (model.n_layers, model.n_heads, model.n_kv_heads) == (2, N_HEADS, N_HEADS)
    assert (model.vocabulary, model.context, model.tap.causal) == (VOCABULARY, CONTEXT, True)
    logits, cache = model.run_with_cache(IDS)
    assert torch.equal(logits, plain)
    for layer, wanted in enumerate(by_hand(module, IDS)):
        assert torch.equal(cache["pattern", layer], wanted["pattern"])
        assert torch.equal(cache["scores", layer], wanted["scores"])
        torch.testing.assert_close(cache["z", layer], wanted["z"], atol=1e-6, rtol=1e-6)
    model.close()
    unchanged(module, before)
    assert torch.equal(module(IDS), plain)


def test_one_that_calls_the_fused_kernel_is_read_like_one_that_does_not() -> None:
    slow, fast = hand_written(), hand_written(NanoGPT)
    twin = {name: w for name, w in slow.state_dict().items() if "attention" not in name}
    fast.load_state_dict(twin, strict=False)
    for a, b in zip(slow.transformer_blocks, fast.transformer_blocks, strict=True):
        parts = (a.attention.W_query, a.attention.W_key, a.attention.W_value)
        b.attention.c_attn.weight.copy_(torch.cat([part.weight for part in parts]))
        b.attention.c_attn.bias.zero_()
        b.attention.c_proj.load_state_dict(a.attention.out_projection.state_dict())
    with load(fast) as model:
        assert model.tap.implementation == "own code: sdpa"
        logits, cache = model.run_with_cache(IDS)
        torch.testing.assert_close(logits, slow(IDS), atol=1e-5, rtol=1e-5)
        for layer, wanted in enumerate(by_hand(slow, IDS)):
            for site in ("scores", "pattern", "z"):
                got = cache[site, layer]
                torch.testing.assert_close(got, wanted[site], atol=5e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", [GPT, NanoGPT])
def test_a_sequence_alone_reads_as_it_does_in_a_padded_batch(kind: Any) -> None:
    texts = [[5, 6, 7, 8, 9], [3, 4, 5]]
    with load(hand_written(kind)) as model:
        _, both = model.run_with_cache(texts, sites="pattern")
        _, alone = model.run_with_cache(texts[1], sites="pattern")
        got = both["pattern", 1][1:, :, :3, :3]
        torch.testing.assert_close(got, alone["pattern", 1], atol=1e-6, rtol=1e-5)
        bias = Bias(value=-math.inf, queries=-1, keys=0)  # of the third token, in the second text
        with model.intervene(bias):
            _, cache = model.run_with_cache(texts, sites="pattern")
        assert float(cache["pattern", 0][1, :, 2, 0].max()) == 0
        assert float(cache["pattern", 0][0, :, 2, 0].min()) > 0


# ------------------------------------------------------------------------------------- editing


def softmaxed(edit: Callable[[Tensor], Tensor]) -> Any:
    return lambda scores, dim: edit(torch.Tensor.softmax(scores, dim))


@pytest.mark.parametrize("layout", LAYOUTS[:2], ids=["found", "named"])
def test_an_edited_pattern_changes_the_logits_as_a_replaced_softmax_does(
    layout: Layout | None,
) -> None:
    def edit(pattern: Tensor) -> Tensor:
        return pattern * torch.linspace(0.5, 1.5, pattern.shape[-1])

    with load(hand_written(), layout=layout) as model:
        with model.intervene(Edit(site="pattern", function=lambda p, _: edit(p))):
            got = model(IDS)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "softmax", softmaxed(edit))
            wanted = model.module(IDS)
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)
        assert float((got - model(IDS)).abs().max()) > 1e-2


@pytest.mark.parametrize("kind", [GPT, NanoGPT])
def test_hooks_and_traces_change_what_a_hand_written_model_says(kind: Any) -> None:
    with load(hand_written(kind)) as model:
        plain = model.run_with_hooks(IDS)
        hooked = model.run_with_hooks(IDS, [(("z", 0), lambda z, hook: 0 * z)])
        traced: list[Tensor] = []
        with model.envoy.trace(IDS):
            model.tap.layers[0].z = 0 * model.tap.layers[0].z
            traced.append(model.envoy.head.output)
        torch.testing.assert_close(hooked, traced[0], atol=1e-6, rtol=1e-6)
        assert not torch.allclose(hooked, plain, atol=1e-2)
        loss = model.run_with_hooks(IDS, return_type="loss")
        wanted = F.cross_entropy(plain[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
        torch.testing.assert_close(loss, wanted)


def test_each_step_of_a_models_own_generation_is_changed() -> None:
    with load(hand_written(NanoGPT)) as model:
        module = cast(Any, model.module)
        plain = module.generate(IDS, 4)
        with model.intervene(Edit(site="z", function=lambda z, _: -z)):
            changed = module.generate(IDS, 4)
        assert plain.shape == changed.shape == (2, 15)
        assert not torch.equal(plain, changed)
        with pytest.raises(InputError, match=r"NanoGPT has no method generate, or one of its own"):
            model.generate(IDS)


def test_a_loss_on_patterns_trains_a_hand_written_model() -> None:
    module = hand_written()
    with load(module) as model, torch.enable_grad():
        _, cache = model.run_with_cache(IDS, sites="pattern")
        torch.autograd.backward(cache["pattern", 0].square().sum())
        got = module.transformer_blocks[0].attention.W_query.weight.grad.clone()
        module.zero_grad()
        torch.autograd.backward(by_hand(module, IDS)[0]["pattern"].square().sum())
        wanted = module.transformer_blocks[0].attention.W_query.weight.grad
        torch.testing.assert_close(got, wanted, atol=1e-6, rtol=1e-5)


# ------------------------------------------------------------------------------------- capturing


@pytest.mark.parametrize("kind", [GPT, NanoGPT])
def test_it_is_captured_into_a_store_with_its_story(kind: Any, tmp_path: Path) -> None:
    module = hand_written(kind)
    texts = [[5, 6, 7, 8, 9], [3, 4, 5], [1, 2]]
    path = tmp_path / "problems.jsonl"
    path.write_text("".join(f'{{"text": "{" ".join(map(str, t))}"}}\n' for t in texts))
    with load(module, Numbers()) as model:
        options: dict[str, Any] = {"sites": ("pattern", "scores", "z"), "dtype": "float32"}
        ds = probe.capture(model, path, tmp_path / "run.zarr", progress=False, **options)
        again = probe.capture(model, path, tmp_path / "run.zarr", progress=False, **options)
        fingerprint = model.fingerprint()
        module.head.weight[0, 0] += 1
        assert model.fingerprint() != fingerprint
        module.head.weight[0, 0] -= 1
    assert ds.attrs["model_class"] == ds.attrs["model"] == kind.__name__
    assert ds.attrs["attn_implementation"].startswith("own code: s")
    assert ds.attrs["dtype"] == "float32"
    assert ds.identical(again)
    for n, text in enumerate(texts):
        with load(module) as model:
            logits, cache = model.run_with_cache(text)
        n_tokens = len(text)
        got = ds.pattern.isel(problem=n, query=slice(n_tokens), key=slice(n_tokens)).values
        for layer in range(2):
            wanted = cache["pattern", layer][0].numpy()
            np.testing.assert_allclose(got[layer], wanted, atol=1e-6)
        loss = F.cross_entropy(logits[0, :-1], torch.tensor(text[1:]))
        assert float(ds.loss[n]) == pytest.approx(float(loss), abs=1e-5)


def test_logits_of_the_last_token_alone_give_no_loss(tmp_path: Path) -> None:
    class Last(NanoGPT):
        def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, None]:
            return self.logits(idx)[:, [-1]], None

    with load(hand_written(Last), Numbers()) as model:
        ds = probe.capture(model, ["5 6 7"], tmp_path / "run.zarr", progress=False)
    assert int(ds.status[0]) == 1
    assert bool(np.isnan(ds.loss[0]))


def test_a_model_that_returns_no_logits_says_so() -> None:
    class Trunk(Body):
        def forward(self, idx: Tensor) -> dict[str, Tensor]:
            return {"hidden": self.logits(idx)}

    with load(hand_written(Trunk)) as model:
        with pytest.raises(
            InputError, match=r"Trunk returned a dict without logits .*return_type="
        ):
            model.run_with_cache(IDS)
        _, cache = model.run_with_cache(IDS, return_type=None)
        assert cache["pattern", 0].shape == (2, N_HEADS, 11, 11)


def test_a_causal_row_alone_on_the_fused_kernel_sees_its_first_key_alone() -> None:
    """As PyTorch means it, which aligns a causal mask at the top left."""
    q, k = torch.randn(1, 2, 1, 4), torch.randn(1, 2, 3, 4)
    given: dict[str, Any] = {"query": q, "key": k, "value": k, "attn_mask": None}
    given |= {"dropout_p": 0.0, "is_causal": True, "scale": None, "enable_gqa": False}
    wanted = F.scaled_dot_product_attention(q, k, k, is_causal=True)
    call = of_sdpa(given, 0)
    torch.testing.assert_close(call.mix(call.pattern()), wanted.transpose(1, 2))


@pytest.mark.parametrize("shape", [(3, 3), (2, 3, 3), (1, 2, 3, 3), (2, 1, 1, 3)])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_masks_of_the_fused_kernel_of_any_shape_are_read(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    random = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 2, 3, 4, generator=random) for _ in range(3))
    mask = torch.rand(shape, generator=random) > 0.3
    mask[..., 0] = True
    if dtype != torch.bool:
        mask = torch.where(mask, torch.rand(shape, generator=random), -math.inf)
    given: dict[str, Any] = {"query": q, "key": k, "value": v, "attn_mask": mask}
    given |= {"dropout_p": 0.0, "is_causal": False, "scale": 0.7, "enable_gqa": False}
    wanted = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.7)
    call = of_sdpa(given, 0)
    torch.testing.assert_close(call.mix(call.pattern()), wanted.transpose(1, 2))


def test_grouped_queries_of_a_hand_written_model_are_read_unrepeated() -> None:
    class Grouped(FusedAttention):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.c_attn(x).split(WIDTH, dim=2)
            q = q.view(*x.shape[:2], N_HEADS, -1).transpose(1, 2)
            k, v = (y[..., :16].reshape(*x.shape[:2], 2, 8).transpose(1, 2) for y in (k, v))
            z = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            projected: Tensor = self.c_proj(z.transpose(1, 2).reshape(x.shape))
            return projected

    module = hand_written(lambda: GPT(Grouped))
    with load(module) as model:
        assert (model.n_heads, model.n_kv_heads) == (4, 2)
        logits, cache = model.run_with_cache(IDS, sites=("pattern", "k"))
        assert torch.equal(logits, module(IDS))
        assert cache["k", 0].shape == (2, 11, 2, 8)
