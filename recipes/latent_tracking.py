"""A study in Weights & Biases, if it is installed; WANDB_MODE=offline keeps it on this machine."""

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from probe.errors import InputError
from recipes import latent
from recipes.latent_export import statistics

if TYPE_CHECKING:
    from recipes.latent_study import Studied


TAGS = ["attention-flow"]


def require() -> Any:
    """The package wandb.

    Raises:
        InputError: It is not installed.
    """
    try:
        return importlib.import_module("wandb")
    except ImportError as error:
        raise InputError(
            "logging needs the package wandb, which is not installed. Install it with: "
            "pip install attn-probe[wandb]"
        ) from error


def log(project: str, found: Mapping[str, "Studied"], out: Path) -> None:
    """Log each model of a study as a run: attention problem by problem, results, figures.

    What is logged is document 002's: problems_processed, mean_attention and max_attention of each
    problem's block; top_flow_score, n_critical_heads (composite above .7), hub_position; and beside
    them the calibrated findings. Arrays are not uploaded.

    Args:
        project: Name of the project.
        found: By name, what `recipes.latent_study.run` returned.
        out: The study's folder, with its figures.

    Raises:
        InputError: wandb is not installed.
    """
    wandb = require()
    for name, one in found.items():
        analysis = one.analysis
        stats = statistics(analysis)
        config = {
            "model": analysis.name,
            "n_problems": stats["n_problems"],
            "layers": analysis.store.sizes["layer"],
            "heads": analysis.store.sizes["head"],
            "problems": analysis.store.attrs["problems"],
        }
        run = wandb.init(project=project, name=name, config=config, tags=TAGS, dir=str(out))
        done = 0
        for block in latent.blocks(analysis.store):
            for each in block:
                done += 1
                numbers = {"mean_attention": float(each.mean()), "max_attention": float(each.max())}
                run.log({"problems_processed": done, **numbers})
        published = analysis.published
        best = int(published["composite"].values.argmax())
        run.log(
            {
                "top_flow_score": float(published["flow"].max()),
                "n_critical_heads": int((published["composite"] > 0.7).sum()),
                "hub_position": int(published["hub_position"].values.flat[best]),
                "calibrated_findings": int(analysis.findings["found"].sum()),
                "calibrated_findings_of_noise": int(analysis.noise.findings["found"].sum()),
            }
        )
        for picture in sorted((out / "figures" / name).glob("*.png")):
            run.log({picture.stem: wandb.Image(str(picture))})
        run.finish()
