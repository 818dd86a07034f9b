"""Layouts that are wrong, and hand-written models that cannot be told apart or proven."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import probe
from probe import owncode
from probe.errors import InputError, UnsupportedModelError, WiringError
from probe.layout import Layout
from probe.loading import load
from probe.model import Model
from tests.own_models import (
    GPT,
    N_HEADS,
    VOCABULARY,
    WIDTH,
    MultiHeadAttention,
    Numbers,
    by_hand,
    hand_written,
)
from tests.references import no_grad as no_grad
from tests.references import photograph, unchanged

LAYOUT = Layout(layers="transformer_blocks", attention="attention")
LAYOUTS = [None, LAYOUT, Layout(**{**vars(LAYOUT), "projection": "out_projection"})]
IDS = torch.arange(22).view(2, 11) * 7 % VOCABULARY


# ----------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"layers": "blocks"},
            r"Layout\(layers='blocks'\): GPT has no module 'blocks'\. It has token_embedding "
            r"\(Embedding\), .*transformer_blocks \(ModuleList\)",
        ),
        (
            {"attention": "attn"},
            r"Layout\(attention='attn'\): Block has no module 'attn'\. It has .*attention \(Multi",
        ),
        (
            {"projection": "c_proj"},
            r"Layout\(projection='c_proj'\): MultiHeadAttention has no .*out_projection \(Linear\)",
        ),
        ({"layers": "head"}, r"Layout\(layers='head'\) is a module without any inside"),
    ],
)
def test_a_path_that_leads_nowhere_says_what_is_there(change: dict[str, str], message: str) -> None:
    module = hand_written()
    before = photograph(module)
    with pytest.raises(InputError, match=message):
        load(module, layout=Layout(**{**vars(LAYOUT), **change}))
    unchanged(module, before)


def test_a_layout_that_names_something_else_than_attention_is_refused() -> None:
    layout = Layout(layers="transformer_blocks", attention="mlp")
    with pytest.raises(UnsupportedModelError, match=r"'transformer_blocks\.0\.mlp', which the lay"):
        load(hand_written(), layout=layout)


def test_a_wrong_projection_is_refused_by_the_proof() -> None:
    class Two(MultiHeadAttention):
        def __init__(self) -> None:
            super().__init__()
            self.after = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.after(super().forward(x))
            return out

    module = hand_written(lambda: GPT(Two))
    layout = Layout(**{**vars(LAYOUT), "projection": "after"})
    with pytest.raises(WiringError, match="layer 0: pattern @ value differs from what goes into"):
        load(module, layout=layout)
    load(module, layout=LAYOUT).close()


class Fake(MultiHeadAttention):
    """Its softmax over (query, key) has no part in what it returns."""

    def forward(self, x: Tensor) -> Tensor:
        q, k = self.heads(self.W_query(x)), self.heads(self.W_key(x))
        torch.softmax(q @ k.transpose(2, 3), dim=-1)
        mixed: Tensor = self.out_projection(self.W_value(x))
        return mixed


class Scaled(MultiHeadAttention):
    """Its pattern is changed behind its softmax."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self.heads(w(x)) for w in (self.W_query, self.W_key, self.W_value))
        p = torch.softmax((q @ k.transpose(2, 3)), dim=-1)
        z = (p**2 @ v).transpose(1, 2).reshape(x.shape)
        projected: Tensor = self.out_projection(z)
        return projected


class Swapped(MultiHeadAttention):
    """Its heads come back in another order."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self.heads(w(x)) for w in (self.W_query, self.W_key, self.W_value))
        z = torch.softmax((q @ k.transpose(2, 3)), dim=-1) @ v
        projected: Tensor = self.out_projection(z.permute(0, 2, 3, 1).reshape(x.shape))
        return projected


@pytest.mark.parametrize("attention", [Fake, Scaled, Swapped])
@pytest.mark.parametrize("layout", LAYOUTS[:2], ids=["found", "named"])
def test_a_softmax_that_is_not_the_attention_is_refused(
    attention: type[nn.Module], layout: Layout | None
) -> None:
    module = hand_written(lambda: GPT(attention))
    before, plain = photograph(module), module(IDS)
    with pytest.raises(WiringError, match=r"^layer 0: pattern @ value differs .*torch [0-9]"):
        load(module, layout=layout)
    unchanged(module, before)
    assert torch.equal(module(IDS), plain)


class Routed(MultiHeadAttention):
    """Softmaxes of other things, before and after the attention's."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        gates: Tensor = self.router(x).softmax(dim=-1)
        return super().forward(x) * gates.sum(-1, keepdim=True).softmax(dim=-1)


def test_softmaxes_of_routers_are_not_taken_for_the_attention() -> None:
    module = hand_written(lambda: GPT(Routed))
    with load(module) as model:
        logits, cache = model.run_with_cache(IDS, sites="pattern")
        assert torch.equal(logits, module(IDS))
        for layer, wanted in enumerate(by_hand(module, IDS)):
            assert torch.equal(cache["pattern", layer], wanted["pattern"])


class OneHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(WIDTH, 24) for _ in range(N_HEADS))
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        out = []
        for head in self.heads:
            q, k, v = head(x).split(8, dim=-1)
            out.append((q @ k.transpose(1, 2)).softmax(dim=-1) @ v)
        projected: Tensor = self.proj(torch.cat(out, dim=-1))
        return projected


def test_heads_that_attend_one_after_the_other_are_refused() -> None:
    with pytest.raises(
        UnsupportedModelError, match=r"'transformer_blocks\.0\.attention' \(OneHead"
    ):
        load(hand_written(lambda: GPT(OneHead)))


class Unprojected(MultiHeadAttention):
    """It projects with a bare matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.out_projection = nn.Identity()  # type: ignore[assignment]


def test_attention_whose_output_goes_nowhere_known_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"layer 0: Unprojected calls no .*projection="):
        load(hand_written(lambda: GPT(Unprojected)), layout=LAYOUT)


class Late(MultiHeadAttention):
    """It computes its values after its softmax."""

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[1]
        scores = self.heads(self.W_query(x)) @ self.heads(self.W_key(x)).transpose(2, 3)
        weights = scores.masked_fill(self.mask[:n, :n], -1e4).softmax(-1)
        z = weights @ self.heads(self.W_value(x))
        projected: Tensor = self.out_projection(z.transpose(1, 2).reshape(x.shape))
        return projected


def test_what_is_projected_is_found_among_all_that_follows_a_softmax() -> None:
    module = hand_written(lambda: GPT(Late))
    into: list[Tensor] = []
    for block in module.transformer_blocks:
        hook = block.attention.out_projection.register_forward_pre_hook
        hook(lambda _, args: into.append(args[0]))
    with load(module) as model:
        into.clear()
        _, cache = model.run_with_cache(IDS, sites=("scores", "z"))
    for layer in range(2):
        assert torch.equal(cache["z", layer].flatten(2), into[layer])
        hidden = cache["scores", layer] == -math.inf
        assert torch.equal(hidden, torch.ones(11, 11).triu(1).bool().expand_as(hidden))


class Multihead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(WIDTH, N_HEADS, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x, x, x, need_weights=False)[0]
        return out


def test_a_module_that_fuses_its_attention_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"nothing to read.*nn\.MultiheadAttention"):
        load(hand_written(lambda: GPT(Multihead)))


class Bare(nn.Module):
    """Attention in the forward of the model itself."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, WIDTH)
        self.out = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, idx: Tensor) -> Tensor:
        x = self.table(idx)[:, None]
        out: Tensor = self.out(((x @ x.transpose(2, 3)).softmax(-1) @ x)[:, 0])
        return out


def test_weights_that_are_no_numbers_are_refused() -> None:
    module = hand_written()
    module.transformer_blocks[1].attention.W_key.weight[0, 0] = math.nan
    with pytest.raises(
        UnsupportedModelError, match="layer 1: the model's own attention is not fin"
    ):
        load(module)


def test_a_forward_without_its_projection_is_refused_while_it_is_watched() -> None:
    module = hand_written()
    with load(module) as model:
        attention = module.transformer_blocks[1].attention
        attention.out_projection = nn.Identity()
        assert module(IDS).shape == (2, 11, VOCABULARY)  # nobody watches
        with pytest.raises(
            WiringError, match=r"layer 1: Mult.* did not call its output projection"
        ):
            model.run_with_cache(IDS)


def leak(scores: Tensor, dim: int) -> Tensor:
    pattern = torch.Tensor.softmax(scores, dim)
    pattern[..., 0, -1] = pattern[..., 0, 0] / 2
    pattern[..., 0, 0] /= 2
    return pattern


def sharpen(scores: Tensor, dim: int) -> Tensor:
    return torch.Tensor.softmax(2 * scores, dim)


def shrink(scores: Tensor, dim: int) -> Tensor:
    return torch.Tensor.softmax(scores, dim) / 2


@pytest.mark.parametrize(
    ("softmax", "message"),
    [
        (leak, r"layer 0: a causal row attends to its future with 0\.5"),
        (sharpen, "layer 0: the model's softmax differs from that of its scores by 0"),
        (shrink, r"layer 0: rows sum to 0\.5 \.\. 0\.5, not to 1"),
    ],
)
def test_the_first_batch_of_a_capture_proves_what_a_softmax_returned(
    softmax: Any, message: str, tmp_path: Path
) -> None:
    with load(hand_written(), Numbers()) as model, pytest.MonkeyPatch.context() as patch:
        functions = {**owncode.FUNCTIONS, "softmax": frozenset({softmax})}
        patch.setattr(owncode, "FUNCTIONS", functions)
        patch.setattr(torch, "softmax", Overheard(softmax))
        with pytest.raises(WiringError, match=message):
            probe.capture(model, ["5 6 7 8"], tmp_path / "run.zarr", progress=False)
    assert not (tmp_path / "run.zarr").exists()


class Overheard:
    """A function that modes hear of, as they do of torch's own."""

    def __init__(self, function: Any) -> None:
        self.function = function

    def __call__(self, x: Tensor, dim: int) -> Tensor:
        return torch.overrides.handle_torch_function(self.function, (x,), x, dim)  # type: ignore[no-any-return]


def test_attention_in_the_models_own_forward_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="Bare computes attention in its own forward"):
        load(Bare())


def test_a_hand_written_model_is_not_loaded_twice_at_once() -> None:
    module = hand_written()
    with load(module), pytest.raises(UnsupportedModelError, match="this GPT is tapped already"):
        load(module)
    Model(module).close()
