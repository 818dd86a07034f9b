"""Results as files: what JSON can say, and a clear word where nothing can be written."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from probe.errors import InputError


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Say of which file or folder it is that it cannot be written.

    Raises:
        InputError: Something in this context was refused by the disk.
    """
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{path} cannot be written: {error}. Free space, or use another place."
        ) from error


def write(path: Path, text: str) -> None:
    """Write a text as UTF-8; its folder is made.

    Raises:
        InputError: It cannot be written.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def plain(value: Any) -> Any:
    """As JSON has it: None for what is no finite number, lists for arrays."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {key: plain(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [plain(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
