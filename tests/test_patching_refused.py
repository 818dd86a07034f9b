"""Which heads a `Patch` takes by itself, and what patching refuses with which words."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import probe
from probe.errors import InputError, UnsupportedModelError
from recipes import patching
from recipes.ablation import Patch
from recipes.architectures_tiny import quiet, tiny
from tests.edited import watched
from tests.references import no_grad as no_grad

CLEAN, CORRUPT = [5, 9, 2, 7, 1, 8, 3], [5, 9, 4, 7, 6, 8, 2]
patch: Any = Patch  # whose types would refuse what is wrong
paths: Any = patching.paths


def cached(ids: Any = CORRUPT, **options: Any) -> Any:
    return watched("llama").run_with_cache(ids, **options)[1]


def last(logits: Tensor) -> Tensor:
    return logits[:, -1, 3]


@pytest.mark.parametrize("site", ["q", "z", "scores", "pattern"])
def test_the_heads_that_a_cache_has_are_the_default(site: Any) -> None:
    model, some = watched("llama"), cached(sites=site, heads=[3, 1], layers=[0, 2])
    found = []
    for one in (
        Patch(some, site),
        Patch(some, site, heads=[1, 3], layers=[0, 2]),
        Patch(cached(sites=site), site, heads=[(0, 3), (2, 1), (0, 1), (2, 3)]),
    ):
        with model.intervene(one):
            found.append(model([CLEAN]).logits)
    assert torch.equal(found[0], found[1])
    torch.testing.assert_close(found[0], found[2], atol=1e-5, rtol=1e-5)
    assert not torch.equal(found[0], model([CLEAN]).logits)


WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "no cache": (lambda: patch({}), r"cache is a dict\. Give what model\.run_with_cache returns"),
    "a site": (lambda: patch(cached(), "o"), r"site='o'\. Choose from q, k, v, scores, pattern, z"),
    "layers twice": (
        lambda: patch(cached(), heads=[(0, 1)], layers=0),
        r"heads=\[\(0, 1\)\] name their layers, and layers=0 too\. Give one\.",
    ),
    "no pair": (lambda: patch(cached(), heads=[(0, 1), 2]), r"heads hold 2\. Give pairs"),
}
MISFITS: dict[str, tuple[Callable[[], Any], str]] = {
    "a layer that was not kept": (
        lambda: patch(cached(layers=[0, 2]), layers=[1]),
        r"z of layer 1 was not kept \(the cache has it of layers \[0, 2\]\)\. Keep it, or name",
    ),
    "a head that was not kept": (
        lambda: patch(cached(heads=[0, 2]), heads=[(1, 1)]),
        r"z of head 1 of layer 1 was not kept \(the cache has heads \[0, 2\]\)\. Keep it, or name",
    ),
    "a query head as key head": (
        lambda: patch(cached(sites="k"), "k", heads=[(0, 2)]),
        r"heads=2 is out of range: the model has 2 heads",
    ),
    "a shorter input": (
        lambda: patch(cached(CORRUPT[:4])),
        r"the cache has no token at position 4 of input 0 \(it has 4 tokens\)\. Give one of inputs",
    ),
    "rows that were not kept": (
        lambda: patch(cached(queries="last:2")),
        r"the cache has no token at position 0 of input 0 \(it has 2 tokens\)",
    ),
    "another number of inputs": (
        lambda: patch(cached([CORRUPT, CORRUPT, CORRUPT])),
        r"the cache holds 3 inputs, and this batch has 2\. Give a cache of one input, or of as",
    ),
}
REFUSED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "other lengths": (
        lambda m: patching.heads(m, CLEAN, CORRUPT[:-1], last),
        r"clean has 7 tokens and corrupt 6\. Give two inputs of as many, in which the same pos",
    ),
    "other lengths of a path": (
        lambda m: paths(m, CLEAN[:-1], CORRUPT, last, senders=[(0, 0)]),
        r"clean has 6 tokens and corrupt 7",
    ),
    "one number for all": (
        lambda m: patching.heads(m, CLEAN, CORRUPT, lambda logits: last(logits).mean()),
        r"metric returned 1 numbers for 4 inputs\. Return one for each: logits are \(batch, pos",
    ),
    "a number for each token": (
        lambda m: patching.heads(m, CLEAN, CORRUPT, lambda logits: logits[..., 0]),
        r"metric returned 7 numbers for 1 inputs",
    ),
    "a sender": (lambda m: paths(m, CLEAN, CORRUPT, last, senders=[(0, 4)]), r"heads=4 is out of"),
    "a receiver of z": (
        lambda m: paths(m, CLEAN, CORRUPT, last, senders=[(0, 0)], receivers=[("z", 1, 0)]),
        r"receivers=\[\('z', 1, 0\)\]\. A receiver reads q, k or v: give \(site, layer, head\)",
    ),
    "a receiver without a head": (
        lambda m: paths(m, CLEAN, CORRUPT, last, senders=[(0, 0)], receivers=[("q", 1)]),
        r"receivers=\[\('q', 1\)\]\. A receiver reads",
    ),
    "no receivers": (
        lambda m: paths(m, CLEAN, CORRUPT, last, senders=[(0, 0)], receivers=[]),
        r"receivers=\[\]\. A receiver reads q, k or v: .* at least once; or leave them out\.",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_refused_when_it_is_written(what: str) -> None:
    make, words = WRONG[what]
    with pytest.raises(InputError, match=words):
        make()


@pytest.mark.parametrize("what", MISFITS)
def test_a_cache_that_does_not_fit_is_refused(what: str) -> None:
    make, words = MISFITS[what]
    with watched("llama").intervene(make()) as model, pytest.raises(InputError, match=words):
        model([CLEAN, CLEAN])


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_patched_is_refused(what: str) -> None:
    call, words = REFUSED[what]
    with pytest.raises(InputError, match=words):
        call(watched("llama"))


def test_mlps_that_are_no_one_module_cannot_be_frozen() -> None:
    with quiet(), probe.load(tiny("opt")) as model:
        with pytest.raises(UnsupportedModelError, match=r"cannot be told: .* has Linear, Linear"):
            paths(model, CLEAN, CORRUPT, last, senders=[(0, 0)], freeze_mlps=True)
        assert paths(model, CLEAN, CORRUPT, last, senders=[(0, 0)])[0, 0] != 0
