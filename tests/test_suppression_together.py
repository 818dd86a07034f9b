"""Interventions beside others, of each problem its own, and in ways of generating of all kinds."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import probe
from probe.errors import InputError
from probe.interventions import Bias, Edit
from probe.model import Model
from recipes.ablation import effect
from recipes.suppression import Knockout, Mask, Steer, Suppress, from_attributes
from tests.conftest import tiny_model
from tests.edited import watched
from tests.models import demo as demo
from tests.references import no_grad as no_grad

IDS = [[3, 17, 40, 8, 22, 9]]
QUIET: dict[str, Any] = {"progress": False}
MIXED: Any = [1, [2]]
RAGGED = [[5, 9], [3, 17, 40, 8, 22, 9, 1, 4], [7, 11, 6, 2]]


def logits(model: Model, ids: Any, *some: Any) -> torch.Tensor:
    with model.intervene(*some):
        found: torch.Tensor = model(ids).logits
    return found


@pytest.mark.parametrize(
    "other",
    [
        Knockout(keys=1),
        Suppress(keys=2, factor=0.2),
        Bias(value=-2.0, keys=0),
        Edit(site="q", function=lambda q, _: 2 * q),
        Edit(site="scores", function=lambda s, _: 2 * s),
    ],
    ids=["knockout", "suppress", "bias", "q", "scores"],
)
@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_an_open_mask_keeps_what_others_change(other: Any, kernel: str) -> None:
    model = watched("llama", kernel)
    causal = torch.full((1, 1, 6, 6), -torch.inf).triu(1)
    open_ = Mask(causal, allow_future=True)
    wanted = logits(model, IDS, other)
    for some in ((other, open_), (open_, other)):
        torch.testing.assert_close(logits(model, IDS, *some), wanted, atol=1e-5, rtol=1e-5)
    assert float((wanted - logits(model, IDS)).abs().max()) > 1e-2


def test_an_open_mask_that_leaves_a_row_nothing_is_refused() -> None:
    mask = torch.zeros(1, 1, 6, 6)
    mask[..., 2, :] = -torch.inf
    one = Mask(mask, allow_future=True)
    with pytest.raises(InputError, match="hides every key of row 2"):
        logits(watched("llama"), IDS, one)


def test_a_capture_hides_the_keys_of_each_problem_in_whatever_batch(tmp_path: Path) -> None:
    model = watched("llama")
    each = [[0], [2, 3], [1]]
    one = Knockout(keys=each)
    for size in (None, 1, 2):
        ds = probe.capture(
            model, RAGGED, tmp_path / f"{size}.zarr", interventions=[one], batch_size=size, **QUIET
        )
        for n, keys in enumerate(each):
            pattern = ds.pattern[n].values
            rows = len(RAGGED[n])
            hidden = (pattern[:, :, rows - 1, :rows] == 0).all((0, 1))
            assert np.flatnonzero(hidden).tolist() == [k for k in keys if k < rows - 1]
    with (
        model.intervene(one),
        pytest.raises(InputError, match="says something else of each input, and a capture puts"),
    ):
        probe.capture(model, RAGGED, tmp_path / "around.zarr", **QUIET)
    with pytest.raises(InputError, match="keys are given for 3 items, and there are 2 problems"):
        probe.plan(model, RAGGED[:2], interventions=[one])


def test_a_mask_of_each_problem_is_its_own_in_an_effect() -> None:
    model = watched("qwen2")
    mask = torch.zeros(3, 1, 8, 8)
    mask[0, :, 1:, 0] = mask[1, :, 4:, 2] = mask[2, :, 3:, 1] = -torch.inf
    both = effect(model, RAGGED, Mask(mask), **QUIET).delta_loss
    for n, ids in enumerate(RAGGED):
        alone = effect(model, [ids], Mask(mask[n : n + 1]), **QUIET).delta_loss
        assert float(both[n]) == pytest.approx(float(alone[0]), abs=2e-6)
    with pytest.raises(InputError, match="mask is for 3 inputs, and there are 2 problems"):
        effect(model, RAGGED[:2], Mask(mask), **QUIET)


def test_an_open_mask_does_not_go_on_into_what_is_generated(tmp_path: Path) -> None:
    one = Mask(torch.zeros(1, 1, 20, 20), allow_future=True)
    with pytest.raises(InputError, match="with allow_future the rows of the prompt would see tok"):
        probe.plan(watched("llama"), RAGGED, max_new_tokens=2, interventions=[one])


def test_how_many_tokens_are_named_is_told(demo: Model) -> None:
    ds = effect(demo, ["abcb", "xyx", "b"], Suppress(keys="text:b"), Knockout(keys=0), **QUIET)
    assert ds.named.values.tolist() == [3, 1, 2]
    steps = effect(demo, ["abcabc", "ab"], Knockout(keys=slice(4, 6)), **QUIET)
    assert steps.named.values.tolist() == [2, 0]
    assert float(steps.delta_loss[1]) == 0


def test_the_form_of_the_document_has_its_control(demo: Model) -> None:
    one = from_attributes(
        suppression_token_indices=[1, -1, 2], suppression_factors=[0.1, 1.0, 0.3], mode="log_add"
    )
    ds = effect(demo, ["abcabc", "xyxyxyx"], one, draws=4, **QUIET)
    assert ds.named.values.tolist() == [2, 2]
    assert bool(np.isfinite(ds.control).all())


def test_steering_towards_a_part_never_touches_what_is_generated() -> None:
    model = watched("llama")
    some, other = (
        Steer(keys=keys, mode="include", factor=0.1) for keys in (slice(1, None), slice(1, 6))
    )
    texts = []
    for one in (some, other):
        with model.intervene(one):
            texts.append(model.generate(IDS, max_new_tokens=6, do_sample=False))
    assert torch.equal(*texts)


def test_beams_have_the_keys_of_their_input(demo: Model) -> None:
    texts, keys, factor = ["abcab", "xyzxy"], [[1, 4], [2]], [[0.1, 0.2], [0.0]]
    one = Suppress(keys=keys, factor=factor)
    with demo.intervene(one):
        both = demo.generate(texts, max_new_tokens=3, num_beams=2, do_sample=False)
    for n, text in enumerate(texts):
        alone = Suppress(keys=keys[n], factor=factor[n])
        with demo.intervene(alone):
            wanted = demo.generate(text, max_new_tokens=3, num_beams=2, do_sample=False)
        assert torch.equal(both[n], wanted[0])


def test_a_cache_that_is_cut_back_takes_its_names_along(demo: Model) -> None:
    one = Suppress(keys="text:b", factor=0.3)
    with demo.intervene(one):
        plain = demo.generate("abcabcab", max_new_tokens=6, do_sample=False)
        guessed = demo.generate(
            "abcabcab", max_new_tokens=6, do_sample=False, prompt_lookup_num_tokens=3
        )
    assert torch.equal(plain, guessed)


def test_texts_are_not_sought_in_prompts_that_are_read_in_pieces(demo: Model) -> None:
    with (
        demo.intervene(Suppress(keys="text:ca")),
        pytest.raises(InputError, match="is sought in prompts that are read in pieces"),
    ):
        demo.generate("abcabcab", max_new_tokens=2, prefill_chunk_size=4, do_sample=False)


@pytest.fixture(scope="module")
def bytewise() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer that knows few words, so that most characters are several tokens."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=262, special_tokens=["<s>"], initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(["caf not not caf"] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>")  # type: ignore[no-untyped-call]


@pytest.mark.parametrize(
    ("selector", "said"),
    [
        ("text:é", "é"),
        ("text:日本", "日本"),
        ("regex:caf.", "café"),
        ("regex:é!", "é!"),
        (r"regex:[0-9]+", "12"),
    ],
)
def test_characters_that_are_several_tokens_are_named_whole(
    bytewise: PreTrainedTokenizerFast, selector: str, said: str
) -> None:
    text = "a café! 日本 12"
    config = {"vocab_size": 300, "max_position_embeddings": 64}
    module = tiny_model("llama")
    module.resize_token_embeddings(config["vocab_size"])
    with probe.load(module, bytewise) as model:
        item = probe.plan(model, [text], keys=selector).items[0]
        ids = [item.token_ids[k] for k in item.keys]
        assert bytewise.decode(ids) == said
        with pytest.raises(InputError, match="has no token that carries it"):
            probe.plan(model, ["<s>"], keys="regex:b")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Suppress(keys=[[1, 2]], factor=[0.1, 0.2]), "is not nested as keys=[[1, 2]] are"),
        (lambda: Suppress(keys=[1, 2], factor=[[0.1, 0.2]]), "is not nested as keys=[1, 2] are"),
        (lambda: Suppress(keys=MIXED), "keys=[1, [2]] mix numbers and lists."),
        (lambda: Suppress(keys=1, factor=10**400), "factor holds 1000"),
        (
            lambda: from_attributes(suppression_token_indices="1", suppression_factors=0.1),
            "suppres",
        ),
        (
            lambda: Mask(torch.zeros(1, 1, 3, 3), MIXED),
            "allow_future=[1, [2]]. Give True or False.",
        ),
    ],
)
def test_mistakes_in_lists_are_told(make: Any, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        make()


def test_numbers_of_arrays_are_numbers_inside_lists_too() -> None:
    model = watched("llama")
    wanted = logits(model, IDS, Suppress(keys=[1], factor=[0.25], heads=[(1, 0)]))
    keys: Any = [np.int64(1)]
    factor: Any = [np.float32(0.25)]
    heads: Any = [(np.int64(1), 0)]
    one = Suppress(keys=keys, factor=factor, heads=heads)
    assert torch.equal(logits(model, IDS, one), wanted)
    some = Steer(keys=1, factor=factor[0], mode="include")
    assert torch.equal(logits(model, IDS, some), logits(model, IDS, Suppress(keys=1, factor=0.25)))
