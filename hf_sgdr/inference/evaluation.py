"""How good a saved model is on the files of class folders."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Subset

from hf_sgdr._utils.metrics import balanced_accuracy, class_metrics, wilson_interval
from hf_sgdr._utils.system import followed
from hf_sgdr.data.labels import MULTI_LABEL, class_names
from hf_sgdr.inference.interpretation import ClassifierInterpretation, ImagePrediction
from hf_sgdr.inference.multi_label import LabelPrediction, MultiLabelInterpretation
from hf_sgdr.inference.pipeline import TTAImageClassificationPipeline


@dataclass(frozen=True)
class Evaluation:
    """What was evaluated, on which images, and how it went.

    Args:
        model (`str`): its id on the Hub, or the name of its folder.
        images (`str`): which, in words.
        folder (`Path`): images are called by their path below it.
        tta (`int`): augmented views beside the plain image.
        result ([`ClassifierInterpretation`] or [`MultiLabelInterpretation`]): the predictions.
        unreadable (`dict[str, str]`): the reason for each image that was left out.
        in_training (`int`, *optional*): how many of the images the model was trained on; None where it is not known.
    """

    model: str
    images: str
    folder: Path
    tta: int
    result: ClassifierInterpretation | MultiLabelInterpretation
    unreadable: dict[str, str]
    in_training: int | None = None

    @property
    def metrics(self) -> dict[str, float]:
        """Accuracy, loss, balanced accuracy, mean precision, recall and f1; of several labels loss, map and f1."""
        if isinstance(self.result, MultiLabelInterpretation):
            return self.result.metrics
        metrics = class_metrics(self.result.predicted, self.result.labels)
        balanced = balanced_accuracy(self.result.predicted, self.result.labels)
        first = {"accuracy": metrics.pop("accuracy"), "loss": self.result.loss, "balanced_accuracy": balanced}
        return {**first, **metrics}

    @property
    def is_multi_label(self) -> bool:
        """Whether images have several labels."""
        return isinstance(self.result, MultiLabelInterpretation)

    def headline(self) -> str:
        """How good the model is, in a sentence; with one label an image also how sure that is (Wilson's interval)."""
        count = len(self.result.labels)
        if isinstance(self.result, MultiLabelInterpretation):
            return f"Mean average precision {self.metrics['map']:.1%}, mean F1 {self.metrics['f1']:.1%}."
        right = int((self.result.predicted == self.result.labels).sum())
        low, high = wilson_interval(right, count)
        return (
            f"{right} of {count} right, {right / count:.1%}; of other images like these between {low:.0%} and "
            f"{high:.0%}, with 95% confidence."
        )

    def seen_before(self) -> str:
        """A sentence about how many of the images the model was trained on."""
        if self.in_training is None:
            return "It is not known whether the model was trained on some of these images."
        if not self.in_training:
            return "None of these images was among those that the model was trained on."
        return (
            f"{self.in_training} of these {len(self.result.labels)} images are among those that the model was trained "
            "on: the metrics are better than those of new images."
        )

    def described(self, predictions: Sequence[ImagePrediction | LabelPrediction]) -> str:
        """The files of images, each with what was predicted for it."""
        files = [os.path.relpath(prediction.file or "", self.folder) for prediction in predictions]
        names = [x.label if isinstance(x, LabelPrediction) else x.predicted for x in predictions]
        each = zip(files, names, predictions, strict=True)
        return "; ".join(f"{file}, {name} {x.probability:.1%}" for file, name, x in each) or "none"

    def to_json(self) -> str:
        """All metrics, schema 1.

        Keys: model, photos, of, in_training, tta, metrics, classes, confusion_matrix (null with several labels an
        image), unreadable.
        """
        classes = [dict(vars(report)) for report in self.result.per_class()]
        matrix = self.result.confusion_matrix().tolist() if isinstance(self.result, ClassifierInterpretation) else None
        content = {
            "schema": 1,
            "model": self.model,
            "photos": len(self.result.labels),
            "of": self.images,
            "in_training": self.in_training,
            "tta": self.tta,
            "metrics": self.metrics,
            "classes": [{"photos": report.pop("images"), **report} for report in classes],
            "confusion_matrix": matrix,
            "unreadable": self.unreadable,
        }
        return json.dumps(content) + "\n"


def evaluate_files(
    pipe: TTAImageClassificationPipeline, files: Sequence[str], classes: Sequence[Any]
) -> ClassifierInterpretation | MultiLabelInterpretation:
    """What a pipeline makes of files whose class is known.

    Args:
        pipe ([`TTAImageClassificationPipeline`]): whose model has these classes.
        files (sequence of `str`): images.
        classes (sequence of `str`, or of lists of them): the class of each by its name, or its labels.

    Raises:
        ValueError: if the images have several labels and the model is made for one, or the other way round.
    """
    names = class_names(pipe.model.config)
    ids = {name: i for i, name in enumerate(names)}
    is_multi_label = pipe.model.config.problem_type == MULTI_LABEL
    if any(isinstance(one, list) != is_multi_label for one in classes):
        given, made, mend = ("several labels", "one", "each image one label, or a model made for several")
        if is_multi_label:
            given, made, mend = ("one label", "several", "a table with lists of labels, or with a label_delimiter")
        raise ValueError(f"The images have {given} each, and the model is made for {made}: give {mend}.")
    # as a data set, which is answered while it is read
    images: Subset[str] = Subset(files, range(len(files)))  # type: ignore[arg-type]  # a sequence serves
    answers = pipe(images, top_k=len(names), function_to_apply="sigmoid" if is_multi_label else "softmax")
    probabilities = np.zeros((len(files), len(names)))
    for row, answer in enumerate(followed(answers, "Evaluating", len(files))):
        for entry in answer:
            probabilities[row, ids[entry["label"]]] = entry["score"]
    if not is_multi_label:
        return ClassifierInterpretation(probabilities, [ids[name] for name in classes], names, files)
    labels = np.zeros(probabilities.shape, dtype=bool)
    for row, several in enumerate(classes):
        labels[row, [ids[name] for name in several]] = True
    return MultiLabelInterpretation(probabilities, labels, names, files)
