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
    parts = module.modules()
    if any(isinstance(m, OptimizedModule) or m._compiled_call_impl is not None for m in parts):
        with torch.compiler.set_stance("force_eager"):
            yield
    else:
        yield
