"""Compiled models run eagerly while somebody watches them."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch._dynamo.eval_frame import OptimizedModule


@contextmanager
def eagerly(module: nn.Module) -> Iterator[None]:
    """Let a model that torch.compile compiled, as a whole or in parts, run as it was written.

    Who watches changes from call to call, and for each change it would be compiled anew. Other
    models are left alone, and so is flex attention, which compiles its own kernel.
    """
    if _compiled(module):
        with torch.compiler.set_stance("force_eager"):
            yield
    else:
        yield


def _compiled(module: nn.Module) -> bool:
    """Whether any part is; this is asked several times a forward, and `modules()` is slow."""
    if isinstance(module, OptimizedModule) or module._compiled_call_impl is not None:
        return True
    return any(_compiled(part) for part in module._modules.values() if part is not None)
