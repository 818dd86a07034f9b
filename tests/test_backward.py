"""Gradients in a process that has imported nnsight: this file writes `with` on purpose."""

from contextlib import nullcontext

import torch
from torch import Tensor

import probe
from tests.conftest import Tiny


def leaf() -> Tensor:
    return torch.ones(2, requires_grad=True)


def test_backward_on_the_line_of_its_with_computes_gradients(tiny: Tiny) -> None:
    probe.load(tiny("llama"))
    x = leaf()
    # fmt: off
    with nullcontext(): (3 * x).sum().backward()  # type: ignore[no-untyped-call]  # noqa: E701
    # fmt: on
    assert x.grad is not None
    assert x.grad.tolist() == [3, 3]


def test_backward_inside_a_block_of_hooks_on_one_line_computes_gradients(tiny: Tiny) -> None:
    model = probe.load(tiny("llama"))
    loss = model.run_with_hooks([[1, 2, 3]], return_type="loss")
    # fmt: off
    with model.hooks(): loss.backward()  # noqa: E701
    # fmt: on
    assert all(p.grad is not None for p in model.module.parameters())


def test_backward_elsewhere_computes_gradients() -> None:
    x = leaf()
    (2 * x).sum().backward()  # type: ignore[no-untyped-call]
    with nullcontext():
        (2 * x).sum().backward(retain_graph=True)  # type: ignore[no-untyped-call]
    assert x.grad is not None
    assert x.grad.tolist() == [4, 4]


def test_the_block_that_nnsight_opens_on_backward_still_reads_gradients(tiny: Tiny) -> None:
    model = probe.load(tiny("llama"))
    with model.envoy.trace(**model.batch([[1, 2, 3]])):
        z = model.envoy.model.layers[1].self_attn.z
        loss = model.envoy.output.logits.sum()
        with loss.backward():
            grad = z.grad.save()
    assert grad.shape == (1, 3, 4, 8)
    assert float(grad.abs().max()) > 0
