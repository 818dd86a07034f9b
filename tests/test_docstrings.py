import doctest
import importlib
import pkgutil
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import probe
import recipes
from recipes import demo, flow, heads, plots

MODULES = [
    f"{package.__name__}.{module.name}"
    for package in (probe, recipes)
    for module in pkgutil.iter_modules(package.__path__)
]


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the examples take as given: a model, and a store made from two problems."""
    folder = tmp_path_factory.mktemp("docs")
    lines = '{"question": "abcabc"}\n{"question": "xyzxyzxyz"}\n'
    (folder / "train.jsonl").write_text(lines, encoding="utf-8")
    model = probe.load("demo-llama")
    ds = probe.capture(model, folder / "train.jsonl", folder / "run.zarr", progress=False)
    names = {"demo": demo, "flow": flow, "heads": heads, "plots": plots, "np": np, "probe": probe}
    return {"folder": folder, "names": {**names, "model": model, "ds": ds}}


@pytest.mark.parametrize("name", MODULES)
def test_every_example_in_a_docstring_runs(
    name: str, session: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    module = importlib.import_module(name)
    names = {**session["names"], **vars(module)}
    shutil.copytree(session["folder"], tmp_path / "docs")
    monkeypatch.chdir(tmp_path / "docs")
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    for test in doctest.DocTestFinder().find(module, globs=names):
        runner.run(test)
    assert runner.failures == 0
