"""A trainer's predictions beside the truth: probabilities, labels, class names and images of a data set.

And what both kinds of interpretation say of a class and of an image.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import datasets
import numpy as np
import torch
from matplotlib.axes import Axes
from numpy.typing import NDArray
from PIL import Image
from transformers import PreTrainedModel, Trainer

from hf_sgdr._utils.plots import plot_per_class
from hf_sgdr.data.dataset import rows_of
from hf_sgdr.data.images import file_of, read_image, undecoded
from hf_sgdr.data.labels import MULTI_LABEL, class_names, label_names
from hf_sgdr.optim.schedule import require_whole


class Pictured:
    """What knows the image that it is about: `source`, as the data set holds it (a path, bytes, ...), or None."""

    _shown_by: ClassVar[str] = "ClassifierInterpretation"
    source: Any

    @property
    def image(self) -> Image.Image:
        """The image in RGB, read each time it is asked for.

        Raises:
            ValueError: if there is none, or it cannot be read.
        """
        if self.source is None:
            raise ValueError(f"There are no images to show: give {self._shown_by} its images=.")
        return read_image(self.source)

    @property
    def file(self) -> str | None:
        """The path of the image's file, None where it comes from no file."""
        return file_of(self.source)


@dataclass(frozen=True)
class ClassReport:
    """How well one class is recognised.

    Args:
        name (`str`): of the class.
        images (`int`): how many are of it.
        precision (`float` or None): the share of those predicted as it that are of it; None if none was.
        recall (`float` or None): the share of its images predicted as it; None if it has none.
        f1 (`float` or None): the harmonic mean of both, 0 where one of them is 0 or None; None if both are None.
    """

    name: str
    images: int
    precision: float | None
    recall: float | None
    f1: float | None


def plot_reports(reports: Sequence[ClassReport], ax: Axes | None = None) -> Axes:
    """Precision and recall, the lowest F1 at the top; what is undefined is left out."""
    ordered = sorted(reports, key=lambda report: -1.0 if report.f1 is None else report.f1)
    names, precision, recall = zip(*((x.name, x.precision, x.recall) for x in ordered), strict=True)
    return plot_per_class(names, precision, recall, ax)


@runtime_checkable
class ImagePredictor(Protocol):
    """A Trainer that reads images itself and draws views of them, as [`SGDRTrainer`] does."""

    images: Any

    def log_predictions(self, dataset: Any = None) -> NDArray[np.float32]:
        """Log-probabilities (images, classes)."""

    def tta(self, n_aug: int = 4, beta: float | None = None, dataset: Any = None) -> NDArray[np.float32]:
        """Probabilities (images, classes) from several views."""


def labelled_predictions(
    trainer: Trainer, dataset: Any, tta: int
) -> tuple[NDArray[Any], NDArray[Any], list[str], Sequence[Any] | None]:
    """Predict with a trainer's model, as [`ClassifierInterpretation.from_trainer`] says.

    Returns:
        Probabilities (images, classes); class ids (images,), or 0 and 1 (images, classes); class names; the images,
        left encoded, None where the data set holds none.
    """
    require_whole("tta", tta, at_least=0)
    dataset = dataset if dataset is not None else trainer.eval_dataset
    if dataset is None or isinstance(dataset, dict):
        raise ValueError("dataset is None, and the trainer has no single eval_dataset: give dataset=.")
    images, dataset_names = _images_and_names(trainer, dataset)
    names = _names_of_classes(trainer.model, dataset_names)
    if isinstance(trainer, ImagePredictor) and images is not None:
        labels = np.asarray(trainer.images.labels(rows_of(dataset)))  # a missing one shows before anything is predicted
        if tta:
            probabilities = trainer.tta(tta, dataset=dataset)
        else:  # in double precision a loss of 100 is still one: in single its probability is 0
            probabilities = np.exp(trainer.log_predictions(dataset), dtype=np.float64)
    elif tta:
        raise TypeError("tta= needs an SGDRTrainer and a data set of images, to draw views of them.")
    else:
        output = trainer.predict(dataset)
        if output.label_ids is None:
            raise ValueError("The data set has no labels, so there is nothing to compare with: give a labelled one.")
        logits = output.predictions[0] if isinstance(output.predictions, tuple) else output.predictions
        values = torch.from_numpy(np.asarray(logits)).double()
        is_multi_label = getattr(getattr(trainer.model, "config", None), "problem_type", None) == MULTI_LABEL
        probabilities = (values.sigmoid() if is_multi_label else values.softmax(dim=-1)).numpy()
        labels = np.asarray(output.label_ids)
    return probabilities, labels, names or [f"class {i}" for i in range(probabilities.shape[-1])], images


def _images_and_names(trainer: Trainer, dataset: Any) -> tuple[Sequence[Any] | None, list[str] | None]:
    """The data set's images, still encoded, and its class names; None for what it does not hold."""
    rows = rows_of(dataset)
    if isinstance(trainer, ImagePredictor):
        feature = (getattr(rows, "features", None) or {}).get(trainer.images.label_column)
        return trainer.images.sources(rows), label_names(feature)
    if not isinstance(rows, datasets.Dataset):
        return None, None
    image, label = _first_column(rows, datasets.Image), _first_column(rows, datasets.ClassLabel)
    images = undecoded(rows.with_format(None), image)[image] if image is not None else None
    return images, label_names(rows.features.get(label))


def _first_column(rows: datasets.Dataset, kind: type) -> str | None:
    return next((name for name, feature in rows.features.items() if isinstance(feature, kind)), None)


def _names_of_classes(model: Any, dataset_names: list[str] | None) -> list[str] | None:
    """The data set's names where they are one a class, else the model's; None if neither has any."""
    if not isinstance(model, PreTrainedModel):
        return dataset_names
    model_names = class_names(model.config)
    if dataset_names is None or len(dataset_names) != len(model_names):
        return model_names
    if dataset_names != model_names and sorted(dataset_names) == sorted(model_names):
        raise ValueError(
            f"The data set counts the classes {', '.join(dataset_names)} and the model {', '.join(model_names)}: "
            "its labels mean other classes. Give the model's order to datasets.ClassLabel(names=...)."
        )
    return dataset_names
