from pathlib import Path

import numpy as np
import pytest

from probe import schema, store
from probe.errors import InputError
from probe.schema import Labels
from tests.stores import create, labels, put, says


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run.zarr"


def test_valid_is_what_exists(path: Path) -> None:
    some = [labels(0, 4), labels(1, 3, (2, 0)), labels(2, 2)]
    with create(path, some) as writer:
        put(writer, some, (0, 1))
        writer.fail(2, "too long")
    ds = store.open(path)
    valid = schema.valid(ds)
    assert valid.dims == ("problem", "query", "key")
    assert valid.dtype == bool
    expected = np.zeros((3, 4, 4), bool)
    expected[0] = np.tri(4, dtype=bool)
    expected[1, 0, :3] = True
    expected[1, 1, :1] = True
    np.testing.assert_array_equal(valid, expected)
    np.testing.assert_array_equal(schema.valid(ds.sel(problem="gsm8k/1")), expected[1])
    everything = schema.valid(ds.assign_attrs(causal=False)).values
    assert everything[0].all()
    np.testing.assert_array_equal(everything[1], np.outer([1, 1, 0, 0], [1, 1, 1, 0]))
    assert not everything[2].any()


def test_labels_must_fit_their_columns() -> None:
    message = "problem 'a' has 1 token labels for 2 columns. Give one for each key_position."
    with pytest.raises(InputError, match=says(message)):
        Labels(
            id="a",
            length=2,
            query_position=(0, 1),
            key_position=(0, 1),
            token=("x",),
            token_id=(1, 2),
            segment=("text", "text"),
        )


def sizes(n: int, layer: int, head: int, query: int, key: int) -> dict[str, int]:
    return {"problem": n, "layer": layer, "head": head, "query": query, "key": key}


@pytest.mark.parametrize(
    ("given", "problems", "chunk", "shard"),
    [
        (sizes(7473, 16, 32, 6, 6), 512, (512, 1, 8, 6, 6), (512, 16, 32, 6, 6)),
        (sizes(5, 12, 12, 6, 6), 5, (5, 1, 6, 6, 6), (5, 12, 12, 6, 6)),
        (sizes(900, 32, 32, 64, 64), 8, (8, 1, 8, 64, 64), (8, 32, 32, 64, 64)),
        (sizes(9, 12, 12, 65, 64), 1, (1, 1, 6, 80, 64), (1, 12, 12, 80, 64)),
        (sizes(9, 12, 11, 300, 300), 1, (1, 1, 6, 256, 256), (1, 12, 12, 512, 512)),
        (sizes(9, 32, 32, 2048, 2048), 1, (1, 1, 8, 256, 256), (1, 8, 32, 2048, 2048)),
        (sizes(9, 2, 64, 16384, 16384), 1, (1, 1, 8, 256, 256), (1, 1, 64, 1024, 16384)),
    ],
)
def test_layouts_are_as_measured(
    given: dict[str, int], problems: int, chunk: tuple[int, ...], shard: tuple[int, ...]
) -> None:
    found = schema.layout({"pattern": schema.site("pattern", dtype="float16")}, sizes=given)
    assert found.problems == problems
    assert found.chunks["pattern"] == chunk
    assert found.shards["pattern"] == shard
    assert found.block % problems == 0
    assert found.block >= min(64, given["problem"])
    assert 2 * np.prod(shard) <= 2**31


@pytest.mark.parametrize("heads", range(1, 70))
def test_every_number_of_heads_gives_shards_that_zarr_accepts(heads: int) -> None:
    given = sizes(3, 2, heads, 100, 100)
    found = schema.layout({"pattern": schema.site("pattern", dtype="float16")}, sizes=given)
    chunk, shard = found.chunks["pattern"], found.shards["pattern"]
    assert all(whole % part == 0 for whole, part in zip(shard, chunk, strict=True))
    assert chunk[2] <= 8
    assert heads <= shard[2] < heads + 8
