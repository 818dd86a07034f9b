"""Ablate heads: put something else in place of what they return, or of what they look at.

A head's output is z, what goes *into* the output projection: a slice of what comes out of it is no
head's, and cannot be named here. Of grouped-query attention, query heads are ablated.

    >>> with model.intervene(Ablate([(1, 0), (1, 3)])):
    ...     logits = model("abcabc").logits
"""

from probe.mlps import without as without_mlps
from recipes._ablate import Ablate, Mode
from recipes.effects import effect
from recipes.gradients import finite_difference, importance, pruning_score
from recipes.groups import cumulative, greedy
from recipes.patching import Patch
from recipes.references import Reference, reference
from recipes.sweeps import sweep

__all__ = [
    "Ablate",
    "Mode",
    "Patch",
    "Reference",
    "cumulative",
    "effect",
    "finite_difference",
    "greedy",
    "importance",
    "pruning_score",
    "reference",
    "sweep",
    "without_mlps",
]
