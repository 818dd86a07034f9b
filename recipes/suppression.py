"""Suppress what tokens are looked at: scaled attention, knocked-out edges, steering, masks.

Every class here is an intervention: `model.intervene(...)`, `probe.capture(interventions=[...])`
and the experiments below take them. Scaling the attention to a key by `a` and renormalising the row
is adding ln a to its score, which is fused into the mask of the model's own kernel.

    >>> with model.intervene(Suppress(keys="text:b", factor=0.1)):
    ...     logits = model("abcabc").logits
"""

from recipes._suppress import Knockout, Mode, Steer, Suppress, from_attributes, window
from recipes.custom_mask import Mask
from recipes.doses import dose_response, knockout_by_layer
from recipes.effects import effect
from recipes.relevance import relevance

__all__ = [
    "Knockout",
    "Mask",
    "Mode",
    "Steer",
    "Suppress",
    "dose_response",
    "effect",
    "from_attributes",
    "knockout_by_layer",
    "relevance",
    "window",
]
