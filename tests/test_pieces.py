"""Matrices of more rows than a tile has are computed, brought home and stored in pieces."""

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM
from zarr.storage import MemoryStore

import probe
from probe import schema, store
from probe.attention import AttentionCall
from probe.errors import InputError
from probe.filling import fill, hides_future, laid
from probe.matrices import Matrices
from tests.naive import SITES, call_of, close, read
from tests.stores import DIM, FULL, check, create, result, says

SHAPE: Any = {
    "vocab_size": 60,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 800,
}
LENGTHS = (530, 256, 257, 40, 530)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run.zarr"


@settings(max_examples=150, deadline=None)
@given(
    n=st.integers(0, 150),
    ends=st.lists(st.integers(0, 160), min_size=4, max_size=4),
    kind=st.sampled_from(["plain", "window", "keep", "softcap", "cached"]),
    dtype=st.sampled_from([torch.float16, torch.float32]),
    again=st.booleans(),
)
def test_some_neighbouring_rows_and_keys_are_those_of_the_whole(
    n: int, ends: list[int], kind: str, dtype: torch.dtype, again: bool
) -> None:
    kinds: dict[str, dict[str, Any]] = {
        "window": {"window": 9},
        "keep": {"mask": torch.arange(n).expand(2, n) > torch.tensor([[3], [-1]])},
        "softcap": {"softcap": 2.0},
    }
    call = call_of(n, n + 5 if kind == "cached" else n, **kinds.get(kind, {}))
    rows, keys = slice(*sorted(ends[:2])), slice(*sorted(ends[2:]))
    for site in SITES:
        wanted = read(call, site)[:, :, rows, keys]
        out = torch.full(wanted.shape, math.nan, dtype=dtype)
        fill(laid(call) if again else call, out, site, queries=rows, keys=keys)
        close(out, wanted.to(dtype), 2e-3 if dtype == torch.float16 else 1e-5)


def test_what_may_lie_beyond_the_diagonal() -> None:
    call, full = call_of(6, 6), torch.zeros(2, 4, 6, 6)
    keep = torch.ones(2, 6, dtype=torch.bool)
    assert all(hides_future(one, "pattern") for one in (call, call_of(6, 6, keep, window=3)))
    for other in (replace(call, causal=False), call_of(6, 9), call_of(6, 6, full.bool())):
        assert not hides_future(other, "pattern")
    edited = Matrices({"pattern": full}, call)
    assert not hides_future(edited, "pattern")
    assert hides_future(edited, "scores")
    assert not hides_future(Matrices({"pattern": full, "scores": full}), "scores")


def test_queries_and_keys_are_converted_once() -> None:
    half = torch.randn(1, 9, 4, 8, dtype=torch.bfloat16).transpose(1, 2)
    call = AttentionCall(half, half, half)
    once = laid(call)
    assert isinstance(once, AttentionCall)
    assert once.key.is_contiguous()
    again = laid(once)
    assert isinstance(again, AttentionCall)
    assert again.key is once.key
    for site in SITES:
        assert torch.equal(read(call, site), read(once, site))


@pytest.mark.parametrize("memory", [False, True])
def test_pieces_make_the_same_store(
    path: Path, memory: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schema, "SHARD_BYTES", 2 * 3 * 256 * 512)
    where: Any = MemoryStore() if memory else path
    with create(where, FULL, sites=("pattern", "scores", "z"), loss=False) as writer:
        assert [writer.tall(name) for name in ("pattern", "scores")] == [256, 256]
        for i in (2, 0, 4, 3, 1):
            writer.begin(i)
            _put(writer, i)
            writer.done(i)
    check(store.open(where), FULL)
    assert store.verify(where) == []


def test_pieces_of_an_attempt_are_forgotten(path: Path) -> None:
    with create(path, FULL, loss=False) as writer:
        for _ in range(2):
            writer.begin(2)
            writer.put([2], "pattern", np.ones((1, 3, 256, 256)), 0, 0)
        with pytest.raises(InputError, match="has 0 of 2 layers"):
            writer.done(2)
        writer.begin(2)
        writer.fail(2, "it broke")
        writer.begin(3)
        _put(writer, 3)
        writer.done(3)
    check(store.open(path), FULL)
    assert not list(path.rglob("*.partial"))


def test_pieces_that_do_not_fit_are_refused(path: Path) -> None:
    said = "row {} of pattern, problem 'gsm8k/2', layer 1, came after {} rows. " + (
        "Put rows in order, 256 at once."
    )
    shape = "pattern of problem 'gsm8k/2' has shape {}. Give (layer, head, query, key) = {}."
    with create(path, FULL, loss=False) as writer:
        writer.begin(2)
        with pytest.raises(InputError, match=says(said.format(256, 0))):
            writer.put([2], "pattern", np.ones((1, 3, 44, 300)), 1, 256)
        writer.put([2], "pattern", np.ones((1, 3, 100, 100)), 1, 0)
        for row in (0, 100, 256):
            with pytest.raises(InputError, match=says(said.format(row, 100))):
                writer.put([2], "pattern", np.ones((1, 3, 44, 300)), 1, row)
        for rows, keys, most in ((301, 300, (300, 300)), (9, 301, (9, 300))):
            message = shape.format((1, 3, rows, keys), (1, 3, *most))
            with pytest.raises(InputError, match=says(message)):
                writer.put([2], "pattern", np.ones((1, 3, rows, keys)), 0, 0)
        for wrong in (np.ones((1, 3)), np.ones((1, 3, 3, 9, 9))):
            with pytest.raises(InputError, match="has shape"):
                writer.put([2], "pattern", wrong, 0, 0)
        with pytest.raises(InputError, match="has 0 of 2 layers"):
            writer.done(2)


def test_only_layers_of_matrices_come_in_pieces(path: Path) -> None:
    said = "{} came with row=0 and layer={}, and only a layer of matrices comes in rows. " + (
        "Put it whole."
    )
    mean = schema.Array(("problem", "layer", "head"), "float32", 0.0)
    with create(path, FULL, sites=("pattern", "z"), reduced={"mean": mean}) as writer:
        writer.begin(2)
        for name, shape, layer in (
            ("z", (1, 256, 3, DIM), 0),
            ("mean", (1, 3), 0),
            ("pattern", (1, 2, 3, 256, 256), None),
        ):
            with pytest.raises(InputError, match=says(said.format(name, layer))):
                writer.put([2], name, np.ones(shape), layer, 0)


def _put(writer: store.Writer, i: int) -> None:
    """All of a problem, in pieces without the keys that their rows cannot see."""
    for layer in (0, 1):
        for name in writer._ledger.data:
            own = result(name, FULL[i], i)[None, layer]
            if name == "z":
                assert own.shape[-1] == DIM
                writer.put([i], name, own, layer)
                continue
            for row in range(0, FULL[i].length, 256):
                stop = min(row + 256, FULL[i].length)
                writer.put([i], name, own[:, :, row:stop, :stop], layer, row)


@pytest.fixture(scope="module", params=["sdpa", "window", "eager"])
def models(request: pytest.FixtureRequest) -> Any:
    """One that is captured, and its eager copy."""
    torch.manual_seed(0)
    made: Any = LlamaForCausalLM(LlamaConfig(**SHAPE))
    if request.param == "window":
        made = MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=70))
    with torch.no_grad():
        for name, weights in made.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                weights *= 40  # or all patterns would be flat
    eager = copy.deepcopy(made.eval())
    eager.set_attn_implementation("eager")
    with probe.load(eager if request.param == "eager" else made) as model:
        yield model, copy.deepcopy(eager)


def _problems() -> list[list[int]]:
    noise = np.random.default_rng(0)
    return [noise.integers(0, 60, n).tolist() for n in LENGTHS]


def _alone(models: Any, ids: list[int]) -> dict[str, Any]:
    """Matrices (layer, head, query, key) of one problem: transformers' patterns, and scores."""
    model, eager = models
    with torch.no_grad():
        out = eager(torch.tensor([ids]), output_attentions=True)
        _, cache = model.run_with_cache(torch.tensor([ids]), ["scores"])
    scores = [cache["scores", layer][0].numpy() for layer in (0, 1)]
    return {"pattern": np.stack([a[0] for a in out.attentions]), "scores": np.stack(scores)}


@pytest.mark.parametrize(
    "where",
    [
        {},
        {"queries": "first:300"},
        {"queries": slice(5, None, 2)},
        {"keys": slice(0, None, 3)},
        {"heads": [3, 0], "layers": [1]},
    ],
)
def test_long_captures_hold_what_the_model_did(models: Any, where: Any, path: Path) -> None:
    ds = probe.capture(
        models[0],
        _problems(),
        path,
        sites=("pattern", "scores"),
        dtype="float32",
        batch_size=5,
        progress=False,
        **where,
    )
    for i, ids in enumerate(_problems()):
        one, whole = ds.isel(problem=i), _alone(models, ids)
        rows, keys = (one[f"{dim}_position"].values for dim in ("query", "key"))
        for site in SITES:
            some = whole[site][one["layer"].values][:, one["head"].values]
            wanted = some[:, :, rows[rows >= 0]][..., keys[keys >= 0]]
            own = one[site].values
            found = own[:, :, : wanted.shape[2], : wanted.shape[3]]
            np.testing.assert_allclose(found, wanted, atol=2e-5, rtol=1e-4)
            own[:, :, : wanted.shape[2], : wanted.shape[3]] = schema.SITES[site][1]
            assert (own == schema.SITES[site][1]).all()


def test_what_a_user_writes_beyond_the_diagonal_is_kept(models: Any, path: Path) -> None:
    def flat(pattern: torch.Tensor, _: object) -> torch.Tensor:
        return torch.full_like(pattern, 1 / pattern.shape[-1])

    ds = probe.capture(
        models[0],
        _problems()[:1],
        path,
        sites=("pattern", "scores"),
        interventions=[probe.Edit(site="pattern", function=flat)],
        progress=False,
    )
    np.testing.assert_array_equal(ds.pattern.values, np.float16(1 / LENGTHS[0]))
    ahead = np.triu(np.ones((LENGTHS[0], LENGTHS[0]), bool), 1)
    assert np.isneginf(ds.scores.values[..., ahead]).all()
    assert np.isfinite(np.diagonal(ds.scores.values, axis1=-2, axis2=-1)).all()
