"""Edits inside a trace against attention by hand, in five families."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from probe.attention import AttentionCall
from probe.envoys import AttentionEnvoy
from probe.errors import InputError
from probe.tap import Tap, run
from tests.references import (
    LENGTHS,
    ByHand,
    batch_of,
    each_kernel,
    real_rows,
    tapped,
    untouched,
)
from tests.references import no_grad as no_grad

Visit = Callable[[int, AttentionEnvoy], None]


def edited(tap: Tap, batch: dict[str, Tensor], visit: Visit) -> Tensor:
    logits = run(tap, visit, batch, layers=tuple(tap.layers)).logits
    assert isinstance(logits, Tensor)
    return logits


def halve(layer: int, p: Tensor) -> Tensor:
    """A pattern that no softmax would give, different in each head and row."""
    factor = torch.linspace(0.5, 1.5, p.shape[1]).view(1, -1, 1, 1) + layer
    return p * factor * torch.linspace(1, 2, p.shape[-1])


def tilt(layer: int, s: Tensor) -> Tensor:
    return s * (0.5 + layer) + torch.linspace(-1, 1, s.shape[-1])


def knock(_: int, hidden: Tensor) -> Tensor:
    """One edge of one head, for a row that keeps others."""
    hidden[:, 1, 9:, 8] = True
    return hidden


def knocked(layer: int, call: AttentionCall) -> Tensor:
    return knock(layer, ~call.keep().expand(2, 4, call.n_queries, -1))


def scale_z(layer: int, z: Tensor) -> Tensor:
    return z * torch.linspace(0, 1 + layer, z.shape[2]).view(1, 1, -1, 1)


def assign_pattern(layer: int, attn: AttentionEnvoy) -> None:
    attn.pattern = halve(layer, attn.pattern)


def overwrite_pattern(layer: int, attn: AttentionEnvoy) -> None:
    p = attn.pattern
    p[:] = halve(layer, p)


def assign_scores(layer: int, attn: AttentionEnvoy) -> None:
    attn.scores = tilt(layer, attn.scores)


def overwrite_scores(layer: int, attn: AttentionEnvoy) -> None:
    s = attn.scores
    s.copy_(tilt(layer, s))


def assign_scores_and_read_on(layer: int, attn: AttentionEnvoy) -> None:
    attn.scores = tilt(layer, attn.scores)
    p = attn.pattern
    assert attn.z.shape[:2] == p.shape[:3:2]


def assign_both(layer: int, attn: AttentionEnvoy) -> None:
    attn.scores = tilt(layer, attn.scores)
    attn.pattern = halve(layer, attn.pattern)


def assign_mask(layer: int, attn: AttentionEnvoy) -> None:
    hidden = knocked(layer, attn.call)
    attn.call = replace(attn.call, mask=torch.zeros(hidden.shape).masked_fill(hidden, -1e38 * 3))


def assign_bool_mask(layer: int, attn: AttentionEnvoy) -> None:
    attn.call = replace(attn.call, mask=~knocked(layer, attn.call))


def assign_query(layer: int, attn: AttentionEnvoy) -> None:
    attn.call = replace(attn.call, query=attn.call.query * (1.2 + layer / 4))


def assign_value(layer: int, attn: AttentionEnvoy) -> None:
    attn.call = replace(attn.call, value=attn.call.value * (1.2 + layer / 4))


def assign_z(layer: int, attn: AttentionEnvoy) -> None:
    attn.z = scale_z(layer, attn.z)


def overwrite_z(layer: int, attn: AttentionEnvoy) -> None:
    z = attn.z
    z.copy_(scale_z(layer, z))


EDITS: dict[str, tuple[Visit, Callable[[], ByHand]]] = {
    "pattern": (assign_pattern, lambda: ByHand(pattern=halve)),
    "pattern in place": (overwrite_pattern, lambda: ByHand(pattern=halve)),
    "scores": (assign_scores, lambda: ByHand(scores=tilt)),
    "scores in place": (overwrite_scores, lambda: ByHand(scores=tilt)),
    "scores, then reading": (assign_scores_and_read_on, lambda: ByHand(scores=tilt)),
    "scores and pattern": (assign_both, lambda: ByHand(scores=tilt, pattern=halve)),
    "float mask": (assign_mask, lambda: ByHand(hidden=knock)),
    "bool mask": (assign_bool_mask, lambda: ByHand(hidden=knock)),
    "query": (assign_query, lambda: ByHand(scores=lambda layer, s: s * (1.2 + layer / 4))),
    "value": (assign_value, lambda: ByHand(z=lambda layer, z: z * (1.2 + layer / 4))),
    "z": (assign_z, lambda: ByHand(z=scale_z)),
    "z in place": (overwrite_z, lambda: ByHand(z=scale_z)),
}


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("padding", ["no", "right"])
@each_kernel
def test_an_edit_changes_the_logits_as_attention_by_hand_does(
    family: str, kernel: str, padding: str, edit: str
) -> None:
    batch = batch_of(family, padding)
    visit, by_hand = EDITS[edit]
    tap = tapped(family, kernel)
    plain = tap.module(**batch).logits
    got = edited(tap, batch, visit)
    wanted = by_hand().logits(family, batch)
    rows = real_rows(batch)
    torch.testing.assert_close(got[rows], wanted[rows], atol=1e-5, rtol=1e-5)
    assert float((got[rows] - plain[rows]).abs().max()) > 1e-2
    assert torch.equal(tap.module(**batch).logits, plain)  # an edit lasts as long as its trace


def test_attention_by_hand_without_an_edit_is_the_model(family: str) -> None:
    batch = batch_of(family, "right")
    got = ByHand().logits(family, batch)[real_rows(batch)]
    wanted = untouched(family, "eager")(**batch).logits[real_rows(batch)]
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


@each_kernel
def test_a_pattern_assigned_unchanged_leaves_the_logits(family: str, kernel: str) -> None:
    batch = batch_of(family, "left")
    tap = tapped(family, kernel)

    def same(_: int, attn: AttentionEnvoy) -> None:
        attn.pattern = attn.pattern.clone()

    rows = real_rows(batch)
    wanted = tap.module(**batch).logits[rows]
    torch.testing.assert_close(edited(tap, batch, same)[rows], wanted, atol=1e-5, rtol=1e-5)


def test_a_pattern_is_assigned_without_being_read(family: str) -> None:
    batch = batch_of(family, "no")
    tap = tapped(family)
    eye = torch.eye(LENGTHS[0]).expand(2, 4, -1, -1)

    def blind(_: int, attn: AttentionEnvoy) -> None:
        attn.pattern = eye

    def look(_: int, attn: AttentionEnvoy) -> None:
        attn.pattern = 0 * attn.pattern + eye

    got = edited(tap, batch, blind)
    torch.testing.assert_close(got, edited(tap, batch, look), atol=1e-5, rtol=1e-5)


@each_kernel
def test_scores_that_hide_a_whole_row_give_zero_and_never_nan(family: str, kernel: str) -> None:
    tap = tapped(family, kernel)
    seen: list[Tensor] = []

    def blind(_: int, attn: AttentionEnvoy) -> None:
        attn.scores = torch.full_like(attn.scores, -torch.inf)
        seen.append(attn.pattern)

    logits = edited(tap, batch_of(family, "left"), blind)
    assert bool(logits.isfinite().all())
    assert all(bool((p == 0).all()) for p in seen)


def test_edits_in_bfloat16_keep_the_dtype_of_the_model(family: str) -> None:
    batch = batch_of(family, "right")
    tap = tapped(family, "sdpa", torch.bfloat16)
    logits = edited(tap, batch, assign_both)
    assert logits.dtype == torch.bfloat16
    assert bool(logits.isfinite().all())


@pytest.mark.parametrize("change", [{"scaling": 0.05}, {"softcap": 0.5}, {"window": 2}])
def test_a_changed_factor_of_a_call_is_refused_and_never_dropped(
    change: dict[str, Any],
) -> None:
    batch = batch_of("llama", "no")
    tap = tapped("llama")
    plain = tap.module(**batch).logits

    def visit(_: int, attn: AttentionEnvoy) -> None:
        attn.call = replace(attn.call, **change)

    with pytest.raises(
        InputError, match=f"layer 0 changes '{next(iter(change))}', which the model"
    ):
        edited(tap, batch, visit)
    assert torch.equal(tap.module(**batch).logits, plain)
