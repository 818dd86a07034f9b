"""What `Ablate` takes as heads, and what it refuses with which words."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from probe.errors import InputError
from recipes import ablation
from tests.ablated import PATTERNS
from tests.edited import watched
from tests.references import LENGTHS, batch_of
from tests.references import no_grad as no_grad

Ablate: Any = ablation.Ablate  # its types would refuse what is wrong


def cached(*sites: Any, **options: Any) -> Any:
    return watched("llama").run_with_cache([1, 2, 3, 4], sites=sites, **options)[1]


WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "no heads": (lambda: Ablate(), r"names no heads\. Give pairs \(layer, head\), or layers="),
    "an empty list": (lambda: Ablate([]), r"names no heads"),
    "no layers": (lambda: Ablate(3), r"heads=3 of which layers\? Give pairs"),
    "both": (lambda: Ablate([(0, 1)], layers=0), r"name their layers, and layers=0 too\. Give one"),
    "no pair": (lambda: Ablate([(0, 1, 2)]), r"heads hold \(0, 1, 2\)\. Give pairs"),
    "no ints": (lambda: Ablate([(0, "1")]), r"heads hold \(0, '1'\)\. Give pairs"),
    "a mode": (lambda: Ablate(layers=0, mode="off"), r"mode='off'\. Choose from zero, mean, resam"),
    "a reference of zero": (
        lambda: Ablate(layers=0, reference=cached("z")),
        r"mode='zero' takes no reference\. Leave it out\.",
    ),
    "a cache as mean": (
        lambda: Ablate(layers=0, mode="mean", reference=cached("z")),
        r"mode='mean' needs reference=ablation\.reference\(model, problems\), and a Cache was",
    ),
    "a mean as cache": (
        lambda: Ablate(layers=0, mode="resample", reference=ablation.Reference({}, "")),
        r"mode='resample' needs reference=a cache with z, and a Reference was given\.",
    ),
    "nothing frozen": (
        lambda: Ablate(layers=0, mode="frozen"),
        r"mode='frozen' needs reference=a cache with patterns, and a NoneType was given\.",
    ),
}
MISFITS: dict[str, tuple[Callable[[], Any], str]] = {
    "a layer too many": (lambda: Ablate([(3, 0)]), r"layers=3 is out of range: the model has 3"),
    "a head too many": (lambda: Ablate([(0, 4)]), r"heads=4 is out of range: the model has 4"),
    "a head twice": (lambda: Ablate([(0, 3), (0, -1)]), r"heads"),
    "a cache without z": (
        lambda: Ablate([(0, 1)], "resample", cached("pattern")),
        r"z of layer 0 was not kept \(the cache has it of layers \[\]\)\. Keep it",
    ),
    "a head that was not kept": (
        lambda: Ablate([(0, 1)], "resample", cached("z", heads=[0, 3])),
        r"z of head 1 of layer 0 was not kept \(the cache has heads \[0, 3\]\)\. Keep it",
    ),
    "a shorter cache": (
        lambda: Ablate([(0, 1)], "frozen", cached("pattern")),
        r"the cache has no token at position 4 of input 0 \(it has 4 tokens\)\. Give one of",
    ),
    "a reference of few layers": (
        lambda: Ablate([(0, 1)], "mean", ablation.Reference({1: torch.zeros(4, 8)}, "mine")),
        r"the reference \(mine\) has no layer 0\.",
    ),
    "a reference of few positions": (
        lambda: Ablate([(0, 1)], "mean", ablation.Reference({0: torch.zeros(2, 4, 8)}, "mine")),
        r"the reference \(mine\) has means for 2 positions, and a token is at 10\. Take it over",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_refused_when_it_is_written(what: str) -> None:
    make, words = WRONG[what]
    with pytest.raises(InputError, match=words):
        make()


@pytest.mark.parametrize("what", MISFITS)
def test_what_does_not_fit_the_model_or_the_batch_is_refused(what: str) -> None:
    make, words = MISFITS[what]
    with watched("llama").intervene(make()) as model, pytest.raises(InputError, match=words):
        model(batch_of("llama", "right"))


def test_a_batch_too_small_for_its_own_mean_or_derangement_is_refused() -> None:
    model = watched("llama")
    with (
        model.intervene(Ablate([(0, 1)], "mean")),
        pytest.raises(InputError, match=r"here it has one token\. Give reference="),
    ):
        model([5])
    with (
        model.intervene(Ablate([(0, 1)], "resample")),
        pytest.raises(InputError, match=rf"only one of this batch has {LENGTHS[1]} tokens"),
    ):
        model(batch_of("llama", "left"))
    for mode in ("zero", *PATTERNS):  # one token may only look at itself
        with model.intervene(Ablate([(0, 1)], mode)):
            got = model([5]).logits
        assert torch.equal(got, model([5]).logits) == (mode != "zero")


def test_heads_may_be_numbers_slices_arrays_and_tensors() -> None:
    model, ids = watched("llama"), [1, 2, 3, 4, 5]
    whole = torch.tensor([[1, h] for h in range(4)])
    same = (
        Ablate(layers=1),
        Ablate(slice(None), layers=-1 - 1),
        Ablate(range(4), layers=[1]),
        Ablate(whole),
        Ablate(whole.numpy()),
        Ablate(iter([(1, 0), (1, 1), (1, 2), (1, 3)])),
    )
    found = []
    for one in same:
        with model.intervene(one):
            found.append(model(ids).logits)
    assert all(torch.equal(found[0], other) for other in found[1:])
