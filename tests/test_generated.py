"""Captures of what a model generates, of z, and under interventions."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import probe
from probe.attention import AttentionCall
from probe.errors import InputError, StoreError
from probe.interventions import Bias, Edit, Intervention
from probe.model import Model
from probe.writer import Writer
from recipes.architectures_tiny import tiny as tiny_of
from tests.models import Bare
from tests.models import bare as bare
from tests.references import no_grad as no_grad
from tests.references import projections, untouched

NEW = 8  # past the window of 5
RAGGED = [[5, 6, 7, 8, 9, 1, 2, 3, 4], [3, 1, 4, 1, 5], [2], [3, 1, 4, 1, 6]]
OPTIONS: dict[str, Any] = {"dtype": "float32", "progress": False}
KNOCK = Bias(value=-torch.inf, queries=slice(1, None), keys=0, heads=[1])


def stepwise(family: str, ids: list[int]) -> Any:
    """What an eager copy generates after one problem alone, with the attentions of each step."""
    model: Any = untouched(family, "eager")
    return model.generate(
        torch.tensor([ids]),
        max_new_tokens=NEW,
        do_sample=False,
        output_attentions=True,
        return_dict_in_generate=True,
    )


def own(ds: Any, problem: int, site: str = "pattern") -> Any:
    """The stored rows and columns that a problem has."""
    one = ds.isel(problem=problem)
    rows, columns = (int((one[f"{d}_position"] >= 0).sum()) for d in ("query", "key"))
    values = one[site].values
    return values[:, :rows] if site == "z" else values[:, :, :rows, :columns]


def capture(model: Model, problems: Any, path: Path, **kwargs: Any) -> Any:
    return probe.capture(model, problems, path, **OPTIONS | kwargs).load()


def test_a_generation_is_stored_like_one_eager_forward_over_it_and_like_its_steps(
    family: str, bare: Bare, tmp_path: Path
) -> None:
    ds = capture(bare(family), RAGGED, tmp_path / "s", max_new_tokens=NEW)
    assert dict(ds.sizes) == {"problem": 4, "layer": 3, "head": 4, "query": 17, "key": 17}
    for i, ids in enumerate(RAGGED):
        steps = stepwise(family, ids)
        whole = steps.sequences[0, : len(ids) + NEW]
        n = len(whole)
        assert ds.length.values[i] == n
        assert ds.token_id.values[i].tolist() == whole.tolist() + [-1] * (17 - n)
        assert ds.segment.values[i].tolist()[:n] == ["text"] * len(ids) + ["generated"] * NEW
        assert ds.query_position.values[i].tolist() == [*range(n)] + [-1] * (17 - n)
        eager = untouched(family, "eager")(whole[None], output_attentions=True).attentions
        np.testing.assert_allclose(own(ds, i), torch.cat(eager).numpy(), atol=1e-5)
        for step, layers in enumerate(steps.attentions):
            for layer, a in enumerate(layers):
                rows = slice(0, len(ids)) if step == 0 else slice(len(ids) + step - 1, None)
                got = own(ds, i)[layer, :, rows][:, : a.shape[2]]
                end = len(ids) + step
                cut = got[..., end - a.shape[3] : end]  # a sliding cache has dropped the first keys
                np.testing.assert_allclose(cut, a[0].numpy(), atol=1e-5)
                np.testing.assert_allclose(cut.sum(-1), 1, atol=1e-5)


def projected(model: Any, ids: list[int]) -> list[torch.Tensor]:
    """What the output projection of each layer is given."""
    given: list[torch.Tensor] = []
    handles = [
        p.register_forward_pre_hook(lambda _, args: given.append(args[0]))
        for p in projections(model)
    ]
    model(torch.tensor([ids]))
    for handle in handles:
        handle.remove()
    return given


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_z_is_what_the_output_projection_gets(
    family: str, kernel: str, bare: Bare, tmp_path: Path
) -> None:
    ds = capture(
        bare(family, kernel), RAGGED, tmp_path / "s", sites="z", heads=[3, 0], queries="last:2"
    )
    assert ds.z.dims == ("problem", "layer", "query", "head", "head_dim")
    copy = untouched(family, "eager")
    for i, ids in enumerate(RAGGED):
        given = torch.cat(projected(copy, ids))
        wanted = given.view(3, len(ids), 4, 8)[:, -2:, [3, 0]]
        np.testing.assert_allclose(own(ds, i, "z"), wanted.numpy(), atol=1e-5)


def stopping(model: Model, token: int) -> None:
    base: Any = model.base
    base.generation_config.update(eos_token_id=[token, 63], pad_token_id=0)


def test_a_generation_ends_with_its_stop_token(bare: Bare, tmp_path: Path) -> None:
    model = bare("llama")
    whole = [stepwise("llama", ids).sequences[0].tolist() for ids in RAGGED]
    stop = whole[0][len(RAGGED[0]) + 2]
    stopping(model, stop)
    ds = capture(model, RAGGED, tmp_path / "s", max_new_tokens=NEW)
    for i, (ids, tokens) in enumerate(zip(RAGGED, whole, strict=True)):
        new = tokens[len(ids) :]
        ends = [n + 1 for n, token in enumerate(new) if token in (stop, 63)]
        wanted = tokens[: len(ids) + (ends[0] if ends else NEW)]
        assert ds.token_id.values[i].tolist()[: len(wanted)] == wanted
        assert ds.length.values[i] == len(wanted)
        alone = untouched("llama", "eager")(torch.tensor([wanted]), output_attentions=True)
        np.testing.assert_allclose(own(ds, i), torch.cat(alone.attentions).numpy(), atol=1e-5)
    assert ds.length.values[0] <= len(RAGGED[0]) + 3


@pytest.mark.parametrize(
    ("selection", "rows"),
    [
        ({"queries": "segment:generated"}, lambda n: range(n, n + NEW)),
        ({"queries": "last:3"}, lambda n: range(n + NEW - 3, n + NEW)),
        ({"queries": [-1, 0]}, lambda n: [n + NEW - 1, 0]),
        (
            {"queries": slice(-2, None), "keys": "segment:text"},
            lambda n: [n + NEW - 2, n + NEW - 1],
        ),
    ],
    ids=str,
)
def test_selections_go_by_the_whole_sequence(
    selection: dict[str, Any], rows: Any, bare: Bare, tmp_path: Path
) -> None:
    model = bare("qwen2")
    whole = capture(model, RAGGED, tmp_path / "a", max_new_tokens=NEW)
    part = capture(model, RAGGED, tmp_path / "b", max_new_tokens=NEW, **selection)
    for i, ids in enumerate(RAGGED):
        index = list(rows(len(ids)))
        wanted = own(whole, i)[:, :, index]
        wanted = wanted[..., : len(ids)] if "keys" in selection else wanted
        np.testing.assert_allclose(own(part, i), wanted, atol=1e-6)
        assert part.query_position.values[i].tolist()[: len(index)] == index


def test_the_loss_is_that_of_the_problem(bare: Bare, tmp_path: Path) -> None:
    model = bare("llama")
    plain = capture(model, RAGGED, tmp_path / "a")
    more = capture(model, RAGGED, tmp_path / "b", max_new_tokens=3)
    np.testing.assert_allclose(plain.loss.values, more.loss.values, rtol=1e-5)


def test_interventions_act_while_generating_and_while_reading(
    family: str, bare: Bare, tmp_path: Path
) -> None:
    def off(z: torch.Tensor, call: AttentionCall) -> torch.Tensor:
        return 0 * z

    some: list[Intervention] = [KNOCK, Edit(site="z", function=off, layers=1, heads=[2])]
    model = bare(family)
    under = capture(
        model,
        RAGGED,
        tmp_path / "a",
        sites=("pattern", "z"),
        max_new_tokens=NEW,
        interventions=some,
        batch_size=2,
    )
    for i, ids in enumerate(RAGGED):
        n = len(ids) + NEW
        with model.intervene(*some):
            wanted = model.generate(ids, max_new_tokens=NEW, do_sample=False)[0].tolist()
            _, cache = model.run_with_cache([wanted], ("pattern", "z"))
        assert under.token_id.values[i].tolist()[:n] == wanted
        assert not own(under, i)[:, 1, 1:, 0].any()
        assert not own(under, i, "z")[1, :, 2].any()
        for layer in range(3):
            kept = cache["pattern", layer][0].numpy()
            np.testing.assert_allclose(own(under, i)[layer], kept, atol=1e-5)


def test_positions_of_interventions_count_from_the_end_of_the_problem(
    family: str, bare: Bare, tmp_path: Path
) -> None:
    long = [ids for ids in RAGGED if len(ids) > 4]
    hide = Bias(value=-torch.inf, queries=slice(4, None), keys=-2)
    ds = capture(bare(family), long, tmp_path / "s", max_new_tokens=3, interventions=[hide])
    for i, ids in enumerate(long):
        p, n = own(ds, i), len(ids)
        assert not p[:, :, 4:, n - 2].any()
        assert p[:, :, n + 2, n + 1].all()  # the last but one of all is not meant


def test_interventions_and_the_contexts_around_are_recorded_and_never_mixed(
    bare: Bare, tmp_path: Path
) -> None:
    model = bare("llama")

    def look(p: torch.Tensor, hook: Any) -> None:
        hook.ctx["seen"] = p

    def one(value: float = 1.0) -> Any:
        with model.intervene(Bias(value=value, keys=0)), model.hooks([(("pattern", 0), look)]):
            return capture(model, RAGGED, tmp_path / "s", interventions=[KNOCK])

    first = one()
    kinds = [data["kind"].rpartition(".")[2] for data in first.attrs["interventions"]]
    assert kinds == ["Bias", "Hooks", "Bias"]
    assert first.attrs["interventions"][0]["value"] == 1.0
    assert first.attrs["interventions"][2]["value"] == "-inf"
    assert first.identical(one())  # what the hook gathered is no part of it
    with pytest.raises(StoreError, match=r"interventions"):
        one(2.0)
    with pytest.raises(StoreError, match=r"interventions"):
        capture(model, RAGGED, tmp_path / "s")
    with pytest.raises(StoreError, match=r"max_new_tokens 0, now 2"), model.hooks():
        capture(model, RAGGED, tmp_path / "s", max_new_tokens=2)


def test_what_cannot_be_recorded_stops_before_anything_runs(bare: Bare, tmp_path: Path) -> None:
    thing = object()
    edit = Edit(site="z", function=lambda z, _: z if thing else None)
    with pytest.raises(InputError, match=r"Edit\.function holds a object"):
        capture(bare("llama"), RAGGED, tmp_path / "s", interventions=[edit])
    assert not (tmp_path / "s").exists()


def test_a_problem_too_short_for_an_intervention_fails_alone(bare: Bare, tmp_path: Path) -> None:
    model = bare("llama")
    some = [Bias(value=-1.0, keys=4)]
    for new in (0, 2):
        ds = capture(model, RAGGED, tmp_path / f"{new}", interventions=some, max_new_tokens=new)
        assert ds.status.values.tolist() == [1, 1, 2, 1]
        assert "keys=4 is out of range: a prompt of this batch has 1 tokens" in ds.error.values[2]
        with model.intervene(*some):
            ids = ds.token_id.values[1].tolist()[: 5 + new]
            _, cache = model.run_with_cache([ids], "pattern", layers=0)
        np.testing.assert_allclose(own(ds, 1)[0], cache["pattern", 0][0].numpy(), atol=1e-5)
    with pytest.raises(InputError, match=r"keys=4 is out of range"):
        capture(model, RAGGED, tmp_path / "r", interventions=some, on_error="raise")


def test_a_generation_too_short_for_a_selection_fails_alone(bare: Bare, tmp_path: Path) -> None:
    model = bare("llama")
    problems = [ids for ids in RAGGED if len(ids) == 5]
    first = [stepwise("llama", ids).sequences[0].tolist() for ids in problems]
    stopping(model, first[0][5])
    ds = capture(model, problems, tmp_path / "s", max_new_tokens=NEW, queries=[6, 0])
    lasting = [first[0][5] not in tokens[5:6] for tokens in first]
    assert ds.status.values.tolist() == [1 if long else 2 for long in lasting]
    assert "queries=6 is out of range: problem '0' has 6 tokens" in ds.error.values[0]


def test_a_run_that_is_stopped_while_generating_goes_on_to_the_same_store(
    bare: Bare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, finish = bare("qwen3"), Writer.done
    problems = [[5, n, *range(1, n)] for n in range(2, 12)]
    options: dict[str, Any] = {"max_new_tokens": 4, "batch_size": 2}
    options["interventions"] = [Bias(value=-1.0, keys="first:2")]
    whole = capture(model, problems, tmp_path / "a", **options)
    done: list[int] = []

    def stop(writer: Writer, index: int, loss: float) -> None:
        if len(done) == 5:
            raise KeyboardInterrupt
        finish(writer, index, loss)
        done.append(index)

    monkeypatch.setattr(Writer, "done", stop)
    with pytest.raises(KeyboardInterrupt):
        capture(model, problems, tmp_path / "b", **options)
    monkeypatch.undo()
    resumed = capture(model, problems, tmp_path / "b", **options)
    for name in ("pattern", "loss", "token_id", "query_position", "segment", "length", "status"):
        np.testing.assert_array_equal(whole[name].values, resumed[name].values)
    assert (whole.status == 1).all()
    assert (whole.segment == "generated").sum("key").values.tolist() == [4] * 10


def test_a_model_in_training_generates_and_is_read_without_dropout(
    bare: Bare, tmp_path: Path
) -> None:
    model = bare("gpt2")
    ds = capture(model, RAGGED, tmp_path / "a", max_new_tokens=3)
    model.module.train()
    again = capture(model, RAGGED, tmp_path / "b", max_new_tokens=3)
    np.testing.assert_array_equal(ds.pattern.values, again.pattern.values)
    assert model.module.training


@pytest.mark.parametrize("new", [-1, 1.5, True, "3"])
def test_a_number_of_tokens_that_is_none_is_refused(new: Any, bare: Bare, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=rf"max_new_tokens={new!r}\. It must be an int of at"):
        capture(bare("llama"), RAGGED, tmp_path / "s", max_new_tokens=new)


def test_a_generation_beyond_the_context_is_refused(bare: Bare, tmp_path: Path) -> None:
    message = r"problem '0' has 60 tokens, and with max_new_tokens=5 it would pass the context of"
    with pytest.raises(InputError, match=message):
        capture(bare("llama"), [[1] * 60], tmp_path / "s", max_new_tokens=5)


@pytest.mark.parametrize("name", ["trocr", "recurrent_gemma", "git", "minimax_m3_vl_text"])
def test_what_is_generated_is_the_same_in_a_batch_where_a_model_feels_padding(
    name: str, tmp_path: Path
) -> None:
    """No position_ids; layers that carry padding on; its own cache; keys chosen by position."""
    some = [[5, 6, 7, 8, 9, 10, 11], [12, 13, 14], [20, 21, 22, 23, 24]]
    options: Any = {"max_new_tokens": 4, "dtype": "float32", "progress": False}
    with probe.load(tiny_of(name)) as model:
        batch = probe.capture(model, some, tmp_path / "batch", **options)
        alone = probe.capture(model, some, tmp_path / "alone", batch_size=1, **options)
        np.testing.assert_array_equal(batch.token_id.values, alone.token_id.values)
        np.testing.assert_allclose(batch.pattern.values, alone.pattern.values, atol=1e-5)
        assert batch.status.values.tolist() == [1, 1, 1]
