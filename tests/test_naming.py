"""Tokens named by what they say or are: in one sequence, in batches, in generation, in stores."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import probe
from probe import Bias, InputError
from probe.model import Model
from probe.positions import chosen
from probe.selection import named, positions, require
from tests.models import demo as demo
from tests.references import no_grad as no_grad

TOKENS = ["<bos>", "do", " no", "t", " stop", " not", " nothing", "1", "2 3"]


def units(tokens: Sequence[str]) -> list[tuple[str, int]]:
    return [(token, 1) for token in tokens]


def said(special: bool) -> list[tuple[str, int]]:
    return units([*(TOKENS[:1] if special else [""]), *TOKENS[1:]])


@pytest.mark.parametrize(
    ("selector", "wanted"),
    [
        ("text: not", (2, 3, 5)),  # in two tokens, in one, and not the half of " nothing"
        ("text: no", (2,)),
        ("text:t", (3,)),
        ("text:<bos>", (0,)),
        ("text:do not", (1, 2, 3)),
        ("text:x", ()),
        ("regex:no", (2, 5, 6)),
        ("regex:[0-9]", (7, 8)),
        ("regex:^.", (1,)),  # of the text without special tokens
        ("regex:bos", ()),
        ("regex:(?<=not) stop", (4,)),
        ("regex:x*", ()),  # which matches nothing at every place
        ("segment:bos", (0,)),
        ("segment:text", tuple(range(1, 9))),
        ("segment:latent", ()),
    ],
)
def test_a_name_finds_its_tokens(selector: str, wanted: tuple[int, ...]) -> None:
    segments = ["bos", *["text"] * 8]
    assert named(selector, segments, said) == wanted
    if wanted:
        found = positions(selector, 9, segments, name="keys", problem="0", tokens=said)
        assert found == wanted


@given(
    st.lists(st.text("ab ", min_size=1, max_size=3), min_size=1, max_size=8),
    st.text("ab ", min_size=1, max_size=4),
)
def test_a_text_is_every_run_of_whole_tokens_that_says_it(tokens: list[str], text: str) -> None:
    wanted = set()
    for start in range(len(tokens)):
        for end in range(start + 1, len(tokens) + 1):
            if "".join(tokens[start:end]) == text:
                wanted |= set(range(start, end))
    assert named(f"text:{text}", (), lambda special: units(tokens)) == tuple(sorted(wanted))


@given(
    st.lists(st.text("ab ", max_size=3), min_size=1, max_size=8),
    st.sampled_from(["a", "ab", "b+", " a|b"]),
)
def test_an_expression_names_every_token_that_a_match_touches(
    tokens: list[str], expression: str
) -> None:
    if not any(tokens):
        return
    owner = [n for n, token in enumerate(tokens) for _ in token]
    wanted = {owner[i] for m in re.finditer(expression, "".join(tokens)) for i in range(*m.span())}
    assert named(f"regex:{expression}", (), lambda special: units(tokens)) == tuple(sorted(wanted))


def test_names_are_known_to_be_wrong_before_a_model_has_run() -> None:
    for good in (None, 3, -1, slice(2), [0, 1], "last:2", "text: a", "regex:a", "segment:x"):
        require(good, "keys")
    for bad in ("last", "text:", "regex:(", "regex:", [0.5], object()):
        with pytest.raises(InputError, match="keys"):
            require(bad, "keys")  # type: ignore[arg-type]


def test_where_nobody_knows_what_tokens_say_they_cannot_be_named() -> None:
    row = torch.arange(3)[None]
    with pytest.raises(InputError, match="cannot be chosen here, where what the tokens say is not"):
        chosen("text:a", row, torch.tensor([3]), "keys")
    with pytest.raises(InputError, match="the model was loaded without a tokenizer"):
        named("text:a", (), lambda special: units(["", ""]))


def hidden(model: Model, batch: Any, selector: Any) -> torch.Tensor:
    """Which columns get nothing from the last row of the first layer."""
    with model.intervene(Bias(value=-torch.inf, queries=slice(-1, None), keys=selector, layers=0)):
        _, cache = model.run_with_cache(batch, sites="pattern", layers=0, queries="last:1")
    return (cache["pattern", 0][:, 0, 0] == 0).long()


@pytest.mark.parametrize("side", ["left", "right"])
def test_in_a_padded_batch_each_sequence_has_its_own(demo: Model, side: str) -> None:
    demo.tokenizer.padding_side = side
    texts = ["abcabc", "xb", "qqq", "bzbzz"]
    own = [[2, 5], [2], [], [1, 3]]
    got = hidden(demo, texts, "text:b")
    plain = hidden(demo, texts, "last:1") * 0  # its shape
    width = got.shape[1]
    for n, text in enumerate(texts):
        start = width - len(text) - 1 if side == "left" else 0
        for position in range(len(text) + 1):
            assert bool(got[n, start + position]) == (position in own[n])
    assert plain.shape == got.shape


def test_texts_name_tokens_of_the_prompt_and_segments_those_that_follow(demo: Model) -> None:
    seen: list[tuple[str, list[int]]] = []

    class Look:
        def edits(self, call: Any) -> Any:
            if call.layer == 0:
                for name in ("text:b", "segment:generated", "segment:bos"):
                    if name != "segment:generated" or call.n_keys > 5:
                        seen.append((name, call.where.columns(name)[0].nonzero()[:, 0].tolist()))
            return []

    with demo.intervene(Look()):
        new = demo.generate("abab", max_new_tokens=3, do_sample=False)[0, 5:]
    assert demo.text.decode(new.tolist())[1] == "b"  # which is not named
    assert [own for name, own in seen if name == "text:b"] == [[2, 4]] * 3
    assert [own for name, own in seen if name == "segment:bos"] == [[0]] * 3
    assert [own for name, own in seen if name == "segment:generated"] == [[5], [5, 6]]


def test_names_hold_in_a_capture_that_goes_on(demo: Model, tmp_path: Path) -> None:
    hide = Bias(value=-torch.inf, keys="text:b", queries=slice(3, None), layers=0)
    ds = probe.capture(
        demo, ["abab", "xyb"], tmp_path / "s.zarr", interventions=[hide], max_new_tokens=3,
        keys="segment:generated", progress=False,
    )  # fmt: skip
    assert ds.status.values.tolist() == [1, 1]
    assert ds.key_position.values.tolist() == [[5, 6, 7], [4, 5, 6]]
    whole = probe.capture(
        demo, ["abab", "xyb"], tmp_path / "w.zarr", interventions=[hide], max_new_tokens=3,
        progress=False,
    )  # fmt: skip
    pattern = whole.pattern.sel(layer=0).values
    assert (pattern[0, :, 3:, [2, 4]] == 0).all()
    assert (pattern[1, :, 3:, 3] == 0).all()


@pytest.mark.parametrize("name", ["text:Q", "regex:[0-9]", "segment:latent"])
def test_a_batch_without_any_warns(demo: Model, name: str) -> None:
    nothing = re.escape(f"keys={name!r} selects nothing: no input of this batch h")
    with pytest.warns(UserWarning, match=nothing):
        got = hidden(demo, ["abc"], name)
    assert not bool(got.any())


def test_another_tokenizer_gives_other_names(demo: Model) -> None:
    demo.tokenizer = None
    with pytest.raises(InputError, match="names tokens by their text, which is not known here"):
        hidden(demo, [[0, 1, 2]], "text:b")
    hide = Bias(value=-torch.inf, keys="segment:text", queries=slice(1, None))
    nothing = pytest.raises(InputError, match="hides every key of row 1")  # the first is text too
    with demo.intervene(hide), nothing:
        demo([[0, 1, 2]])


def test_beams_are_named_by_their_own_prompt(demo: Model) -> None:
    counted: list[list[int]] = []

    class Look:
        def edits(self, call: Any) -> Any:
            counted.append(call.where.columns("text:b").sum(-1).tolist())
            return []

    with demo.intervene(Look()):
        demo.generate(["abab", "abbb"], max_new_tokens=3, num_beams=2, do_sample=False)
    assert all(found == [2, 2, 3, 3] for found in counted)


def test_embeddings_in_place_of_tokens_cannot_be_named(demo: Model) -> None:
    table: Any = demo.module.get_input_embeddings()  # type: ignore[operator]
    with (
        demo.intervene(Bias(value=1.0, keys="text:b")),
        pytest.raises(InputError, match="what the tokens say is not known"),
    ):
        demo({"inputs_embeds": table(torch.tensor([[0, 1, 2]]))})


@pytest.mark.parametrize(
    ("selector", "wanted"),
    [
        ("segment:latent", (2, 3, 4)),
        ("segment:latent[0]", (2,)),
        ("segment:latent[-1]", (4,)),
        ("segment:latent[1:], eot", (3, 4, 5)),
        ("segment:eot,latent[:-1]", (2, 3, 5)),
        ("segment:latent[7]", ()),
    ],
)
def test_places_within_segments_are_named(selector: str, wanted: tuple[int, ...]) -> None:
    segments = ("bos", "bot", "latent", "latent", "latent", "eot")
    require(selector, "keys")
    assert named(selector, segments, lambda special: ()) == wanted


@pytest.mark.parametrize("selector", ["segment:", "segment:z[a]", "segment:z[1", "segment:a,,b"])
def test_what_names_no_segments_is_refused(selector: str) -> None:
    with pytest.raises(InputError, match=r"names no segments\. Write 'segment:latent', 'segment"):
        require(selector, "keys")
