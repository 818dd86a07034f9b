"""Loaded models that are closed whatever happens; import the fixtures that a module needs."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from probe.loading import load
from probe.model import Model
from tests.conftest import Tiny

Bare = Callable[..., Model]


@pytest.fixture
def demo() -> Iterator[Model]:
    with load("demo-llama", device="cpu") as model:
        yield model


@pytest.fixture
def bare(tiny: Tiny) -> Iterator[Bare]:
    """Models without a tokenizer."""
    models: list[Model] = []

    def make(*args: Any, **kwargs: Any) -> Model:
        models.append(load(tiny(*args, **kwargs)))
        return models[-1]

    yield make
    for model in models:
        model.close()
