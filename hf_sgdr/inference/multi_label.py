"""What a classifier of several labels an image gets right and wrong, label by label."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import ArrayLike, NDArray
from transformers import Trainer

from hf_sgdr._utils.metrics import average_precision, multi_label_metrics
from hf_sgdr._utils.plots import plot_images
from hf_sgdr.data.labels import class_id
from hf_sgdr.inference.predictions import ClassReport, Pictured, labelled_predictions, plot_reports
from hf_sgdr.optim.schedule import require_whole


@dataclass(frozen=True)
class LabelPrediction(Pictured):
    """What was predicted of one label of one image.

    Args:
        index (`int`): the image's row in the data set.
        label (`str`): its name.
        is_there (`bool`): whether the image has it.
        probability (`float`): that it has, as predicted.
        loss (`float`): -log of the probability of what is true.
        source: the image as the data set holds it (a path, bytes, ...), or None.
    """

    _shown_by: ClassVar[str] = "MultiLabelInterpretation"
    index: int
    label: str
    is_there: bool
    probability: float
    loss: float
    source: Any = field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class LabelReport(ClassReport):
    """How well one label is recognised.

    Args:
        name, images, precision, recall, f1: as in [`ClassReport`], of those that have the label or were predicted to.
        average_precision (`float` or None): the mean precision over all thresholds; None if none has it.
    """

    average_precision: float | None


class MultiLabelInterpretation:
    """Predictions of several labels an image beside the truth.

    Args:
        probabilities (array of float (images, classes)): of each label by itself, from 0 to 1.
        labels (array (images, classes)): 0 and 1.
        names (sequence of `str`): of the labels.
        images (sequence, *optional*): as in [`ClassifierInterpretation`].
        threshold (`float`, *optional*, defaults to 0.5): a label is predicted above this probability.

    Raises:
        ValueError: if the shapes do not fit, or a number is out of range.
    """

    def __init__(
        self,
        probabilities: ArrayLike,
        labels: ArrayLike,
        names: Sequence[str],
        images: Sequence[Any] | None = None,
        threshold: float = 0.5,
    ) -> None:
        self.probabilities, given = np.asarray(probabilities, dtype=np.float64), np.asarray(labels)
        self.names, self.images, self.threshold = list(names), images, threshold
        shape = self.probabilities.shape
        if given.shape != shape or len(shape) != 2 or shape[1] != len(self.names) or not shape[0]:
            raise ValueError(
                f"probabilities of shape {shape}, labels of shape {given.shape}, {len(self.names)} names: both must be "
                "(images, classes), a name for each class, an image at least."
            )
        if not ((self.probabilities >= 0) & (self.probabilities <= 1)).all():
            raise ValueError("probabilities must be from 0 to 1: give the sigmoid of the logits.")
        if not np.isin(given, (0, 1)).all():
            raise ValueError("labels must be 0 and 1, one for each image and class.")
        if images is not None and len(images) != len(given):
            raise ValueError(f"{len(images)} images for {len(given)} rows of probabilities: give one a row.")
        self.labels: NDArray[np.bool_] = given.astype(bool)
        of_truth = np.where(self.labels, self.probabilities, 1 - self.probabilities)
        self.losses: NDArray[np.float64] = -np.log(np.maximum(of_truth, np.finfo(np.float32).tiny))

    @classmethod
    def from_trainer(cls, trainer: Trainer, dataset: Any = None, tta: int = 0) -> "MultiLabelInterpretation":
        """Predict with a trainer's model and look at the result; see [`ClassifierInterpretation.from_trainer`]."""
        return cls(*labelled_predictions(trainer, dataset, tta))

    def __repr__(self) -> str:
        metrics = ", ".join(f"{name}={value:.4f}" for name, value in self.metrics.items())
        return f"{type(self).__name__}({len(self.labels)} images, {len(self.names)} labels, {metrics})"

    @property
    def loss(self) -> float:
        """The mean loss (binary cross entropy in nats) of all images and labels."""
        return float(self.losses.mean())

    @property
    def metrics(self) -> dict[str, float]:
        """Loss, macro mean average precision and macro-F1."""
        return {"loss": self.loss, **multi_label_metrics(self.probabilities, self.labels, self.threshold)}

    def per_class(self) -> list[LabelReport]:
        """Precision, recall, F1 and average precision of each label."""
        said = self.probabilities > self.threshold
        reports = []
        for i, name in enumerate(self.names):
            truth, predicted = self.labels[:, i], said[:, i]
            right, images, guesses = int((truth & predicted).sum()), int(truth.sum()), int(predicted.sum())
            reports.append(
                LabelReport(
                    name,
                    images,
                    right / guesses if guesses else None,
                    right / images if images else None,
                    2 * right / (images + guesses) if images or guesses else None,
                    average_precision(self.probabilities[:, i], truth) if images else None,
                )
            )
        return reports

    def most_incorrect(self, n: int = 4, of_class: str | int | None = None) -> list[LabelPrediction]:
        """The surest mistakes: labels predicted that are not there, and labels that are there and were not predicted.

        Args:
            n (`int`, *optional*, defaults to 4): how many at most.
            of_class (`str` or `int`, *optional*): only of this label, by its name or number.

        Raises:
            ValueError: if there is no such label.
        """
        require_whole("n", n, at_least=1)
        wrong = (self.probabilities > self.threshold) != self.labels
        if of_class is not None:
            wrong &= np.arange(len(self.names)) == class_id(of_class, self.names)
        cells = np.argwhere(wrong)
        order = np.argsort(-self.losses[wrong], kind="stable")[:n]
        return [self._prediction(int(row), int(column)) for row, column in cells[order]]

    def plot_per_class(self, ax: Axes | None = None) -> Axes:
        """Precision and recall of each label, the lowest F1 at the top; what is undefined is left out."""
        return plot_reports(self.per_class(), ax)

    def plot_most_incorrect(self, n: int = 4, of_class: str | int | None = None, ax: Axes | None = None) -> Axes:
        """The images of `most_incorrect` in one Axes."""
        mistakes = self.most_incorrect(n, of_class)
        captions = [
            [f"{x.label} {x.probability:.1%}", f"truth: {'' if x.is_there else 'not '}{x.label}"]
            + ([Path(x.file).name] if x.file else [])
            for x in mistakes
        ]
        return plot_images([x.image for x in mistakes], captions, ax)

    def _prediction(self, row: int, column: int) -> LabelPrediction:
        return LabelPrediction(
            index=row,
            label=self.names[column],
            is_there=bool(self.labels[row, column]),
            probability=float(self.probabilities[row, column]),
            loss=float(self.losses[row, column]),
            source=None if self.images is None else self.images[row],
        )
