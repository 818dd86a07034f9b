"""Which architectures of transformers can be captured: each is built tiny, tapped, and compared.

The comparison never uses the tap's own reading of a kernel's arguments. An untapped copy with the
same weights runs transformers' eager attention; what it reports as its attentions is one
reference, and what its own kernel mixes values with is another: given unit vectors as values, a
kernel returns its pattern.
"""

import gc
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

import probe
from probe.tap import run
from recipes.architectures_tiny import MODEL_TYPES, padded, quiet, references, tiny

Outcome = Literal["captured", "refused", "unbuilt", "WRONG"]

TOLERANCE = 2e-5
HEADINGS = ("model type", "kernel", "layers", "heads", "key heads", "special", "difference")
OTHER_HEADINGS = ("model type", "outcome", "reason")


@dataclass(frozen=True, slots=True)
class Row:
    """What came of an architecture.

    Attributes:
        model_type: As transformers names it.
        outcome: captured: its patterns are right. refused: `probe.load` says no. unbuilt:
            transformers cannot build it here. WRONG: it is tapped, and something is not right.
        reason: Why it is not captured.
        kernel: The attention implementation that transformers chooses; eager is checked as well.
        layers: Layers with attention.
        heads: Query heads in a layer, or several numbers.
        kv_heads: Key heads, likewise.
        special: What is unlike plain causal attention.
        difference: Largest difference of a pattern from the references, in any real row.
        contrast: Mean over rows of the largest weight times the number of keys: 1 is uniform.
    """

    model_type: str
    outcome: Outcome
    reason: str = ""
    kernel: str = ""
    layers: int = 0
    heads: str = ""
    kv_heads: str = ""
    special: tuple[str, ...] = ()
    difference: float = math.nan
    contrast: float = math.nan


def check(model_type: str) -> Row:
    """Build a tiny model of a type, tap it, and compare its patterns with untapped references.

    Under the kernel that transformers chooses and under eager attention, two sequences of
    different lengths are padded on the left and on the right. Logits with and without the tap must
    be the same bit for bit.

    Args:
        model_type: One of `MODEL_TYPES`.

    Example:
        >>> row = check("gemma2")
        >>> row.outcome, row.layers, row.special
        ('captured', 4, ('softcap', 'window'))
    """
    with quiet(), torch.no_grad():
        try:
            reference, model = tiny(model_type, "eager"), tiny(model_type)
        except Exception as error:  # whatever stops transformers
            return Row(model_type, "unbuilt", _reason(error))
        kernel = str(model.config._attn_implementation)
        try:
            with probe.load(model) as loaded:
                batches = [loaded.batch(batch) for batch in padded()]
                kv_heads = str(loaded.n_kv_heads)
        except Exception as error:  # also what transformers raises on the way
            return Row(model_type, "refused", _reason(error), kernel)
        try:
            copies = [model] if kernel == "eager" else [model, tiny(model_type, "eager")]
            seen = [_seen(copy, reference, batch) for batch in batches for copy in copies]
        except Exception as error:
            return Row(model_type, "WRONG", f"fails once it is tapped: {_reason(error)}", kernel)
    differences, patterns, notes = zip(*seen, strict=True)
    gc.collect()  # models are full of cycles
    largest = max(differences)
    if largest > TOLERANCE:
        reason = f"differs from the references by {largest:.2g}"
        return Row(model_type, "WRONG", reason, kernel, difference=largest)
    return Row(
        model_type,
        "captured",
        "",
        kernel,
        layers=len(patterns[0]),
        heads=", ".join(map(str, sorted({p.shape[1] for p in patterns[0]}))),
        kv_heads=kv_heads,
        special=tuple(dict.fromkeys((*special(model.config, patterns[0]), *notes[0]))),
        difference=largest,
        contrast=_contrast(patterns[0]),
    )


def table(model_types: Iterable[str] = MODEL_TYPES) -> Iterator[Row]:
    """The row of each type, one after another, on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for model_type in model_types:
            yield check(model_type)
    finally:
        torch.set_num_threads(threads)


def _seen(
    model: PreTrainedModel, reference: PreTrainedModel, batch: dict[str, Tensor]
) -> tuple[float, list[Tensor], tuple[str, ...]]:
    """(largest difference, patterns of each layer, notes) of one batch through the tap."""
    inputs = {**batch, "use_cache": False}
    before = model(**inputs).logits
    patterns: list[Tensor] = []
    with probe.load(model) as loaded:
        layers = tuple(loaded.layers)
        output = run(loaded.tap, lambda _, e: patterns.append(e.pattern), inputs, layers=layers)
    if not torch.equal(output.logits, before):
        raise AssertionError("the logits change when attention is read")
    reported, mixed = references(reference, inputs)
    rows = batch["attention_mask"].bool()
    if not mixed:
        return largest_difference(patterns, reported, rows), patterns, ()
    difference = largest_difference(patterns, mixed, rows)
    if len(reported) != len(mixed):
        return difference, patterns, ("reports other attentions too",)
    if (apart := largest_difference(reported, mixed, rows)) > TOLERANCE:
        return difference, patterns, ("reports its attentions before the sinks",)
    return max(difference, apart), patterns, ()


def largest_difference(got: Sequence[Tensor], wanted: Sequence[Tensor], rows: Tensor) -> float:
    """The largest difference of any number in the rows that count; infinite if shapes differ.

    Args:
        got: (batch, head, query, key) of each layer.
        wanted: Likewise.
        rows: (batch, query) bool.
    """
    if [a.shape for a in got] != [b.shape for b in wanted] or not got:
        return math.inf
    apart = [(a - b).abs().transpose(1, 2)[rows].max() for a, b in zip(got, wanted, strict=True)]
    return float(torch.stack(apart).nan_to_num(nan=math.inf).max())


def special(config: Any, patterns: Sequence[Tensor]) -> Iterator[str]:
    """What is unlike plain causal attention, seen in patterns of which the first item is unpadded.

    Args:
        config: The model's.
        patterns: (batch, head, query, key) of each layer.
    """
    text = config.get_text_config()
    if len(patterns) < getattr(text, "num_hidden_layers", 0):
        yield "hybrid"
    if getattr(text, "kv_lora_rank", None):
        yield "latent attention"
    if getattr(text, "attn_logit_softcapping", None):
        yield "softcap"
    first = [pattern[0] for pattern in patterns]
    if any(bool((p.sum(-1) < 1 - 1e-3).any()) for p in first):
        yield "sinks"
    n = first[0].shape[-1]
    behind = torch.arange(n)[:, None] - torch.arange(n)
    kinds = [_hidden(p, behind) for p in first if p.shape[1:] == behind.shape]
    yield from (kind for kind in dict.fromkeys(kinds) if kind)


def _hidden(pattern: Tensor, behind: Tensor) -> str:
    """How the keys that a layer hides lie: pattern (head, query, key), behind = query - key."""
    keep = pattern > 0
    if bool((keep & (behind < 0)).any()):
        return "sees the future"
    union = keep.any(0)
    if bool((keep == (behind >= 0)).all()):
        return ""
    width = int(behind[union].max()) + 1
    if bool((keep == ((behind >= 0) & (behind < width))).all()):
        return "window"
    start = torch.arange(len(union)) - behind[:, 0] % width
    if bool((keep == ((behind >= 0) & (torch.arange(len(union)) >= start[:, None]))).all()):
        return "chunks"
    return "sparse"


def _contrast(patterns: Sequence[Tensor]) -> float:
    """Mean over the unpadded item's rows of the largest weight times the keys attended to."""
    each = [(p[0].amax(-1) * (p[0] > 0).sum(-1))[:, 1:].mean() for p in patterns]
    return float(torch.stack(each).mean())


def _reason(error: Exception) -> str:
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {text}"


def summary(rows: Sequence[Row]) -> str:
    """How many came out how.

    Example:
        >>> summary([Row("llama", "captured"), Row("mamba", "refused")])
        '2 architectures: 1 captured, 1 refused'
    """
    counts: dict[str, int] = {}
    for row in rows:
        counts[row.outcome] = counts.get(row.outcome, 0) + 1
    listed = [f"{n} {outcome}" for outcome, n in sorted(counts.items())]
    return f"{len(rows)} architectures: {', '.join(listed)}"


def cells(row: Row) -> tuple[str, ...]:
    """A row as text, in the order of the table's columns; its reason if it is not captured."""
    if row.outcome != "captured":
        return row.model_type, row.outcome, row.reason
    numbers = (str(row.layers), row.heads, row.kv_heads)
    return (row.model_type, row.kernel, *numbers, ", ".join(row.special), f"{row.difference:.0e}")


def as_json(row: Row) -> dict[str, Any]:
    """A row for scripts: numbers that there are none of are null."""
    return {k: None if v != v else v for k, v in asdict(row).items()}


def markdown(rows: Sequence[Row]) -> str:
    """The table as a page of the documentation."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("transformers", "torch"))
    captured = [cells(row) for row in rows if row.outcome == "captured"]
    others = [cells(row) for row in rows if row.outcome != "captured"]
    return "\n".join(
        [
            "# Architectures",
            "",
            f"{summary(rows)} ({versions}).",
            "",
            "Each causal language model of transformers is built tiny, with random weights, and",
            "tapped. Captured means: on sequences padded on either side and longer than a window,",
            "under the kernel named and under eager attention, logits are the same bit for bit",
            "with and without the tap, and no number of a pattern differs by more than",
            f"{TOLERANCE:.0e} from what an untapped eager copy reports, and from what its own",
            "kernel mixes values with. This page is written by",
            "`probe check --all --markdown docs/architectures.md`.",
            "",
            *_markdown_table(HEADINGS, captured),
            "",
            "Not captured:",
            "",
            *_markdown_table(OTHER_HEADINGS, others),
            "",
        ]
    )


def _markdown_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [headings, ["---"] * len(headings), *rows]
    return [f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines]
