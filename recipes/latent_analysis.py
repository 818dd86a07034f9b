"""All numbers of a study of one store: document 002's, the calibrated ones, and noise beside."""

from functools import partial
from typing import NamedTuple

import xarray as xr

from recipes import latent
from recipes.latent_criteria import Criterion

NOISE = 500  # problems at most: more of them need much memory, and change little


class Analysis(NamedTuple):
    """What is found in a latent store.

    Attributes:
        store: The store itself, lazy.
        aggregated: See `recipes.latent.aggregate`.
        published: Document 002's scores of the mean block: see `recipes.latent.published`.
        shifted: The same scores of the original's reading, one row and column off.
        findings: The calibrated scores: see `recipes.latent.findings`.
        criteria: Document 002's criteria of success.
        noise: The same criteria, and `findings`, of a store of pure noise of the same size, but for
            at most 500 problems: fewer make chance findings likelier, not rarer.
    """

    store: xr.Dataset
    aggregated: xr.Dataset
    published: xr.Dataset
    shifted: xr.Dataset
    findings: xr.Dataset
    criteria: list[Criterion]
    noise: tuple[list[Criterion], xr.Dataset]

    @property
    def name(self) -> str:
        """The model's."""
        return str(self.store.attrs["model"])


def analyse(
    ds: xr.Dataset, *, top: int = 10, draws: int = 2000, level: float = 0.95, seed: int = 0
) -> Analysis:
    """Measure a latent store: see `Analysis`.

    Args:
        ds: An opened latent store.
        top: Rank up to which a head counts as one of the best.
        draws: Of the bootstrap over problems.
        level: Of the intervals.
        seed: Of the draws and of the noise.

    Raises:
        InputError: It is no latent store, or has too few finished problems.
    """
    aggregated = latent.aggregate(ds)
    published = latent.published(aggregated)
    found = partial(latent.findings, top=top, draws=draws, level=level, seed=seed)
    noise = latent.noise(
        problems=min(int(aggregated.attrs["n"]), NOISE),
        layers=ds.sizes["layer"],
        heads=ds.sizes["head"],
        n_latents=aggregated.sizes["key"],
        seed=seed,
    )
    of_noise = latent.aggregate(noise)
    return Analysis(
        store=ds,
        aggregated=aggregated,
        published=published,
        shifted=latent.published(latent.aggregate(ds, convention="published")),
        findings=found(latent.scores(ds)),
        criteria=latent.criteria(aggregated, published),
        noise=(
            latent.criteria(of_noise, latent.published(of_noise)),
            found(latent.scores(noise)),
        ),
    )
