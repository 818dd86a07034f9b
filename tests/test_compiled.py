"""Models under torch.compile: read as they were written, compiled again when nobody watches."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from probe.compiled import eagerly
from probe.model import Model
from probe.tap import Tap
from tests.conftest import tiny_model
from tests.references import batch_of, eager, real_rows, same, watch
from tests.references import no_grad as no_grad

BATCH = batch_of("llama", "left")
ROWS = real_rows(BATCH)[:, None, :, None]


class Compiler:
    """A backend of torch.compile that compiles nothing and counts its graphs."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: Any, _: Any) -> Any:
        self.graphs += 1
        return graph.forward


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    yield
    torch._dynamo.reset()


def whole(model: Any, compiler: Compiler) -> Any:
    return torch.compile(model, backend=compiler)


def in_place(model: Any, compiler: Compiler) -> Any:
    model.compile(backend=compiler)
    return model


def in_parts(model: Any, compiler: Compiler) -> Any:
    for layer in model.model.layers:
        layer.compile(backend=compiler)
    return model


Way = Callable[[Any, Compiler], Any]
each_way = pytest.mark.parametrize("way", [whole, in_place, in_parts])


@each_way
@pytest.mark.parametrize("loader", [Tap, Model])
def test_a_compiled_model_is_read_as_it_was_written(loader: Any, way: Way) -> None:
    logits = tiny_model("llama")(**BATCH).logits
    compiler = Compiler()
    model = way(tiny_model("llama"), compiler)
    loaded = loader(model)
    tap = loaded if isinstance(loaded, Tap) else loaded.tap
    for _ in range(2):
        output, seen = watch(tap, BATCH, "pattern")
        same(seen["pattern"], eager("llama", BATCH), 3e-6, ROWS)
        assert torch.equal(output.logits, logits)
    assert compiler.graphs == 0
    torch.testing.assert_close(model(**BATCH).logits, logits, atol=1e-5, rtol=1e-5)
    assert compiler.graphs > 0
    loaded.close()
    torch.testing.assert_close(model(**BATCH).logits, logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("touched", [False, True], ids=["", "traced before"])
def test_an_idle_tapped_model_compiles_in_one_graph(touched: bool) -> None:
    model = tiny_model("llama")
    logits = model(**BATCH).logits
    tap, compiler = Tap(model), Compiler()
    if touched:
        watch(tap, BATCH, "pattern")
    compiled: Any = torch.compile(model, backend=compiler, fullgraph=True)
    torch.testing.assert_close(compiled(**BATCH).logits, logits, atol=1e-5, rtol=1e-5)
    assert compiler.graphs == 1
    same(watch(tap, BATCH, "pattern")[1]["pattern"], eager("llama", BATCH), 3e-6, ROWS)
    tap.close()


def test_a_tap_leaves_other_models_to_the_compiler(family: str) -> None:
    tap, other, compiler = Tap(tiny_model("llama")), tiny_model(family), Compiler()
    torch.compile(other, backend=compiler, fullgraph=True)(**batch_of(family, "left"))
    assert compiler.graphs == 1
    tap.close()


@each_way
def test_only_a_compiled_model_runs_eagerly(way: Way) -> None:
    compiler = Compiler()
    kernel: Any = torch.compile(torch.square, backend=compiler)  # such as flex attention's
    with eagerly(tiny_model("llama")):
        kernel(torch.ones(2))
    assert compiler.graphs == 1
    torch._dynamo.reset()
    with eagerly(way(tiny_model("llama"), Compiler())):
        kernel(torch.ones(2))
    assert compiler.graphs == 1
    kernel(torch.ones(2))
    assert compiler.graphs == 2
