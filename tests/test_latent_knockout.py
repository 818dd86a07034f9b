from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from torch import Tensor
from transformers import AutoTokenizer

import probe
from probe.errors import InputError, WiringError
from probe.latent import Reasoner
from recipes import latent_knockout
from recipes.latent_knockout import knockout
from tests.reasoners import reasoner

PROBLEMS = [
    {"id": "a", "question": "abcd", "answer": "k"},
    {"id": "b", "question": "abcdefgh", "answer": "xy"},
    {"id": "c", "question": "zz", "answer": "q"},
]


def talking(family: str) -> Reasoner:
    found = reasoner(family)
    found.model.tokenizer = AutoTokenizer.from_pretrained(str(probe.demos.path("demo-llama")))
    return found


def hide(who: Reasoner, ids: list[int], target: list[int], edges: list[tuple[int, int]]) -> float:
    """Mean loss of an answer, by whole forwards from scratch under a mask of what is hidden."""
    module: Any = who.model.base
    embeds = who.embed(torch.tensor([ids]))

    def run(embeds: Tensor) -> Any:
        n = embeds.shape[1]
        mask = torch.zeros(n, n).masked_fill(torch.ones(n, n).triu(1).bool(), -torch.inf)
        for row, key in edges:
            if row < n:
                mask[row, key] = -torch.inf
        return module(
            inputs_embeds=embeds,
            attention_mask=mask[None, None].clamp_min(-1e30),
            output_hidden_states=True,
            use_cache=False,
        )

    for _ in range(who.n_latents):
        hidden = run(embeds).hidden_states[-1][:, -1:]
        embeds = torch.cat([embeds, who.following(hidden)], 1)
    answer = who.embed(torch.tensor([[*who.closes, *target]]))
    logits = run(torch.cat([embeds, answer], 1)).logits[0, embeds.shape[1] : -1]
    return float(torch.nn.functional.cross_entropy(logits, torch.tensor(target)))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@torch.no_grad()
def test_losses_are_those_of_masked_forwards(family: str) -> None:
    with talking(family) as who:
        ds = knockout(who, PROBLEMS, max_new_tokens=3, progress=False)
        who.model.close()
        for problem in PROBLEMS:
            one = ds.sel(problem=problem["id"])
            ids = [*who.model.text.encode(problem["question"]), *who.opens]
            target = who.model.text.encode(problem["answer"], special=False)
            n, last = len(ids), len(ids) + who.n_latents + 1 + len(target)
            base = hide(who, ids, target, [])
            assert float(one.base_loss) == pytest.approx(base, abs=1e-4)
            each = [[(row, n + k) for row in range(n + k + 1, last)] for k in range(4)]
            for k, edges in enumerate([*each, list(chain(*each))]):
                wanted = hide(who, ids, target, edges) - base
                assert float(one.delta_loss[k]) == pytest.approx(wanted, abs=1e-4)


def test_the_results_are_labelled_and_the_no_op_is_one(tmp_path: Path) -> None:
    with talking("llama") as who:
        ds = knockout(who, PROBLEMS, tmp_path / "out.zarr", max_new_tokens=3, progress=False)
        again = knockout(who, PROBLEMS, tmp_path / "out.zarr", max_new_tokens=3, progress=False)
    assert ds.hidden.values.tolist() == ["z0", "z1", "z2", "z3", "all"]
    assert (ds.noop == 0).all()
    assert set(np.unique(ds.kept)) <= {0.0, 1.0}
    assert ds.control_delta_loss.dims == ("problem", "hidden")
    xr.testing.assert_identical(ds.load(), again.load())
    assert ds.attrs["recipe"]["name"] == "latent.knockout"
    other = [{**PROBLEMS[0], "answer": "j"}, *PROBLEMS[1:]]
    with talking("llama") as who, pytest.raises(probe.StoreError, match="expected"):
        knockout(who, other, tmp_path / "out.zarr", max_new_tokens=3, progress=False)


def test_a_problem_alone_has_the_numbers_that_it_has_in_a_batch() -> None:
    with talking("mistral") as who:
        together = knockout(who, PROBLEMS, max_new_tokens=3, progress=False)
        alone = knockout(who, PROBLEMS, max_new_tokens=3, batch_size=1, progress=False)
    for name in ("delta_loss", "control_delta_loss", "base_loss"):
        np.testing.assert_allclose(together[name], alone[name], atol=2e-5)


def test_without_an_answer_only_what_is_kept_is_known() -> None:
    with talking("llama") as who:
        ds = knockout(who, ["abc"], max_new_tokens=2, progress=False)
    assert ds.delta_loss.isnull().all()
    assert ds.correct.isnull().all()
    assert ds.kept.notnull().all()


def test_the_control_hides_tokens_of_the_question(monkeypatch: pytest.MonkeyPatch) -> None:
    with talking("llama") as who:
        todo = probe.latent.plan(who, PROBLEMS)
        drawn = latent_knockout._others(todo.items, [0, 1, 2, 3], seed=0)
        again = latent_knockout._others(todo.items, [0, 1, 2, 3], seed=0)
    assert drawn == again
    for n, item in enumerate(todo.items):
        each: list[Any] = [one.keys for one in drawn]
        keys = [key for own in each for key in own[n]]
        assert len(keys) == len(set(keys)) == min(4, item.segments.count("question"))
        assert all(item.segments[key] == "question" for key in keys)


def test_runs_that_differ_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with talking("llama") as who:
        noise = iter(range(100))

        def following(hidden: Tensor) -> Tensor:
            return hidden + 0.01 * next(noise)

        object.__setattr__(who, "following", following)
        with pytest.raises(WiringError, match=r"two runs over problem 'a' differ by .* nats"):
            knockout(who, PROBLEMS[:1], max_new_tokens=2, progress=False)


def test_questions_are_never_cut() -> None:
    with (
        talking("llama") as who,
        pytest.raises(InputError, match="max_length would cut what opens the latents"),
    ):
        knockout(who, PROBLEMS, max_length=3)
