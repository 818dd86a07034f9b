"""Where a model of one's own keeps its attention, as data."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from probe.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where the attention of a model is that is not found by itself.

    Attributes:
        layers: Dotted path of the list of blocks, as "transformer_blocks" or "model.h".
        attention: Path of the attention module inside a block; blocks without it have no attention.
        projection: Path of the output projection inside the attention module, by default the first
            module with a weight that it calls after its softmax.
        ids: The argument of the model's forward that takes token ids; default "input_ids" if there
            is one, else its first.
        context: Longest input in tokens; default the size of the table of positions, if any.
        vocabulary: Token ids are below it; default the size of the table of tokens.

    Example:
        >>> Layout(layers="transformer_blocks", attention="attention").projection is None
        True
    """

    layers: str
    attention: str
    projection: str | None = None
    ids: str | None = None
    context: int | None = None
    vocabulary: int | None = None


def placed(layout: Layout, module: nn.Module) -> Mapping[nn.Module, tuple[int, nn.Module | None]]:
    """The attention modules that a layout names.

    Returns:
        For each its absolute layer, and its output projection if the layout names it.

    Raises:
        InputError: A path leads nowhere; the message names what is there.
    """
    blocks = list(_at(module, layout.layers, "layers").children())
    if not blocks:
        raise InputError(
            f"Layout(layers={layout.layers!r}) is a module without any inside. Name the list of "
            "blocks."
        )
    paths = [{name for name, _ in block.named_modules()} for block in blocks]
    found: dict[nn.Module, tuple[int, nn.Module | None]] = {}
    for layer, block in enumerate(blocks):
        if any(layout.attention in names for names in paths) and (
            layout.attention not in paths[layer]
        ):
            continue  # other kinds of layers stand between those with attention
        attention = _at(block, layout.attention, "attention")
        projection = None
        if layout.projection is not None:
            projection = _at(attention, layout.projection, "projection")
        found[attention] = layer, projection
    return found


def _at(module: nn.Module, path: str, field: str) -> nn.Module:
    for part in path.split(".") if path else ():
        children = dict(module.named_children())
        if part not in children:
            there = ", ".join(f"{name} ({type(m).__name__})" for name, m in children.items())
            raise InputError(
                f"Layout({field}={path!r}): {type(module).__name__} has no module {part!r}. "
                f"It has {there or 'none'}. Name one of these."
            )
        module = children[part]
    return module
