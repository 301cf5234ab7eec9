"""What the recipes share: arguments from flags or a YAML file, images and trainer from them, errors in one line."""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

import yaml
from datasets import DatasetDict
from transformers import HfArgumentParser, set_seed

from hf_sgdr.cli.errors import OneLineParser, remove_empty_dir_on_error
from hf_sgdr.data.folders import load_image_folder
from hf_sgdr.data.hub import load_image_dataset
from hf_sgdr.data.splits import stratified_sample
from hf_sgdr.data.transforms import image_transforms
from hf_sgdr.models.classifiers import create_image_classifier
from hf_sgdr.optim.schedule import require_whole
from hf_sgdr.recipe import LESSON, Stage
from hf_sgdr.training.arguments import SGDRTrainingArguments
from hf_sgdr.training.trainer import SGDRTrainer

DEFAULT_MODEL = "timm/resnet34.a1_in1k"
_OUR_DEFAULTS = {"output_dir": "hf_sgdr_out", "save_strategy": "epoch", "save_total_limit": "2"}  # --resume needs them


@dataclass
class DataArguments:
    """Where the images are."""

    data_dir: str | None = field(default=None, metadata={"help": "Folder of images; without any data the demo runs."})
    dataset_name: str | None = field(default=None, metadata={"help": "A labelled image data set of the Hub, instead."})
    train_split_name: str = field(default="train", metadata={"help": "Of --dataset_name."})
    validation_split_name: str | None = field(default=None, metadata={"help": "Of --dataset_name."})
    validation_fraction: float = field(
        default=0.2, metadata={"help": "Share of each class split off where there are no validation images."}
    )
    on_error: Literal["raise", "skip"] = field(
        default="raise",
        metadata={"help": "What images that cannot be read do: raise (name them all and stop) or skip (leave out)."},
    )
    max_train_samples: int | None = field(
        default=None,
        metadata={
            "help": "For debugging purposes or quicker training, truncate the number of training examples to this "
            "value if set; each class keeps its share, and --seed decides which."
        },
    )
    max_eval_samples: int | None = field(
        default=None,
        metadata={
            "help": "For debugging purposes or quicker training, truncate the number of evaluation examples to this "
            "value if set; likewise."
        },
    )

    def __post_init__(self) -> None:
        for name in ("max_train_samples", "max_eval_samples"):
            if getattr(self, name) is not None:
                require_whole(name, getattr(self, name), at_least=1)


@dataclass
class ModelArguments:
    """Which model, and which views of the images it sees."""

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
    parser = _Parser(kinds, description)
    words = [*(parser.words_of_yaml(defaults) if defaults is not None else []), *parser.all_words(argv)]
    ours = _OUR_DEFAULTS.keys() & parser.types.keys() - parser.nulls
    words = [*(f"--{name}={_OUR_DEFAULTS[name]}" for name in sorted(ours)), *words]  # what comes later wins
    parser.parse_args(words)  # an unknown argument is refused here, in one line
    return tuple(parser.parse_args_into_dataclasses(words, look_for_args_file=False))


def given_arguments(kinds: Sequence[Any], argv: Sequence[str], description: str) -> set[str]:
    """The names of the arguments that a command line gives, itself or in its YAML file, whatever their values.

    Args:
        kinds, argv, description: see [`parse`].

    Raises:
        ValueError: see [`parse`].
    """
    parser = _Parser(kinds, description)
    not_given = object()
    namespace = argparse.Namespace(**dict.fromkeys(parser.types, not_given))
    found = vars(parser.parse_args(parser.all_words(argv), namespace))
    return {name for name, value in found.items() if value is not not_given and value is not None}


def has_config(argv: Sequence[str]) -> bool:
    """Whether a command line begins with a YAML file."""
    return bool(argv) and argv[0].endswith((".yaml", ".yml"))


def load_images(data: DataArguments, training: SGDRTrainingArguments) -> DatasetDict:
    """The images that the arguments name, at most `max_train_samples` and `max_eval_samples` of them.

    Raises:
        ValueError, FileNotFoundError: if there are none, or both sources are named.
    """
    if data.data_dir is not None and data.dataset_name is not None:
        raise ValueError("--data_dir and --dataset_name: give one of the two.")
    if data.data_dir is not None:
        images = load_image_folder(
            data.data_dir, validation_fraction=data.validation_fraction, seed=training.seed, on_error=data.on_error
        )
        return _truncated(images, data, training.seed)
    if data.dataset_name is None:
        raise ValueError("No images: give --data_dir FOLDER or --dataset_name NAME.")
    images = load_image_dataset(
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
    return _truncated(images, data, training.seed)


def _truncated(images: DatasetDict, data: DataArguments, seed: int) -> DatasetDict:
    for split, count in (("train", data.max_train_samples), ("validation", data.max_eval_samples)):
        if count is not None and count < len(images[split]):
            images[split] = stratified_sample(images[split], count, seed)
    return images


def build_trainer(images: DatasetDict, model_args: ModelArguments, training: SGDRTrainingArguments) -> SGDRTrainer:
    """The trainer that the arguments describe, everything seeded.

    Raises:
        ValueError, OSError: if the model or a transform cannot be made.
    """
    set_seed(training.seed)
    model = create_image_classifier(
        model_args.model_name_or_path,
        labels=images["train"].features["label"].names,
        pretrained=model_args.pretrained,
        weights_file=model_args.weights_file,
    )
    augment: Any = None if model_args.augment in (None, "none") else model_args.augment
    train_transform, eval_transform = image_transforms(
        model, image_size=model_args.image_size, augment=augment, max_zoom=model_args.max_zoom
    )
    with remove_empty_dir_on_error(training.output_dir):
        return SGDRTrainer(
            model,
            training,
            train_dataset=images["train"],
            eval_dataset=images["validation"],
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
            try:
                values = json.loads(word)
            except ValueError as error:
                raise ValueError(f"--stages {word}: not valid JSON ({error}).") from error
            stages.append(Stage.from_dict(values))
        else:
            raise ValueError(
                f"--stages {word}: give lesson, or any of {', '.join(known)}, or write stages in a YAML file."
            )
    return tuple(stages)


class _Parser(OneLineParser, HfArgumentParser):
    """The dataclasses' arguments, from words and YAML files."""

    def __init__(self, kinds: Sequence[Any], description: str) -> None:
        # before HfArgumentParser writes simpler types into the dataclasses' fields
        self.types: dict[str, Any] = {}
        for kind in kinds:
            hints = get_type_hints(kind)
            self.types |= {one.name: hints[one.name] for one in dataclasses.fields(kind) if one.init}
        self.nulls: set[str] = set()
        super().__init__(list(kinds), description=description)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Also with what a YAML file sets to null, which no word can say; a flag wins over it."""
        namespace = namespace if namespace is not None else argparse.Namespace()
        for name in self.nulls:
            setattr(namespace, name, None)
        return super().parse_known_args(args, namespace)

    def all_words(self, argv: Sequence[str]) -> list[str]:
        """The words of a command line, those of a YAML file at its beginning in that file's place."""
        return [*self.words_of_yaml(Path(argv[0])), *argv[1:]] if has_config(argv) else list(argv)

    def words_of_yaml(self, path: Path) -> list[str]:
        """A YAML file of arguments as the words of a command line.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is not valid YAML, holds no arguments, or a value is of another type than its argument.
        """
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file.")
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: not valid YAML ({' '.join(str(error).split())}).") from error
        if not isinstance(values, dict):
            raise ValueError(f"{path}: give `argument: value` lines, not a {type(values).__name__}.")
        words: list[str] = []
        for name, value in values.items():
            if value is None and type(None) in _kinds_of(self.types.get(_dest(name))):
                self.nulls.add(_dest(name))
            elif isinstance(value, list):
                words += [f"--{name}", *(self._word(path, name, item) for item in value)]
            else:
                words.append(f"--{name}={self._word(path, name, value)}")
        return words

    def _word(self, path: Path, name: str, value: Any) -> str:
        """A value as a word, if it can be one of the argument's."""
        expected = self.types.get(_dest(name))
        if value is None and expected is not None:
            raise ValueError(f"{path}: {name}: null is no value of it: give another one, or leave {name} out.")
        if isinstance(value, bool) and expected is not None and bool not in _kinds_of(expected):
            raise ValueError(
                f"{path}: {name}: {str(value).lower()} is no value of it (unquoted, YAML reads yes, no, on and off as "
                "true and false): give another one, or quote it."
            )
        return json.dumps(value, default=str) if isinstance(value, dict) else str(value)


def _dest(name: Any) -> str:
    return str(name).replace("-", "_")


def _kinds_of(hint: Any) -> set[Any]:
    """The types that a type hint is made of."""
    return {hint}.union(*(_kinds_of(one) for one in get_args(hint)))
