from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import probe
from probe import latent
from probe.errors import InputError
from recipes.suppression import Knockout
from tests.reasoners import LATENTS, reasoner

LENGTHS = (5, 9, 3, 9, 1)


def questions() -> list[list[int]]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randint(1, 60, (n,), generator=draw).tolist() for n in LENGTHS]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_rows_read_at_once_in_a_batch_are_those_read_step_by_step_alone(
    family: str, implementation: str, tmp_path: Path
) -> None:
    with reasoner(family, implementation) as who:
        options: dict[str, Any] = {"dtype": "float32", "progress": False, "max_new_tokens": 3}
        ds = latent.capture(who, questions(), tmp_path / "a.zarr", **options)
        full = latent.capture(who, questions(), tmp_path / "b.zarr", queries=None, **options)
        for i, question in enumerate(questions()):
            steps = latent.stepwise(who, [question]).values
            n = len(question) + 1
            one = ds.pattern.values[i, :, :, :LATENTS, : n + LATENTS]
            np.testing.assert_allclose(one, steps, atol=1e-5)
            same = full.pattern.values[i, :, :, n : n + LATENTS, : n + LATENTS]
            np.testing.assert_allclose(same, steps, atol=1e-5)


@torch.no_grad()
def test_rows_are_those_of_eager_attention_over_the_stitched_embeddings(tmp_path: Path) -> None:
    with reasoner("gpt2", "eager") as who:
        ds = latent.capture(
            who, questions(), tmp_path / "a.zarr", dtype="float32", progress=False, max_new_tokens=3
        )
        thoughts = latent.think(who, questions(), max_new_tokens=3)
        who.close()
        module: Any = who.model.base
        for i, (question, thought) in enumerate(zip(questions(), thoughts, strict=True)):
            parts = [[*question, *who.opens], [*who.closes, *thought.token_ids]]
            first, last = (who.embed(torch.tensor([ids])) for ids in parts)
            embeds = torch.cat([first, thought.latents[None], last], 1)
            wanted = torch.stack(module(inputs_embeds=embeds, output_attentions=True).attentions)
            found = ds.pattern.values[i, ..., : embeds.shape[1]]
            start = len(question) + 1
            np.testing.assert_allclose(found, wanted[:, 0, :, start:].numpy(), atol=1e-5)


def test_masses_are_sums_over_the_segments_of_all_keys(family: str, tmp_path: Path) -> None:
    with reasoner(family) as who:
        options: dict[str, Any] = {"dtype": "float32", "progress": False, "max_new_tokens": 3}
        ds = latent.capture(who, questions(), tmp_path / "a.zarr", **options)
        some: dict[str, Any] = {"queries": "segment:latent", "keys": "segment:latent"}
        block = latent.capture(who, questions(), tmp_path / "b.zarr", **some, **options)
    mass = ds.mass.values
    np.testing.assert_allclose(mass.sum(-1), 1.0, atol=1e-6)
    np.testing.assert_allclose(block.mass, mass[:, :, :, :LATENTS], atol=1e-6)
    parts = ds.part.values.tolist()
    for i in range(len(LENGTHS)):
        segments = ds.segment.values[i].tolist()
        for q, at in enumerate(ds.query_position.values[i].tolist()):
            wanted = np.zeros((*mass.shape[1:3], len(parts)))
            for key, segment in enumerate(segments):
                if segment:
                    part = "self" if key == at else segment
                    wanted[..., parts.index(part)] += ds.pattern.values[i, :, :, q, key]
            np.testing.assert_allclose(mass[i, :, :, q], wanted, atol=1e-6)


def test_everything_is_labelled(tmp_path: Path) -> None:
    with reasoner("llama") as who:
        ds = latent.capture(
            who, [[7, 8]], tmp_path / "a.zarr", sites=("pattern", "scores", "z"),
            max_new_tokens=2, layers=[2, 0], heads=[3, 1], progress=False,
        )  # fmt: skip
    wanted = ["question", "question", "bot", *["latent"] * 4, "eot", "answer", "answer"]
    assert ds.segment.values[0].tolist() == wanted
    assert ds.query_segment.values[0].tolist() == wanted[3:]
    assert ds.query_position.values[0].tolist() == list(range(3, 10))
    assert ds.token_id.values[0, 3:7].tolist() == [-1] * 4
    assert ds.token.values[0, 3:7].tolist() == ["z0", "z1", "z2", "z3"]
    assert ds.layer.values.tolist() == [2, 0]
    assert ds.attrs["latent"]["n_latents"] == 4
    softmax = np.exp(ds.scores.values.astype("float32"))
    softmax /= softmax.sum(-1, keepdims=True)
    np.testing.assert_allclose(ds.pattern.values, softmax, atol=2e-3)
    assert "loss" not in ds


def test_a_knocked_out_latent_is_not_seen_in_thinking_nor_afterwards(tmp_path: Path) -> None:
    hidden = Knockout(keys="segment:latent[1]", queries="segment:latent[2:],eot,answer")
    with reasoner("qwen2") as who:
        options: dict[str, Any] = {"progress": False, "max_new_tokens": 3, "dtype": "float32"}
        ds = latent.capture(
            who, questions(), tmp_path / "a.zarr", interventions=[hidden], **options
        )
        base = latent.think(who, questions(), max_new_tokens=3)
        changed = latent.think(who, questions(), hidden, max_new_tokens=3)
        for i, question in enumerate(questions()):
            key = len(question) + 2
            seen = ds.pattern.values[i, :, :, :, key]
            assert (seen[:, :, 2:] == 0).all()
            assert (seen[:, :, 1] > 0).all()
            steps = latent.stepwise(who, [question], hidden).values
            rows = ds.pattern.values[i, :, :, :LATENTS, : steps.shape[-1]]
            np.testing.assert_allclose(rows, steps, atol=1e-5)
        for before, after in zip(base, changed, strict=True):
            torch.testing.assert_close(before.latents[:3], after.latents[:3], atol=1e-4, rtol=1e-4)
            assert not torch.allclose(before.latents[3], after.latents[3], atol=1e-4)


def test_the_original_padding_is_felt_and_the_masked_is_not() -> None:
    with reasoner("gpt2") as who:
        alone = [latent.think(who, [q], max_new_tokens=2)[0] for q in questions()]
        masked = latent.think(who, questions(), max_new_tokens=2)
        original = latent.think(who, questions(), max_new_tokens=2, padding="original")
    for one, same, other, n in zip(alone, masked, original, LENGTHS, strict=True):
        torch.testing.assert_close(one.latents, same.latents, atol=2e-5, rtol=1e-5)
        assert one.token_ids == same.token_ids
        felt = not torch.allclose(one.latents, other.latents, atol=1e-3)
        assert felt == (n < max(LENGTHS))


def test_a_stopped_capture_goes_on(tmp_path: Path) -> None:
    with reasoner("llama") as who:
        options: dict[str, Any] = {"progress": False, "max_new_tokens": 2}
        latent.capture(who, questions(), tmp_path / "a.zarr", **options)
        again = latent.capture(who, questions(), tmp_path / "a.zarr", **options)
        assert again.sizes["problem"] == len(LENGTHS)
        with pytest.raises(probe.StoreError, match="max_new_tokens"):
            latent.capture(who, questions(), tmp_path / "a.zarr", progress=False, max_new_tokens=3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, r"max_new_tokens=0\. An answer has at least 1 token"),
        ({"max_new_tokens": 99}, r"max_new_tokens=99 and 5 between them it would pass the context"),
        ({"queries": "segment:thought"}, r"has no segment 'thought'"),
    ],
)
def test_what_cannot_be_done_is_said_before_anything_runs(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with reasoner("llama") as who, pytest.raises(InputError, match=message):
        latent.capture(who, questions(), tmp_path / "a.zarr", progress=False, **options)
    assert not (tmp_path / "a.zarr").exists()


def test_other_mistakes_are_named(tmp_path: Path) -> None:
    with reasoner("llama") as who:
        with pytest.raises(InputError, match=r"padding='left'\. Choose from masked, original"):
            latent.think(who, questions(), padding="left")  # type: ignore[arg-type]
        with pytest.raises(InputError, match=r"5 problems, where one is read"):
            latent.stepwise(who, questions())
        with pytest.raises(
            InputError, match=r"reasoner is a Model\. Give what probe\.latent\.load"
        ):
            latent.plan(who.model, questions())  # type: ignore[arg-type]
        made: dict[str, Any] = {"model": who.model, "kind": "x", "following": who.following}
        made |= {"n_latents": 1, "opens": (1,), "closes": (2,), "words": 9}
        for wrong, message in (
            ({"n_latents": 0}, r"n_latents=0\. It must be an int of at least 1"),
            ({"opens": ()}, r"opens=\(\) leaves nothing to read"),
            ({"answer": "42"}, r"answer='42' has no place for it"),
        ):
            with pytest.raises(InputError, match=message):
                latent.Reasoner(**made | wrong)
