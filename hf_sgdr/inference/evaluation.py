"""How good a saved model is on the files of class folders."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from torch.utils.data import Subset
from tqdm.auto import tqdm

from hf_sgdr._utils.metrics import class_metrics
from hf_sgdr.data.labels import class_names
from hf_sgdr.inference.interpretation import ClassifierInterpretation, ImagePrediction
from hf_sgdr.inference.pipeline import TTAImageClassificationPipeline


@dataclass(frozen=True)
class Evaluation:
    """What was evaluated, on which images, and how it went.

    Args:
        model (`str`): its id on the Hub, or the name of its folder.
        images (`str`): which, in words.
        folder (`Path`): images are called by their path below it.
        tta (`int`): augmented views beside the plain image.
        result ([`ClassifierInterpretation`]): the predictions.
        unreadable (`dict[str, str]`): the reason for each image that was left out.
        in_training (`int`, *optional*): how many of the images the model was trained on; None where it is not known.
    """

    model: str
    images: str
    folder: Path
    tta: int
    result: ClassifierInterpretation
    unreadable: dict[str, str]
    in_training: int | None = None

    @property
    def metrics(self) -> dict[str, float]:
        """Accuracy, loss, and mean precision, recall and f1."""
        metrics = class_metrics(self.result.predicted, self.result.labels)
        return {"accuracy": metrics.pop("accuracy"), "loss": self.result.loss, **metrics}

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

    def described(self, predictions: Sequence[ImagePrediction]) -> str:
        """The files of images, each with what was predicted for it."""
        files = [Path(prediction.file or "").relative_to(self.folder).as_posix() for prediction in predictions]
        each = zip(files, predictions, strict=True)
        return "; ".join(f"{file}, {x.predicted} {x.probability:.1%}" for file, x in each) or "none"

    def to_json(self) -> str:
        """All metrics, schema 1.

        Keys: model, photos, of, in_training, tta, metrics, classes, confusion_matrix, unreadable.
        """
        classes = map(asdict, self.result.per_class())
        content = {
            "schema": 1,
            "model": self.model,
            "photos": len(self.result.labels),
            "of": self.images,
            "in_training": self.in_training,
            "tta": self.tta,
            "metrics": self.metrics,
            "classes": [{"photos": report.pop("images"), **report} for report in classes],
            "confusion_matrix": self.result.confusion_matrix().tolist(),
            "unreadable": self.unreadable,
        }
        return json.dumps(content) + "\n"


def evaluate_files(
    pipe: TTAImageClassificationPipeline, files: Sequence[str], classes: Sequence[str]
) -> ClassifierInterpretation:
    """What a pipeline makes of files whose class is known.

    Args:
        pipe ([`TTAImageClassificationPipeline`]): whose model has these classes.
        files (sequence of `str`), classes (sequence of `str`): images, and the class of each by its name.
    """
    names = class_names(pipe.model.config)
    ids = {name: i for i, name in enumerate(names)}
    # as a data set, which is answered while it is read
    images: Subset[str] = Subset(files, range(len(files)))  # type: ignore[arg-type]  # a sequence serves
    answers = pipe(images, top_k=len(names), function_to_apply="softmax")
    probabilities = np.zeros((len(files), len(names)))
    for row, answer in enumerate(tqdm(answers, desc="Evaluating", unit="image", total=len(files))):
        for entry in answer:
            probabilities[row, ids[entry["label"]]] = entry["score"]
    return ClassifierInterpretation(probabilities, [ids[name] for name in classes], names, files)
