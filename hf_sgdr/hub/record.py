"""`RunRecord`: what a model card, a recipe file and a push need to know of a run, as plain data."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from hf_sgdr.data.transforms import ImageTransform
from hf_sgdr.inference.interpretation import ClassifierInterpretation
from hf_sgdr.inference.multi_label import MultiLabelInterpretation
from hf_sgdr.recipe import RunResults, Stage

Interpretation = ClassifierInterpretation | MultiLabelInterpretation


@dataclass(frozen=True)
class RunRecord:
    """A finished run; [`~hf_sgdr.training.record.run_record`] takes it from a trainer.

    Args:
        folder (`Path`): the run's `output_dir`, with the plots of its stages.
        config (`PretrainedConfig`): of the model.
        name_or_path (`str`): what the model was loaded by.
        model_id (`str` or None): the model's id on the Hub, once it is known.
        layer_groups (`tuple[str, ...]`): their names, from the input to the head.
        stages (`tuple[Stage, ...]`), results ([`RunResults`]): what was asked for, and what came of it.
        is_recipe (`bool`): False for fits that were called one by one, which are told as stages.
        settings (`dict`): the training arguments that decide the result, in plain values.
        changed (`tuple[str, ...]`): the names of those that differ from their defaults.
        train_transform, eval_transform ([`ImageTransform`]): what training and evaluation see of an image.
        training_counts (`tuple[int, ...]`): training images of each class, in the order of the ids.
        interpretation (`Interpretation` or None): of the validation images; a card needs it.
        device (`torch.device`): that the model is on.
    """

    folder: Path
    config: PretrainedConfig
    name_or_path: str
    model_id: str | None
    layer_groups: tuple[str, ...]
    stages: tuple[Stage, ...]
    results: RunResults
    is_recipe: bool
    settings: dict[str, Any]
    changed: tuple[str, ...]
    train_transform: ImageTransform
    eval_transform: ImageTransform
    training_counts: tuple[int, ...]
    interpretation: Interpretation | None
    device: torch.device

    @property
    def architecture(self) -> str:
        """The name of the network: timm's, or the type of transformers' model."""
        return self.config.architecture if self.config.model_type == "timm_wrapper" else self.config.model_type
