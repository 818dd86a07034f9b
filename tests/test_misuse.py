"""What users do wrong, or do to a run while it is going on."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

import probe
from probe import demos, interface
from probe.errors import InputError, StoreError, WiringError

IDS = [[0, 5, 9, 2, 5, 9, 2], [0], [0, 7, 7], list(range(13)), [3, 1]]


@pytest.fixture(scope="module")
def llama() -> Any:
    with probe.load("demo-llama") as model:
        yield model


def test_two_threads_can_share_a_model(llama: Any, tmp_path: Path) -> None:
    problems = demos.repeated(20, 40)

    def go(name: str) -> Any:
        return probe.capture(llama, problems, tmp_path / name, batch_size=4, progress=False).load()

    alone = go("alone")
    with ThreadPoolExecutor(3) as pool:
        for ds in pool.map(go, "abc"):
            np.testing.assert_array_equal(ds.pattern.values, alone.pattern.values)
            assert (ds.status == 1).all()


def test_a_layer_that_was_not_read_is_an_error_and_never_data(
    llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attention = llama.base.model.layers[1].self_attn
    monkeypatch.delitem(attention.__dict__, interface.LISTENER)
    with pytest.raises(WiringError, match=r"layer 1 could not be read: .*already ran past it"):
        probe.capture(llama, IDS, tmp_path / "s", progress=False)
    assert not (tmp_path / "s").exists()


def test_a_model_that_is_closed_or_switched_is_refused(tmp_path: Path) -> None:
    model = probe.load("demo-llama")
    cast(Any, model.base).set_attn_implementation("eager")
    with pytest.raises(InputError, match="LlamaForCausalLM was changed to 'eager' after"):
        probe.capture(model, IDS, tmp_path / "s", progress=False)
    model.close()
    with pytest.raises(InputError, match="this model was closed"):
        probe.capture(model, IDS, tmp_path / "s", progress=False)
    with pytest.raises(InputError, match=r"model is a str\. Give what probe\.load returns\."):
        probe.plan("demo-llama", IDS)  # type: ignore[arg-type]


def test_autocast_does_not_touch_what_is_read(llama: Any, tmp_path: Path) -> None:
    plain = probe.capture(llama, IDS, tmp_path / "plain", dtype="float32", progress=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ds = probe.capture(llama, IDS, tmp_path / "s", dtype="float32", progress=False)
    valid = probe.valid(ds).any("key").values[:, None, None]
    total = ds.pattern.values.sum(-1)
    np.testing.assert_allclose(total, np.broadcast_to(valid, total.shape), atol=1e-6)
    # the model itself computes in bfloat16 here, so its own queries and keys differ by 1 %
    np.testing.assert_allclose(ds.pattern.values, plain.pattern.values, atol=0.1)


def test_a_home_folder_in_the_path_is_the_home_folder(
    llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    probe.capture(llama, IDS, "~/s", progress=False)
    assert probe.open("~/s").sizes["problem"] == len(IDS)
    assert probe.open(tmp_path / "s").sizes["problem"] == len(IDS)


def test_overwrite_never_replaces_something_foreign(llama: Any, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "text.tex").write_text("years of work", encoding="utf-8")
    with pytest.raises(StoreError, match="is a folder that holds no store"):
        probe.capture(llama, IDS, tmp_path / "thesis", overwrite=True, progress=False)
    assert (tmp_path / "thesis" / "text.tex").exists()


def test_a_store_that_is_deleted_under_the_run_stops_it(llama: Any, tmp_path: Path) -> None:
    problems = [ids + ids[1:] for ids in demos.repeated(20, 3)]  # a shard each
    seen: list[int] = []

    def vanish(module: Any, arguments: Any, named: Any) -> None:
        seen.append(1)
        if len(seen) == 2:
            shutil.rmtree(tmp_path / "s")

    hook = llama.module.register_forward_pre_hook(vanish, with_kwargs=True)
    try:
        with pytest.raises(StoreError, match="was deleted or moved while it was being written"):
            probe.capture(llama, problems, tmp_path / "s", batch_size=1, progress=False)
    finally:
        hook.remove()
    assert not (tmp_path / "s").exists()


def test_lists_that_can_be_read_only_once_are_read_once(llama: Any, tmp_path: Path) -> None:
    off = probe.Edit(site="z", function=lambda z, _: 0 * z)
    ds = probe.capture(
        llama,
        IDS,
        tmp_path / "s",
        sites=iter(["z", "pattern"]),  # type: ignore[arg-type]
        queries=iter([0]),  # type: ignore[arg-type]
        keys=iter([0]),  # type: ignore[arg-type]
        interventions=iter([off]),  # type: ignore[arg-type]
        progress=False,
    )
    assert len(ds.attrs["interventions"]) == 1
    assert float(abs(ds["z"]).max()) == 0  # what is recorded was also done
    assert (ds.status == 1).all()


@pytest.mark.parametrize("given", [None, 3, probe.Bias(value=-1.0)], ids=str)
def test_what_is_no_list_is_refused(given: Any, llama: Any) -> None:
    for name in ("sites", "interventions"):
        with pytest.raises(InputError, match=rf"{name}=.* is no list\. Give one, as {name}=\["):
            probe.plan(llama, IDS, **{name: given})


@pytest.mark.parametrize("store", [None, 3, b"s"], ids=str)
def test_a_store_that_is_no_path_is_refused(store: Any, llama: Any) -> None:
    with pytest.raises(
        InputError, match=r"store=.*\. Give the folder of the store, as 'run\.zarr'"
    ):
        probe.capture(llama, IDS, store)


ODD: dict[str, tuple[dict[str, Any], str]] = {
    "nothing": ({"source": None}, r"source is a NoneType\. Give a name on the hub, a local folder"),
    "a list": ({"source": ["demo-llama"]}, r"source is a list\."),
    "an unknown device": ({"device": "nonsense"}, r"device='nonsense' cannot be used: .*as 'cpu'"),
    "a device of no kind": ({"device": 1.5}, r"device=1\.5 cannot be used"),
    "a device that is not here": ({"device": "cuda:99"}, r"device='cuda:99' cannot be used"),
    "an unknown dtype": (
        {"dtype": "float99"},
        r"dtype='float99'\. Give one of torch, as 'bfloat16'",
    ),
    "another name of torch": ({"dtype": "nn"}, r"dtype='nn'\."),
    "a layout of no kind": ({"layout": "x"}, r"layout='x'\. Give a probe\.Layout\(\.\.\.\)"),
}


@pytest.mark.parametrize("what", ODD)
def test_what_cannot_be_loaded_says_why(what: str) -> None:
    options, message = ODD[what]
    with pytest.raises(InputError, match=message):
        probe.load(**{"source": "demo-llama"} | options)


def test_a_dtype_may_be_left_to_the_checkpoint_by_its_name() -> None:
    for dtype in ("auto", "float32", torch.float32, None):
        assert probe.load("demo-llama", dtype=dtype).dtype == torch.float32


def test_real_text_in_a_real_model_proves_itself(tmp_path: Path) -> None:
    shared = Path(__file__).parent.parent.parent / "shared" / "data"
    if not shared.exists():
        pytest.skip("needs the optional data")
    problems = probe.problems(shared / "gsm8k" / "train.jsonl", n=60)
    # terms that cancel inside a score round more than the score's own size says
    with probe.load(shared / "stories260K-hf") as model:
        ds = probe.capture(model, [problems[28].text], tmp_path / "s", progress=False)
        assert (ds.status == 1).all()
