"""Activations of another run put in place, by `Patch`, head by head, and along paths."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import probe
from probe.interventions import SITES, Site
from recipes import patching
from recipes.ablation import Patch
from recipes.architectures_tiny import quiet, tiny
from tests.ablated import OUT, PAIRS, logits_of, on_z, z_of
from tests.edited import STEPS, Step, by_token, cache_of, generated, watched
from tests.references import LENGTHS, batch_of, real_rows, untouched
from tests.references import no_grad as no_grad

each_site = pytest.mark.parametrize("site", SITES)
TOLERANCE: dict[str, Any] = {"atol": 1e-5, "rtol": 1e-5}
CLEAN, CORRUPT = [5, 9, 2, 7, 1, 8, 3], [5, 9, 4, 7, 6, 8, 2]
KEYED = ("k", "v")


def answer(logits: Tensor) -> Tensor:
    return logits[:, -1, 11] - logits[:, -1, 12]


def other(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Other tokens in the same places."""
    return {**batch, "input_ids": (batch["input_ids"] * 7) % 60 + 1}


def stored(site: str, family: str, batch: Any, padding: str) -> list[Tensor]:
    """A site of every layer in a run of attention by hand."""
    found: list[Tensor] = []

    def keep(_: int, x: Tensor, *__: Any) -> Tensor:
        found.append(x.clone())
        return x

    by_token({site: keep}, padding).model(family)(**batch)
    return found


def replaced(site: str, values: Sequence[Tensor], chosen: dict[int, list[int]] | None) -> Step:
    dim = 1 if site in ("scores", "pattern") else 2

    def step(layer: int, x: Tensor, *_: Any) -> Tensor:
        if chosen is None:
            return values[layer]
        index = torch.tensor(chosen[layer])
        return x.index_copy(dim, index, values[layer].index_select(dim, index))

    return step


@each_site
@pytest.mark.parametrize(
    ("kernel", "padding"), [("sdpa", "no"), ("sdpa", "left"), ("eager", "left"), ("eager", "right")]
)
def test_every_site_is_replaced_as_by_hand(
    family: str, kernel: str, padding: str, site: Site
) -> None:
    model, batch = watched(family, kernel), batch_of(family, padding)
    rows = real_rows(batch)
    _, cache = model.run_with_cache(other(batch), sites=site)
    values = stored(site, family, model.batch(other(batch)), padding)
    chosen = {0: [1], 1: [0, 1], 2: [1]} if site in KEYED else OUT
    pairs = [(la, h) for la, own in chosen.items() for h in own] if site in KEYED else PAIRS
    for one, some in ((Patch(cache, site), None), (Patch(cache, site, heads=pairs), chosen)):
        with model.intervene(one):
            got = model(batch).logits[rows]
        hand = by_token({site: replaced(site, values, some)}, padding).model(family)
        wanted = hand(**model.batch(batch)).logits[rows]
        torch.testing.assert_close(got, wanted, **TOLERANCE)
        assert float((got - model(batch).logits[rows]).abs().max()) > 1e-3


def test_with_all_z_of_the_last_layer_only_what_comes_before_differs(family: str) -> None:
    model, plain = watched(family), untouched(family)
    _, cache = model.run_with_cache(CORRUPT, sites="z")
    zs = z_of(plain, CORRUPT)
    with model.intervene(Patch(cache)):
        got = model([CLEAN]).logits[0]
    with on_z(plain, lambda layer, _: zs[layer][None]):
        torch.testing.assert_close(got, logits_of(plain, CLEAN), **TOLERANCE)
    with model.intervene(Patch(cache)):  # the tokens of the other run, and nothing is left
        same = model([CORRUPT]).logits[0]
    torch.testing.assert_close(same, logits_of(plain, CORRUPT), **TOLERANCE)


@each_site
def test_tokens_are_matched_by_position_whatever_the_padding(site: Site) -> None:
    model = watched("llama")
    right, batch = batch_of("llama", "right"), batch_of("llama", "left")
    values = stored(site, "llama", model.batch(other(batch)), "left")
    moved = other(batch)["input_ids"]
    moved[1] = moved[1].roll(LENGTHS[1] - LENGTHS[0])
    _, cache = model.run_with_cache({**right, "input_ids": moved}, sites=site)
    with model.intervene(Patch(cache, site)):
        got = model(batch).logits
    hand = by_token({site: replaced(site, values, None)}, "left").model("llama")
    wanted, rows = hand(**model.batch(batch)).logits, real_rows(batch)
    torch.testing.assert_close(got[rows], wanted[rows], **TOLERANCE)


@each_site
def test_a_cache_of_one_input_serves_a_batch_and_some_tokens(site: Site) -> None:
    model, batch = watched("gpt2"), batch_of("gpt2", "no")
    ids = other(batch)["input_ids"][:1]
    _, cache = model.run_with_cache(ids, sites=site)
    values = [x.expand(2, *x.shape[1:]) for x in stored(site, "gpt2", {"input_ids": ids}, "no")]

    def rows(layer: int, x: Tensor, *_: Any) -> Tensor:
        x, new = x.clone(), values[layer]
        if site in ("scores", "pattern"):
            x[:, :, 2:4] = new[:, :, 2:4]
        else:
            x[:, 2:4] = new[:, 2:4]
        return x

    with model.intervene(Patch(cache, site, queries=[2, 3])):
        got = model(batch).logits
    hand = by_token({site: rows}, "no").model("gpt2")
    torch.testing.assert_close(got, hand(**batch).logits, **TOLERANCE)


@each_site
def test_in_generation_tokens_of_the_prompt_stay_replaced(site: Site) -> None:
    model, batch = watched("llama"), {"input_ids": batch_of("llama", "no")["input_ids"]}
    _, cache = model.run_with_cache(other(batch), sites=site)
    with model.intervene(Patch(cache, site, queries="first:5")):
        got = generated(model.module, batch, cache_of("dynamic", model.module))
    values = stored(site, "llama", other(batch), "no")

    def first(layer: int, x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        x, new = x.clone(), values[layer]
        if site in KEYED:
            x[:, :5] = new[:, :5]
        elif rows.shape[1] > 1:  # and not one token at a time
            matrix = site in ("scores", "pattern")
            at = (..., slice(5), slice(None)) if matrix else (slice(None), slice(5))
            x[at] = new[at]
        return x

    hand = by_token({site: first}, "no", grows=True).model("llama")
    wanted = generated(hand, batch, cache_of("whole", hand))
    assert len(got.logits) == STEPS
    torch.testing.assert_close(got.logits, wanted.logits, **TOLERANCE)


def test_what_is_there_already_changes_no_bit(family: str) -> None:
    model = watched(family)
    assert not patching.heads(model, CLEAN, CLEAN, answer, batch_size=1).values.any()
    together = patching.heads(model, CLEAN, CLEAN, answer)  # a batch is rounded otherwise
    assert float(abs(together).max()) < 1e-6
    receivers: list[Any] = [("k", 1, 0), ("q", 2, 3), ("v", -1, 1)]
    for heard, freeze in ((None, False), (None, True), (receivers, False), (receivers, True)):
        found = patching.paths(
            model, CLEAN, CLEAN, answer, senders=[(0, 1), (-1, 3)], receivers=heard,
            freeze_mlps=freeze,
        )  # fmt: skip
        assert found == {(0, 1): 0, (2, 3): 0}


@pytest.mark.parametrize("queries", [None, "last:2"])
def test_heads_are_patched_one_at_a_time(family: str, queries: Any) -> None:
    plain, zs = untouched(family), z_of(untouched(family), CORRUPT)
    rows = slice(None) if queries is None else slice(-2, None)
    got = patching.heads(watched(family), CLEAN, CORRUPT, answer, queries=queries, batch_size=3)
    base = float(answer(logits_of(plain, CLEAN)[None]))
    wanted = torch.zeros(3, 4)
    for layer, head in np.ndindex(3, 4):

        def put(la: int, z: Tensor, layer: int = layer, head: int = head) -> Tensor | None:
            z = z.clone()
            z[0, rows, head] = zs[layer][rows, head]
            return z if la == layer else None

        with on_z(plain, put):
            wanted[layer, head] = float(answer(logits_of(plain, CLEAN)[None])) - base
    np.testing.assert_allclose(got, wanted, atol=1e-5)
    assert float(abs(got).max()) > 0.01


def test_layers_without_attention_have_no_number() -> None:
    with quiet(), probe.load(tiny("jamba")) as model:
        got = patching.heads(model, CLEAN, CORRUPT, answer)
    assert got.isnull().all("head").values.tolist() == [True, False, True, False]


@contextmanager
def hooked(*pairs: tuple[nn.Module, Callable[[Tensor], Tensor | None]]) -> Iterator[None]:
    """Functions on what modules return."""
    with ExitStack() as stack:
        for module, function in pairs:

            def hook(_: Any, __: Any, output: Any, function: Any = function) -> Any:
                return function(output)

            stack.callback(module.register_forward_hook(hook).remove)
        yield


def blocks(model: Any) -> Any:
    return model.transformer.h if model.config.model_type == "gpt2" else model.model.layers


def outputs(modules: Sequence[nn.Module], run: Callable[[], object]) -> list[Tensor]:
    found: list[Tensor] = []
    with hooked(*((m, lambda x: found.append(x.clone())) for m in modules)):
        run()
    return found


@contextmanager
def frozen_but(plain: Any, sender: tuple[int, int], mlps: bool) -> Iterator[None]:
    """z of the clean run, but the sender's of the corrupt one; the MLPs' output, if asked for."""
    clean, corrupt = z_of(plain, CLEAN), z_of(plain, CORRUPT)
    clean[sender[0]][:, sender[1]] = corrupt[sender[0]][:, sender[1]]
    parts = [block.mlp for block in blocks(plain)] if mlps else []
    kept = outputs(parts, lambda: logits_of(plain, CLEAN))
    put = [(m, lambda _, x=x: x) for m, x in zip(parts, kept, strict=True)]
    with on_z(plain, lambda layer, _: clean[layer][None]), hooked(*put):
        yield


SENDERS = [(0, 1), (1, 0), (2, 3)]


@pytest.mark.parametrize("mlps", [False, True])
def test_the_direct_effect_is_that_of_a_run_with_all_else_frozen(family: str, mlps: bool) -> None:
    plain = untouched(family)
    got = patching.paths(
        watched(family), CLEAN, CORRUPT, answer, senders=[(0, 1), (1, 0), (-1, 3)], freeze_mlps=mlps
    )
    base = float(answer(logits_of(plain, CLEAN)[None]))
    assert list(got) == SENDERS
    for sender in SENDERS:
        with frozen_but(plain, sender, mlps):
            wanted = float(answer(logits_of(plain, CLEAN)[None])) - base
        assert got[sender] == pytest.approx(wanted, abs=1e-5)
        assert abs(wanted) > 1e-4


def test_with_mlps_frozen_too_only_what_the_head_writes_reaches_the_logits() -> None:
    plain: Any = untouched("llama")
    senders = [(0, 1), (1, 0), (2, 3)]
    got = patching.paths(
        watched("llama"), CLEAN, CORRUPT, answer, senders=senders, freeze_mlps=True
    )
    (end,) = outputs([plain.model.layers[-1]], lambda: logits_of(plain, CLEAN))
    base = answer(plain.lm_head(plain.model.norm(end)))
    for layer, head in senders:
        own = slice(8 * head, 8 * head + 8)
        moved = (z_of(plain, CORRUPT)[layer] - z_of(plain, CLEAN)[layer])[:, head]
        written = moved @ plain.model.layers[layer].self_attn.o_proj.weight[:, own].T
        wanted = answer(plain.lm_head(plain.model.norm(end + written))) - base
        assert got[layer, head] == pytest.approx(float(wanted), abs=1e-5)


def readers(family: str, block: Any, site: str) -> tuple[nn.Module, int, int]:
    """The module that makes q, k or v, where it begins there, and how many heads it has."""
    if family == "gpt2":
        return block.attn.c_attn, 32 * ("q", "k", "v").index(site), 4
    return getattr(block.self_attn, f"{site}_proj"), 0, 4 if site == "q" else 2


@pytest.mark.parametrize("mlps", [False, True])
def test_a_path_runs_through_what_its_receivers_read(family: str, mlps: bool) -> None:
    plain = untouched(family)
    receivers: list[Any] = [("q", 1, 2), ("k", 1, 1), ("v", -1, 0)]
    got = patching.paths(
        watched(family), CLEAN, CORRUPT, answer, senders=SENDERS[:2], receivers=receivers,
        freeze_mlps=mlps,
    )  # fmt: skip
    base = float(answer(logits_of(plain, CLEAN)[None]))
    for sender in SENDERS[:2]:
        places = [readers(family, blocks(plain)[layer], site) for site, layer, _ in receivers]
        with frozen_but(plain, sender, mlps):
            heard = [outputs([m], lambda: logits_of(plain, CLEAN))[0] for m, _, _ in places]
        put = []
        for (module, start, _), (_, _, head), new in zip(places, receivers, heard, strict=True):

            def some(x: Tensor, start: int = start + 8 * head, new: Tensor = new) -> Tensor:
                x = x.clone()
                x[..., start : start + 8] = new[..., start : start + 8]
                return x

            put.append((module, some))
        with hooked(*put):
            wanted = float(answer(logits_of(plain, CLEAN)[None])) - base
        assert got[sender] == pytest.approx(wanted, abs=1e-5)
    assert abs(got[0, 1]) > 1e-4
