"""A repair of `Tensor.backward` in a process that has imported nnsight.

nnsight gives `with loss.backward():` a meaning, and to find out whether that is written, it looks
for a `with` on the line of the call. It also finds the one of `with context: loss.backward()`, and
then no gradient is computed, without a word (nnsight 0.8.1).
"""

import ast
from typing import Any

import torch
from nnsight.intervention import backward as nnsight_backward
from nnsight.intervention.backward import BackwardTracer
from nnsight.tracing.tracer import WithBlockNotFoundError
from torch import Tensor

_original = nnsight_backward._original_backward


def _backward(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Torch's own; nnsight's tracer only where the block itself is opened on `backward()`."""
    tracer = BackwardTracer(tensor, _original, *args, **kwargs)
    try:
        tracer.capture()  # looks two frames up, for the line that called this function
    except WithBlockNotFoundError:
        return _original(tensor, *args, **kwargs)
    return tracer if _opens(tracer.node) else _original(tensor, *args, **kwargs)


def _opens(node: ast.With) -> bool:
    names = (n for item in node.items for n in ast.walk(item.context_expr))
    return any(isinstance(n, ast.Attribute) and n.attr == "backward" for n in names)


def install() -> None:
    """Put the repair in place; again does nothing."""
    torch.Tensor.backward = _backward  # type: ignore[assignment]
