"""What lies beside a saved model and is pushed with it: figures, configuration and card of a trainer's own fits.

A recipe writes all of it itself; this is for whoever calls `fit`, `run_stages` and `push_to_hub` by hand.
"""

import json
import re
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from transformers.utils import logging

from hf_sgdr._utils.store import replace_file
from hf_sgdr.hub.recipe_file import RECIPE_FILE, write_recipe
from hf_sgdr.hub.record import TrainedRun
from hf_sgdr.recipe import RunResults, Stage

logger = logging.get_logger(__name__)


def write_run_files(trainer: TrainedRun, card_facts: dict[str, Any]) -> None:
    """Write what is missing, or older than the last training, into the trainer's `output_dir`.

    Under several processes all of them call it, and the main one writes.

    Args:
        trainer ([`TrainedRun`]): its model is saved.
        card_facts (`dict`): for [`~hf_sgdr.hub.card.write_model_card`]; if there are any, the card is written anew.
    """
    folder = Path(trainer.args.output_dir)
    stages, results = trainer.history.recipe(), trainer.history.results(trainer.args.world_size)
    if trainer.is_world_process_zero() and results.stages:
        if _is_old(folder / "results.json", trainer):
            replace_file(folder / "results.json", (json.dumps(results.to_dict(), indent=2) + "\n").encode())
        if _is_old(folder / RECIPE_FILE, trainer):
            write_recipe(trainer, stages)
    wanted = [bool(card_facts) or _is_old(folder / "README.md", trainer)]
    if trainer.args.world_size > 1:
        broadcast_object_list(wanted)
    if wanted[0] and (trainer.eval_dataset is None or isinstance(trainer.eval_dataset, dict)):
        logger.warning("The trainer has no single eval_dataset to measure a card's figures on: pushing without a card.")
        if trainer.is_world_process_zero():
            (folder / "README.md").unlink(missing_ok=True)  # of an earlier model
    elif wanted[0]:
        trainer.create_model_card(**({"results": trainer.history.run[1]} if trainer.history.run else {}), **card_facts)


def of_fits(trainer: TrainedRun) -> tuple[list[Stage], RunResults]:
    """A trainer's fits as stages of a recipe, and as its results; the weights are those that the last one left."""
    stages: list[Stage] = []
    for figures, told in zip(trainer.fits, trainer.fit_stages, strict=True):
        name = re.sub(r"[^a-z0-9_-]+", "-", figures["name"].lower())
        taken = sum(re.fullmatch(rf"{name}(-again-\d+)?", stage.name) is not None for stage in stages)
        stages.append(Stage(name=f"{name}-again-{taken}" if taken else name, **told))
    results = RunResults(trainer.args.world_size, list(trainer.fits))
    if trainer.fits:
        results.best = {"stage": trainer.fits[-1]["name"], **trainer.fits[-1]["kept"]}
    return stages, results


def _is_old(file: Path, trainer: TrainedRun) -> bool:
    """Whether a file is missing or was written before the trainer trained."""
    return not file.exists() or file.stat().st_mtime < trainer.history.trained_at
