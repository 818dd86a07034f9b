"""Traces of the user's own, and a tree that is wrapped when it is touched."""

from typing import Any

import pytest
import torch
from nnsight import NNsight
from torch import Tensor, nn

from probe.attention import AttentionCall
from probe.envoys import LazyEnvoy, RootEnvoy
from probe.errors import WiringError
from probe.tap import Tap, run
from tests.conftest import Tiny
from tests.references import batch_of, watch
from tests.references import no_grad as no_grad


@pytest.mark.parametrize("order", [("pattern", "scores"), ("z", "pattern"), ("scores", "call")])
def test_sites_are_read_in_the_order_in_which_they_happen(
    order: tuple[str, str], tiny: Tiny
) -> None:
    tap = Tap(tiny("llama"))
    batch = batch_of("llama", "no")
    with pytest.raises(WiringError, match="already ran past it"):
        watch(tap, batch, *order)
    watch(tap, batch, *reversed(order))  # the model can be used on


def test_a_layer_before_the_last_one_read_is_refused(tiny: Tiny) -> None:
    tap = Tap(tiny("llama"))
    with pytest.raises(WiringError, match="already ran past it"):
        run(tap, lambda _, envoy: envoy.pattern, batch_of("llama", "no"), layers=(2, 0))


def test_sites_can_be_read_in_a_trace_of_the_users_own(tiny: Tiny) -> None:
    tap = Tap(tiny("llama"))
    batch = batch_of("llama", "no")
    seen: list[Tensor] = []
    with tap.envoy.trace(**batch):
        seen.append(tap.envoy.model.layers[0].self_attn.pattern)
        seen.append(tap.envoy.model.layers[0].mlp.output)  # not wrapped before
        seen.append(tap.envoy.model.layers[2].self_attn.z)
    _, wanted = watch(tap, batch, "pattern", "z")
    assert torch.equal(seen[0], wanted["pattern"][0])
    assert seen[1].shape == (2, 11, 32)
    assert torch.equal(seen[2], wanted["z"][2])


def test_a_trace_computes_only_what_is_asked(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    tap = Tap(tiny("llama"))
    computed: list[tuple[str, int]] = []
    for name in ("scores", "pattern"):
        own = getattr(AttentionCall, name)

        def counted(call: AttentionCall, _own: Any = own, _name: str = name, **kwargs: Any) -> Any:
            computed.append((_name, call.layer))
            return _own(call, **kwargs)

        monkeypatch.setattr(AttentionCall, name, counted)
    batch = batch_of("llama", "no")
    watch(tap, batch, "call", "z")
    assert computed == []
    run(tap, lambda _, envoy: envoy.scores, batch, layers=(1,))
    assert computed == [("scores", 1)]


# ------------------------------------------------------------------------------ the lazy tree


def test_the_lazy_tree_lists_every_module_like_a_plain_one(family: str, tiny: Tiny) -> None:
    plain, lazy = NNsight(tiny(family)), Tap(tiny(family)).envoy
    assert [path for path, _ in lazy.named_modules()] == [p for p, _ in plain.named_modules()]
    fresh = Tap(tiny(family)).envoy
    assert [e.path for e in fresh.modules()] == [e.path for e in plain.modules()]
    assert [e.path for e in Tap(tiny(family)).envoy] == [e.path for e in plain]


def test_the_lazy_tree_is_sliced_and_indexed_like_a_plain_one(tiny: Tiny) -> None:
    plain, lazy = NNsight(tiny("llama")), Tap(tiny("llama")).envoy
    for cut in (slice(None), slice(1, None), slice(None, None, 2)):
        wanted = [e.path for e in plain.model.layers[cut]]
        assert [e.path for e in lazy.model.layers[cut]] == wanted
    assert lazy.model.layers[-1].path == plain.model.layers[-1].path
    assert len(lazy.model.layers) == 3
    assert lazy.get("model.layers.1.mlp").path == "model.model.layers.1.mlp"
    assert lazy.lm_head.path == "model.lm_head"


def test_the_lazy_tree_prints_like_a_plain_one_with_what_can_be_read(tiny: Tiny) -> None:
    plain, lazy = str(NNsight(tiny("llama"))), str(Tap(tiny("llama")).envoy)
    for name in ("embed_tokens", "self_attn", "q_proj", "mlp", "input_layernorm", "lm_head"):
        assert name in lazy
        assert lazy.count(f"({name})") == plain.count(f"({name})")
    for line in ("what the kernel is given", "before softmax", "after softmax"):
        assert line in lazy


def test_the_lazy_tree_keeps_the_order_of_the_model_whatever_is_touched_first(tiny: Tiny) -> None:
    # as in a hybrid model, where only some layers have attention
    tree = RootEnvoy(tiny("llama"), envoys={nn.Module: LazyEnvoy})
    tree.model.layers[2].mlp  # noqa: B018
    paths = [f"model.model.layers.{i}" for i in range(3)]
    assert [e.path for e in tree.model.layers] == paths
    assert [e.path for e in tree.model.layers[:2]] == paths[:2]
