"""How hand-written models take their token ids, masks and padding."""

import math
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from probe.errors import InputError, UnsupportedModelError
from probe.interventions import Edit
from probe.layout import Layout
from probe.loading import load
from tests.own_models import (
    CONTEXT,
    GPT,
    N_HEADS,
    VOCABULARY,
    WIDTH,
    Block,
    Body,
    MultiHeadAttention,
    by_hand,
    hand_written,
)
from tests.references import no_grad as no_grad

LAYOUT = Layout(layers="transformer_blocks", attention="attention")
LAYOUTS = [None, LAYOUT, Layout(**{**vars(LAYOUT), "projection": "out_projection"})]
IDS = torch.arange(22).view(2, 11) * 7 % VOCABULARY


# ------------------------------------------------------------------------------------- tokens


def test_padding_on_the_left_is_refused_where_the_forward_takes_no_mask() -> None:
    with load(hand_written()) as model:
        inputs = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
        assert torch.equal(model(inputs), model(IDS))
        inputs["attention_mask"][1, :3] = 0
        with pytest.raises(InputError, match=r"GPT takes no attention_mask, .*Pad on the right"):
            model(inputs)


def test_token_ids_and_lengths_that_do_not_fit_are_refused() -> None:
    with load(hand_written()) as model:
        with pytest.raises(InputError, match=f"token id 64, and the vocabulary of GPT has {64}"):
            model([1, VOCABULARY])
        with pytest.raises(InputError, match=f"the context of GPT is {CONTEXT}"):
            model([1] * (CONTEXT + 1))


class Open(MultiHeadAttention):
    """Without a causal mask; padding gets -1e9."""

    hidden: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        scores = self.heads(self.W_query(x)) @ self.heads(self.W_key(x)).transpose(2, 3)
        if self.hidden is not None:
            scores = scores.masked_fill(self.hidden, -1e9)
        weights = scores.flatten(0, 1).softmax(dim=-1)  # (batch * head, query, key)
        z = weights.view(scores.shape) @ self.heads(self.W_value(x))
        projected: Tensor = self.out_projection(z.transpose(1, 2).reshape(x.shape))
        return projected


class Encoder(Body):
    """One that sees the future, and hides padding if it is told to."""

    def __init__(self) -> None:
        super().__init__(Open)

    def forward(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Any:
        hidden = None if attention_mask is None else ~attention_mask.bool()[:, None, None]
        for block in self.transformer_blocks:
            cast(Open, cast(Block, block).attention).hidden = hidden
        return self.logits(tokens)


class Blind(Body):
    def __init__(self) -> None:
        super().__init__(Open)

    def forward(self, tokens: Tensor) -> Any:
        return self.logits(tokens)


def test_an_encoder_is_read_with_its_mask_and_its_flattened_heads() -> None:
    texts = [[5, 6, 7, 8, 9], [3, 4, 5]]
    with load(hand_written(Encoder)) as model:
        assert (model.tap.causal, model.n_heads) == (False, N_HEADS)
        _, both = model.run_with_cache(texts, sites=("pattern", "scores"))
        _, alone = model.run_with_cache(texts[1], sites=("pattern", "scores"))
        for site, empty in (("pattern", 0.0), ("scores", -math.inf)):
            got = both[site, 1][1]
            torch.testing.assert_close(got[:, :3, :3], alone[site, 1][0], atol=1e-5, rtol=1e-5)
            assert bool((got[:, :, 3:] == empty).all())
    with load(hand_written(Blind)) as model:
        with pytest.raises(InputError, match=r"takes no attention_mask, so its tokens see the pad"):
            model(texts)
        assert model(texts[0]).shape == (1, 5, VOCABULARY)


def test_the_argument_that_takes_token_ids_can_be_named() -> None:
    class Named(Body):
        def forward(self, scale: float = 1.0, tokens: Any = None) -> Any:
            return scale * self.logits(tokens)

    module = hand_written(Named)
    with pytest.raises(UnsupportedModelError, match=r"a forward of Named over .*what argument"):
        load(module)
    layout = Layout(**{**vars(LAYOUT), "ids": "tokens", "context": 12, "vocabulary": 50})
    with load(module, layout=layout) as model:
        assert (model.vocabulary, model.context) == (50, 12)
        assert torch.equal(model(IDS % 50), module(tokens=IDS % 50))


class Passing(nn.Module):
    """As DDP and friends hand on what they are given."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


class Naming(Passing):
    def forward(self, **kwargs: Any) -> Any:
        return self.inner(**kwargs)


@pytest.mark.parametrize(("wrapper", "ids"), [(Passing, None), (Naming, "idx")])
def test_a_wrapper_hands_on_what_it_is_given(wrapper: Any, ids: str | None) -> None:
    module = hand_written()
    paths = {"layers": "inner.transformer_blocks", "ids": ids}
    layout = Layout(**{**vars(LAYOUT), **paths})
    with load(wrapper(module), layout=layout) as model:
        logits, cache = model.run_with_cache(IDS, sites="pattern")
        assert torch.equal(logits, module(IDS))
        assert torch.equal(cache["pattern", 1], by_hand(module, IDS)[1]["pattern"])


def test_a_compiled_model_is_read_and_runs_compiled_when_nobody_watches() -> None:
    module = hand_written()
    graphs: list[Any] = []

    def count(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    compiled: Any = torch.compile(module, backend=count, fullgraph=True)
    with load(compiled) as model:
        assert type(model.base) is GPT
        logits, cache = model.run_with_cache(IDS, sites="pattern")
        assert torch.equal(logits, module(IDS))
        assert torch.equal(cache["pattern", 1], by_hand(module, IDS)[1]["pattern"])
        with model.intervene(Edit(site="z", function=lambda z, _: 0 * z)):
            assert not torch.allclose(model(IDS), logits, atol=1e-2)
        assert graphs == []
        torch.testing.assert_close(model(IDS), logits, atol=1e-5, rtol=1e-5)
        assert len(graphs) == 1


def test_a_short_context_and_a_small_vocabulary_are_no_hindrance() -> None:
    module = hand_written()
    module.position_embedding = nn.Embedding(8, WIDTH)
    module.token_embedding = nn.Embedding(11, WIDTH)
    with load(module) as model:
        assert (model.vocabulary, model.context) == (11, 8)


def test_a_vocabulary_in_no_table_must_be_told() -> None:
    class OneHot(GPT):
        def __init__(self) -> None:
            super().__init__()
            self.token_embedding = nn.Linear(VOCABULARY, WIDTH)  # type: ignore[assignment]

        def forward(self, idx: Tensor) -> Tensor:
            return self.logits(F.one_hot(idx, VOCABULARY).float())

        def logits(self, idx: Tensor) -> Tensor:
            x = self.token_embedding(idx) + self.position_embedding(torch.arange(idx.shape[1]))
            for block in self.transformer_blocks:
                x = block(x)
            logits: Tensor = self.head(x)
            return logits

    module = hand_written(OneHot)
    with pytest.raises(UnsupportedModelError, match=r"OneHot looks its token ids up in no nn\.Emb"):
        load(module)
    with load(module, layout=Layout(**{**vars(LAYOUT), "vocabulary": VOCABULARY})) as model:
        assert model.vocabulary == VOCABULARY
