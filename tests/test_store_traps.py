"""Ways to lose something in a store that were once open."""

import errno
import gc
import os
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from zarr.storage import MemoryStore, WrapperStore

import probe
from probe import demos, latent, schema, store
from probe.errors import InputError, StoreError
from probe.schema import DONE
from recipes.moments import over
from tests.stores import CONFIG, FULL, TINY, check, create, fill, labels, put, result, says


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run.zarr"


def test_a_first_batch_of_long_problems_keeps_its_files(path: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=16,
        num_key_value_heads=16,
        max_position_embeddings=512,
    )
    problems = [[(i * 7 + n) % 60 for i in range(300)] for n in range(3)]
    with probe.load(LlamaForCausalLM(config)) as model:
        ds = probe.capture(model, problems, path, progress=False)
        assert ds.status.values.tolist() == [DONE] * 3
        eager: Any = LlamaForCausalLM(config)
        eager.eval()
        eager.load_state_dict(model.module.state_dict())
    eager.set_attn_implementation("eager")
    found = eager(torch.tensor(problems), output_attentions=True).attentions
    expected = torch.stack(found, 1).detach().numpy()
    np.testing.assert_allclose(ds.pattern.astype("float32"), expected, atol=1e-3)


def test_problems_that_failed_are_mended_one_after_the_other(path: Path) -> None:
    for fsync in (False, True):
        with create(path, FULL, overwrite=True, fsync=fsync) as writer:
            writer.fail(0, "oom")
            writer.fail(1, "oom")
            put(writer, FULL, [2, 3, 4])
        with store.resume(path, config=CONFIG, fsync=fsync) as writer:
            put(writer, FULL, [0])
            writer.wait()
            put(writer, FULL, [1])
        assert store.open(path).status.values.tolist() == [DONE] * 5
        check(store.open(path), FULL)


def test_shards_of_later_rows_are_missed_too(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schema, "SHARD_BYTES", 2 * 3 * 256 * 512)
    some = [labels(0, 300), labels(1, 20)]
    fill(path, some)
    assert store.verify(path) == []
    (path / "pattern/c/0/0/0/1/0").unlink()
    assert [one.key for one in store.verify(path)] == ["pattern/c/0/0/0/1/0"]
    with pytest.raises(StoreError, match="pattern/c/0/0/0/1/0 cannot be read, it is missing"):
        store.open(path).pattern.values  # noqa: B018


def test_texts_that_are_empty_are_no_damage(path: Path) -> None:
    with latent.load("demo-codi", device="cpu") as reasoner:
        questions = [one["question"] for one in demos.chains(2, seed=1)]
        latent.capture(reasoner, questions, path, max_new_tokens=2, progress=False)
    assert store.verify(path) == []


def test_a_problem_without_rows_is_no_damage(path: Path) -> None:
    some = [labels(0, 80), labels(1, 80, ())]
    fill(path, some)
    assert store.verify(path) == []
    check(store.open(path), some)


def test_moments_of_problems_that_differ_in_length(path: Path) -> None:
    with probe.load("demo-llama", device="cpu") as model:
        ds = probe.capture(model, [[1] * 70, [2] * 80], path, progress=False)
    found = over(ds)
    assert found.mean.pattern.shape == (2, 4, 80, 80)
    assert int(found.count.pattern[0, 0, 75, 3]) == 1
    assert set(found.mean.coords) == {"layer", "head", "query", "key"}


def test_an_attempt_that_was_longer_leaves_nothing(path: Path) -> None:
    some = [labels(0, 6), labels(1, 6)]
    short = labels(0, 4)
    with create(path, some, loss=False) as writer:
        writer.begin(0, some[0])
        writer.put([0], "pattern", result("pattern", some[0], 0)[None])
        writer.begin(0, short)
        writer.put([0], "pattern", result("pattern", short, 0)[None])
        writer.done(0)
        writer.append([1], {"pattern": [result("pattern", some[1], 1)]})
    check(store.open(path), [short, some[1]])


def test_a_failed_problem_keeps_no_labels_of_its_attempt(path: Path) -> None:
    some = [labels(0, 6), labels(1, 6)]
    with create(path, some) as writer:
        writer.begin(0, labels(0, 3))
        writer.fail(0, "it broke")
        put(writer, some, [1])
    assert store.open(path).length.values.tolist() == [6, 6]


def test_a_layer_twice_is_not_all_layers(path: Path) -> None:
    one = result("pattern", FULL[0], 0)
    with create(path, FULL) as writer:
        writer.begin(0)
        for _ in range(2):
            writer.put([0], "pattern", one[None, 0], 0)
        with pytest.raises(InputError, match="has 1 of 2 layers"):
            writer.done(0)
        for layer in (-1, 2):
            with pytest.raises(InputError, match=says(f"layer={layer}: the store has 2, 0 to 1.")):
                writer.put([0], "pattern", one[None, 0], layer)
        with pytest.raises(InputError, match="holds pattern, and nope came"):
            writer.put([0], "nope", one[None])


def test_a_closed_writer_answers(path: Path) -> None:
    writer = create(path, TINY)
    put(writer, TINY, range(5))
    writer.close()
    writer.wait()
    assert writer.status.tolist() == [DONE] * 5
    assert writer.pending() == []


def test_a_writer_that_is_dropped_writes_no_more(path: Path) -> None:
    writer = create(path, FULL)
    put(writer, FULL, [0])
    writer.wait()
    put(writer, FULL, [1])
    del writer
    time.sleep(0.5)  # what it had taken is written first
    gc.collect()
    with store.resume(path, config=CONFIG) as again:
        put(again, FULL, [i for shard in again.pending() for i in shard])
    time.sleep(1.2)
    assert store.open(path).sizes["problem"] == 5
    check(store.open(path), FULL)


def test_a_store_object_that_is_held_is_neither_replaced_nor_repaired() -> None:
    where: Any = MemoryStore()
    some = [labels(i, 70) for i in range(8)]
    create(where, some, part=(1, 2)).close()
    held = r"is being written by process \d+ on "
    with store.resume(where, config=CONFIG, part=(2, 2)) as writer:
        with store.resume(where, config=CONFIG, part=(1, 2)) as other:
            put(other, some, range(4))
        with pytest.raises(StoreError, match=held):
            create(where, TINY, overwrite=True)
        with pytest.raises(StoreError, match=held):
            store.verify(where, repair=True)
        put(writer, some, range(4, 8))
    check(store.open(where), some)


class Failing(WrapperStore[Any]):
    """Refuses one key."""

    key = ""

    async def set(self, key: str, value: Any) -> None:
        if self.key and self.key in key:
            raise RuntimeError("the bucket is gone")
        await self._store.set(key, value)


def test_a_creation_that_fails_leaves_a_store_object_empty() -> None:
    where: Any = Failing(MemoryStore())
    where.key = "token/zarr.json"
    with pytest.raises(StoreError, match=r"cannot write to .* \(.*the bucket is gone\)"):
        create(where, TINY)
    where.key = ""
    create(where, TINY).close()
    assert store.open(where).sizes["problem"] == 0


def test_a_sweep_that_fails_lets_go_of_the_store(path: Path) -> None:
    fill(path, TINY)

    def refuse(folder: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "scandir", refuse)
        with pytest.raises(StoreError, match=r"cannot write to .*Permission denied"):
            store.resume(path, config=CONFIG)
    store.resume(path, config=CONFIG).close()


def test_another_parts_half_written_loss_stays(path: Path) -> None:
    some = [labels(i, 70) for i in range(200)]
    with create(path, some, part=(2, 2)):
        file = path / "loss/c" / f"1.{'0' * 32}.partial"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("part 2 is at it")
        store.resume(path, config=CONFIG, part=(1, 2)).close()
        assert file.exists()


def test_what_is_gone_or_damaged_at_the_end_is_told(path: Path) -> None:
    writer = create(path, TINY)
    put(writer, TINY, range(5))
    writer.wait()
    shutil.rmtree(path)
    with pytest.raises(StoreError, match="was deleted or moved while it was being written"):
        writer.close()
    fill(path, TINY)
    (path / "status/c/0").write_bytes(b"torn")
    for _ in range(2):  # no lock stays behind
        with pytest.raises(StoreError, match="is damaged: its labels cannot be read"):
            store.resume(path, config=CONFIG)


def test_parts_and_ids_that_cannot_be_are_refused(path: Path) -> None:
    with pytest.raises(InputError, match=says("part=1/0. Give 1/1 to 1/1.")):
        create(path, TINY, part=(1, 0))
    bad = schema.Labels(
        id="\ud800",
        length=1,
        query_position=[0],
        key_position=[0],
        token=["a"],
        token_id=[1],
        segment=["text"],
    )
    with pytest.raises(InputError, match=r"is no valid text\. Give one that UTF-8 can hold"):
        create(path, [bad])
    with probe.load("demo-llama", device="cpu") as model, pytest.raises(InputError) as caught:
        probe.capture(model, "abc", path, part=(2, 2), overwrite=True, progress=False)
    assert str(caught.value) == (
        "overwrite=True with part=(2, 2): each part would remove what the others have written. "
        "Remove the old store first."
    )


def test_pieces_of_reordered_and_of_other_arrays(path: Path) -> None:
    fill(path, TINY, "pattern", "z")
    ds = store.open(path)
    turned = probe.trimmed(ds.isel(query=slice(None, None, -1)), "gsm8k/1")
    assert turned.query_position.values.tolist() == [2, 1, 0]
    np.testing.assert_array_equal(turned.pattern[:, :, ::-1], probe.trimmed(ds, "gsm8k/1").pattern)
    assert probe.trimmed(ds.z, 1).shape == (2, 3, 3, 5)
    assert float(probe.trimmed(ds.loss, 2)) == 1.0
    assert [part.sizes["problem"] for part in probe.shards(ds.z)] == [5]
