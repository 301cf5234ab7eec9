"""What a classifier gets right and wrong, and how surely: the lesson's "most correct dogs" and confusion matrix.

Works on probabilities and labels alone; the images are read only where they are looked at.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import ArrayLike, NDArray
from transformers import Trainer

from hf_sgdr._utils.plots import plot_confusion_matrix, plot_images
from hf_sgdr._utils.text import few
from hf_sgdr.data.labels import class_id
from hf_sgdr.inference.predictions import ClassReport, Pictured, labelled_predictions, plot_reports
from hf_sgdr.optim.schedule import require_whole

# How far the probabilities of an image may be from 1 in sum: those of 16-bit models are.
ROUNDING = 1e-2


@dataclass(frozen=True)
class ImagePrediction(Pictured):
    """What was predicted for one image.

    Args:
        index (`int`): its row in the data set.
        truth, predicted (`str`): class names.
        probability (`float`): of the predicted class.
        probability_of_truth (`float`): of the true class.
        loss (`float`): the negative logarithm of that.
        source: the image as the data set holds it (a path, bytes, ...), or None.
    """

    index: int
    truth: str
    predicted: str
    probability: float
    probability_of_truth: float
    loss: float
    source: Any = field(default=None, repr=False, compare=False)


class ClassifierInterpretation:
    """Predictions of a classifier beside the truth.

    Args:
        probabilities (array of float (images, classes)): each row sums to 1.
        labels (array of int (images,)): class ids of the truth.
        names (sequence of `str`): class names in the order of their ids.
        images (sequence, *optional*): the images in the same order, each a path, encoded bytes, a Pillow image or
            whatever else [`read_image`] takes; they are read only to be shown.

    Attributes:
        predicted (array of int (images,)): the likeliest class of each image.
        losses (array of float (images,)): -log of the probability of each image's true class.

    Raises:
        ValueError: if the shapes do not fit, a label is no class id, or a row is no probabilities.
    """

    def __init__(
        self,
        probabilities: ArrayLike,
        labels: ArrayLike,
        names: Sequence[str],
        images: Sequence[Any] | None = None,
    ) -> None:
        if np.ndim(labels) == 2:
            raise ValueError("Each image has several labels: MultiLabelInterpretation is for them.")
        self.probabilities = _checked_probabilities(probabilities)
        self.names = list(names)
        count, classes = self.probabilities.shape
        if len(self.names) != classes:
            raise ValueError(f"{len(self.names)} names for {classes} classes: give one a column of the probabilities.")
        self.labels = _checked_labels(labels, count, self.names)
        if images is not None and len(images) != count:
            raise ValueError(f"{len(images)} images for {count} rows of probabilities: give one a row.")
        self.images = images
        self.predicted: NDArray[np.int64] = self.probabilities.argmax(axis=1)
        of_truth = self.probabilities[np.arange(count), self.labels]
        # a probability that was rounded to 0 has a high loss, not an infinite one
        self.losses: NDArray[np.floating[Any]] = np.abs(np.log(np.maximum(of_truth, np.finfo(of_truth.dtype).tiny)))

    @classmethod
    def from_trainer(cls, trainer: Trainer, dataset: Any = None, tta: int = 0) -> "ClassifierInterpretation":
        """Predict with a trainer's model and look at the result.

        Args:
            trainer ([`~transformers.Trainer`]): an [`SGDRTrainer`], or a stock one that classifies.
            dataset (`datasets.Dataset`, *optional*): labelled images; validation by default.
            tta (`int`, *optional*, defaults to 0): augmented views of test-time augmentation, beside the plain image.

        Raises:
            ValueError: if there is no data set, an image has no label, the data set counts the classes in another
                order than the model, or there is nothing random to draw views with.
            TypeError: if `tta` is asked of a stock trainer.
        """
        return cls(*labelled_predictions(trainer, dataset, tta))

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({len(self.labels)} images of {len(self.names)} classes, "
            f"accuracy={self.accuracy:.4f}, loss={self.loss:.4f})"
        )

    # ---- Single images ----

    def most_correct(self, n: int = 4, of_class: str | int | None = None) -> list[ImagePrediction]:
        """The images that are rightly and most surely classified, by the probability of their class.

        Source: the lesson's "most correct cats", `most_by_correct` of fast.ai 0.7's lesson 1.

        Args:
            n (`int`, *optional*, defaults to 4): how many at most.
            of_class (`str` or `int`, *optional*): only images of this class, by its name or id.

        Raises:
            ValueError: if there is no such class.
        """
        return self._first(n, self.losses, (self.predicted == self.labels) & self._is_of(of_class))

    def most_incorrect(self, n: int = 4, of_class: str | int | None = None) -> list[ImagePrediction]:
        """The images that are wrongly classified and whose own class has the lowest probability, so the highest losses.

        Source: the lesson's "most incorrect dogs". Arguments and errors are those of `most_correct`.
        """
        return self._first(n, -self.losses, (self.predicted != self.labels) & self._is_of(of_class))

    def most_uncertain(self, n: int = 4) -> list[ImagePrediction]:
        """The images whose two likeliest classes are closest; with two classes, those nearest to one half.

        Source: the lesson's "most uncertain predictions"; for more classes this is margin sampling (Scheffer et al.
        2001, "Active hidden Markov models for information extraction", section 4).

        Args:
            n (`int`, *optional*, defaults to 4): how many at most.
        """
        highest = np.partition(self.probabilities, -2, axis=1)[:, -2:]
        return self._first(n, highest[:, 1] - highest[:, 0], np.ones(len(self.labels), dtype=bool))

    # ---- Sums ----

    @property
    def accuracy(self) -> float:
        """The share of images whose likeliest class is theirs."""
        return float((self.predicted == self.labels).mean())

    @property
    def metrics(self) -> dict[str, float]:
        """Loss and accuracy."""
        return {"loss": self.loss, "accuracy": self.accuracy}

    @property
    def loss(self) -> float:
        """The mean loss (log loss, cross entropy in nats)."""
        return float(self.losses.mean(dtype=np.float64))

    def confusion_matrix(self, normalize: bool = False) -> NDArray[Any]:
        """How many images of each class (rows) were predicted as each class (columns).

        Args:
            normalize (`bool`, *optional*, defaults to False): as shares of the row; a row without images is all 0.

        Returns:
            array of int, or of float if normalized, (classes, classes).
        """
        classes = len(self.names)
        pairs = self.labels * classes + self.predicted
        counts = np.bincount(pairs, minlength=classes * classes).reshape(classes, classes)
        return counts / np.maximum(counts.sum(axis=1, keepdims=True), 1) if normalize else counts

    def most_confused(self, min_count: int = 1) -> list[tuple[str, str, int]]:
        """The kinds of mistakes, the most frequent first: (truth, predicted, how many images).

        Args:
            min_count (`int`, *optional*, defaults to 1): leave out what happened less often.
        """
        require_whole("min_count", min_count, at_least=1)
        mistakes = self.confusion_matrix()
        np.fill_diagonal(mistakes, 0)
        order = np.argsort(-mistakes, axis=None, kind="stable")
        cells = zip(*np.unravel_index(order[mistakes.ravel()[order] >= min_count], mistakes.shape), strict=True)
        return [(self.names[truth], self.names[guess], int(mistakes[truth, guess])) for truth, guess in cells]

    def per_class(self) -> list[ClassReport]:
        """Precision, recall and F1 of each class, in the order of the ids."""
        counts = self.confusion_matrix()
        sums = np.stack([counts.diagonal(), counts.sum(axis=1), counts.sum(axis=0)], axis=1).tolist()
        reports = []
        for name, (right, images, predicted) in zip(self.names, sums, strict=True):
            precision = right / predicted if predicted else None
            recall = right / images if images else None
            f1 = 2 * right / (images + predicted) if images or predicted else None
            reports.append(ClassReport(name, images, precision, recall, f1))
        return reports

    # ---- Plots ----

    def plot_confusion_matrix(self, ax: Axes | None = None, *, normalize: bool = False) -> Axes:
        """The confusion matrix as [`~hf_sgdr._utils.plots.plot_confusion_matrix`] draws it."""
        return plot_confusion_matrix(self.confusion_matrix(), self.names, ax, normalize=normalize)

    def plot_per_class(self, ax: Axes | None = None) -> Axes:
        """Precision and recall of each class, the lowest F1 at the top; what is undefined is left out."""
        return plot_reports(self.per_class(), ax)

    def plot_most_correct(self, n: int = 4, of_class: str | int | None = None, ax: Axes | None = None) -> Axes:
        """The images of `most_correct` in one Axes."""
        return _plot_predictions(self.most_correct(n, of_class), ax)

    def plot_most_incorrect(self, n: int = 4, of_class: str | int | None = None, ax: Axes | None = None) -> Axes:
        """The images of `most_incorrect` in one Axes."""
        return _plot_predictions(self.most_incorrect(n, of_class), ax)

    def plot_most_uncertain(self, n: int = 4, ax: Axes | None = None) -> Axes:
        """The images of `most_uncertain` in one Axes."""
        return _plot_predictions(self.most_uncertain(n), ax)

    # ---- Helpers ----

    def _is_of(self, of_class: str | int | None) -> NDArray[np.bool_]:
        if of_class is None:
            return np.ones(len(self.labels), dtype=bool)
        return self.labels == class_id(of_class, self.names)

    def _first(self, n: int, key: NDArray[Any], allowed: NDArray[np.bool_]) -> list[ImagePrediction]:
        """The n allowed images with the lowest key, ties in the order of the data set."""
        require_whole("n", n, at_least=1)
        indices = np.flatnonzero(allowed)
        return [self._prediction(int(i)) for i in indices[np.argsort(key[indices], kind="stable")[:n]]]

    def _prediction(self, index: int) -> ImagePrediction:
        truth, predicted = int(self.labels[index]), int(self.predicted[index])
        return ImagePrediction(
            index=index,
            truth=self.names[truth],
            predicted=self.names[predicted],
            probability=float(self.probabilities[index, predicted]),
            probability_of_truth=float(self.probabilities[index, truth]),
            loss=float(self.losses[index]),
            source=None if self.images is None else self.images[index],
        )


def _plot_predictions(predictions: list[ImagePrediction], ax: Axes | None) -> Axes:
    captions = [
        [f"{x.predicted} {x.probability:.1%}"]
        + [f"truth: {x.truth}"] * (x.predicted != x.truth)
        + ([Path(x.file).name] if x.file else [])
        for x in predictions
    ]
    return plot_images([x.image for x in predictions], captions, ax)


def _checked_probabilities(given: ArrayLike) -> NDArray[np.floating[Any]]:
    probabilities = np.asarray(given)
    if probabilities.ndim != 2 or probabilities.shape[0] < 1 or probabilities.shape[1] < 2:
        raise ValueError(
            f"probabilities of shape {probabilities.shape}: give (images, classes), an image and two classes at least."
        )
    if probabilities.dtype not in (np.float32, np.float64):
        probabilities = probabilities.astype(np.float32)
    sums = probabilities.sum(axis=1)
    off = ~((np.abs(sums - 1) <= ROUNDING) & (probabilities >= 0).all(axis=1))
    if off.any():
        first = int(off.argmax())
        lowest = probabilities[first].min()
        raise ValueError(
            f"Row {first} is no probabilities: it sums to {sums[first]:.4g}, and its lowest is {lowest:.4g}. "
            "Give the softmax of the logits, such as np.exp(trainer.log_predictions())."
        )
    return probabilities


def _checked_labels(given: ArrayLike, count: int, names: list[str]) -> NDArray[np.int64]:
    labels = np.asarray(given)
    if labels.shape != (count,):
        raise ValueError(f"labels of shape {labels.shape} for {count} rows of probabilities: give one a row.")
    if not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0 or labels.max() >= len(names):
        raise ValueError(
            f"labels are {labels.dtype} from {labels.min()} to {labels.max()}: give class ids from 0 to "
            f"{len(names) - 1} ({few(names)})."
        )
    return labels.astype(np.int64)
