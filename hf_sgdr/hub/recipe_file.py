"""`recipe.yaml`: the exact configuration of a run, to run again and to share, without a place of this machine in it."""

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, fields
from enum import Enum
from pathlib import Path
from typing import Any

import yaml
from transformers import TrainingArguments

from hf_sgdr._utils.store import replace_file
from hf_sgdr.hub.record import TrainedRun
from hf_sgdr.recipe import NO_EFFECT_ON_RESULT, SAID_BY_STAGES, Stage
from hf_sgdr.version import __version__

RECIPE_FILE = "recipe.yaml"


def write_recipe(
    trainer: TrainedRun,
    stages: Sequence[Stage],
    *,
    model: Mapping[str, Any] | None = None,
    data: Mapping[str, Any] | None = None,
    more: dict[str, Any] | None = None,
) -> Path:
    """Write `recipe.yaml` into the trainer's `output_dir`; `recipes/train.py recipe.yaml --data_dir FOLDER` runs it.

    Args:
        trainer ([`TrainedRun`]): of the run.
        stages (sequence of [`Stage`]): what it was told to do.
        model (mapping, *optional*): the recipe's arguments of what it was made from; by default what the trainer's
            model says.
        data (mapping, *optional*): its arguments of where the images came from; a local folder is left out.
        more (`dict`, *optional*): further arguments of the recipe, in plain values.

    Returns:
        `Path`: the file.
    """
    notes: list[str] = []
    values: dict[str, Any] = {}
    if data is not None and data["dataset_name"] is not None:
        values |= _of_dataset(data)
    elif data is not None:
        names = ("validation_fraction", "on_error", "max_train_samples", "max_eval_samples")
        values |= {name: data[name] for name in names if data[name] is not None}
    values |= _of_model(model or _model_of(trainer), trainer, notes)
    values |= _of_training(trainer.args)
    values |= more or {}
    values["stages"] = [_of_stage(stage) for stage in stages]
    if trainer.args.world_size > 1:
        notes.append(f"It ran in {trainer.args.world_size} processes.")
    asked = "" if "dataset_name" in values else " --data_dir FOLDER"
    head = [
        f"The configuration of a run, written by hf_sgdr {__version__}. The same again, on the same images:",
        f"    accelerate launch recipes/train.py {RECIPE_FILE}{asked} --output_dir again",
        *notes,
    ]
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=120, default_flow_style=None)
    path = Path(trainer.args.output_dir, RECIPE_FILE)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, ("".join(f"# {line}\n" for line in head) + text).encode())
    return path


def _of_dataset(data: Mapping[str, Any]) -> dict[str, Any]:
    name = str(data["dataset_name"])
    given = {**data, "data_dir": None, "dataset_name": Path(name).name if Path(name).exists() else name}
    return {key: value for key, value in given.items() if value is not None}


def _of_model(model: Mapping[str, Any], trainer: TrainedRun, notes: list[str]) -> dict[str, Any]:
    """A place of this machine is named by its last part, with a note, so that a run without it stops and says so."""
    values = {
        **model,
        "image_size": trainer.eval_transform.spec.size,
        "augment": trainer.train_transform.augment or "none",
        "max_zoom": trainer.train_transform.max_zoom,
    }
    for name in ("model_name_or_path", "weights_file"):
        value = values[name]
        if value is not None and os.path.exists(value):
            place = Path(value).resolve()
            values[name] = place.name
            digest = f", SHA-256 {hashlib.sha256(place.read_bytes()).hexdigest()}" if place.is_file() else ""
            flag = "--model" if name == "model_name_or_path" else f"--{name}"
            notes.append(f"{name} was local{digest}: give {flag}.")
    return {name: value for name, value in values.items() if value is not None}


def _model_of(trainer: TrainedRun) -> dict[str, Any]:
    config = trainer.model.config
    name = trainer.model.name_or_path or getattr(config, "architecture", None) or config.model_type
    return {"model_name_or_path": name, "weights_file": None, "pretrained": True}


def _of_training(training: TrainingArguments) -> dict[str, Any]:
    """The seed and the batch, and all that was given another value than its default."""
    values: dict[str, Any] = {
        "seed": training.seed,
        "per_device_train_batch_size": training.per_device_train_batch_size,
    }
    for item in fields(training):
        value = getattr(training, item.name)
        value = value.value if isinstance(value, Enum) else value
        default = item.default_factory() if item.default_factory is not MISSING else item.default
        plain = isinstance(value, bool | int | float | str) or (
            isinstance(value, list) and all(isinstance(one, int | float | str) for one in value)
        )
        is_local = isinstance(value, str) and os.path.isabs(value)
        is_default = value == default or ((value is False or value == []) and not default)
        if item.name in SAID_BY_STAGES or NO_EFFECT_ON_RESULT.match(item.name) or is_default or is_local or not plain:
            continue
        values[item.name] = value
    return values


def _of_stage(stage: Stage) -> dict[str, Any]:
    """What differs from a stage's defaults."""
    values = asdict(stage)
    return {
        item.name: values[item.name]
        for item in fields(stage)
        if item.default is MISSING or values[item.name] != item.default
    }
