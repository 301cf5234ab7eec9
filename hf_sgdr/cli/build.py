"""What the arguments of a recipe describe: images, stages and trainer."""

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from datasets import DatasetDict
from transformers import set_seed

from hf_sgdr._utils.text import nearest
from hf_sgdr.cli.arguments import DataArguments, ModelArguments
from hf_sgdr.cli.errors import remove_empty_dir_on_error
from hf_sgdr.data.folders import load_image_folder
from hf_sgdr.data.hub import load_image_dataset
from hf_sgdr.data.labels import MULTI_LABEL, is_multi_label, label_names
from hf_sgdr.data.splits import stratified_sample
from hf_sgdr.data.stream import is_stream
from hf_sgdr.data.tables import load_image_table
from hf_sgdr.data.transforms import fine_tuning_size, image_transforms
from hf_sgdr.models.classifiers import create_image_classifier
from hf_sgdr.recipe import LESSON, Stage
from hf_sgdr.training.arguments import SGDRTrainingArguments
from hf_sgdr.training.trainer import SGDRTrainer


def load_images(data: DataArguments, training: SGDRTrainingArguments) -> DatasetDict:
    """The images that the arguments name, at most `max_train_samples` and `max_eval_samples` of them.

    Raises:
        ValueError, FileNotFoundError: if there are none.
    """
    split: Any = {name: getattr(data, name) for name in ("validation_fraction", "on_error")} | {"seed": training.seed}
    split["label_column_name"] = training.label_column_name
    if data.labels_file is not None:
        images = load_image_table(
            data.labels_file,
            image_column_name=training.image_column_name if training.image_column_name != "image" else None,
            label_delimiter=data.label_delimiter,
            image_dir=data.data_dir,
            split_column_name=data.split_column_name,
            **split,
        )
    elif data.data_dir is not None:
        images = load_image_folder(
            data.data_dir, label_pattern=data.label_pattern, label_delimiter=data.label_delimiter, **split
        )
    elif data.dataset_name is not None:
        images = load_image_dataset(
            data.dataset_name,
            image_column_name=training.image_column_name,
            train_split_name=data.train_split_name,
            validation_split_name=data.validation_split_name,
            streaming=data.streaming,
            **split,
        )
    else:
        raise ValueError("No images: give --data_dir FOLDER, --labels_file TABLE or --dataset_name NAME.")
    training.image_column_name, training.label_column_name = "image", "label"
    for name, count in (("train", data.max_train_samples), ("validation", data.max_eval_samples)):
        if count is not None and is_stream(images[name]):
            images[name] = images[name].take(count)
        elif count is not None and count < len(images[name]):
            images[name] = stratified_sample(images[name], count, training.seed)
    return images


def build_trainer(images: DatasetDict, model_args: ModelArguments, training: SGDRTrainingArguments) -> SGDRTrainer:
    """The trainer that the arguments describe, everything seeded.

    Raises:
        ValueError, OSError: if the model or a transform cannot be made.
    """
    set_seed(training.seed)
    feature = images["train"].features["label"]
    model = create_image_classifier(
        model_args.model_name_or_path,
        labels=label_names(feature) or [],
        pretrained=model_args.pretrained,
        weights_file=model_args.weights_file,
        problem_type=MULTI_LABEL if is_multi_label(feature) else None,
    )
    if not is_multi_label(feature) and model.config.problem_type == MULTI_LABEL:
        model.config.problem_type = None  # of the labels that it had
    size = model_args.image_size
    if size is None and model_args.pretrained:
        size = fine_tuning_size(model)
    augment: Any = None if model_args.augment in (None, "none") else model_args.augment
    train_transform, eval_transform = image_transforms(
        model, image_size=size, augment=augment, max_zoom=model_args.max_zoom
    )
    with remove_empty_dir_on_error(str(training.output_dir)):
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
                f"--stages {name}{nearest(name, known)}: give lesson, or any of {', '.join(known)}, or write stages "
                "in a YAML file."
            )
    if learning_rate is not None:
        first = next((stage for stage in stages if not stage.solve), None)  # none before it has a rate
        stages = [
            replace(stage, lr=learning_rate) if stage.lr == "auto" or (stage is first and stage.lr is None) else stage
            for stage in stages
        ]
    return tuple(stages)
