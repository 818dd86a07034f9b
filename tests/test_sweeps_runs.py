"""Sweeps as runs: what they cost, their labels, controls and stores, interrupted and resumed."""

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from peft import LoraConfig, get_peft_model
from torch import nn

import probe
from probe.errors import InputError, StoreError, WiringError
from probe.interventions import Intervention
from probe.model import Model
from probe.writer import Writer
from recipes import sweeps
from recipes.ablation import Ablate, reference, sweep
from recipes.architectures_tiny import quiet, tiny
from tests.ablated import PATTERNS, logits_of, mean_nll, without
from tests.conftest import tiny_model
from tests.edited import watched
from tests.models import demo as demo
from tests.references import no_grad as no_grad

IDS = [[5, 9, 2, 7, 1, 8, 3], [4, 4, 6, 1, 9, 2, 2]]
quietly: Any = {"progress": False}


def runs_of_one_more(model: Model, part: str = "mlp", **options: Any) -> list[int]:
    """How often a part of each block runs for a third problem; the first also proves what can be
    left out.

    Its no-op is in the third of the layers (the first of one or two), and the heads of a layer run
    together.
    """
    module: Any = model.module
    found = []
    for problems in (IDS, [*IDS, IDS[0]]):
        runs = [0] * len(model.layers)
        handles = []
        for layer, block in enumerate(module.model.layers):

            def count(*_: Any, layer: int = layer, runs: list[int] = runs) -> None:
                runs[layer] += 1

            handles.append(block.get_submodule(part).register_forward_hook(count))
        sweep(model, problems, **options, **quietly)
        for handle in handles:
            handle.remove()
        found.append(runs)
    return [more - fewer for fewer, more in zip(*found, strict=True)]


@pytest.mark.parametrize(
    ("options", "cost"),
    [
        # unchanged + no-op + ablated here and below
        ({}, [1 + 0 + 1, 1 + 0 + 2, 1 + 1 + 3]),
        ({"layers": 2}, [1, 1, 1 + 1 + 1]),
        ({"layers": [1, 2], "heads": 0}, [1, 1 + 1 + 1, 1 + 1 + 2]),
        ({"layers": 2, "mode": "uniform"}, [2, 2, 2 + 1 + 1]),  # once for all layers' patterns
        ({"layers": 2, "mode": "resample"}, [2, 2, 2 + 1 + 1]),  # once for the other problem
    ],
    ids=str,
)
def test_blocks_below_an_ablated_layer_never_run_for_its_variants(
    options: Any, cost: list[int]
) -> None:
    assert runs_of_one_more(watched("llama"), **options) == cost


def test_the_attention_of_an_ablated_layer_never_runs_for_its_variants() -> None:
    # unchanged + ablated below
    assert runs_of_one_more(watched("llama"), "self_attn.q_proj") == [1 + 0, 1 + 1, 1 + 2]


def test_variants_that_do_not_fit_together_give_the_same_numbers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = watched("qwen3")
    together = sweep(model, IDS, **quietly).delta_loss
    monkeypatch.setitem(sweeps._NUMBERS, "cpu", 3 * 7 * 32)  # three of four heads
    assert runs_of_one_more(model, layers=2) == [1, 1, 1 + 1 + 2]
    np.testing.assert_allclose(sweep(model, IDS, **quietly).delta_loss, together, atol=1e-5)


AROUND: list[Intervention] = [
    probe.Edit(site="v", function=lambda v, _: 2 * v, layers=[0, 2]),
    probe.Edit(site="z", function=lambda z, _: 0.5 * z, heads=[1, 2]),
    probe.Bias(value=-1.0, keys=0, queries=slice(1, None)),
]


@pytest.mark.parametrize("mode", ["zero", "mean", "resample", *PATTERNS])
def test_interventions_around_a_sweep_are_part_of_all_of_it(mode: Any) -> None:
    model = watched("gpt2")
    with model.intervene(*AROUND):
        ds = sweep(model, IDS, mode=mode, **quietly)
        means = reference(model, IDS) if mode == "mean" else None
        for n, ids in enumerate(IDS):
            cache = model.run_with_cache(IDS[1 - n], sites="z")[1] if mode == "resample" else None
            base = mean_nll(model([ids]).logits[0], ids)
            for layer, head in [(0, 0), (1, 1), (2, 2)]:
                with model.intervene(Ablate([(layer, head)], mode, means or cache)):
                    wanted = mean_nll(model([ids]).logits[0], ids) - base
                got = float(ds.delta_loss.sel(layer=layer, head=head)[n])
                assert got == pytest.approx(wanted, abs=2e-5)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_a_projection_that_is_itself_a_module_of_modules_is_given_z_as_a_whole() -> None:
    options: Any = {"r": 4, "target_modules": ["o_proj"], "init_lora_weights": False}
    with torch.random.fork_rng():
        torch.manual_seed(3)
        adapted: Any = get_peft_model(tiny_model("llama"), LoraConfig(**options))
    adapted.train(mode=False)
    plain = adapted.base_model.model
    base = mean_nll(logits_of(plain, IDS[0]), IDS[0])
    zero = torch.zeros(1)
    wanted = [
        [mean_nll(without(plain, IDS[0], la, h, zero), IDS[0]) - base for h in range(4)]
        for la in range(3)
    ]
    with probe.load(adapted) as model:
        ds = sweep(model, IDS[:1], **quietly)
    np.testing.assert_allclose(ds.delta_loss[0], wanted, atol=2e-5)


def test_a_model_that_computes_otherwise_each_time_is_found_out() -> None:
    model = watched("llama")
    module: Any = model.module

    def noise(_: nn.Module, __: Any, output: torch.Tensor) -> torch.Tensor:
        return output + 1e-4 * torch.randn_like(output)

    handle = module.model.norm.register_forward_hook(noise)
    with pytest.raises(
        WiringError, match=r"no-op changed the logits of problem '0' by .*no effect"
    ):
        sweep(model, IDS, **quietly)
    handle.remove()
    assert sweep(model, IDS, **quietly).noop.values.tolist() == [0, 0]


def test_labels_are_those_of_a_store_that_may_itself_be_the_source(
    demo: Model, tmp_path: Path
) -> None:
    source = tmp_path / "texts.jsonl"
    source.write_text('{"id": "x", "text": "abcabc"}\n{"id": "y", "text": "xyzwxyzw"}\n')
    captured = probe.capture(demo, source, tmp_path / "run.zarr", progress=False)
    for problems in (captured, tmp_path / "run.zarr", str(tmp_path / "run.zarr"), source):
        ds = sweep(demo, problems, per_token=True, **quietly)
        assert ds.problem.values.tolist() == captured.problem.values.tolist() == ["x", "y"]
        one, other = xr.align(ds.delta_nll, captured.pattern.isel(key=0), join="exact")
        assert one.sizes == other.sizes == {"problem": 2, "layer": 2, "head": 4, "query": 9}
        np.testing.assert_array_equal(ds.token, captured.token)
        np.testing.assert_allclose(ds.loss, captured.loss, rtol=1e-6)


def test_layers_without_attention_have_no_rows() -> None:
    with quiet(), probe.load(tiny("jamba")) as model:
        ds = sweep(model, IDS, **quietly)
        assert ds.layer.values.tolist() == list(model.layers) == [1, 3]
        assert int(ds.delta_loss.isnull().sum()) == 0
        with pytest.raises(InputError, match=r"layer 0 has no attention, so no heads\. Choose"):
            sweep(model, IDS, layers=0, **quietly)


MANY = probe.demos.repeated(n=5, count=20)

KILLED = """
import os, signal, sys
import probe
import torch
from probe import writer
from probe.writer import Writer
from recipes.ablation import sweep

torch.set_num_threads(1)
append, calls = Writer.append, []
writer.SECONDS = writer.SHARE = 0

def dies(*args, **kwargs):
    calls.append(1)
    if len(calls) == 12:
        os.kill(os.getpid(), signal.SIGKILL)
    append(*args, **kwargs)

Writer.append = dies
sweep(probe.load("demo-llama"), probe.demos.repeated(n=5, count=20), sys.argv[1], progress=False)
"""


def test_a_sweep_that_is_killed_or_interrupted_goes_on_to_the_same_numbers(
    demo: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = sweep(demo, MANY, **quietly)
    killed = tmp_path / "killed.zarr"
    command = [sys.executable, "-c", KILLED, str(killed)]
    run = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True)
    assert run.returncode == -signal.SIGKILL
    assert 8 <= len(probe.open(killed).problem) <= 11

    stopped, append, calls = tmp_path / "stopped.zarr", Writer.append, list[int]()

    def stops(*args: Any, **kwargs: Any) -> None:
        calls.append(1)
        if len(calls) == 12:
            raise KeyboardInterrupt
        append(*args, **kwargs)

    monkeypatch.setattr(Writer, "append", stops)
    with pytest.raises(KeyboardInterrupt):
        sweep(demo, MANY, stopped, **quietly)
    monkeypatch.undo()
    assert len(probe.open(stopped).problem) == 11
    for path in (killed, stopped):
        xr.testing.assert_equal(sweep(demo, MANY, path, **quietly).load(), whole)
    monkeypatch.setattr(sweeps, "dissect", None)  # nothing is left to do
    xr.testing.assert_equal(sweep(demo, MANY, killed, **quietly).load(), whole)


OTHERWISE: list[dict[str, Any]] = [
    {"mode": "identity"},
    {"tokens": "last:2"},
    {"heads": [0]},
    {"layers": [0]},
    {"per_token": True},
    {"max_length": 5},
]


def test_a_store_of_another_sweep_is_not_gone_on_with(demo: Model, tmp_path: Path) -> None:
    path = tmp_path / "run.zarr"
    sweep(demo, MANY[:2], path, **quietly)
    for options in OTHERWISE:
        with pytest.raises(StoreError):
            sweep(demo, MANY[:2], path, **options, **quietly)
    with pytest.raises(StoreError):
        sweep(demo, MANY[2:4], path, **quietly)
    with demo.intervene(*AROUND), pytest.raises(StoreError):
        sweep(demo, MANY[:2], path, **quietly)
    sweep(demo, MANY[:2], path, mode="identity", overwrite=True, **quietly)
