import errno
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from probe import schema, store
from probe import writer as writer_module
from probe.errors import InputError, StoreError
from probe.schema import DONE, FAILED, Labels
from tests.stores import (
    CONFIG,
    FULL,
    TINY,
    check,
    create,
    disk_refuses,
    files,
    fill,
    labels,
    put,
    result,
    says,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run.zarr"


def test_problems_arrive_in_any_order(path: Path) -> None:
    with create(path, TINY) as writer:
        for i in (3, 0, 4):
            put(writer, TINY, [i])
        writer.wait()
        assert not files(path)  # a shard waits until all its problems are there
        put(writer, TINY, (2, 1))
        writer.wait()
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
                "scores of problem 'gsm8k/1' pass what float16 holds (65504). Use dtype='float32'.",
            ),
        ):
            with pytest.raises(InputError, match=says(message)):
                writer.append([index], arrays)
        message = "scores of 1 problems came for 2. Give one for each."
        with pytest.raises(InputError, match=says(message)):
            writer.put([1, 4], "scores", good[None])
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
        with pytest.raises(InputError, match="pass what float16 holds"):
            writer.append([0], {"scores": [bad]})
        writer.fail(0, "scores overflow")
        put(writer, TINY, range(1, 5), "scores")
    check(store.open(path), TINY)


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


@pytest.mark.parametrize("some", [TINY, FULL], ids=["tiny", "full"])
def test_layers_come_one_by_one_and_each_once(path: Path, some: list[Labels]) -> None:
    with create(path, some, sites=("pattern", "z")) as writer:
        for i, one in enumerate(some):
            writer.begin(i)
            for layer in (1, 0):
                for name in ("z", "pattern"):
                    writer.put([i], name, result(name, one, i)[None, layer], layer)
            writer.done(i, i / 2)
    check(store.open(path), some)


@pytest.mark.parametrize("some", [TINY, FULL], ids=["tiny", "full"])
def test_a_problem_that_is_begun_again_forgets_what_was_put(path: Path, some: list[Labels]) -> None:
    message = "pattern of problem 'gsm8k/1' has 1 of 2 layers. Put each before it is done."
    with create(path, some) as writer:
        writer.begin(1)
        writer.put([1], "pattern", np.ones((1, 3, 3, 3)), 0)
        with pytest.raises(InputError, match=says(message)):
            writer.done(1)
        with pytest.raises(InputError, match=says("layer=2: the store has 2, 0 to 1.")):
            writer.put([1], "pattern", np.ones((1, 3, 3, 3)), 2)
        put(writer, some, [1])
        writer.begin(2)
        writer.put([2], "pattern", np.ones((1, 3, *[some[2].length] * 2)), 1)
        writer.fail(2, "it broke")
    ds = store.open(path)
    assert ds.status.values.tolist() == [DONE, FAILED]
    check(ds, some)
    assert not list(path.rglob("*.partial"))


def test_alike_problems_come_together(path: Path) -> None:
    some = [labels(i, 5) for i in range(9)]
    with create(path, some) as writer:
        for which in ([0, 1, 2], [8, 3], [7, 5], [4, 6]):
            for i in which:
                writer.begin(i)
            writer.put(which, "pattern", np.stack([result("pattern", some[i], i) for i in which]))
            for i in which:
                writer.done(i, i / 2)
    check(store.open(path), some)


def test_incomplete_shards_are_kept_from_time_to_time(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer_module, "SECONDS", 0)
    monkeypatch.setattr(writer_module, "SHARE", 0)
    with create(path, TINY) as writer:
        for i in (3, 0):
            put(writer, TINY, [i])
            assert store.open(path).sizes["problem"] == (1 if i == 3 else 2)
        check(store.open(path), TINY)
        put(writer, TINY, [1, 2, 4])
    check(store.open(path), TINY)
    assert store.open(path).sizes["problem"] == 5


def test_an_error_of_the_disk_stops_the_next_put_and_nothing_hangs(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    some = [labels(i, 300) for i in range(40)]
    disk_refuses(monkeypatch, "pattern/c/1/", errno.ENOSPC)

    def run() -> None:
        with create(path, some) as writer:
            put(writer, some, range(40))

    with pytest.raises(StoreError, match="no room left"):
        run()
    monkeypatch.undo()
    assert store.open(path).problem.values.tolist() == ["gsm8k/0"]
    assert not list(path.rglob("*.partial"))
    with store.resume(path, config=CONFIG) as writer:
        for indices in writer.pending():
            put(writer, some, indices)
    check(store.open(path), some)


def test_shards_of_a_long_problem_are_split_by_layer_and_row(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schema, "SHARD_BYTES", 2 * 3 * 256 * 512)
    fill(path, FULL)
    folder = path / "pattern/c/2"
    shards = sorted(str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file())
    assert shards == ["0/0/0/0", "0/0/1/0", "1/0/0/0", "1/0/1/0"]
    check(store.open(path), FULL)
    assert store.verify(path) == []
    (path / "pattern/c/2/1/0/0/0").unlink()
    assert [one.key for one in store.verify(path)] == ["pattern/c/2/1/0/0/0"]
    with pytest.raises(StoreError, match="pattern/c/2/1/0/0/0 cannot be read, it is missing"):
        store.open(path).pattern.values  # noqa: B018
