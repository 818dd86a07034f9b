"""What attention can be kept in: each contender writes problems, and reads a head and a problem.

`python -m benchmarks.store_contenders NAME DATA FOLDER` runs one and prints its figures as JSON.
Data is a .npz of one array (layer, head, query, key), float16, for each problem.
"""

import ctypes
import json
import os
import pickle
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Problems = Sequence[Array]

HEAD = (3, 2)
PROBLEM = 1


@dataclass(frozen=True)
class Contender:
    """Ways to write all problems into a folder, and to read from it."""

    write: Callable[[Problems, Path], None]
    head: Callable[[Path], Any]  # of every problem
    problem: Callable[[Path], Any]


def _numpy(problems: Problems, folder: Path) -> None:
    for i, one in enumerate(problems):
        np.save(folder / f"{i}.npy", one)


def _numpy_head(folder: Path) -> Any:
    return [np.array(np.load(file, mmap_mode="r")[HEAD]) for file in folder.glob("*.npy")]


def _zip(problems: Problems, folder: Path) -> None:
    for i, one in enumerate(problems):
        np.savez_compressed(folder / f"{i}.npz", one)


def _zip_head(folder: Path) -> Any:
    return [np.load(file)["arr_0"][HEAD] for file in folder.glob("*.npz")]


def _pickle(problems: Problems, folder: Path) -> None:
    with (folder / "all.pkl").open("wb") as file:
        pickle.dump(dict(enumerate(problems)), file, protocol=pickle.HIGHEST_PROTOCOL)


def _pickles(problems: Problems, folder: Path) -> None:
    """As the documents' tools do: a file for each problem, with a dict of layers."""
    for i, one in enumerate(problems):
        layers = {n: {"shape": layer.shape, "tensor": layer} for n, layer in enumerate(one)}
        with (folder / f"{i}.pkl").open("wb") as file:
            pickle.dump(layers, file)


def _pickles_read(file: Path) -> Any:
    with file.open("rb") as opened:
        return pickle.load(opened)


def _unpickled(folder: Path) -> Any:
    with (folder / "all.pkl").open("rb") as file:
        return pickle.load(file)


def _safetensors(problems: Problems, folder: Path) -> None:
    from safetensors.numpy import save_file

    for i, one in enumerate(problems):
        save_file({"pattern": one}, folder / f"{i}.safetensors")


def _safetensors_head(folder: Path) -> Any:
    from safetensors import safe_open

    out = []
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "np") as opened:
            out.append(opened.get_slice("pattern")[HEAD[0], HEAD[1]])
    return out


def _safetensors_problem(folder: Path) -> Any:
    from safetensors.numpy import load_file

    return load_file(folder / f"{PROBLEM}.safetensors")


def _h5(problems: Problems, folder: Path) -> None:
    import h5py

    with h5py.File(folder / "all.h5", "w") as file:
        for i, one in enumerate(problems):
            file.create_dataset(str(i), data=one)


def _h5_read(folder: Path, one: bool) -> Any:
    import h5py

    with h5py.File(folder / "all.h5") as file:
        return file[str(PROBLEM)][...] if one else [file[name][HEAD] for name in file]


def _shape(problems: Problems) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int]:
    """Of one array for all: its shape, shards, chunks and the problems in a shard, as ours are."""
    from probe import schema

    layers, heads = problems[0].shape[:2]
    longest = max(one.shape[-1] for one in problems)
    sizes = {"layer": layers, "head": heads, "query": longest, "key": longest}
    sizes["problem"] = len(problems)
    layout = schema.layout({"pattern": schema.site("pattern", dtype="float16")}, sizes=sizes)
    shape = (len(problems), layers, heads, longest, longest)
    return shape, layout.shards["pattern"], layout.chunks["pattern"], layout.problems


def _shards(problems: Problems, step: int) -> Any:
    """Each shard's problems as they are assigned: (slices, values)."""
    for start in range(0, len(problems), step):
        some = problems[start : start + step]
        n = max(one.shape[-1] for one in some)
        yield (slice(start, start + len(some)), ..., slice(n), slice(n)), np.stack(some)


def _zarr(problems: Problems, folder: Path, *, empty: bool) -> None:
    import zarr
    from zarr.codecs import ZstdCodec

    shape, shards, chunks, step = _shape(problems)
    array = zarr.create_array(
        folder / "all.zarr",
        shape=shape,
        shards=shards,
        chunks=chunks,
        dtype="float16",
        compressors=ZstdCodec(level=1),
        fill_value=0,
        config={"write_empty_chunks": empty},
    )
    for where, values in _shards(problems, step):
        array[where] = values


def _zarr_read(folder: Path, which: Any) -> Any:
    import zarr

    return zarr.open_array(folder / "all.zarr")[which]


def _tensorstore(problems: Problems, folder: Path) -> None:
    import tensorstore

    shape, shards, chunks, step = _shape(problems)
    inner = [
        {"name": "bytes", "configuration": {"endian": "little"}},
        {"name": "zstd", "configuration": {"level": 1}},
    ]
    array = tensorstore.open(
        {
            "driver": "zarr3",
            "kvstore": {"driver": "file", "path": f"{folder}/all.zarr/"},
            "metadata": {
                "shape": shape,
                "data_type": "float16",
                "fill_value": 0,
                "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": shards}},
                "codecs": [
                    {
                        "name": "sharding_indexed",
                        "configuration": {"chunk_shape": chunks, "codecs": inner},
                    }
                ],
            },
        },
        create=True,
    ).result()
    for where, values in _shards(problems, step):
        array[where].write(values).result()


def _tensorstore_read(folder: Path, which: Any) -> Any:
    import tensorstore

    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{folder}/all.zarr/"}}
    return tensorstore.open(spec).result()[which].read().result()


def _ours(problems: Problems, folder: Path, *, fsync: bool = False) -> None:
    """With what the others lack: tokens, positions, loss, status."""
    from probe import store
    from probe.schema import Labels

    layers, heads = problems[0].shape[:2]
    labels = []
    for i, one in enumerate(problems):
        n = one.shape[-1]
        one_label: dict[str, Any] = {"query_position": range(n), "key_position": range(n)}
        one_label |= {"token": [f" {k}" for k in range(n)], "token_id": range(n)}
        labels.append(Labels(id=str(i), length=n, segment=["text"] * n, **one_label))
    options: dict[str, Any] = {"layers": range(layers), "heads": range(heads), "fsync": fsync}
    with store.create(folder / "all.zarr", labels=labels, config={}, **options) as writer:
        for i, one in enumerate(problems):
            writer.append([i], {"pattern": [one]}, loss=[1.0])


def _ours_head(folder: Path) -> Any:
    import probe

    return probe.open(folder / "all.zarr").pattern.isel(layer=HEAD[0], head=HEAD[1]).values


def _ours_problem(folder: Path) -> Any:
    import probe

    return probe.trimmed(probe.open(folder / "all.zarr"), PROBLEM).pattern.values


_ALL_HEADS = (slice(None), *HEAD)

CONTENDERS: dict[str, Contender] = {
    "np.save": Contender(_numpy, _numpy_head, lambda f: np.load(f / f"{PROBLEM}.npy")),
    "np.savez_compressed": Contender(
        _zip, _zip_head, lambda f: np.load(f / f"{PROBLEM}.npz")["arr_0"]
    ),
    "pickle, all in one": Contender(
        _pickle,
        lambda f: [one[HEAD] for one in _unpickled(f).values()],
        lambda f: _unpickled(f)[PROBLEM],
    ),
    "pickle, one a problem": Contender(
        _pickles,
        lambda f: [_pickles_read(file)[HEAD[0]]["tensor"][HEAD[1]] for file in f.glob("*.pkl")],
        lambda f: _pickles_read(f / f"{PROBLEM}.pkl"),
    ),
    "safetensors": Contender(_safetensors, _safetensors_head, _safetensors_problem),
    "h5py, contiguous": Contender(_h5, lambda f: _h5_read(f, False), lambda f: _h5_read(f, True)),
    "zarr-python": Contender(
        lambda p, f: _zarr(p, f, empty=False),
        lambda f: _zarr_read(f, _ALL_HEADS),
        lambda f: _zarr_read(f, PROBLEM),
    ),
    "zarr-python, write_empty_chunks": Contender(
        lambda p, f: _zarr(p, f, empty=True),
        lambda f: _zarr_read(f, _ALL_HEADS),
        lambda f: _zarr_read(f, PROBLEM),
    ),
    "tensorstore": Contender(
        _tensorstore,
        lambda f: _tensorstore_read(f, _ALL_HEADS),
        lambda f: _tensorstore_read(f, PROBLEM),
    ),
    "ours": Contender(_ours, _ours_head, _ours_problem),
    "ours, fsync": Contender(lambda p, f: _ours(p, f, fsync=True), _ours_head, _ours_problem),
}


def sync(folder: Path) -> None:
    """Have the folder's file system on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        ctypes.CDLL(None).syncfs(handle)
    finally:
        os.close(handle)


def forget(folder: Path) -> None:
    """Drop the files from the page cache; they must be on the disk."""
    for file in folder.rglob("*"):
        if file.is_file():
            handle = os.open(file, os.O_RDONLY)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


def written(contender: Contender, problems: Problems, target: Path) -> tuple[float, float]:
    """Seconds until it has written, and until that is on the disk."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    sync(target)
    start = time.perf_counter()
    contender.write(problems, target)
    done = time.perf_counter() - start
    sync(target)
    return done, time.perf_counter() - start


def figures(name: str, data: Path, folder: Path, again: int = 3) -> dict[str, float]:
    """Seconds to write and to read, bytes and files.

    The first writing of a process takes memory that no process had before; later ones take what the
    one before them gave back, which on virtual machines is several times as fast.
    """
    contender, target = CONTENDERS[name], folder / "all"
    with np.load(data) as loaded:
        problems = [loaded[f"p{i}"] for i in range(len(loaded.files))]
    warm = folder / "warm"  # imports, threads and pools are not what is measured
    warm.mkdir(parents=True)
    contender.write(problems[:2], warm)
    contender.problem(warm)
    out = {"raw": float(sum(one.nbytes for one in problems))}
    out["written first"], out["first"] = written(contender, problems, target)
    later = [written(contender, problems, target) for _ in range(again)]
    out["written again"], out["again"] = (statistics.median(x) for x in zip(*later, strict=True))
    sizes = [file.stat().st_size for file in target.rglob("*") if file.is_file()]
    out["bytes"], out["files"] = float(sum(sizes)), float(len(sizes))
    del problems  # who reads a store does not hold all of it
    for what, read in (("head", contender.head), ("problem", contender.problem)):
        for state in ("cold", "warm"):
            times = []
            for _ in range(again):
                if state == "cold":
                    forget(target)
                start = time.perf_counter()
                read(target)
                times.append(time.perf_counter() - start)
            out[f"{what} {state}"] = statistics.median(times)
    shutil.rmtree(folder)
    return out


if __name__ == "__main__":
    print(json.dumps(figures(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))))
