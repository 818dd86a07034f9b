from pathlib import Path
from typing import Any

import pytest

import probe
from probe import batching, demos
from probe.errors import InputError


@pytest.fixture(scope="module")
def llama() -> Any:
    with probe.load("demo-llama") as model:
        yield model


def test_a_plan_counts_what_would_be_stored(llama: Any) -> None:
    plan = probe.plan(
        llama, [[0, 1, 2, 3], [0, 5]], sites=("pattern", "scores"), heads=[0, 2], queries="last:3"
    )
    assert plan.tokens == 6
    assert plan.rows == (3 + 2) * 2 * 2 * 2  # rows, layers, heads, sites
    assert plan.bytes == (3 * 4 + 2 * 2) * 2 * 2 * 2 * 2
    assert 0 < plan.stored <= plan.bytes
    assert plan.seconds > 0
    assert str(plan).splitlines()[:2] == [
        "2 problems, 6 tokens (longest 4), 1 batches",
        "pattern + scores: 2 layers x 2 heads x up to 3 rows, float16: 40 rows, 256 B "
        "(166 B expected on disk)",
    ]


def test_nothing_is_run_or_written_by_a_plan(llama: Any, tmp_path: Path) -> None:
    def refuse(*arguments: Any) -> None:
        raise AssertionError("the model ran")

    hook = llama.module.register_forward_pre_hook(refuse)
    try:
        probe.plan(llama, demos.repeated())
    finally:
        hook.remove()


def test_batches_hold_every_problem_once_and_neighbours_in_length(llama: Any) -> None:
    ids = [demos.repeated(30, 1, seed=n)[0][: 2 + n % 59] for n in range(700)]
    plan = probe.plan(llama, ids)
    assert sorted(i for batch in plan.batches for i in batch) == list(range(700))
    for batch in plan.batches:
        lengths = [len(ids[i]) for i in batch]
        assert max(lengths) * len(batch) <= batching._BATCH_TOKENS
        assert {i // 512 for i in batch} in ({0}, {1})  # shards fill one after the other
    assert max(len(batch) for batch in probe.plan(llama, ids, batch_size=7).batches) == 7


def test_long_matrices_make_small_batches(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching, "_BATCH_BYTES", 2 * 4 * 4 * 40 * 40)
    plan = probe.plan(llama, [ids[:40] for ids in demos.repeated(20, 8)])
    assert [len(batch) for batch in plan.batches] == [1] * 8


@pytest.mark.parametrize(
    ("rope", "mixed"),
    [
        ({"rope_type": "default", "rope_theta": 1e4}, True),
        ({"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}, False),
        ({"full_attention": {"rope_type": "longrope", "rope_theta": 1e4}}, False),
    ],
)
def test_only_equal_lengths_share_a_batch_where_angles_depend_on_the_longest(
    rope: dict[str, Any], mixed: bool, llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llama.base.config, "rope_parameters", rope)
    batches = probe.plan(llama, [[0, 1], [0, 1, 2], [0, 3]]).batches
    assert batches == (((1, 0, 2),) if mixed else ((1,), (0, 2)))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"layers": 2}, r"layers=2 is out of range"),
        ({"heads": [0, 4]}, r"heads=4 is out of range"),
        ({"queries": [0, 3]}, r"problem '1'"),
        ({"keys": "segment:latent"}, r"has no segment 'latent'"),
        ({"sites": ("pattern", "z9")}, r"sites=\('pattern', 'z9'\)\. Choose from pattern, scores"),
        ({"sites": ()}, r"sites=\(\)\. Choose from"),
        ({"sites": ("pattern", "pattern")}, r"each once"),
        ({"dtype": "bfloat16"}, r"dtype='bfloat16'\. Choose 'float16' or 'float32'\."),
        ({"batch_size": 2.5}, r"batch_size=2\.5\. It must be an int of at least 1\."),
        ({"batch_size": True}, r"batch_size=True\. It must be an int of at least 1\."),
        ({"batch_size": 0}, r"batch_size=0\. It must be an int of at least 1\."),
        ({"max_length": -1}, r"max_length=-1\. It must be an int of at least 1\."),
    ],
)
def test_a_mistake_shows_before_anything_runs(
    options: dict[str, Any], said: str, llama: Any, tmp_path: Path
) -> None:
    problems = [[0, 1, 2, 3], [0, 5, 6]]
    with pytest.raises(InputError, match=said):
        probe.plan(llama, problems, **options)
    with pytest.raises(InputError, match=said):
        probe.capture(llama, problems, tmp_path / "s", **options)
    assert not (tmp_path / "s").exists()


def test_a_problem_longer_than_the_context_is_refused_unless_cut(llama: Any) -> None:
    long = {"id": "long", "text": "a" * 200}
    said = (
        r"problem 'long' has 201 tokens, and the context of demo-llama is 128\. "
        r"Shorten it, or cut it with max_length=128\."
    )
    with pytest.raises(InputError, match=said):
        probe.plan(llama, [long])
    assert probe.plan(llama, [long], max_length=128).tokens == 128


def test_token_ids_outside_the_vocabulary_are_refused(llama: Any) -> None:
    with pytest.raises(InputError, match=r"problem '1' holds token id 64, .* has 64 \(0 to 63\)"):
        probe.plan(llama, [[0, 63], [0, 64]])


def test_a_text_that_the_tokenizer_cannot_encode_is_named(llama: Any) -> None:
    with pytest.raises(InputError, match=r"tokenizer of demo-llama cannot encode 'a b'"):
        probe.plan(llama, ["a b"])
