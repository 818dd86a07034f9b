"""The two reasoners that ship: they calculate in latents, which matter, and z1 is what "m" asks."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import xarray as xr
from safetensors.torch import load_file

import probe
from probe import InputError, demos
from probe.demos import train_latent
from probe.latent import Reasoner
from recipes import latent

QUESTIONS = demos.chains(200, seed=1)  # the models were trained on other draws of the same
LATENTS = 6


@pytest.fixture(scope="module", params=demos.LATENT)
def reasoner(request: pytest.FixtureRequest) -> Reasoner:
    return probe.latent.load(request.param, device="cpu")


@pytest.fixture(scope="module")
def store(reasoner: Reasoner, tmp_path_factory: pytest.TempPathFactory) -> xr.Dataset:
    path = tmp_path_factory.mktemp("latent") / "run.zarr"
    return probe.latent.capture(reasoner, QUESTIONS, path, max_new_tokens=4, progress=False)


def calculated(question: str) -> list[int]:
    """Results of a question, one operation after the other, by Python's own arithmetic."""
    value, results = int(question[0]), list[int]()
    for sign, operand in re.findall(r"([-+*])(\d|m)", question):
        value = eval(f"{value} {sign} {results[1] if operand == 'm' else operand}") % 7
        results.append(value)
    return results


def test_chains_are_right_different_and_of_all_lengths() -> None:
    for row in QUESTIONS:
        question = str(row["question"])
        assert row["results"] == calculated(question)
        assert row["answer"] == str(calculated(question)[-1])
        assert re.fullmatch(r"[0-6]([-+*][0-6]){3}([-+]m){1,3}=", question)
        assert "*0" not in question
    assert len({row["question"] for row in QUESTIONS}) == len(QUESTIONS)
    assert {len(calculated(str(row["question"]))) for row in QUESTIONS} == set(demos.STEPS)
    assert [p.text for p in probe.problems("demo:chains")][:3] == [
        row["question"] for row in demos.chains(3)
    ]
    with pytest.raises(InputError, match="count=-1"):
        demos.chains(-1)


def test_answers_are_right(reasoner: Reasoner, store: xr.Dataset) -> None:
    assert store["correct"].mean() > 0.95
    thoughts = probe.latent.think(reasoner, QUESTIONS, max_new_tokens=4)
    assert [thought.text for thought in thoughts] == store["answer"].values.tolist()
    assert all(re.fullmatch(r"[0-6]", thought.text) for thought in thoughts)


@torch.no_grad()
def test_each_latent_says_the_result_after_its_own(reasoner: Reasoner) -> None:
    """Read from the model's head, position by position, in one forward."""
    model: Any = reasoner.model.base
    right = []
    for row, thought in zip(
        QUESTIONS[:50], probe.latent.think(reasoner, QUESTIONS[:50]), strict=True
    ):
        ids = reasoner.prompt(probe.problems([row])[0])
        embeds = torch.cat([reasoner.embed(torch.tensor(ids)), thought.latents])
        said = model(inputs_embeds=embeds[None]).logits[0, len(ids) - 1 : -1].argmax(-1)
        results = calculated(str(row["question"]))
        wanted = results + results[-1:] * (LATENTS - len(results))
        digits = [train_latent.FIRST + result for result in wanted[:LATENTS]]
        right.append((said == torch.tensor(digits)).float().mean())
    assert torch.stack(right).mean() > 0.95


def test_hiding_latents_breaks_the_answer_and_hiding_as_much_else_less(
    reasoner: Reasoner, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"max_new_tokens": 2, "progress": False}
    found = latent.knockout(reasoner, QUESTIONS[:100], tmp_path / "out.zarr", **options)
    mean = found.mean("problem")
    every = mean.sel(hidden="all")
    assert mean["base_correct"] > 0.95
    assert every["correct"] < 0.5 < every["control_correct"]
    cost = mean["delta_loss"].to_series().drop("all")
    worst = cost.idxmax()
    # what "m" asks for, or the latent that reads it next
    assert worst == ("z1" if reasoner.kind == "codi" else "z2")
    assert cost[worst] > 1.5
    assert mean["correct"].sel(hidden=worst) < mean["control_correct"].sel(hidden=worst) - 0.1
    assert abs(cost["z0"]) < 0.05  # nobody asks for the first result


def test_the_calibrated_hub_is_the_latent_that_is_asked_for(store: xr.Dataset) -> None:
    found = latent.findings(latent.scores(store), draws=200)
    strongest = found.stack(cell=("layer", "head"))
    strongest = strongest.isel(cell=int(strongest["mean"].sel(score="hub").values.argmax()))
    assert int(strongest["hub_position"]) == 1
    assert float(strongest["low"].sel(score="hub_1")) > 0.45
    assert float(strongest["p_hub_family"]) < 1e-6


def test_a_checkpoint_has_the_published_layout() -> None:
    codi = load_file(demos.path("demo-codi") / "model.safetensors")
    layer = "codi.base_model.model.model.layers.0.self_attn.q_proj"
    assert {f"{layer}.base_layer.weight", f"{layer}.lora_A.default.weight"} <= codi.keys()
    assert {"prj.1.weight", "prj.3.bias", "prj.ln.weight"} <= codi.keys()
    coconut = load_file(demos.path("demo-coconut") / "model.safetensors")
    assert "base_causallm.transformer.h.1.attn.c_attn.weight" in coconut
    assert "embedding.weight" in coconut


def test_a_reasoner_is_no_plain_model() -> None:
    with pytest.raises(InputError, match=re.escape("probe.latent.load('demo-codi')")):
        probe.load("demo-codi")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # by peft
@pytest.mark.parametrize("kind", train_latent.BASES)
def test_training_twice_gives_the_same_bits(
    kind: train_latent.Kind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_latent, "SAID", 3)
    monkeypatch.setattr(train_latent, "CARRIED", 3)
    monkeypatch.setattr(train_latent, "THOUGHT", {kind: (3, 1e-3)})
    for run in ("once", "again"):
        train_latent.main([kind, "--out", str(tmp_path / run)])
    once, again = (tmp_path / run / kind for run in ("once", "again"))
    assert (once / "model.safetensors").read_bytes() == (again / "model.safetensors").read_bytes()
    shipped = demos.path(f"demo-{kind}")
    assert (
        load_file(once / "model.safetensors").keys()
        == load_file(shipped / "model.safetensors").keys()
    )
    for file in ("latent.json", "tokenizer.json"):
        assert json.loads((once / file).read_text()) == json.loads((shipped / file).read_text())
    with probe.latent.load(once, device="cpu") as fresh:
        assert len(probe.latent.think(fresh, QUESTIONS[:2], max_new_tokens=1)) == 2
