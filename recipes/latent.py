"""How a latent reasoner looks at its latents: document 002's scores, calibrated ones, knock-outs.

All but `knockout` read stores that `probe.latent.capture` writes. Scores of single blocks are in
`recipes.flow`.

    >>> mean = aggregate(noise(problems=50, layers=2, heads=4))
    >>> sum(one.passed for one in criteria(mean, published(mean))) >= 4  # of 6, on pure noise
    True
"""

from typing import TYPE_CHECKING, Any

from recipes.latent_blocks import block, blocks, noise
from recipes.latent_criteria import Criterion, criteria
from recipes.latent_findings import best, findings, kind
from recipes.latent_reading import masses, readout, top_tokens
from recipes.latent_scores import aggregate, published, scores

if TYPE_CHECKING:
    from recipes.latent_knockout import knockout

__all__ = [
    "Criterion",
    "aggregate",
    "best",
    "block",
    "blocks",
    "criteria",
    "findings",
    "kind",
    "knockout",
    "masses",
    "noise",
    "published",
    "readout",
    "scores",
    "top_tokens",
]


def __getattr__(name: str) -> Any:
    """The experiment, which runs models, is imported when it is first asked for."""
    if name != "knockout":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from recipes.latent_knockout import knockout

    return knockout
