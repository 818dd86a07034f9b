"""Hooks as in TransformerLens: functions on named activations, forward and backward.

Names are `blocks.{i}.attn.hook_pattern`, `hook_attn_scores`, `hook_z`, `hook_q`, `hook_k` and
`hook_v`. Here q and k are what the kernel is given, after rotary embedding and norms (so
`hook_rot_q` and `hook_rot_k` name the same), k and v have key heads and all cached keys.
"""

import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor

from probe import selection
from probe.attention import AttentionCall
from probe.errors import InputError
from probe.interventions import SITES, Change, Site, require_function
from probe.selection import Selector

_HOOKS: Mapping[Site, str] = {site: f"hook_{site}" for site in SITES} | {
    "scores": "hook_attn_scores"
}
_SITES: Mapping[str, Site] = (
    {hook: site for site, hook in _HOOKS.items()}
    | {site: site for site in SITES}
    | {"attn_scores": "scores", "hook_rot_q": "q", "hook_rot_k": "k", "rot_q": "q", "rot_k": "k"}
)
_NAME = re.compile(r"blocks\.(-?[0-9]+)\.attn\.(\w+)")


@dataclass(frozen=True, slots=True)
class Hook:
    """Where a hook function is called: its second argument.

    Attributes:
        name: As `blocks.3.attn.hook_pattern`.
        site: "q", "k", "v", "scores", "pattern" or "z".
        ctx: A dict of your own, kept between the calls of one `with model.hooks(...)`.
    """

    name: str
    site: Site
    number: int
    ctx: dict[str, Any] = field(default_factory=dict, compare=False)

    def layer(self) -> int:
        """The absolute layer."""
        return self.number


HookFunction = Callable[..., Tensor | None]
Name = str | tuple[str, Selector] | re.Pattern[str] | Callable[[str], bool] | Sequence[str]


def full_name(site: Site, layer: int) -> str:
    """The TransformerLens name of a site.

    Example:
        >>> full_name("scores", 3)
        'blocks.3.attn.hook_attn_scores'
    """
    return f"blocks.{layer}.attn.{_HOOKS[site]}"


def resolve(name: Name, layers: Sequence[int]) -> list[tuple[Site, int]]:
    """The sites that a name stands for.

    Args:
        name: A name (layers may be negative), a tuple (site, layers) such as ("pattern", -1) or
            ("z", [0, 2]) or ("scores", None) for all, perhaps with "attn" behind, a compiled
            regular expression that is searched in every name, a function of a name that says
            whether to take it, or a list of names.
        layers: Absolute layers that have attention.

    Returns:
        (site, absolute layer), in the order in which a model runs them.

    Raises:
        InputError: It names nothing.

    Example:
        >>> resolve(("pattern", -1), (0, 1)), resolve(lambda name: name.endswith("z"), (0, 1))
        ([('pattern', 1)], [('z', 0), ('z', 1)])
    """
    known = [(site, layer) for layer in layers for site in SITES]
    if isinstance(name, tuple) and name[2:] == ("attn",):  # TransformerLens' long form
        name = name[:2]
    if isinstance(name, str):
        found = [_one(name, layers)]
    elif isinstance(name, tuple) and len(name) == 2 and str(name[0]) in _SITES:
        some = layers if name[1] is None else selection.axis(name[1], max(layers) + 1, "layers")
        found = [(_SITES[str(name[0])], layer) for layer in some]
    elif isinstance(name, re.Pattern):
        found = [place for place in known if name.search(full_name(*place))]
    elif callable(name):
        found = [place for place in known if name(full_name(*place))]
    elif isinstance(name, list | tuple) and all(isinstance(part, str) for part in name):
        found = [_one(part, layers) for part in name]
    else:
        raise InputError(f"{name!r:.60} names no activation. {_advice(layers)}")
    for _, layer in found:
        if layer not in layers:
            raise InputError(
                f"layer {layer} has no attention. There is attention in layers "
                f"{', '.join(map(str, layers))}."
            )
    if not found:
        raise InputError(f"{name!r:.60} matches no name. {_advice(layers)}")
    return [place for place in known if place in found]


@dataclass(frozen=True)
class Hooks:
    """Hook functions as an intervention.

    Attributes:
        forward: (place, function) in the order in which they act.
        backward: Likewise; they get gradients.
    """

    forward: Sequence[tuple[Hook, HookFunction]]
    backward: Sequence[tuple[Hook, HookFunction]]

    def edits(self, call: AttentionCall) -> Iterator[Change]:
        """The functions of a call's layer."""
        for hook, function in self.forward:
            if hook.number == call.layer:
                yield Change(hook.site, partial(_call, function, hook), f"the hook on {hook.name}")
        for hook, function in reversed(self.backward):  # gradients come from behind
            if hook.number == call.layer:
                yield Change(hook.site, partial(_listen, function, hook), hook.name)


def hooks(
    forward: Iterable[tuple[Name, HookFunction]],
    backward: Iterable[tuple[Name, HookFunction]],
    layers: Sequence[int],
) -> Hooks:
    """Hook functions with their names resolved: see `resolve`."""
    places: dict[tuple[Site, int], Hook] = {}

    def placed(pairs: Iterable[tuple[Name, HookFunction]]) -> Iterator[tuple[Hook, HookFunction]]:
        if not isinstance(pairs, Iterable):
            raise InputError(f"{pairs!r:.60} is no list of hooks. Give pairs (name, function).")
        for pair in pairs:
            if not isinstance(pair, tuple | list) or len(pair) != 2 or not callable(pair[1]):
                raise InputError(f"{pair!r:.60} is not a hook. Give pairs (name, function).")
            named = {"hook": None} if _by_name(pair[1]) else {}
            require_function(pair[1], "(tensor, hook)", *[None] * (2 - len(named)), **named)
            for site, layer in resolve(pair[0], layers):
                hook = Hook(full_name(site, layer), site, layer)
                yield places.setdefault((site, layer), hook), pair[1]

    return Hooks(tuple(placed(forward)), tuple(placed(backward)))


def _one(name: str, layers: Sequence[int]) -> tuple[Site, int]:
    match = _NAME.fullmatch(name)
    if match is None or match[2] not in _SITES:
        raise InputError(f"{name!r} names no activation. {_advice(layers)}")
    return _SITES[match[2]], selection.axis(int(match[1]), max(layers) + 1, "layers")[0]


def _advice(layers: Sequence[int]) -> str:
    names = ", ".join(full_name(site, layers[0]) for site in SITES)
    return (
        f"Names are {names}; or tuples such as ('pattern', {layers[-1]}), regular expressions "
        "(re.compile) and functions of a name. For other modules use model.envoy.trace."
    )


def _by_name(function: Callable[..., Any]) -> bool:
    """Whether a function has an argument `hook`.

    TransformerLens gives the hook by that name, so that others may come before it in a partial.
    """
    try:
        argument = inspect.signature(function).parameters.get("hook")
    except (TypeError, ValueError):
        return False
    return argument is not None and argument.kind is not argument.POSITIONAL_ONLY


def _call(function: Callable[..., Any], hook: Hook, value: Tensor) -> Any:
    return function(value, hook=hook) if _by_name(function) else function(value, hook)


def _listen(function: HookFunction, hook: Hook, value: Tensor) -> Tensor:
    """The value on the model's own path, its gradient heard."""
    if not value.requires_grad:
        raise InputError(
            f"{hook.name} has no gradient, so a backward hook would never be called. Run the model "
            "outside torch.no_grad(), with parameters that require gradients below this layer."
        )
    value = value.view_as(value)  # another tensor: it counts as edited, so the output follows it

    def listen(grad: Tensor) -> Tensor | None:
        new = _call(function, hook, grad)
        if new is None or (isinstance(new, Tensor) and new.shape == grad.shape):
            return new
        found = tuple(new.shape) if isinstance(new, Tensor) else type(new).__name__
        raise InputError(
            f"the backward hook on {hook.name} returned {found}. Return a tensor of shape "
            f"{tuple(grad.shape)}, or None to leave it."
        )

    value.register_hook(listen)  # type: ignore[no-untyped-call]
    return value
