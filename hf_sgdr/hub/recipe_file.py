"""`recipe.yaml`: the exact configuration of a run, to run again and to share, without a path of this machine in it."""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import yaml
from transformers.utils.hub import cached_file

from hf_sgdr._utils.store import replace_file
from hf_sgdr.hub.record import RunRecord
from hf_sgdr.recipe import Stage
from hf_sgdr.version import __version__

RECIPE_FILE = "recipe.yaml"


def train_command(processes: int) -> str:
    """The command that trains in so many processes."""
    return (
        "hf-sgdr train" if processes == 1 else f"accelerate launch --num_processes {processes} -m hf_sgdr.recipes.train"
    )


def read_recipe(model: str) -> dict[str, Any]:
    """The arguments that a saved or pushed model's `recipe.yaml` holds; none where there is no file, or no YAML in it.

    Args:
        model (`str`): a folder, or a model id of the Hub.
    """
    path = cached_file(
        model,
        RECIPE_FILE,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    if path is None:
        return {}
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):  # a person may have edited it
        return {}
    return content if isinstance(content, dict) else {}


def write_recipe(
    record: RunRecord,
    *,
    model: Mapping[str, Any] | None = None,
    data: Mapping[str, Any] | None = None,
    more: Mapping[str, Any] | None = None,
) -> Path:
    """Write `recipe.yaml` into a run's folder; `hf-sgdr train recipe.yaml FOLDER` runs it.

    Args:
        record ([`RunRecord`]): of the run; its predictions are not needed.
        model (mapping, *optional*): the recipe's arguments of what it was made from; defaults to what the model says.
        data (mapping, *optional*): its arguments of where the images came from; a local folder is left out.
        more (mapping, *optional*): further arguments of the recipe, in plain values.

    Returns:
        `Path`: the file.
    """
    notes: list[str] = []
    names = ("seed", "per_device_train_batch_size", *record.changed)
    values = {
        **_data_arguments(data or {}),
        **_model_arguments(model or {"model_name_or_path": record.name_or_path or record.architecture}, record, notes),
        **{name: record.settings[name] for name in names},
        **(more or {}),
        "stages": [_changed(stage) for stage in record.stages],
    }
    images = "FOLDER --labels_file TABLE" if (data or {}).get("labels_file") else "FOLDER"
    data_dir = "" if "dataset_name" in values else f" {images}"
    head = [
        f"The configuration of a run, written by hf_sgdr {__version__}. The same again, on the same images:",
        f"    {train_command(record.results.world_size)} {RECIPE_FILE}{data_dir} --output_dir again",
        *notes,
    ]
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=120, default_flow_style=None)
    record.folder.mkdir(parents=True, exist_ok=True)
    path = record.folder / RECIPE_FILE
    replace_file(path, ("".join(f"# {line}\n" for line in head) + text).encode())
    return path


def _data_arguments(data: Mapping[str, Any]) -> dict[str, Any]:
    name = data.get("dataset_name")
    if name is not None:
        data = {**data, "data_dir": None, "dataset_name": Path(name).name if Path(name).exists() else str(name)}
    else:
        local = ("data_dir", "labels_file", "dataset_name", "streaming", "train_split_name", "validation_split_name")
        data = {key: value for key, value in data.items() if key not in local}
    return {key: value for key, value in data.items() if value is not None}


def _model_arguments(model: Mapping[str, Any], record: RunRecord, notes: list[str]) -> dict[str, Any]:
    """A path of this machine is named by its last part, with a note, so that a run without it stops and says so."""
    values = {
        "model_name_or_path": None,
        "weights_file": None,
        "pretrained": True,
        **model,
        "image_size": record.eval_transform.spec.size,
        "augment": record.train_transform.augment or "none",
        "max_zoom": record.train_transform.max_zoom,
    }
    for name, flag in (("model_name_or_path", "--model"), ("weights_file", "--weights_file")):
        if values[name] is not None and os.path.exists(values[name]):
            path = Path(values[name]).resolve()
            values[name] = f"./{path.name}" if path.is_dir() else path.name  # a bare name may be one of timm's
            digest = f", SHA-256 {hashlib.sha256(path.read_bytes()).hexdigest()}" if path.is_file() else ""
            notes.append(f"{name} was local{digest}: give {flag}.")
    return {name: value for name, value in values.items() if value is not None}


def _changed(stage: Stage) -> dict[str, Any]:
    """What differs from a stage's defaults."""
    values = {item.name: (getattr(stage, item.name), item.default) for item in fields(stage)}
    return {name: value for name, (value, default) in values.items() if default is MISSING or value != default}
