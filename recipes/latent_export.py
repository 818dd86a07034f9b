"""Document 002's files of one model: arrays, statistics, rankings, failures, checkpoints."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from probe.schema import DONE, FAILED
from recipes import latent
from recipes._files import plain, write, writing
from recipes.latent_analysis import Analysis

CHECKPOINT = 1000  # problems from one checkpoint to the next, as in the document

# Columns of the document's tables, and where their numbers stand.
_COLUMNS = {
    "flow_score": "flow",
    "hub_score": "hub",
    "hub_position": "hub_position",
    "skip_score": "skip",
    "composite_score": "composite",
    "functional_type": "functional_type",
}
_RANKED = {
    "heads_ranked_by_flow.csv": "flow",
    "heads_ranked_by_hub.csv": "hub",
    "heads_ranked_by_skip.csv": "skip",
    "ranked_heads.csv": "composite",
}
_ESTIMATES = ("mean", "low", "high", "rank", "rank_low", "rank_high", "p_top")


def export(found: Analysis, folder: Path, *, checkpoints: bool = False) -> list[Path]:
    """Write the files that document 002 keeps of a model under `results/`, and the calibrated ones.

    - attention_patterns_raw.npy [problem, layer, head, n, n] float16, attention_patterns_avg.npy
      float32 [layer, head, n, n], attention_stats.json, attention_summary.json;
    - heads_ranked_by_flow.csv, ..._hub.csv, ..._skip.csv, ranked_heads.csv: the document's scores;
    - calibrated_heads.csv: scores beyond chance, with intervals, ranks and types;
    - failed_problems.json; with `checkpoints`, checkpoints/attention_checkpoint_1000.npy, ...: all
      blocks up to there.

    Args:
        found: What was measured.
        folder: Where; it is made, and files of these names are replaced.
        checkpoints: Whether to write checkpoints too.

    Returns:
        The files, in the order in which they were written.

    Raises:
        InputError: Something cannot be written.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        files = list(_arrays(found, folder, checkpoints))
        files += [_table(found.published, score, folder / name) for name, score in _RANKED.items()]
        files.append(_calibrated(found.findings, folder / "calibrated_heads.csv"))
        for name, data in _documents(found).items():
            files.append(folder / name)
            write(files[-1], json.dumps(data, indent=2) + "\n")
    return files


def _arrays(found: Analysis, folder: Path, checkpoints: bool) -> Any:
    done = int(found.aggregated.attrs["n"])
    mean = found.aggregated["mean"].transpose("layer", "head", "query", "key")
    raw = folder / "attention_patterns_raw.npy"
    shape = (done, *mean.shape)
    out = np.lib.format.open_memmap(raw, mode="w+", dtype="float16", shape=shape)
    start = 0
    for block in latent.blocks(found.store):
        out[start : start + len(block)] = block
        start += len(block)
    out.flush()
    yield raw
    average = folder / "attention_patterns_avg.npy"
    np.save(average, mean.values.astype("float32"))
    yield average
    for count in range(CHECKPOINT, done + 1, CHECKPOINT) if checkpoints else ():
        path = folder / "checkpoints" / f"attention_checkpoint_{count}.npy"
        path.parent.mkdir(exist_ok=True)
        np.save(path, out[:count])
        yield path


def _table(published: xr.Dataset, score: str, path: Path) -> Path:
    """Heads by one of the document's scores, best first; those without a number last."""
    table = published[list(_COLUMNS.values())].rename({n: c for c, n in _COLUMNS.items()})
    by = next(c for c, n in _COLUMNS.items() if n == score)
    heads = _by_head(table)[list(_COLUMNS)].sort_values(by, ascending=False, kind="stable")
    heads = heads.reset_index()
    heads.insert(0, "rank", range(1, 1 + len(heads)))
    return _write_csv(path, heads)


def _calibrated(findings: xr.Dataset, path: Path) -> Path:
    """Every head and calibrated score, with intervals, ranks, the hub's p and the type."""
    parts = [_by_head(findings[["type", "found", "hub_position", "p_hub", "p_hub_family"]])]
    for score in findings["score"].values.tolist():
        one = findings[list(_ESTIMATES)].sel(score=score, drop=True)
        parts.append(_by_head(one).add_prefix(f"{score}_"))
    heads = parts[0].join(parts[1:])
    return _write_csv(path, heads.sort_values("composite_rank", kind="stable").reset_index())


def _by_head(table: xr.Dataset) -> Any:
    """A data frame with a row for each layer and head, in their order."""
    wide = table.map(lambda x: x.astype("float64") if x.dtype.kind == "f" else x)
    return wide.to_dataframe(dim_order=["layer", "head"])


def _write_csv(path: Path, rows: Any) -> Path:
    rows.to_csv(path, index=False, na_rep="nan", lineterminator="\r\n")
    return path


def statistics(found: Analysis) -> dict[str, Any]:
    """What attention_stats.json holds."""
    ds, aggregated, published = found.store, found.aggregated, found.published
    done = ds["status"].values == DONE
    mean, std = aggregated["mean"], aggregated["std"]
    stats = {
        "model": found.name,
        "n_problems": int(done.sum()),
        "shape": [int(done.sum()), *mean.shape],
        "mean_attention": float(mean.mean()),
        "max_attention": float(mean.max()),
        "mean_std": float(std.mean()),
        "block_mass_per_row": plain(mean.sum("key").mean(("layer", "head")).values),
        "mass": {
            str(part): float(value)
            for part, value in zip(
                aggregated["part"].values,
                aggregated["mass"].mean(("layer", "head", "query")).values,
                strict=True,
            )
        },
        "hub_scores_max": float(published["hub"].max()),
        "notes": "Rows of the block do not sum to 1: each latent also attends to the question.",
    }
    return dict(plain(stats))


def _documents(found: Analysis) -> dict[str, object]:
    ds, published = found.store, found.published
    failed = ds.isel(problem=np.flatnonzero(ds["status"].values == FAILED))
    done = ds["status"].values == DONE
    right = ds["correct"].values[done]
    summary = {
        "model": found.name,
        "n_problems": int(done.sum()),
        "accuracy": float(np.nanmean(right)) if np.isfinite(right).any() else None,
        "top_heads": _top(found),
        "functional_types": _counts(published["functional_type"]),
        "calibrated_types": _counts(found.findings["type"]),
        "calibrated_findings": int(found.findings["found"].sum()),
        "hub_positions": _counts(published["hub_position"]),
        "criteria": [one._asdict() for one in found.criteria],
        "criteria_of_noise": [one._asdict() for one in found.noise.criteria],
        "calibrated_findings_of_noise": int(found.noise.findings["found"].sum()),
        "artefact": {
            "reading": "as published: the step of bot counted as latent 0, columns one ahead",
            "flow_min": float(found.shifted["flow"].min()),
            "flow_max": float(found.shifted["flow"].max()),
            "composite_max": float(found.shifted["composite"].max()),
        },
    }
    return {
        "attention_stats.json": statistics(found),
        "attention_summary.json": plain(summary),
        "failed_problems.json": [
            {"id": str(name), "error": str(reason)}
            for name, reason in zip(failed["problem"].values, failed["error"].values, strict=True)
        ],
    }


def _top(found: Analysis, n: int = 10) -> list[dict[str, Any]]:
    out = []
    for layer, head in latent.best(found.findings, top=n):
        one = found.findings.sel(layer=layer, head=head)
        scores = {s: one["mean"].sel(score=s).item() for s in one["score"].values.tolist()}
        composite = found.published["composite"].sel(layer=layer, head=head).item()
        out.append(
            {
                "layer": layer,
                "head": head,
                "type": str(one["type"].item()),
                "calibrated": scores,
                "document_composite": composite,
            }
        )
    return out


def _counts(names: xr.DataArray) -> dict[str, int]:
    values, counts = np.unique(names.values.astype(str), return_counts=True)
    return dict(zip(values.tolist(), counts.tolist(), strict=True))
