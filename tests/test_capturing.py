import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import probe
from probe import capturing, demos, interface
from probe.errors import InputError, StoreError, WiringError

NAMES = demos.NAMES
# A model on SDPA and its eager copy differ by the rounding of their own kernels: scores near 30 are
# known to 2e-6, which is what moves a probability. On the same kernel the difference is exactly 0.
KERNELS = 4e-6
RAGGED = [[0, 5, 9, 2, 5, 9, 2], [0], [0, 7, 7], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12], [3, 1]]


@pytest.fixture(scope="module")
def llama() -> Any:
    with probe.load("demo-llama") as model:
        yield model


def eager(name: str, ids: list[int]) -> tuple[np.ndarray[Any, Any], float]:
    """Patterns (layer, head, query, key) and mean loss of one problem alone, by transformers."""
    model = AutoModelForCausalLM.from_pretrained(demos.path(name), attn_implementation="eager")
    with torch.no_grad():
        out = model(torch.tensor([ids]), output_attentions=True)
    each = out.logits[0, :-1].double().log_softmax(-1)
    loss = float(-each[range(len(ids) - 1), ids[1:]].mean()) if len(ids) > 1 else float("nan")
    return np.stack([a[0].numpy() for a in out.attentions]), loss


def own(ds: Any, problem: int, site: str = "pattern") -> np.ndarray[Any, Any]:
    """The stored rows and columns that a problem has."""
    one = ds.isel(problem=problem)
    rows, columns = (int((one[f"{d}_position"] >= 0).sum()) for d in ("query", "key"))
    return np.asarray(one[site].values[:, :, :rows, :columns])


@pytest.mark.parametrize("name", NAMES)
def test_stored_patterns_and_losses_equal_those_of_an_eager_copy(name: str, tmp_path: Path) -> None:
    long = demos.repeated(30, 1)[0]  # longer than Mistral's window
    with probe.load(name) as model:
        ds = probe.capture(model, [*RAGGED, long], tmp_path / "s", dtype="float32", progress=False)
    for i, ids in enumerate([*RAGGED, long]):
        pattern, loss = eager(name, ids)
        np.testing.assert_allclose(own(ds, i), pattern, atol=KERNELS)
        np.testing.assert_allclose(float(ds.loss[i]), loss, rtol=1e-5)
        padding = ds.pattern.values[i, :, :, len(ids) :], ds.pattern.values[i, :, :, :, len(ids) :]
        assert not any(part.any() for part in padding)


def test_softmax_of_stored_scores_is_the_stored_pattern(llama: Any, tmp_path: Path) -> None:
    ds = probe.capture(
        llama, RAGGED, tmp_path / "s", sites=("pattern", "scores"), dtype="float32", progress=False
    )
    for i in range(len(RAGGED)):
        scores = own(ds, i, "scores")
        allowed = np.tril(np.ones(scores.shape[-2:], dtype=bool))
        assert (np.isneginf(scores) == ~allowed).all()
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        np.testing.assert_allclose(weights / weights.sum(-1, keepdims=True), own(ds, i), atol=1e-6)
    beyond = ds.scores.values[
        ~np.broadcast_to(probe.valid(ds).values[:, None, None], ds.scores.shape)
    ]
    assert np.isneginf(beyond).all()


def test_a_problem_has_the_same_numbers_alone_and_in_a_batch(llama: Any, tmp_path: Path) -> None:
    options: dict[str, Any] = {"dtype": "float32", "progress": False}
    batched = probe.capture(llama, RAGGED, tmp_path / "a", **options)
    alone = probe.capture(llama, RAGGED, tmp_path / "b", batch_size=1, **options)
    np.testing.assert_allclose(batched.pattern.values, alone.pattern.values, atol=KERNELS)
    np.testing.assert_allclose(batched.loss.values, alone.loss.values, rtol=1e-5)


def test_labels_say_what_each_stored_row_and_column_is(llama: Any, tmp_path: Path) -> None:
    ds = probe.capture(llama, ["abca", "z."], tmp_path / "s", queries="last:2", progress=False)
    assert ds.problem.values.tolist() == ["0", "1"]
    assert ds.query_position.values.tolist() == [[3, 4], [1, 2]]
    assert ds.key_position.values.tolist() == [[0, 1, 2, 3, 4], [0, 1, 2, -1, -1]]
    assert ds.token.values.tolist() == [["<bos>", "a", "b", "c", "a"], ["<bos>", "z", ".", "", ""]]
    assert ds.token_id.values.tolist() == [[0, 1, 2, 3, 1], [0, 26, 63, -1, -1]]
    assert ds.segment.values.tolist() == [["bos"] + ["text"] * 4, ["bos", "text", "text", "", ""]]
    assert ds.length.values.tolist() == [5, 3]
    assert ds.status.values.tolist() == [1, 1]


@pytest.mark.parametrize(
    ("selection", "index"),
    [
        ({"queries": "last:2"}, np.s_[:, :, -2:, :]),
        ({"queries": [3, 1]}, np.s_[:, :, [3, 1], :]),
        ({"keys": slice(1, 3)}, np.s_[:, :, :, 1:3]),
        ({"keys": [4, 0], "queries": -1}, np.s_[:, :, -1:, [4, 0]]),
        ({"heads": [3, 1]}, np.s_[:, [3, 1]]),
        ({"layers": -1}, np.s_[-1:]),
        ({"layers": [1, 0], "heads": slice(2)}, np.s_[[1, 0], :2]),
    ],
)
@pytest.mark.parametrize("name", ["demo-llama", "demo-qwen2"])
def test_a_selection_is_that_part_of_everything(
    name: str, selection: dict[str, Any], index: Any, tmp_path: Path
) -> None:
    ids = [demos.repeated(6, 1)[0], demos.repeated(4, 1, seed=1)[0]]
    with probe.load(name) as model:
        part = probe.capture(
            model, ids, tmp_path / "s", dtype="float32", progress=False, **selection
        )
    for i, one in enumerate(ids):
        np.testing.assert_allclose(own(part, i), eager(name, one)[0][index], atol=KERNELS)


def test_a_run_that_is_killed_and_run_again_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    code = """if True:
        import os, signal, sys
        import probe
        from probe import demos, ledger, store
        ledger.SECONDS = 0
        write, seen = store.Writer.done, []
        def done(self, *arguments, **named):
            write(self, *arguments, **named)
            seen.append(1)
            if len(seen) == int(sys.argv[2]):
                os.kill(os.getpid(), signal.SIGKILL)
        store.Writer.done = done
        problems = [ids[:n] for n in range(70, 101) for ids in demos.repeated(30, 1, seed=n)]
        problems = [ids + ids[1:] for ids in problems]
        probe.capture(probe.load("demo-llama"), problems, sys.argv[1], batch_size=3, progress=False)
    """
    whole, killed = str(tmp_path / "whole"), str(tmp_path / "killed")
    for path, after, expected in ((whole, 0, 0), (killed, 10, -signal.SIGKILL), (killed, 0, 0)):
        done = subprocess.run([sys.executable, "-c", code, path, str(after)], check=False)
        assert done.returncode == expected
        if after:
            part = probe.open(killed)
            assert 0 < part.sizes["problem"] < 31
            assert (part.status == 1).all()
    once, twice = probe.open(whole).load(), probe.open(killed).load()
    for name in ("pattern", "loss", "token_id", "query_position", "status"):
        np.testing.assert_array_equal(once[name].values, twice[name].values)


def test_running_a_finished_capture_again_computes_nothing(
    llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = probe.capture(llama, RAGGED, tmp_path / "s", progress=False).load()
    monkeypatch.setattr(capturing, "read", lambda *_, **__: pytest.fail("the model ran"))
    again = probe.capture(llama, RAGGED, tmp_path / "s", progress=False).load()
    assert first.identical(again)


def breaking(model: Any, token: int, error: Exception) -> Any:
    """A hook that makes the model fail on every batch that holds a token."""

    def check(module: Any, arguments: Any, named: Any) -> None:
        if bool((named["input_ids"] == token).any()):
            raise error

    return model.module.register_forward_pre_hook(check, with_kwargs=True)


def test_a_problem_that_fails_is_recorded_and_the_others_go_on(llama: Any, tmp_path: Path) -> None:
    hook = breaking(llama, 12, ArithmeticError("token 12 overflowed"))
    try:
        ds = probe.capture(llama, RAGGED, tmp_path / "s", progress=False)
    finally:
        hook.remove()
    assert ds.status.values.tolist() == [1, 1, 1, 2, 1]
    assert ds.error.values.tolist()[3] == "ArithmeticError: token 12 overflowed"
    assert not ds.pattern.values[3].any()
    assert np.isnan(ds.loss.values[3])
    assert not probe.valid(ds).values[3].any()
    again = probe.capture(llama, RAGGED, tmp_path / "s", progress=False)  # now it works
    assert (again.status == 1).all()
    np.testing.assert_allclose(own(again, 3), eager("demo-llama", RAGGED[3])[0], atol=1e-3)


def test_on_error_raise_stops_and_names_the_problem(llama: Any, tmp_path: Path) -> None:
    hook = breaking(llama, 12, ArithmeticError("token 12 overflowed"))
    try:
        with pytest.raises(ArithmeticError) as caught:
            probe.capture(llama, RAGGED, tmp_path / "s", on_error="raise", progress=False)
    finally:
        hook.remove()
    assert caught.value.__notes__ == ["This happened in problem '3'."]


def test_a_run_in_which_everything_fails_stops_early_and_says_why(
    llama: Any, tmp_path: Path
) -> None:
    wrong = probe.Edit(site="z", function=lambda z, _: z[:, :1])
    many = [[n, n + 1, n + 2] for n in range(1, 30)]
    options: Any = {"interventions": [wrong], "batch_size": 1, "progress": False}
    with pytest.raises(InputError, match="Return a tensor of shape") as raised:
        probe.capture(llama, many, tmp_path / "s", **options)
    assert raised.value.__notes__ == ["This happened in problem '8'."]
    with pytest.raises(InputError, match="Return a tensor of shape"):
        probe.capture(llama, many[:3], tmp_path / "few", **options)
    with pytest.raises(InputError, match="Return a tensor of shape"):
        probe.capture(llama, many[:1], tmp_path / "one", **options)
    assert not (tmp_path / "one").exists()


def test_a_batch_that_does_not_fit_in_memory_is_halved(
    llama: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def check(module: Any, arguments: Any, named: Any) -> None:
        if len(named["input_ids"]) > 2:
            raise torch.OutOfMemoryError("too much")

    problems = [ids[: 10 + i] for i, ids in enumerate(demos.repeated(20, 9))]
    hook = llama.module.register_forward_pre_hook(check, with_kwargs=True)
    try:
        ds = probe.capture(llama, problems, tmp_path / "s", dtype="float32", progress=False)
    finally:
        hook.remove()
    assert (ds.status == 1).all()
    assert [record.getMessage() for record in caplog.records] == [
        "out of memory; going on with batches of 4 problems",
        "out of memory; going on with batches of 2 problems",
    ]
    np.testing.assert_allclose(own(ds, 8), eager("demo-llama", problems[8])[0], atol=KERNELS)


def test_numbers_that_are_not_finite_are_a_failure_not_data(tmp_path: Path) -> None:
    module: Any = AutoModelForCausalLM.from_pretrained(demos.path("demo-llama"))
    with torch.no_grad():
        module.get_input_embeddings().weight[30] = torch.nan
    with probe.load(module) as model:
        ds = probe.capture(model, [[0, 1, 2], [0, 30, 2], [0, 63]], tmp_path / "s", progress=False)
    assert ds.status.values.tolist() == [1, 2, 1]
    assert "not finite" in str(ds.error.values[1])


def test_what_cannot_be_proven_is_not_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = interface._call

    def wrong(*arguments: Any) -> Any:
        call = right(*arguments)
        return replace(call, scaling=1.1 * (call.scaling or 1))

    with probe.load("demo-llama") as model:
        monkeypatch.setattr(interface, "_call", wrong)
        with pytest.raises(WiringError, match=r"layer 0: pattern @ value differs"):
            probe.capture(model, RAGGED, tmp_path / "s", progress=False)
        assert not (tmp_path / "s").exists()
        monkeypatch.setattr(interface, "_call", right)
        before = probe.capture(model, RAGGED, tmp_path / "s", progress=False).load()
        monkeypatch.setattr(interface, "_call", wrong)
        with pytest.raises(WiringError):
            probe.capture(model, RAGGED, tmp_path / "s", overwrite=True, progress=False)
        assert before.identical(probe.open(tmp_path / "s").load())  # not replaced by nothing


def test_the_model_runs_in_eval_mode_and_gets_its_mode_back(tmp_path: Path) -> None:
    module: Any = AutoModelForCausalLM.from_pretrained(demos.path("demo-gpt2"), attn_pdrop=0.5)
    module.train()
    module.lm_head.eval()
    with probe.load(module) as model:
        ds = probe.capture(model, RAGGED, tmp_path / "s", dtype="float32", progress=False)
    assert module.training
    assert module.transformer.h[0].attn.training
    assert not module.lm_head.training
    np.testing.assert_allclose(own(ds, 3), eager("demo-gpt2", RAGGED[3])[0], atol=KERNELS)


def test_a_bfloat16_model_is_captured_close_to_its_own_eager_patterns(tmp_path: Path) -> None:
    folder = demos.path("demo-llama")
    with probe.load("demo-llama", dtype=torch.bfloat16) as model:
        ds = probe.capture(model, RAGGED, tmp_path / "s", progress=False)
    copy = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, attn_implementation="eager"
    )
    with torch.no_grad():
        expected = copy(torch.tensor([RAGGED[3]]), output_attentions=True).attentions
    # bfloat16 keeps 8 bits: scores near 10 are rounded by 0.03, which moves a probability by 3 %
    stacked = np.stack([a[0].float().numpy() for a in expected])
    np.testing.assert_allclose(own(ds, 3), stacked, atol=0.03)
    assert ds.attrs["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"queries": "last:1"}, r"queries None, now 'last:1'"),
        ({"dtype": "float32"}, r"dtype float16, now float32"),
        ({"max_length": 2}, r"max_length None, now 2"),
    ],
)
def test_a_store_of_other_settings_is_not_mixed(
    changed: dict[str, Any], said: str, llama: Any, tmp_path: Path
) -> None:
    before = probe.capture(llama, RAGGED, tmp_path / "s", progress=False).load()
    with pytest.raises(StoreError, match=said):
        probe.capture(llama, RAGGED, tmp_path / "s", progress=False, **changed)
    assert before.identical(probe.open(tmp_path / "s").load())
    new = probe.capture(llama, RAGGED, tmp_path / "s", overwrite=True, progress=False, **changed)
    assert not before.equals(new)


def test_another_checkpoint_is_not_mixed(llama: Any, tmp_path: Path) -> None:
    probe.capture(llama, RAGGED, tmp_path / "s", progress=False)
    other = AutoModelForCausalLM.from_pretrained(demos.path("demo-llama"))
    with torch.no_grad():
        other.lm_head.weight += 1
    with probe.load(other) as model, pytest.raises(StoreError, match=r"model\.fingerprint"):
        probe.capture(model, RAGGED, tmp_path / "s", progress=False)


def test_no_room_on_the_disk_shows_before_anything_runs(
    llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 100})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(StoreError, match=r"would write about .* and the disk has 100 B free"):
        probe.capture(llama, RAGGED, tmp_path / "new" / "s", progress=False)
    assert list(tmp_path.iterdir()) == []


def test_a_bad_on_error_is_refused(llama: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"on_error='ignore'\. Choose 'record' or 'raise'\."):
        probe.capture(llama, RAGGED, tmp_path / "s", on_error="ignore")  # type: ignore[arg-type]


def test_the_record_tells_the_story(llama: Any, tmp_path: Path) -> None:
    ds = probe.capture(llama, ["abc"], tmp_path / "s", layers=1, progress=False)
    story = ds.attrs
    assert story["schema"] == "probe/1"
    assert story["model"] == "demo-llama"
    assert story["model_class"] == "LlamaForCausalLM"
    assert story["attn_implementation"] == "sdpa"
    assert story["interventions"] == []
    assert story["selection"] == {
        "layers": [1],
        "heads": [0, 1, 2, 3],
        "queries": None,
        "keys": None,
    }
    assert story["problems"]["source"] == "list"
    assert set(story["versions"]) >= {"probe", "nnsight", "transformers", "torch", "zarr"}
    assert len(story["config_sha256"]) == 64
