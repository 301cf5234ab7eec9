"""A trainer's run as a [`RunRecord`], and the files that lie beside its saved model and are pushed with it."""

import json
import os
from dataclasses import MISSING, fields
from enum import Enum
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from transformers.utils import logging

from hf_sgdr._utils.files import RUN_PICTURE
from hf_sgdr._utils.store import replace_file
from hf_sgdr.data.labels import MULTI_LABEL
from hf_sgdr.hub.card import save_plot, write_model_card
from hf_sgdr.hub.card_facts import CardFacts
from hf_sgdr.hub.recipe_file import RECIPE_FILE, write_recipe
from hf_sgdr.hub.record import Interpretation, RunRecord
from hf_sgdr.inference.interpretation import ClassifierInterpretation
from hf_sgdr.inference.multi_label import MultiLabelInterpretation
from hf_sgdr.optim.rates import varies
from hf_sgdr.recipe import NO_EFFECT_ON_RESULT, SAID_BY_STAGES
from hf_sgdr.training.arguments import SGDRTrainingArguments
from hf_sgdr.training.loop import trains_in_bfloat16

logger = logging.get_logger(__name__)


def run_record(trainer: Any, interpretation: Interpretation | None = None) -> RunRecord:
    """What there is to tell of a trainer's last [`run_stages`], or else of its own fits.

    Args:
        trainer ([`SGDRTrainer`]): with training images.
        interpretation (`Interpretation`, *optional*): of the validation images, for a card.
    """
    args = trainer.args
    settings, changed = _settings(args)
    return RunRecord(
        folder=Path(args.output_dir),
        config=trainer.model.config,
        name_or_path=trainer.model.name_or_path,
        model_id=trainer.hub_model_id or args.hub_model_id,
        layer_groups=tuple(trainer.layer_groups.names),
        stages=trainer.history.recipe(),
        results=trainer.history.results(args.world_size),
        is_recipe=trainer.history.run is not None,
        settings={**settings, "feature_dtype": trainer.features.dtype},  # what "auto" means depends on the machine
        changed=changed,
        train_transform=trainer.train_transform,
        eval_transform=trainer.eval_transform,
        training_counts=trainer.classes.training_counts if interpretation is not None else (),
        interpretation=interpretation,
        device=args.device,
    )


def interpret(trainer: Any) -> Interpretation:
    """The interpretation that suits a trainer's model: by its configuration, images have one label or several."""
    if trainer.model.config.problem_type == MULTI_LABEL:
        return MultiLabelInterpretation.from_trainer(trainer)
    return ClassifierInterpretation.from_trainer(trainer)


def write_card(trainer: Any, facts: CardFacts) -> None:
    """Write the card of what a trainer did, with metrics of the weights that it has now.

    Under several processes all of them call it: all predict, and the main one writes.

    Raises:
        ValueError: if the trainer has no single set of validation images.
    """
    record = run_record(trainer, interpret(trainer))
    if trainer.is_world_process_zero():
        if not record.is_recipe:
            _plot_own_fits(trainer)
        write_model_card(record, facts)


def write_run_files(trainer: Any, facts: CardFacts | None = None) -> None:
    """Write what is missing, or older than the last training, into a trainer's `output_dir`: results, recipe, card.

    A recipe writes all of it itself; this is for whoever calls `fit`, `run_stages` and `push_to_hub` by hand. Under
    several processes all of them call it, and the main one writes.

    Args:
        trainer ([`SGDRTrainer`]): its model is saved.
        facts ([`CardFacts`], *optional*): if given, the card is written anew.
    """
    folder = Path(trainer.args.output_dir)
    record = run_record(trainer)
    if trainer.is_world_process_zero() and record.results.stages:
        if _is_old(folder / "results.json", trainer):
            replace_file(folder / "results.json", (json.dumps(record.results.to_dict(), indent=2) + "\n").encode())
        if _is_old(folder / RECIPE_FILE, trainer):
            write_recipe(record)
    wanted = [facts is not None or _is_old(folder / "README.md", trainer)]
    if trainer.args.world_size > 1:
        broadcast_object_list(wanted)
    if wanted[0] and (trainer.eval_dataset is None or isinstance(trainer.eval_dataset, dict)):
        logger.warning("The trainer has no single eval_dataset to measure a card's metrics on: pushing without a card.")
        if trainer.is_world_process_zero():
            (folder / "README.md").unlink(missing_ok=True)  # of an earlier model
    elif wanted[0]:
        write_card(trainer, facts or CardFacts())


def _plot_own_fits(trainer: Any) -> None:
    """Plots of the run, its range tests and the last fit's rates, in `output_dir`; an earlier run's are removed."""
    fits, range_tests = trainer.history.fits, trainer.history.range_tests
    for fit in fits:
        name, folder = fit["name"], Path(trainer.args.output_dir)
        range_test, rates = folder / f"{name}-range-test.png", folder / f"{name}-learning-rate.png"
        for path in (range_test, rates):
            path.unlink(missing_ok=True)
        if name in range_tests:
            save_plot(range_tests[name].plot(chosen=fit["learning_rates"][-1]), range_test)
        if fit is fits[-1] and varies(trainer.learning_rates()):
            save_plot(trainer.plot_lr(), rates)
    if trainer.history.curves:
        trainer.history.plot().savefig(Path(trainer.args.output_dir, RUN_PICTURE))


def _settings(args: SGDRTrainingArguments) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The arguments that decide the result, in plain values, and which of them differ from their defaults.

    What the stages say is left out, and what names a folder of this machine.
    """
    settings, changed = {"bf16": trains_in_bfloat16(args)}, []
    for item in fields(args):
        value = getattr(args, item.name)
        value = value.value if isinstance(value, Enum) else value
        if item.name == "class_weights" and isinstance(value, dict):
            value = json.dumps(value)
        items = value if isinstance(value, list) else [value]
        is_plain = all(isinstance(one, bool | int | float | str) for one in items)
        is_local = isinstance(value, str) and os.path.isabs(value)
        if is_plain and not is_local and item.name not in SAID_BY_STAGES and not NO_EFFECT_ON_RESULT.match(item.name):
            settings[item.name] = value
            default = item.default_factory() if item.default_factory is not MISSING else item.default
            # what transformers makes of a None that nobody gave
            is_theirs = item.name not in SGDRTrainingArguments.__annotations__
            is_unset = is_theirs and (value is False or value == []) and not default
            if value != default and not is_unset:
                changed.append(item.name)
    return settings, tuple(changed)


def _is_old(file: Path, trainer: Any) -> bool:
    """Whether a file is missing or was written before the trainer trained."""
    return not file.exists() or file.stat().st_mtime < trainer.history.trained_at
