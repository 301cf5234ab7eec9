"""Arguments that the recipes share, and what they describe: images, stages and trainer."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from datasets import DatasetDict
from transformers import set_seed
from transformers.hf_argparser import HfArg

from hf_sgdr.cli.errors import remove_empty_dir_on_error
from hf_sgdr.data.folders import load_image_folder
from hf_sgdr.data.hub import load_image_dataset
from hf_sgdr.data.splits import stratified_sample
from hf_sgdr.data.transforms import image_transforms
from hf_sgdr.hub.card import require_license
from hf_sgdr.models.classifiers import create_image_classifier
from hf_sgdr.optim.schedule import require_whole
from hf_sgdr.recipe import LESSON, SAID_BY_STAGES, Stage
from hf_sgdr.training.arguments import SGDRTrainingArguments
from hf_sgdr.training.trainer import SGDRTrainer

# What recipes/train.py does not take, with the reason; a --learning_rate takes the place of range tests.
DECIDED_BY_STAGES = {
    name: "the stages say that; write stages in a YAML file." for name in SAID_BY_STAGES if name != "learning_rate"
} | {
    "num_train_epochs": "the stages say how long: give cycles and cycle_len to the stages of a YAML file "
    "(recipes/configs/lesson.yaml is one), or --max_steps for a short trial."
}


@dataclass
class DataArguments:
    """Where the images are."""

    data_dir: str | None = HfArg(default=None, help="Folder of images; without any data the demo runs.")
    dataset_name: str | None = HfArg(default=None, help="A labelled image data set of the Hub, instead.")
    train_split_name: str = HfArg(default="train", help="Of --dataset_name.")
    validation_split_name: str | None = HfArg(default=None, help="Of --dataset_name.")
    validation_fraction: float = HfArg(
        default=0.2, help="Share of each class split off where there are no validation images."
    )
    on_error: Literal["raise", "skip"] = HfArg(
        default="raise", help="What unreadable images do: raise (name them all and stop) or skip (leave them out)."
    )
    max_train_samples: int | None = HfArg(
        default=None, help="At most so many training images; each class keeps its share, and --seed decides which."
    )
    max_eval_samples: int | None = HfArg(default=None, help="At most so many validation images, likewise.")

    def __post_init__(self) -> None:
        for name in ("max_train_samples", "max_eval_samples"):
            if getattr(self, name) is not None:
                require_whole(name, getattr(self, name), at_least=1)


@dataclass
class ModelArguments:
    """Which model, and which views of the images it sees."""

    model_name_or_path: str = HfArg(
        default="timm/resnet34.a1_in1k", aliases=["--model"], help="Model id of the Hub, folder, or bare timm name."
    )
    weights_file: str | None = HfArg(default=None, help="Local weights for a bare timm name.")
    pretrained: bool = HfArg(default=True, help="Start from pretrained weights.")
    image_size: int | None = HfArg(default=None, help="Side of the input, pixels; the model's own.")
    augment: str | None = HfArg(default="side_on", help="none, basic, side_on or top_down.")
    max_zoom: float = HfArg(default=1.1, help="Highest zoom of augmentation, at least 1.")


@dataclass
class RecipeArguments:
    """What recipes/train.py does."""

    stages: list[str] | None = HfArg(  # noqa: RUF009  # it makes a field
        default=None, help="lesson (the default), or some of its stages: precomputed, augmented, unfrozen."
    )
    n_aug: int = HfArg(default=4, help="Augmented views of test-time augmentation at the end; 0: none.")
    license: str | None = HfArg(default=None, help="For the card: the Hub's identifier, such as apache-2.0.")
    card_photos: bool = HfArg(default=False, help="Show some validation images in the card; it may become public.")
    push_space: bool = HfArg(
        default=False, help="With --push_to_hub: also publish a page for the model, a Gradio Space."
    )
    resume: bool = HfArg(default=False, help="Go on with an unfinished run; a finished one stays as it is.")

    def __post_init__(self) -> None:
        require_whole("n_aug", self.n_aug, at_least=0)
        require_license(self.license)


def load_images(data: DataArguments, training: SGDRTrainingArguments) -> DatasetDict:
    """The images that the arguments name, at most `max_train_samples` and `max_eval_samples` of them.

    Raises:
        ValueError, FileNotFoundError: if there are none, or both sources are named.
    """
    if data.data_dir is not None and data.dataset_name is not None:
        raise ValueError("--data_dir and --dataset_name: give one of the two.")
    split: Any = {name: getattr(data, name) for name in ("validation_fraction", "on_error")} | {"seed": training.seed}
    if data.data_dir is not None:
        images = load_image_folder(data.data_dir, **split)
    elif data.dataset_name is not None:
        images = load_image_dataset(
            data.dataset_name,
            image_column_name=training.image_column_name,
            label_column_name=training.label_column_name,
            train_split_name=data.train_split_name,
            validation_split_name=data.validation_split_name,
            **split,
        )
        training.image_column_name, training.label_column_name = "image", "label"
    else:
        raise ValueError("No images: give --data_dir FOLDER or --dataset_name NAME.")
    for name, count in (("train", data.max_train_samples), ("validation", data.max_eval_samples)):
        if count is not None and count < len(images[name]):
            images[name] = stratified_sample(images[name], count, training.seed)
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


def chosen_stages(names: Sequence[str] | None, learning_rate: float | None = None) -> tuple[Stage, ...]:
    """The stages of a recipe.

    Args:
        names (sequence of `str`, *optional*, defaults to `["lesson"]`): of the lesson's stages, "lesson" for all of
            them; or JSON objects, as which YAML files give stages.
        learning_rate (`float`, *optional*): takes the place of every range test.

    Raises:
        ValueError: if a name or a key is unknown.
    """
    known = {stage.name: stage for stage in LESSON}
    stages: list[Stage] = []
    for name in names or ["lesson"]:
        if name == "lesson":
            stages += LESSON
        elif name in known:
            stages.append(known[name])
        elif name.startswith("{"):
            try:
                values = json.loads(name)
            except ValueError as error:
                raise ValueError(f"--stages {name}: not valid JSON ({error}).") from error
            stages.append(Stage.from_dict(values))
        else:
            raise ValueError(
                f"--stages {name}: give lesson, or any of {', '.join(known)}, or write stages in a YAML file."
            )
    if learning_rate is not None:
        stages = [replace(stage, lr=learning_rate) if stage.lr == "auto" else stage for stage in stages]
    return tuple(stages)
