import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import xarray as xr
import zarr
from zarr.storage import LocalStore

from probe import schema, store
from probe.errors import InputError, StoreError
from probe.schema import DONE, FAILED, Labels

ROOT = Path(__file__).parents[1]
CONFIG = {"model": "gpt2", "dtype": "float16", "queries": None}
LAYERS, HEADS, DIM = (1, 4), (0, 2, 3), 5

Array = npt.NDArray[Any]


def labels(i: int, length: int, queries: Sequence[int] | None = None) -> Labels:
    keys = tuple(range(length))
    return Labels(
        id=f"gsm8k/{i}",
        length=length,
        query_position=keys if queries is None else queries,
        key_position=keys,
        token=tuple(f" tök{k}" for k in keys),
        token_id=tuple(100 + k for k in keys),
        segment=tuple("bos" if k == 0 else "question" for k in keys),
    )


def result(name: str, one: Labels, seed: int) -> Array:
    """What a model might give: a causal matrix, float32, the same for the same problem."""
    noise = np.random.default_rng([seed, len(name)])
    rows, columns = np.array(one.query_position), np.array(one.key_position)
    if name == "z":
        return noise.normal(size=(len(LAYERS), len(rows), len(HEADS), DIM)).astype("float32")
    shape = (len(LAYERS), len(HEADS), len(rows), len(columns))
    seen = columns <= rows[:, None]
    score = np.where(seen, noise.normal(size=shape), -np.inf).astype("float32")
    if name == "scores":
        return score
    weight = np.exp(score)
    return np.asarray(weight / weight.sum(-1, keepdims=True), dtype="float32")


def create(path: Path, some: Sequence[Labels], **options: Any) -> store.Writer:
    defaults: dict[str, Any] = {
        "labels": some,
        "layers": LAYERS,
        "heads": HEADS,
        "config": CONFIG,
        "sizes": {"head_dim": DIM},
    }
    return store.create(path, **(defaults | options))


def put(writer: store.Writer, some: Sequence[Labels], indices: Sequence[int], *sites: str) -> None:
    arrays = {name: [result(name, some[i], i) for i in indices] for name in sites or ["pattern"]}
    writer.append(indices, arrays, loss=[i / 2 for i in indices])


def fill(path: Path, some: Sequence[Labels], *sites: str, **options: Any) -> None:
    with create(path, some, sites=sites or ("pattern",), **options) as writer:
        for indices in writer.pending():
            put(writer, some, indices, *sites)


def check(ds: xr.Dataset, some: Sequence[Labels]) -> None:
    """Every done problem of an opened store holds what `result` gave, bit for bit."""
    known = {one.id: i for i, one in enumerate(some)}
    sites = [name for name in schema.SITES if name in ds]
    for row, id_ in enumerate(ds["problem"].values):
        i, done = known[str(id_)], ds["status"].values[row] == DONE
        rows, columns = len(some[i].query_position), len(some[i].key_position)
        for name in sites:
            stored, fill_value = ds[name].values[row], schema.SITES[name][1]
            expected = np.full(stored.shape, fill_value, stored.dtype)
            if done:
                own = expected[:, :rows] if name == "z" else expected[:, :, :rows, :columns]
                own[...] = result(name, some[i], i)
            np.testing.assert_array_equal(stored, expected)
        assert ds["length"].values[row] == some[i].length
        if "loss" in ds:
            np.testing.assert_equal(ds["loss"].values[row], i / 2 if done else np.nan)


def files(path: Path) -> int:
    return sum(file.is_file() for file in (path / "pattern" / "c").rglob("*"))


def says(text: str) -> str:
    return f"^{re.escape(text)}$"


TINY = [labels(i, length) for i, length in enumerate((6, 3, 6, 1, 5))]
FULL = [labels(i, length) for i, length in enumerate((70, 3, 300, 257, 16))]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run.zarr"


@pytest.mark.parametrize("some", [TINY, FULL], ids=["tiny", "full"])
def test_what_is_written_is_read_back_exactly(path: Path, some: list[Labels]) -> None:
    fill(path, some, "pattern", "scores", "z")
    ds = store.open(path)
    check(ds, some)
    assert ds["pattern"].dims == ("problem", "layer", "head", "query", "key")
    assert ds["z"].dims == ("problem", "layer", "query", "head", "head_dim")
    assert set(ds.indexes) == {"problem", "layer", "head", "query", "key"}
    assert set(ds.coords) == set(schema.INDEXES) | set(schema.COORDINATES)
    assert set(ds.data_vars) == {"pattern", "scores", "z", "length", "loss"}
    assert ds["layer"].values.tolist() == list(LAYERS)
    assert ds["head"].values.tolist() == list(HEADS)
    for name, spec in schema.COLUMNS.items():
        assert spec.dtype == ("string" if ds[name].dtype.kind == "T" else ds[name].dtype)
        assert ds[name].dims == spec.dims
    one = ds.sel(problem="gsm8k/1", layer=4, head=2)
    assert one["token"].values[:4].tolist() == [" tök0", " tök1", " tök2", ""]
    assert one["token_id"].values[:4].tolist() == [100, 101, 102, -1]
    assert one["segment"].values[:4].tolist() == ["bos", "question", "question", ""]
    assert one["key_position"].values[:4].tolist() == [0, 1, 2, -1]
    np.testing.assert_array_equal(
        one["pattern"].values[:3, :3], result("pattern", some[1], 1)[1, 1].astype("float16")
    )


def test_float32_is_kept_as_it_is(path: Path) -> None:
    fill(path, TINY, "scores", dtype="float32")
    ds = store.open(path)
    assert ds["scores"].dtype == np.float32
    check(ds, TINY)


def test_selected_rows_stay_labelled_in_ragged_problems(path: Path) -> None:
    some = [labels(i, n, tuple(range(n))[-2:]) for i, n in enumerate((6, 3, 1))]
    fill(path, some)
    ds = store.open(path)
    assert ds.sizes["query"] == 2
    assert ds["query_position"].values.tolist() == [[4, 5], [1, 2], [0, -1]]
    check(ds, some)


@pytest.mark.parametrize("some", [TINY, FULL], ids=["tiny", "full"])
def test_xarray_and_zarr_read_the_same_without_this_package(path: Path, some: list[Labels]) -> None:
    fill(path, some, "pattern", "scores")
    ours, plain = store.open(path), xr.open_zarr(path, consolidated=False)
    xr.testing.assert_identical(ours, plain.load())
    raw = zarr.open_group(path, mode="r")
    for name in ours.variables:
        read = raw[str(name)][...]  # type: ignore[index]
        np.testing.assert_array_equal(np.asarray(read), ours[name].values)


def test_opening_reads_labels_only_and_needs_no_dask(path: Path) -> None:
    fill(path, FULL)
    ds = store.open(path)
    assert ds["pattern"].chunks is None
    assert not ds["pattern"].variable._in_memory
    started = time.perf_counter()
    store.open(path)
    assert time.perf_counter() - started < 1  # milliseconds; the limit only catches disasters


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


def test_problems_arrive_in_any_order(path: Path) -> None:
    with create(path, TINY) as writer:
        for i in (3, 0, 4):
            put(writer, TINY, [i])
        assert not files(path)  # a shard waits until all its problems are there
        put(writer, TINY, (2, 1))
        assert files(path) == 1
        assert writer.status.tolist() == [DONE] * 5
    check(store.open(path), TINY)


def test_a_failed_problem_keeps_its_reason_and_holds_nothing(path: Path) -> None:
    for some in (TINY, FULL):
        sites = ("pattern", "scores")
        with create(path, some, sites=sites, overwrite=True) as writer:
            put(writer, some, (0, 1), *sites)
            writer.fail(2, "CUDA out of memory")
            put(writer, some, (3, 4), *sites)
        ds = store.open(path)
        assert ds["status"].values.tolist() == [DONE, DONE, FAILED, DONE, DONE]
        assert ds["error"].values.tolist() == ["", "", "CUDA out of memory", "", ""]
        check(ds, some)


@pytest.mark.parametrize("some", [TINY, FULL], ids=["tiny", "full"])
def test_a_failed_problem_is_offered_again_and_what_is_done_is_not(
    path: Path, some: list[Labels]
) -> None:
    with create(path, some) as writer:
        put(writer, some, (0, 1, 3, 4))
        writer.fail(2, "CUDA out of memory")
    with store.resume(path, config=CONFIG) as writer:
        assert writer.pending() == [(2,)]
        put(writer, some, [2])
        assert writer.pending() == []
    ds = store.open(path)
    assert set(ds["error"].values.tolist()) == {""}
    assert ds["status"].values.tolist() == [DONE] * 5
    check(ds, some)


@pytest.mark.parametrize("some", [TINY, FULL], ids=["tiny", "full"])
def test_a_reader_of_a_half_written_store_sees_what_is_finished(
    path: Path, some: list[Labels]
) -> None:
    writer = create(path, some)
    assert store.open(path).sizes["problem"] == 0
    assert store.open(path)["pattern"].values.shape[0] == 0
    put(writer, some, (4, 1))
    writer.close()
    ds = store.open(path)
    assert ds["problem"].values.tolist() == ["gsm8k/1", "gsm8k/4"]
    check(ds, some)
    with store.resume(path, config=CONFIG) as again:
        put(again, some, [0])
    assert store.open(path)["problem"].values.tolist() == ["gsm8k/0", "gsm8k/1", "gsm8k/4"]
    with store.resume(path, config=CONFIG) as again:
        assert again.pending() in ([(2, 3)], [(2,), (3,)])
        put(again, some, (3, 2))
    check(store.open(path), some)


def test_leaving_by_an_exception_keeps_what_is_in_hand(path: Path) -> None:
    def interrupted() -> None:
        with create(path, TINY) as writer:
            put(writer, TINY, (0, 1))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert store.open(path).sizes["problem"] == 2
    check(store.open(path), TINY)


def test_a_problem_may_have_no_tokens_at_all(path: Path) -> None:
    for length in (6, 70):
        some = [labels(0, 0), labels(1, length)]
        with create(path, some, overwrite=True) as writer:
            writer.fail(0, "no tokens")
            put(writer, some, [1])
        check(store.open(path), some)


def test_generated_tokens_are_labelled_when_they_are_known(path: Path) -> None:
    for length in (6, 80):
        some = [labels(0, length), labels(1, length)]
        known = [labels(0, length - 2), labels(1, length - 1)]
        with create(path, some, overwrite=True) as writer:
            arrays = {"pattern": [result("pattern", one, i) for i, one in enumerate(known)]}
            writer.append((0, 1), arrays, loss=(0.0, 0.5), labels=known)
        ds = store.open(path)
        check(ds, known)
        assert (ds["key_position"].values >= 0).sum(1).tolist() == [length - 2, length - 1]
        assert ds["token"].values[0, length - 2 :].tolist() == ["", ""]


def test_reduced_arrays_are_stored_beside_or_instead_of_sites(path: Path) -> None:
    dims = ("problem", "layer", "head", "query")
    options: dict[str, Any] = {"reduced": {"entropy": dims}, "sites": ()}
    with create(path, FULL, **options) as writer:
        for i, one in enumerate(FULL):
            value = np.full((2, 3, one.length), i, "float64")
            writer.append([i], {"entropy": [value]})
    ds = store.open(path)
    assert ds["entropy"].dims == dims
    assert ds["entropy"].dtype == np.float32
    assert ds["entropy"].values[1, 0, 0, :4].tolist()[:3] == [1, 1, 1]
    assert np.isnan(ds["entropy"].values[1, 0, 0, 3])
    assert np.isnan(ds["loss"].values).all()


def test_a_number_per_problem_is_an_array_too(path: Path) -> None:
    with create(path, TINY, sites=(), reduced={"flow": ["problem"]}) as writer:
        writer.append(range(5), {"flow": [np.array(i) for i in range(5)]})
    assert store.open(path)["flow"].values.tolist() == [0, 1, 2, 3, 4]
    shutil.rmtree(path / "status" / "c")  # as if the process had died before its last step
    with store.resume(path, config=CONFIG) as writer:
        assert not list((path / "flow" / "c").iterdir())
        writer.append(range(5), {"flow": [np.array(i) for i in range(5)]})
    assert store.open(path)["flow"].values.tolist() == [0, 1, 2, 3, 4]


def test_a_store_may_keep_no_loss(path: Path) -> None:
    with create(path, TINY, loss=False) as writer:
        for i, one in enumerate(TINY):
            writer.append([i], {"pattern": [result("pattern", one, i)]})
    assert "loss" not in store.open(path)


def test_attributes_tell_how_the_store_was_made(path: Path) -> None:
    attrs = {"versions": {"torch": "2.9"}, "causal": True, "model": "gpt2"}
    fill(path, TINY, attrs=attrs, config=CONFIG | {"layers": (1, 4)})
    found = store.open(path).attrs
    assert found["schema"] == "probe/1"
    assert found["config"] == CONFIG | {"layers": [1, 4]}
    assert len(found["config_sha256"]) == 64
    assert found["model"] == "gpt2"
    assert found["versions"]["torch"] == "2.9"
    assert found["versions"]["zarr"] == zarr.__version__
    assert re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", found["created"])


def test_tiny_problems_share_a_file_and_full_ones_have_one_each(tmp_path: Path) -> None:
    many = [labels(i, 6) for i in range(600)]
    fill(tmp_path / "tiny.zarr", many)
    assert files(tmp_path / "tiny.zarr") == 2
    fill(tmp_path / "full.zarr", FULL)
    assert files(tmp_path / "full.zarr") == 5
    check(store.open(tmp_path / "tiny.zarr").isel(problem=slice(505, 520)), many)


def test_tiles_where_nothing_is_attended_take_no_space(tmp_path: Path) -> None:
    one = [labels(0, 1000)]
    fill(tmp_path / "a.zarr", one)
    shard = next(file for file in (tmp_path / "a.zarr/pattern/c").rglob("*") if file.is_file())
    raw = 2 * np.prod((2, 3, 1000, 1000))
    assert shard.stat().st_size < 0.55 * raw
    chunks = 2 * 4 * 4
    index = np.frombuffer(shard.read_bytes()[-(16 * chunks + 4) : -4], "<u8").reshape(-1, 2)
    assert (index[:, 0] != 2**64 - 1).sum() == 2 * (4 + 3 + 2 + 1)


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
    assert found.block >= 64
    assert 2 * np.prod(shard) <= 2**31


@pytest.mark.parametrize("heads", range(1, 70))
def test_every_number_of_heads_gives_shards_that_zarr_accepts(heads: int) -> None:
    given = sizes(3, 2, heads, 100, 100)
    found = schema.layout({"pattern": schema.site("pattern", dtype="float16")}, sizes=given)
    chunk, shard = found.chunks["pattern"], found.shards["pattern"]
    assert all(whole % part == 0 for whole, part in zip(shard, chunk, strict=True))
    assert chunk[2] <= 8
    assert heads <= shard[2] < heads + 8


# Death at any moment

WRITER = """
import sys, time
from pathlib import Path
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/tests"]
import test_store as t
t.schema.TINY_PROBLEMS = 4
from zarr.storage import LocalStore
real = LocalStore.set
async def slow(self, key, value, *rest):
    time.sleep(0.002)
    await real(self, key, value, *rest)
    time.sleep(0.002)
LocalStore.set = slow
path, some = Path(sys.argv[2]), t.MANY[sys.argv[3]]
new = t.store.vacant(path)
sites = ("pattern", "scores")
writer = t.create(path, some, sites=sites) if new else t.store.resume(path, config=t.CONFIG)
print("ready", flush=True)
with writer:
    for indices in writer.pending():
        for i in reversed(indices):
            t.put(writer, some, [i], *sites)
"""

MANY = {
    "tiny": [labels(i, 40 + i % 24) for i in range(48)],
    "full": [labels(i, 65 + i) for i in range(24)],
}


def start(path: Path, kind: str) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-c", WRITER, str(ROOT), str(path), kind]
    return subprocess.Popen(command, stdout=subprocess.PIPE)


@pytest.mark.parametrize("kind", ["tiny", "full"])
def test_a_writer_killed_at_any_moment_loses_nothing_that_was_done(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schema, "TINY_PROBLEMS", 4)
    path, some = tmp_path / "run.zarr", MANY[kind]
    chance, done, kills = random.Random(1), set[str](), 0
    while kills < 12:
        process = start(path, kind)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(chance.uniform(0, 0.15))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        kills += process.returncode == -signal.SIGKILL
        ds = store.open(path)
        check(ds, some)
        assert done <= set(ds["problem"].values.tolist())
        done = set(ds["problem"].values.tolist())
        if len(done) == len(some):
            shutil.rmtree(path)
            done.clear()
    process = start(path, kind)
    process.communicate()
    assert process.returncode == 0
    fill(tmp_path / "whole.zarr", some, "pattern", "scores")
    killed, whole = store.open(path).load(), store.open(tmp_path / "whole.zarr").load()
    xr.testing.assert_equal(killed, whole)
    assert not list(tmp_path.rglob("*.partial"))
    assert not list(tmp_path.glob("*.creating"))


CREATOR = """
import sys, time
from pathlib import Path
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/tests"]
import test_store as t
from zarr.storage import LocalStore
real = LocalStore.set
async def slow(self, key, value, *rest):
    time.sleep(0.003)
    await real(self, key, value, *rest)
LocalStore.set = slow
print("ready", flush=True)
t.create(Path(sys.argv[2]), t.MANY["tiny"], overwrite=True).close()
"""


def test_a_creation_killed_at_any_moment_leaves_a_whole_store_or_none(tmp_path: Path) -> None:
    path, chance, absent = tmp_path / "run.zarr", random.Random(2), 0
    for _ in range(12):
        command = [sys.executable, "-c", CREATOR, str(ROOT), str(path)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(chance.uniform(0, 0.3))
        process.kill()
        process.communicate()
        if store.vacant(path):
            absent += 1
        else:
            ds = store.open(path)
            assert ds.sizes["problem"] == 0
            store.resume(path, config=CONFIG).close()
            shutil.rmtree(path)
    assert absent
    create(path, TINY).close()
    assert [item.name for item in tmp_path.iterdir()] == ["run.zarr"]


def test_a_failed_creation_leaves_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk_refuses(monkeypatch, "token/", errno.ENOSPC)
    with pytest.raises(StoreError, match=r"no room left on the disk for .*run.zarr \(.* free\)\. "):
        create(path, TINY)
    assert list(path.parent.iterdir()) == []


# The disk refuses


def disk_refuses(monkeypatch: pytest.MonkeyPatch, part: str, number: int) -> None:
    real = LocalStore.set

    async def refuse(self: LocalStore, key: str, value: Any, *rest: Any) -> None:
        if part in key:
            raise OSError(number, os.strerror(number))
        await real(self, key, value, *rest)

    monkeypatch.setattr(LocalStore, "set", refuse)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
@pytest.mark.parametrize("part", ["pattern/c", "loss/c", "status/c"])
def test_a_full_disk_keeps_what_is_done(
    path: Path, number: int, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(writer: store.Writer) -> None:
        with writer:
            put(writer, FULL, [1])
            disk_refuses(monkeypatch, part, number)
            put(writer, FULL, [2])

    with pytest.raises(StoreError) as caught:
        write(create(path, FULL))
    need = 2 * 6 * sum(one.length**2 for i, one in enumerate(FULL) if i != 1)
    assert re.fullmatch(
        rf"no room left on the disk for {re.escape(str(path))} \(needs up to {need / 1e6:.1f} MB, "
        r"[0-9.]+ [kMGT]?B free\); the problems already done \(1 of 5\) are intact\. "
        r"Free space and run the same call again\.",
        str(caught.value),
    )
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno == number
    assert store.open(path)["problem"].values.tolist() == ["gsm8k/1"]
    monkeypatch.undo()
    with store.resume(path, config=CONFIG) as writer:
        for indices in writer.pending():
            put(writer, FULL, indices)
    check(store.open(path), FULL)


def test_a_disk_that_forbids_writing_is_named(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = create(path, FULL)
    disk_refuses(monkeypatch, "pattern/c", errno.EACCES)
    message = (
        f"cannot write to {path} (Permission denied); the problems already done (0 of 5) are "
        "intact. Remove the cause and run the same call again."
    )
    with pytest.raises(StoreError, match=says(message)):
        put(writer, FULL, [0])
    writer.close()


LIMITED = """
import resource, sys
from pathlib import Path
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/tests"]
import test_store as t
path = Path(sys.argv[2])
with t.create(path, t.FULL) as writer:
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
    for i in range(5):
        t.put(writer, t.FULL, [i])
"""


def test_a_real_limit_on_file_size_is_told_as_a_full_disk(path: Path) -> None:
    command = [sys.executable, "-c", LIMITED, str(ROOT), str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert "StoreError: no room left on the disk" in last
    assert "the problems already done (2 of 5) are intact." in last
    assert not list(path.rglob("*.partial"))
    check(store.open(path), FULL)
    assert store.open(path).sizes["problem"] == 2


# What is refused, and how


def edit(path: Path, **attrs: object) -> None:
    root = json.loads((path / "zarr.json").read_text())
    root["attributes"] |= attrs
    (path / "zarr.json").write_text(json.dumps(root))


def foreign(path: Path) -> str:
    zarr.create_group(path, attributes={"schema": "other/1"})
    return (
        f"{path} is Zarr data of another kind (schema 'other/1'), not a store. "
        "Read it with xarray.open_zarr, or use another path."
    )


def plain_folder(path: Path) -> str:
    path.mkdir()
    (path / "thesis.txt").write_text("irreplaceable")
    return f"{path} is a folder that holds no store (no zarr.json). Use another path."


def plain_file(path: Path) -> str:
    path.write_text("irreplaceable")
    return f"{path} is a file, not a store. Use another path."


def broken(path: Path) -> str:
    path.mkdir()
    (path / "zarr.json").write_text("[1]")
    return (
        f"{path} is damaged: its zarr.json cannot be read ('list' object has no attribute 'get'). "
        "Restore it from a copy, or use another path."
    )


@pytest.mark.parametrize("make", [foreign, plain_folder, plain_file, broken])
def test_what_is_not_a_store_is_neither_read_nor_written_nor_replaced(
    path: Path, make: Any
) -> None:
    message = says(make(path))
    before = sorted(str(item) for item in path.parent.rglob("*"))
    with pytest.raises(StoreError, match=message):
        store.open(path)
    with pytest.raises(StoreError, match=message):
        store.resume(path, config=CONFIG)
    with pytest.raises(StoreError, match=message):
        create(path, TINY, overwrite=True)
    assert not store.vacant(path)
    assert sorted(str(item) for item in path.parent.rglob("*")) == before


def test_a_path_with_nothing_in_it_cannot_be_opened(path: Path) -> None:
    message = f"there is no store at {path}. Check the path, or make one with probe.capture."
    with pytest.raises(StoreError, match=says(message)):
        store.open(path)
    with pytest.raises(StoreError, match=says(message)):
        store.resume(path, config=CONFIG)


def test_a_newer_schema_asks_for_an_upgrade(path: Path) -> None:
    fill(path, TINY)
    edit(path, schema="probe/2")
    message = (
        f"{path} has schema 'probe/2', and this version reads 'probe/1'. "
        "Upgrade with: pip install --upgrade attn-probe"
    )
    with pytest.raises(StoreError, match=says(message)):
        store.open(path)
    with pytest.raises(StoreError, match=says(message)):
        store.resume(path, config=CONFIG)


@pytest.mark.parametrize("name", ["pattern", "token", "status", "layer"])
def test_a_missing_array_is_named(path: Path, name: str) -> None:
    fill(path, TINY)
    shutil.rmtree(path / name)
    message = (
        f"{path} is damaged: it lacks {name}. "
        "Restore it from a copy, or make it anew with overwrite=True."
    )
    with pytest.raises(StoreError, match=says(message)):
        store.open(path)
    with pytest.raises(StoreError, match=says(message)):
        store.resume(path, config=CONFIG)


@pytest.mark.parametrize(
    ("now", "difference"),
    [
        (
            {"dtype": "float32", "queries": "last:6"},
            "dtype float16, now float32; queries None, now 'last:6'",
        ),
        ({"layers": [1]}, "layers absent, now [1]"),
        (
            {"model": {"name": "gpt2", "revision": "607a30d"}},
            "model gpt2, now {'name': 'gpt2', 'revision': '607a30d'}",
        ),
    ],
)
def test_resuming_with_other_settings_lists_what_differs(
    path: Path, now: dict[str, object], difference: str
) -> None:
    fill(path, TINY)
    message = (
        f"cannot resume {path}, it was made with other settings: {difference}. "
        "Use the old settings, another store, or overwrite=True."
    )
    with pytest.raises(StoreError, match=says(message)):
        store.resume(path, config=CONFIG | now)


def test_settings_inside_settings_are_compared_one_by_one(path: Path) -> None:
    config = {"a": {"b": 1, "c": (2, 3)}, "nan": float("nan")}
    fill(path, TINY, config=config)
    store.resume(path, config=config).close()
    with pytest.raises(StoreError, match=re.escape("settings: a.b 1, now 2; a.c [2, 3], now abs")):
        store.resume(path, config=config | {"a": {"b": 2}})


def test_a_store_is_replaced_only_when_told(path: Path) -> None:
    fill(path, TINY)
    message = (
        f"{path} already holds a store. "
        "Resume it, use another path, or replace it with overwrite=True."
    )
    with pytest.raises(StoreError, match=says(message)):
        create(path, FULL)
    check(store.open(path), TINY)
    fill(path, FULL, overwrite=True)
    assert store.open(path).sizes["key"] == 300
    assert [item.name for item in path.parent.iterdir()] == ["run.zarr"]


def test_an_empty_folder_is_as_good_as_none(path: Path) -> None:
    path.mkdir()
    assert store.vacant(path)
    fill(path, TINY)
    check(store.open(path), TINY)


def test_one_store_has_one_writer(path: Path) -> None:
    message = says(f"{path} is being written by another process. Wait for it, or use another path.")
    with create(path, TINY):
        with pytest.raises(StoreError, match=message):
            store.resume(path, config=CONFIG)
        with pytest.raises(StoreError, match=message):
            create(path, TINY, overwrite=True)
    store.resume(path, config=CONFIG).close()


def test_what_dead_processes_left_is_removed(path: Path) -> None:
    fill(path, TINY)
    (path / "pattern/c/0.0123456789abcdef0123456789abcdef.partial").write_text("torn")
    for suffix in ("creating", "replaced"):
        (path.parent / f"run.zarr.{'0' * 32}.{suffix}").mkdir()
    (path.parent / "run.zarr.mine.creating").mkdir()
    store.resume(path, config=CONFIG).close()
    assert not list(path.rglob("*.partial"))
    assert {item.name for item in path.parent.iterdir()} == {"run.zarr", "run.zarr.mine.creating"}


@pytest.mark.parametrize("some", [TINY, FULL], ids=["tiny", "full"])
def test_data_that_no_status_vouches_for_is_never_shown(
    path: Path, some: list[Labels], monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = create(path, some)
    disk_refuses(monkeypatch, "status/c", errno.EIO)
    with pytest.raises(StoreError, match="Input/output error"):
        put(writer, some, range(5))
    monkeypatch.undo()
    assert files(path)
    writer.close()
    with store.resume(path, config=CONFIG) as again:
        for i in range(5):
            again.fail(i, "too long")
    assert not store.open(path)["pattern"].values.any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sites": ["patern"]}, "there is no site 'patern'. Choose from pattern, scores, z."),
        ({"dtype": "bfloat16"}, "dtype='bfloat16' cannot be stored. Choose float16 or float32."),
        (
            {"labels": []},
            "a store needs at least one problem, and labels is empty. Give one.",
        ),
        (
            {"labels": [labels(0, 3), labels(0, 4)]},
            "two problems have the id 'gsm8k/0'. Give each its own.",
        ),
        (
            {"sites": ["z"], "sizes": {}},
            "z has dim 'head_dim' of unknown length. Give sizes={'head_dim': ...}.",
        ),
        (
            {"reduced": {"entropy": ("layer", "head")}},
            "an array 'entropy' over ('layer', 'head') cannot be stored. "
            'Its first dim must be "problem", and its name must not be one that stores use.',
        ),
        (
            {"config": {"model": {1, 2}}},
            "config cannot be recorded as JSON (Object of type set is not JSON serializable). "
            "Give strings, numbers, lists and dicts.",
        ),
    ],
)
def test_a_store_that_cannot_be_made_says_why(
    path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=says(message)):
        create(path, TINY, **options)
    assert list(path.parent.iterdir()) == []


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


def test_results_that_do_not_fit_are_refused(path: Path) -> None:
    with create(path, FULL, sites=("scores",)) as writer:
        good = result("scores", FULL[1], 1)
        for index, arrays, message in (
            (9, {"scores": [good]}, f"there is no problem 9 in {path}: it has 5, 0 to 4."),
            (-1, {"scores": [good]}, f"there is no problem -1 in {path}: it has 5, 0 to 4."),
            (
                1,
                {"pattern": [good]},
                f"{path} holds scores, and pattern came. "
                "Give every array of the store, and no other.",
            ),
            (
                2,
                {"scores": [good]},
                "scores of problem 'gsm8k/2' has shape (2, 3, 3, 3). "
                "Give (layer, head, query, key) = (2, 3, 300, 300).",
            ),
            (
                1,
                {"scores": [good + np.float32(70000)]},
                "scores of problem 'gsm8k/1' reach 7e+04, past what float16 holds (65504). "
                "Use dtype='float32'.",
            ),
        ):
            with pytest.raises(InputError, match=says(message)):
                writer.append([index], arrays)
        put(writer, FULL, [1], "scores")
        message = f"problem 'gsm8k/1' of {path} is there already. Write only what pending() lists."
        with pytest.raises(InputError, match=says(message)):
            put(writer, FULL, [1], "scores")
        with pytest.raises(InputError, match=says(message)):
            writer.fail(1, "late")
        message = (
            f"problem 'gsm8k/0' has 301 rows and 301 columns now, and {path} was made for 300 "
            "and 300. Create it with as many as the longest may get."
        )
        with pytest.raises(InputError, match=says(message)):
            writer.append([0], {"scores": [good]}, labels=[labels(0, 301)])
    ds = store.open(path)
    check(ds, FULL)
    assert ds["problem"].values.tolist() == ["gsm8k/1"]


def test_a_closed_writer_takes_nothing(path: Path) -> None:
    writer = create(path, TINY)
    writer.close()
    writer.close()
    with pytest.raises(
        InputError, match=says(f"the writer of {path} is closed. Open another with resume.")
    ):
        put(writer, TINY, [0])


def test_a_problem_refused_half_way_can_still_fail(path: Path) -> None:
    bad = result("scores", TINY[0], 0)
    bad[0] += 70000
    with create(path, TINY, sites=("scores",)) as writer:
        with pytest.raises(InputError, match="past what float16 holds"):
            writer.append([0], {"scores": [bad]})
        writer.fail(0, "scores overflow")
        put(writer, TINY, range(1, 5), "scores")
    check(store.open(path), TINY)


def test_reading_a_store_needs_no_torch(path: Path) -> None:
    fill(path, TINY)
    code = (
        f"import sys; import probe.store, probe.problems; probe.store.open({str(path)!r});"
        "print(sorted({'torch', 'nnsight', 'transformers'} & set(sys.modules)))"
    )
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"
