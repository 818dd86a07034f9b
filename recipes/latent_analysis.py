"""All numbers of a study of one store: document 002's, the calibrated ones, and noise beside."""

from dataclasses import dataclass, replace
from functools import cached_property

import xarray as xr

from recipes import latent
from recipes.latent_blocks import latents
from recipes.latent_criteria import Criterion

NOISE = 500  # problems at most: more of them need much memory, and change little


@dataclass(frozen=True, eq=False)
class Analysis:
    """What is found in a latent store; each table is computed when it is first asked for.

    Attributes:
        store: The store itself, lazy.
        top: Rank up to which a head counts as one of the best.
        draws: Of the bootstrap over problems.
        level: Of the intervals.
        seed: Of the draws and of the noise.
    """

    store: xr.Dataset
    top: int
    draws: int
    level: float
    seed: int

    @property
    def name(self) -> str:
        """The model's."""
        return str(self.store.attrs["model"])

    @cached_property
    def aggregated(self) -> xr.Dataset:
        """See `recipes.latent.aggregate`."""
        return latent.aggregate(self.store)

    @cached_property
    def published(self) -> xr.Dataset:
        """Document 002's scores of the mean block: see `recipes.latent.published`."""
        return latent.published(self.aggregated)

    @cached_property
    def shifted(self) -> xr.Dataset:
        """The same scores of the original's reading, one row and column off."""
        return latent.published(latent.aggregate(self.store, convention="published"))

    @cached_property
    def findings(self) -> xr.Dataset:
        """The calibrated scores: see `recipes.latent.findings`."""
        options = {"top": self.top, "draws": self.draws, "seed": self.seed}
        return latent.findings(latent.scores(self.store), level=self.level, **options)

    @cached_property
    def criteria(self) -> list[Criterion]:
        """Document 002's criteria of success."""
        return latent.criteria(self.aggregated, self.published)

    @cached_property
    def noise(self) -> "Analysis":
        """The same of a store of pure noise of the same size, but for at most 500 problems.

        Fewer make chance findings likelier, not rarer.
        """
        store = latent.noise(
            problems=min(int(self.aggregated.attrs["n"]), NOISE),
            layers=self.store.sizes["layer"],
            heads=self.store.sizes["head"],
            n_latents=self.aggregated.sizes["key"],
            seed=self.seed,
        )
        return replace(self, store=store)


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
        InputError: It is no latent store; once asked, that it has too few finished problems.
    """
    latents(ds)
    return Analysis(ds, top, draws, level, seed)
