"""Metrics that are named by text."""

import importlib
from collections.abc import Callable
from typing import Any


def metric(name: str) -> Callable[..., Any] | None:
    """The function heads.entropy, flow.hub, or any package.module.function; None for none.

    Example:
        >>> metric("heads.entropy").__name__, metric("heads.nothing")
        ('entropy', None)
    """
    module, _, function = name.rpartition(".")
    for home in (f"recipes.{module}", module):
        try:
            found: Any = getattr(importlib.import_module(home), function, None)
        except (ImportError, ValueError):
            continue
        if callable(found):
            return found  # type: ignore[no-any-return]
    return None
