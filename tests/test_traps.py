"""What breaks users of nnsight, each shown to work here or to be refused.

Others of these traps have tests beside what they are about: gradient checkpointing in
test_checkpointing, `with ...: loss.backward()` in test_backward, threads and nested calls in
test_watching, peft, torch.compile, quantised and offloaded weights in test_loading_ways and
test_compiled, caches and truncated keys in test_caches and test_interventions, reading out of order
in test_envoys, copies and pickles in test_tap_wiring.
"""

import linecache
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

import probe
from probe.errors import InputError
from probe.model import Model
from tests.conftest import Tiny
from tests.models import Bare
from tests.models import bare as bare

SCRIPT = """
import torch
import probe

def double(p, hook):
    return 2 * p

with torch.no_grad(), probe.load("demo-llama", device="cpu") as model:
    plain = model.run_with_hooks([[0, 1, 2, 3]])
    with model.hooks([(("pattern", 1), double)]):
        changed, cache = model.run_with_cache([[0, 1, 2, 3]], sites="pattern")
    ds = probe.capture(model, [[0, 1, 2, 3]], STORE, interventions=[
        probe.Edit(site="z", function=lambda z, call: 0 * z)
    ], max_new_tokens=2, progress=False)
    print(float((changed - plain).abs().max()) > 1e-3, float(cache["pattern", 1].sum()), ds.sizes)
"""
WANTED = "True 32.0"


def run(arguments: list[str], text: str, folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        input=text,
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("way", ["stdin", "-c", "exec", "prompt"])
def test_everything_works_where_python_has_no_source_to_show(way: str, tmp_path: Path) -> None:
    script = SCRIPT.replace("STORE", repr(str(tmp_path / "s.zarr")))
    if way == "stdin":
        out = run(["-"], script, tmp_path)
    elif way == "-c":
        out = run(["-c", script], "", tmp_path)
    elif way == "exec":
        out = run(["-c", f"exec({script!r})"], "", tmp_path)
    else:  # a prompt ends a block at a blank line, and only there
        lines = script.replace("return 2 * p\n", "return 2 * p\n\n")
        out = run(["-i", "-q"], lines + "\n\n", tmp_path)
    assert WANTED in out


def test_everything_works_in_a_cell_of_a_notebook(tmp_path: Path, capsys: Any) -> None:
    script = SCRIPT.replace("STORE", repr(str(tmp_path / "s.zarr")))
    name = "<ipython-input-7>"
    linecache.cache[name] = (len(script), None, script.splitlines(keepends=True), name)
    exec(compile(script, name, "exec"), {})
    assert WANTED in capsys.readouterr().out


def test_contexts_can_be_stacked_and_left_in_any_way(bare: Bare) -> None:
    model = bare("llama")
    plain = model([[1, 2, 3]]).logits
    with ExitStack() as stack:
        stack.enter_context(model.hooks([(("z", 0), lambda z, _: 0 * z)]))
        stack.enter_context(model.intervene(probe.Bias(value=-3.0, keys=0)))
        assert not torch.equal(model([[1, 2, 3]]).logits, plain)
    assert torch.equal(model([[1, 2, 3]]).logits, plain)

    def leaves() -> Tensor:
        with model.hooks([(("z", 0), lambda z, _: 0 * z)]):
            try:
                return cast(Tensor, model([[1, 2, 3]]).logits)
            finally:
                pass

    assert not torch.equal(leaves(), plain)
    assert torch.equal(model([[1, 2, 3]]).logits, plain)


def fail(model: Model, value: object) -> None:
    with model.envoy.trace(**model.batch([[1, 2, 3]])):
        pattern = model.envoy.model.layers[1].self_attn.pattern
        pattern[:] = 1 // cast(int, value)


def assign(model: Model, site: str, value: object) -> None:
    with model.envoy.trace(**model.batch([[1, 2, 3]])):
        setattr(model.envoy.model.layers[1].self_attn, site, value)


def test_an_error_in_the_body_of_a_trace_leaves_the_model_as_it_was(bare: Bare) -> None:
    model = bare("llama")
    plain = model([[1, 2, 3]]).logits
    with pytest.raises(ZeroDivisionError):
        fail(model, 0)
    assert torch.equal(model([[1, 2, 3]]).logits, plain)
    _, cache = model.run_with_cache([[1, 2, 3]], sites="pattern")
    assert len(cache) == 3


@pytest.mark.parametrize(
    ("site", "value", "message"),
    [
        ("pattern", torch.zeros(1, 2), r"pattern was assigned \(1, 2\) .*shape \(1, 4, 3, 3\)"),
        ("scores", 3.0, r"scores was assigned float .*shape \(1, 4, 3, 3\)"),
        ("z", torch.zeros(1), r"z was assigned \(1,\) .*shape \(1, 3, 4, 8\)"),
        ("call", None, "call was assigned NoneType .*one of AttentionCall"),
    ],
)
def test_what_cannot_stand_in_a_place_is_refused_where_it_is_assigned(
    site: str, value: object, message: str, bare: Bare
) -> None:
    model = bare("llama")
    plain = model([[1, 2, 3]]).logits
    with pytest.raises(InputError, match=message):
        assign(model, site, value)
    assert torch.equal(model([[1, 2, 3]]).logits, plain)


def monkeypatched(tiny: Tiny) -> Any:
    model: Any = tiny("llama")
    attention = model.model.layers[1].self_attn
    own = attention.forward
    attention.forward = lambda *args, **kwargs: own(*args, **kwargs)
    return model


def test_a_forward_that_somebody_patched_before_or_after_loading_is_read(tiny: Tiny) -> None:
    ids = [[1, 2, 3, 4]]
    with probe.load(tiny("llama")) as model:
        logits, cache = model.run_with_cache(ids, sites="pattern")
    with probe.load(monkeypatched(tiny)) as before:
        assert_same(before, ids, logits, cache["pattern", 1])
    with probe.load(tiny("llama")) as after:
        attention = cast(Any, after.module).model.layers[1].self_attn
        own = attention.forward
        attention.forward = lambda *args, **kwargs: own(*args, **kwargs)
        assert_same(after, ids, logits, cache["pattern", 1])


def assert_same(model: Model, ids: list[list[int]], logits: Tensor, pattern: Tensor) -> None:
    got, cache = model.run_with_cache(ids, sites="pattern")
    assert torch.equal(got, logits)
    assert torch.equal(cache["pattern", 1], pattern)
    with model.hooks([(("pattern", 1), lambda p, _: 0 * p)]):
        assert not torch.equal(model(ids).logits, logits)


def test_under_a_debugger_a_trace_is_read_and_the_debugger_stays(bare: Bare) -> None:
    model = bare("llama")
    seen: list[str] = []

    def debugger(frame: Any, event: str, _: object) -> Any:
        seen.append(frame.f_code.co_name)
        return debugger

    before = sys.gettrace()
    sys.settrace(debugger)
    try:
        _, cache = model.run_with_cache([[1, 2, 3]], sites="pattern")
        kept = sys.gettrace()
    finally:
        sys.settrace(before)
    assert len(cache) == 3
    assert kept is debugger
    assert "run_with_cache" in seen


def test_the_callers_grad_mode_and_autocast_do_not_leak_into_the_model(bare: Bare) -> None:
    model = bare("llama")
    logits, cache = model.run_with_cache([[1, 2, 3]], sites=("pattern", "z"))
    assert logits.requires_grad
    assert all(x.requires_grad for x in cache.values())
    with torch.no_grad():
        quiet, cache = model.run_with_cache([[1, 2, 3]], sites=("pattern", "z"))
    assert not quiet.requires_grad
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half, cache = model.run_with_cache([[1, 2, 3]], sites=("pattern", "z"))
    assert cache["pattern", 0].dtype == torch.float32
    assert half.dtype == torch.bfloat16
    assert torch.equal(model([[1, 2, 3]]).logits, logits)


def longer_than_the_run(model: Model, seen: list[Tensor]) -> None:
    inputs: dict[str, Any] = {**model.batch([[1, 2, 3]]), "max_new_tokens": 2, "do_sample": False}
    with model.envoy.trace(fn="generate", **inputs) as tracer:
        for _ in tracer.iter[:9]:
            seen.append(model.envoy.model.layers[1].self_attn.pattern)


def test_a_run_that_ends_before_the_loop_over_its_steps_keeps_what_was_read(bare: Bare) -> None:
    seen: list[Tensor] = []
    with pytest.warns(UserWarning, match="was never reached"):
        longer_than_the_run(bare("llama"), seen)
    assert [tuple(p.shape) for p in seen] == [(1, 4, 3, 3), (1, 4, 1, 4)]
