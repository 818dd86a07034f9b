"""Which problems run together."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from probe.plans import Item

# Batches are made inside windows of so many problems, so that shards fill one after the other.
_WINDOW = 512
_BATCH_TOKENS = 4096
_BATCH_BYTES = 1 << 29


def batches(
    items: Sequence[Item], batch_size: int | None, cell_bytes: int, *, equal: bool
) -> Iterator[tuple[int, ...]]:
    """Problems of similar length, longest first so that memory runs short early if it does."""
    for start in range(0, len(items), _WINDOW):
        window = range(start, min(start + _WINDOW, len(items)))
        batch: list[int] = []
        for i in sorted(window, key=lambda i: -items[i].length):
            longest = items[batch[0]] if batch else items[i]
            n = len(batch) + 1
            cells = max(len(longest.queries) * len(longest.keys), 1)
            full = (
                n > batch_size
                if batch_size
                else n * longest.length > _BATCH_TOKENS or n * cells * cell_bytes > _BATCH_BYTES
            )
            if batch and (full or (equal and items[i].length != longest.length)):
                yield tuple(batch)
                batch = []
            batch.append(i)
        yield tuple(batch)


def length_matters(config: Any) -> bool:
    """Whether rotary angles depend on the longest input of a batch, as they do in longrope."""

    def kinds(value: Any) -> Iterator[Any]:
        if isinstance(value, Mapping):
            for name, inner in value.items():
                yield from [inner] if name in ("rope_type", "type") else kinds(inner)

    rope = getattr(config, "rope_parameters", None)
    return bool({"dynamic", "longrope"} & set(kinds(rope)))
