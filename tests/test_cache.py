"""What a cache keeps, against eager attentions and projections by hand; its dataset, its loss."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor

import probe
from probe.errors import InputError
from probe.interventions import SITES, Bias, Site
from tests.edited import watched
from tests.models import Bare
from tests.models import bare as bare
from tests.references import (
    batch_of,
    each_dtype,
    each_kernel,
    each_padding,
    eager,
    real_rows,
    untouched,
)

IDS = [5, 6, 7, 8, 9, 1, 2, 3]
RAGGED = [IDS, [3, 1, 4, 1, 5], [2]]


@each_padding
@each_kernel
@pytest.mark.parametrize("grad", [True, False])
def test_patterns_scores_and_z_are_those_of_an_eager_copy(
    family: str, kernel: str, padding: str, grad: bool
) -> None:
    batch, model = batch_of(family, padding), watched(family, kernel)
    with torch.set_grad_enabled(grad):
        logits, cache = model.run_with_cache(batch, ("pattern", "scores", "z", "v"))
        attentions = eager(family, model.batch(batch))
    assert torch.equal(logits, model(batch).logits)
    rows = real_rows(batch)
    for layer, wanted in enumerate(attentions):
        p, s = cache["pattern", layer], cache["scores", layer]
        real = rows[:, None, :, None]
        torch.testing.assert_close(p * real, wanted * real, atol=5e-6, rtol=0)
        torch.testing.assert_close(s.softmax(-1).nan_to_num(0.0), p, atol=1e-6, rtol=0)
        v = cache["v", layer]
        v = v.repeat_interleave(4 // v.shape[2], dim=2)
        z = torch.einsum("bhqk,bkhd->bqhd", wanted, v) * rows[:, :, None, None]
        torch.testing.assert_close(cache["z", layer] * rows[:, :, None, None], z, atol=1e-5, rtol=0)
        assert p.requires_grad == grad


@each_kernel
def test_queries_keys_and_values_are_the_projections(kernel: str) -> None:
    model, batch = watched("gpt2", kernel), batch_of("gpt2", "no")
    seen: list[Tensor] = []
    projection = model.base.get_submodule("transformer.h.1.attn.c_attn")
    handle = projection.register_forward_hook(lambda _, __, x: seen.append(x))
    _, cache = model.run_with_cache(batch, ("q", "k", "v"), layers=1)
    handle.remove()
    for site, wanted in zip(("q", "k", "v"), seen[0].chunk(3, dim=-1), strict=True):
        torch.testing.assert_close(cache[site, 1], wanted.reshape(2, 11, 4, 8))


def test_queries_and_keys_are_after_norm_and_rotation(family: str) -> None:
    model, batch = watched(family), batch_of(family, "no")
    _, cache = model.run_with_cache(batch, ("q", "k", "scores"), layers=2)
    k = cache["k", 2]
    k = k.repeat_interleave(4 // k.shape[2], dim=2)
    scaling = 8**-0.5 / (3 if family == "gpt2" else 1)  # GPT-2's third layer divides by 3
    s = torch.einsum("bqhd,bkhd->bhqk", cache["q", 2], k) * scaling
    seen = cache["scores", 2] != -torch.inf
    torch.testing.assert_close(s[seen], cache["scores", 2][seen], atol=1e-5, rtol=0)


@each_dtype
def test_matrices_are_wide_and_the_rest_is_in_the_models_dtype(dtype: torch.dtype) -> None:
    _, cache = watched("llama", "sdpa", dtype).run_with_cache(IDS, SITES, layers=0)
    assert {site: cache[site, 0].dtype for site in ("pattern", "scores")} == {
        "pattern": torch.float32,
        "scores": torch.float32,
    }
    assert all(cache[site, 0].dtype == dtype for site in ("q", "k", "v", "z"))
    with torch.no_grad():
        _, exact = watched("llama", "sdpa", torch.float64).run_with_cache(IDS, SITES, layers=0)
    assert all(x.dtype == torch.float64 for x in exact.values())


SELECTIONS: dict[str, tuple[dict[str, Any], dict[str, list[int]]]] = {
    "last rows": ({"queries": "last:2"}, {"query": [6, 7]}),
    "rows in any order": ({"queries": [3, 1]}, {"query": [3, 1]}),
    "columns": ({"keys": slice(1, 3)}, {"key": [1, 2]}),
    "both": ({"keys": [4, 0], "queries": -1}, {"key": [4, 0], "query": [7]}),
    "heads": ({"heads": [3, 1]}, {"head": [3, 1]}),
    "one head": ({"heads": -1, "keys": "first:3"}, {"head": [3], "key": [0, 1, 2]}),
}
AXES: dict[Site, tuple[str, ...]] = {
    "q": ("query", "head"),
    "k": ("key",),
    "v": ("key",),
    "scores": ("head", "query", "key"),
    "pattern": ("head", "query", "key"),
    "z": ("query", "head"),
}


@pytest.mark.parametrize("what", SELECTIONS)
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("intervene", [False, True])
def test_a_selection_is_that_part_of_everything(what: str, grad: bool, intervene: bool) -> None:
    model = watched("qwen3")
    selection, picks = SELECTIONS[what]
    some = [Bias(value=2.0, keys=0)] if intervene else []
    double = [(("pattern", 0), lambda p, _: 2 * p)] if intervene else []
    with torch.set_grad_enabled(grad), model.intervene(*some), model.hooks(double):
        _, whole = model.run_with_cache([IDS, IDS[::-1]], SITES)
        _, part = model.run_with_cache([IDS, IDS[::-1]], SITES, **selection)
    for site, axes in AXES.items():
        for layer in range(3):
            wanted = whole[site, layer]
            for axis, index in picks.items():
                if axis in axes:
                    wanted = wanted.index_select(1 + axes.index(axis), torch.tensor(index))
            torch.testing.assert_close(part[site, layer], wanted, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("grad", [True, False])
def test_a_selection_goes_by_the_tokens_of_each_sequence(
    family: str, side: str, grad: bool, bare: Bare
) -> None:
    class Padder:
        padding_side, pad_token_id = side, 9

        def decode(self, ids: list[int]) -> str:
            return "".join(f"<{i}>" for i in ids)

    model = bare(family)
    model.tokenizer = Padder()
    with torch.set_grad_enabled(grad):
        _, cache = model.run_with_cache(RAGGED[:2], SITES, queries="last:2", keys=[-1, 0])
        for i, ids in enumerate(RAGGED[:2]):
            _, alone = model.run_with_cache([ids], SITES)
            for layer in range(3):
                for site in ("pattern", "scores"):
                    wanted = alone[site, layer][0, :, -2:][:, :, [-1, 0]]
                    torch.testing.assert_close(cache[site, layer][i], wanted, atol=1e-5, rtol=1e-5)
                for site in ("q", "z"):
                    wanted = alone[site, layer][0, -2:]
                    torch.testing.assert_close(cache[site, layer][i], wanted, atol=1e-5, rtol=1e-5)
                for site in ("k", "v"):
                    wanted = alone[site, layer][0, [-1, 0]]
                    torch.testing.assert_close(cache[site, layer][i], wanted, atol=1e-5, rtol=1e-5)
    ds = cache.to_xarray()
    assert ds.query_position.values.tolist() == [[6, 7], [3, 4]]
    assert ds.key_position.values.tolist() == [[7, 0], [4, 0]]
    assert ds.token.values.tolist() == [["<3>", "<5>"], ["<5>", "<3>"]]
    assert ds.length.values.tolist() == [8, 5]


def test_a_selection_of_different_sizes_is_refused() -> None:
    message = r"queries=slice\(2, None, None\) selects 6, 3 tokens .* Select as many of each"
    with pytest.raises(InputError, match=message):
        watched("llama").run_with_cache(RAGGED[:2], queries=slice(2, None))


def test_gradients_flow_through_the_cache_to_the_weights() -> None:
    model, batch = watched("llama"), batch_of("llama", "right")
    rows = real_rows(batch)[:, None, :, None]
    weights = [p for n, p in model.base.named_parameters() if "q_proj" in n or "k_proj" in n]
    _, cache = model.run_with_cache(batch, "pattern")
    loss = sum(((cache["pattern", i] * rows) ** 2).sum() for i in range(3))
    got = torch.autograd.grad(loss, weights)  # type: ignore[arg-type]
    copy = untouched("llama", "eager")
    theirs = [p for n, p in copy.named_parameters() if "q_proj" in n or "k_proj" in n]
    attentions = copy(**batch, output_attentions=True).attentions
    wanted = torch.autograd.grad(sum(((a * rows) ** 2).sum() for a in attentions), theirs)
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4)


# ----------------------------------------------------------------------------- as a mapping


def test_a_cache_is_a_mapping_of_full_names() -> None:
    _, cache = watched("llama").run_with_cache(IDS, ("z", "pattern"), layers=[0, -1])
    assert list(cache) == [
        "blocks.0.attn.hook_pattern",
        "blocks.0.attn.hook_z",
        "blocks.2.attn.hook_pattern",
        "blocks.2.attn.hook_z",
    ]
    assert len(cache) == 4
    assert cache["z", -1] is cache["blocks.2.attn.hook_z"] is cache["blocks.-1.attn.hook_z"]
    assert "blocks.2.attn.hook_z" in cache
    places: list[Any] = [("z", 2), ("z", 1)]
    assert [place in cache for place in places] == [True, False]
    assert "nonsense" not in cache
    assert repr(cache).startswith("<Cache: blocks.0.attn.hook_pattern, ")
    message = "('z', 1) was not kept. This cache has pattern, z of layers 0, 2."
    with pytest.raises(KeyError, match=re.escape(message)):
        cache["z", 1]
    with pytest.raises(InputError, match=r"\('z', None\) names 3 activations\. Name one\."):
        cache["z", None]
    with pytest.raises(InputError, match=r"'nonsense' names no activation"):
        cache["nonsense"]


def test_a_names_filter_chooses_instead_of_sites_and_layers() -> None:
    _, cache = watched("llama").run_with_cache(
        IDS, names_filter=lambda n: n.endswith("1.attn.hook_z")
    )
    assert list(cache) == ["blocks.1.attn.hook_z"]
    _, cache = watched("llama").run_with_cache(IDS, names_filter=re.compile("0.*(scores|_v)"))
    assert list(cache) == ["blocks.0.attn.hook_v", "blocks.0.attn.hook_attn_scores"]


def test_what_cannot_be_kept_is_refused() -> None:
    model = watched("llama")
    with pytest.raises(InputError, match=r"sites=\(\) keeps nothing\. Name at least one"):
        model.run_with_cache(IDS, ())
    with pytest.raises(InputError, match=r"\('mlp', None\) names no activation"):
        model.run_with_cache(IDS, "mlp")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"queries=8 is out of range: problem '0' has 8 tokens"):
        model.run_with_cache(IDS, queries=8)
    with pytest.raises(InputError, match=r"heads=4 is out of range"):
        model.run_with_cache(IDS, heads=4)
    with pytest.raises(InputError, match=r"labels what it keeps by token ids, and these inputs"):
        model.run_with_cache({"inputs_embeds": torch.zeros(1, 3, 32)})
    assert model.run_with_cache(IDS, return_type=None)[0] is None


def test_the_loss_is_naive_cross_entropy_over_the_tokens_of_all_sequences(
    family: str, bare: Bare
) -> None:
    model = bare(family)
    model.module.requires_grad_(requires_grad=False)
    total, n = 0.0, 0
    for ids in RAGGED:
        each = model.module(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        total -= sum(float(each[i, token]) for i, token in enumerate(ids[1:]))
        n += len(ids) - 1
    loss, _ = model.run_with_cache(RAGGED, layers=0, return_type="loss")
    assert float(loss) == pytest.approx(total / n, rel=1e-5)
    logits, again = model.run_with_hooks(RAGGED, return_type="both")
    assert logits.shape == (3, 8, 64)
    assert float(again) == pytest.approx(total / n, rel=1e-5)
    assert bool(model.run_with_hooks([7], return_type="loss").isnan())  # nothing follows it


def test_a_loss_needs_a_mask_that_shows_padding() -> None:
    model = watched("llama")
    square = torch.ones(8, 8).tril().bool()[None, None]
    batch = {"input_ids": torch.tensor([IDS]), "attention_mask": square}
    with torch.no_grad():
        logits, _ = model.run_with_cache(batch)
        torch.testing.assert_close(logits, model(IDS).logits, atol=1e-5, rtol=1e-5)
    with pytest.raises(InputError, match=r"mask of shape \(1, 1, 8, 8\) does not tell from text"):
        model.run_with_cache(batch, return_type="loss")


def test_segments_are_chosen_as_in_a_capture() -> None:
    with probe.load("demo-llama") as model:
        texts = ["abcabc", "abc"]
        _, cache = model.run_with_cache(texts, sites="pattern", keys="segment:bos", queries=-1)
        _, whole = model.run_with_cache(texts, sites="pattern")
        for item, length in enumerate((7, 4)):
            wanted = whole["pattern", 1][item, :, length - 1, :1]
            torch.testing.assert_close(cache["pattern", 1][item, :, 0], wanted)
        with pytest.raises(InputError, match=r"no segment 'latent' \(it has: bos, text\)"):
            model.run_with_cache("abc", queries="segment:latent")


def test_selections_that_can_be_read_only_once_serve_everywhere() -> None:
    model, ids = watched("llama"), [[5, 6, 7, 8], [1, 2, 3]]
    once: Any = {"layers": iter([0, 2]), "queries": iter([0, 2])}
    _, cache = model.run_with_cache(ids, **once)
    _, wanted = model.run_with_cache(ids, layers=[0, 2], queries=[0, 2])
    assert list(cache) == list(wanted)
    assert all(torch.equal(cache[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("sites", [None, 3])
def test_sites_that_are_no_list_are_refused(sites: Any) -> None:
    with pytest.raises(InputError, match=rf"sites={sites}\. Choose from q, k, v, scores, pattern"):
        watched("llama").run_with_cache([5, 6], sites=sites)


@pytest.mark.parametrize("queries", [None, -1])
def test_a_sequence_that_is_all_padding_is_refused(queries: Any) -> None:
    ids = torch.tensor([[5, 6, 7], [5, 6, 7]])
    batch = {"input_ids": ids, "attention_mask": torch.tensor([[1, 1, 1], [0, 0, 0]])}
    with pytest.raises(InputError, match=r"attention_mask hides every token of sequence 1"):
        watched("llama").run_with_cache(batch, queries=queries)


def test_the_long_form_of_transformer_lens_names_the_same(bare: Bare) -> None:
    _, cache = bare("llama").run_with_cache([[1, 2, 3]], sites="pattern")
    assert cache["pattern", 1, "attn"] is cache["pattern", 1]  # type: ignore[index]
