"""What the recipes share: arguments from flags or a YAML file, photos and trainer from them, errors in one line."""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from datasets import DatasetDict
from transformers import HfArgumentParser, set_seed

from hf_sgdr.clear_errors import nothing_left_on_failure
from hf_sgdr.data import load_image_dataset, load_image_folder
from hf_sgdr.modeling import create_image_classifier
from hf_sgdr.stages import LESSON, Stage
from hf_sgdr.trainer import SGDRTrainer
from hf_sgdr.training_args import SGDRTrainingArguments
from hf_sgdr.transforms import image_transforms

DEFAULT_MODEL = "timm/resnet34.a1_in1k"
_OUR_DEFAULTS = {"output_dir": "hf_sgdr_out", "save_strategy": "epoch", "save_total_limit": "2"}  # --resume needs them


@dataclass
class DataArguments:
    """Where the photos are."""

    data_dir: str | None = field(default=None, metadata={"help": "Folder of photos; without any data the demo runs."})
    dataset_name: str | None = field(default=None, metadata={"help": "A labelled image data set of the Hub, instead."})
    train_split_name: str = field(default="train", metadata={"help": "Of --dataset_name."})
    validation_split_name: str | None = field(default=None, metadata={"help": "Of --dataset_name."})
    validation_fraction: float = field(
        default=0.2, metadata={"help": "Share of each class split off where there are no validation photos."}
    )
    on_error: Literal["raise", "skip"] = field(
        default="raise",
        metadata={"help": "What photos that cannot be read do: raise (name them all and stop) or skip (leave out)."},
    )


@dataclass
class ModelArguments:
    """Which model, and which views of the photos it sees."""

    model_name_or_path: str = field(
        default=DEFAULT_MODEL,
        metadata={"help": "Model id of the Hub, folder, or bare timm name.", "aliases": ["--model"]},
    )
    weights_file: str | None = field(default=None, metadata={"help": "Local weights for a bare timm name."})
    pretrained: bool = field(default=True, metadata={"help": "Start from pretrained weights."})
    image_size: int | None = field(default=None, metadata={"help": "Side of the input, pixels; the model's own."})
    augment: str | None = field(default="side_on", metadata={"help": "none, basic, side_on or top_down."})
    max_zoom: float = field(default=1.1, metadata={"help": "Highest zoom of augmentation, at least 1."})


def parse(kinds: Sequence[Any], argv: Sequence[str], description: str, defaults: Path | None = None) -> tuple[Any, ...]:
    """Arguments from `[config.yaml] [--flag value ...]`; flags win over the file, the file over `defaults`.

    Args:
        kinds (sequence of dataclasses): what to fill.
        argv (sequence of `str`): the command line without the program's name.
        description (`str`): for `--help`.
        defaults (`Path`, *optional*): a YAML file that counts first.

    Raises:
        ValueError: for an unknown argument or a value that does not fit, in one line.
    """
    parser = _OneLineParser(list(kinds), description=description)
    read, words = _words_of_yaml(defaults) if defaults is not None else [], all_words(argv)
    known = {one.name for kind in kinds for one in dataclasses.fields(kind)}
    for name, value in _OUR_DEFAULTS.items():
        if name in known and f"--{name}" not in read:
            read += [f"--{name}", value]
    return tuple(parser.parse_args_into_dataclasses(read + words))


def all_words(argv: Sequence[str]) -> list[str]:
    """The words of a command line, those of a YAML file at its beginning in that file's place."""
    words = list(argv)
    if words and words[0].endswith((".yaml", ".yml")):
        return _words_of_yaml(Path(words[0])) + words[1:]
    return words


def load_photos(data: DataArguments, training: SGDRTrainingArguments) -> DatasetDict:
    """The photos that the arguments name.

    Raises:
        ValueError, FileNotFoundError: if there are none, or both sources are named.
    """
    if data.data_dir is not None and data.dataset_name is not None:
        raise ValueError("--data_dir and --dataset_name: give one of the two.")
    if data.data_dir is not None:
        return load_image_folder(
            data.data_dir, validation_fraction=data.validation_fraction, seed=training.seed, on_error=data.on_error
        )
    if data.dataset_name is None:
        raise ValueError("No photos: give --data_dir FOLDER or --dataset_name NAME.")
    photos = load_image_dataset(
        data.dataset_name,
        image_column_name=training.image_column_name,
        label_column_name=training.label_column_name,
        train_split_name=data.train_split_name,
        validation_split_name=data.validation_split_name,
        validation_fraction=data.validation_fraction,
        seed=training.seed,
        on_error=data.on_error,
    )
    training.image_column_name, training.label_column_name = "image", "label"
    return photos


def build_trainer(photos: DatasetDict, model_args: ModelArguments, training: SGDRTrainingArguments) -> SGDRTrainer:
    """The trainer that the arguments describe, everything seeded.

    Raises:
        ValueError, OSError: if the model or a transform cannot be made.
    """
    set_seed(training.seed)
    model = create_image_classifier(
        model_args.model_name_or_path,
        labels=photos["train"].features["label"].names,
        pretrained=model_args.pretrained,
        weights_file=model_args.weights_file,
    )
    augment: Any = None if model_args.augment in (None, "none") else model_args.augment
    train_transform, eval_transform = image_transforms(
        model, image_size=model_args.image_size, augment=augment, max_zoom=model_args.max_zoom
    )
    with nothing_left_on_failure(training.output_dir):
        return SGDRTrainer(
            model,
            training,
            train_dataset=photos["train"],
            eval_dataset=photos["validation"],
            train_transform=train_transform,
            eval_transform=eval_transform,
        )


def chosen_stages(words: Sequence[str] | None) -> tuple[Stage, ...]:
    """Stages of `--stages`: names of the lesson's, "lesson" for all of them, or JSON objects (as YAML files give).

    Raises:
        ValueError: if a name or a key is unknown.
    """
    known = {stage.name: stage for stage in LESSON}
    stages: list[Stage] = []
    for word in words or ["lesson"]:
        if word == "lesson":
            stages += LESSON
        elif word in known:
            stages.append(known[word])
        elif word.startswith("{"):
            stages.append(Stage.from_dict(json.loads(word)))
        else:
            raise ValueError(
                f"--stages {word}: give lesson, or any of {', '.join(known)}, or write stages in a YAML file."
            )
    return tuple(stages)


class _OneLineParser(HfArgumentParser):
    def error(self, message: str) -> Any:
        raise ValueError(f"{message} (--help lists all arguments)")


def _words_of_yaml(path: Path) -> list[str]:
    """A YAML file of arguments as the words of a command line."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file.")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not valid YAML ({' '.join(str(error).split())}).") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: give `argument: value` lines, not a {type(values).__name__}.")
    words: list[str] = []
    for name, value in values.items():
        items = value if isinstance(value, list) else [value]
        words += [f"--{name}", *(json.dumps(item) if isinstance(item, dict) else str(item) for item in items)]
    return words
