"""Read attention in any Hugging Face model, into labelled stores.

`load` a model, choose `problems`, `capture` them into a store, `open` it, measure it with recipes.
Nothing heavy is imported before it is used: reading a store never needs torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

from probe import demos
from probe.errors import InputError, ProbeError, StoreError, UnsupportedModelError, WiringError
from probe.problems import Problem, Problems, problems

if TYPE_CHECKING:
    from probe import latent
    from probe.attention import AttentionCall
    from probe.capturing import capture
    from probe.interventions import Bias, Edit, Intervention
    from probe.layout import Layout
    from probe.loading import load
    from probe.model import Model
    from probe.planning import plan
    from probe.plans import Plan
    from probe.schema import valid
    from probe.store import open
    from probe.verifying import verify
    from probe.views import shards, trimmed

__version__ = "0.1.0"

_HOME = {
    "AttentionCall": "attention",
    "Bias": "interventions",
    "Edit": "interventions",
    "Intervention": "interventions",
    "Layout": "layout",
    "Model": "model",
    "Plan": "plans",
    "capture": "capturing",
    "latent": "latent",
    "load": "loading",
    "open": "store",
    "plan": "planning",
    "shards": "views",
    "trimmed": "views",
    "valid": "schema",
    "verify": "verifying",
}

__all__ = [
    "AttentionCall",
    "Bias",
    "Edit",
    "InputError",
    "Intervention",
    "Layout",
    "Model",
    "Plan",
    "ProbeError",
    "Problem",
    "Problems",
    "StoreError",
    "UnsupportedModelError",
    "WiringError",
    "capture",
    "demos",
    "latent",
    "load",
    "open",
    "plan",
    "problems",
    "shards",
    "trimmed",
    "valid",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'probe' has no attribute {name!r}")
    try:
        home = importlib.import_module(f"probe.{_HOME[name]}")
    except ImportError as error:
        raise ImportError(
            f"probe.{name} needs {error.name}, which cannot be imported here ({error}). Stores can "
            "be read and measured without torch; to run models: pip install attn-probe"
        ) from error
    value = home if name == _HOME[name] else getattr(home, name)
    globals()[name] = value
    return value
