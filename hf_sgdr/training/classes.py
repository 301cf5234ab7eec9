"""`TrainingClasses`: how the classes of the training images are made up, and what follows for metrics and the loss."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedConfig
from transformers.utils import logging

from hf_sgdr._utils.text import printable
from hf_sgdr.data.inputs import ImageInputs
from hf_sgdr.data.labels import MULTI_LABEL, class_names, is_multi_label
from hf_sgdr.data.stream import is_stream
from hf_sgdr.optim.balance import BalancedLoss, class_weights

logger = logging.get_logger(__name__)

# From so many times as many images of the largest class on, accuracy says little of the smallest, and it is said.
UNBALANCED, VERY_UNBALANCED = 3, 10


@dataclass(frozen=True)
class TrainingClasses:
    """The classes of a trainer.

    Args:
        names (`list[str]`): in the order of their ids.
        counts (array of int (classes,) or None): training images of each; None where they cannot be counted.
        images (`int`): how many training images there are.
        is_multi_label (`bool`): whether an image has several labels.
    """

    names: list[str]
    counts: NDArray[np.int64] | None
    images: int
    is_multi_label: bool

    @classmethod
    def of(cls, config: PreTrainedConfig, images: ImageInputs, rows: Any) -> "TrainingClasses":
        """Those of a model and its training images; the model's kind of problem is noted in its configuration.

        Args:
            config (`PreTrainedConfig`): of the model.
            images ([`ImageInputs`]): how rows are read.
            rows (`datasets.Dataset` or anything else): the training images; others cannot be counted.

        Raises:
            ValueError: if the images have several labels and the model is made for one, or the other way round.
        """
        names, is_multi = class_names(config), config.problem_type == MULTI_LABEL
        if is_stream(rows) and is_multi_label((rows.features or {}).get(images.label_column)) and not is_multi:
            config.problem_type, is_multi = MULTI_LABEL, True
        labels = images.known_labels(rows)
        if labels is None or not len(labels):
            return cls(names, None, 0, is_multi)
        if (labels.ndim == 2) != is_multi:
            if is_multi or config.problem_type is not None:
                raise ValueError(
                    f"The training images have {'one label' if is_multi else 'several labels'} each, and the model is "
                    f"made for {config.problem_type}: give create_image_classifier the right problem_type."
                )
            config.problem_type, is_multi = MULTI_LABEL, True
        if is_multi:
            return cls(names, labels.sum(axis=0).astype(np.int64), len(labels), True)
        return cls(names, np.bincount(labels[labels >= 0], minlength=len(names)), len(labels), False)

    def counted(self, labels: torch.Tensor) -> "TrainingClasses":
        """The same with the counts of labels, class ids (images,), or 0 and 1 (images, classes)."""
        ids = labels.numpy()
        counts = ids.sum(axis=0).astype(np.int64) if ids.ndim == 2 else np.bincount(ids, minlength=len(self.names))
        return replace(self, counts=counts, images=len(ids))

    @property
    def training_counts(self) -> tuple[int, ...]:
        """Training images of each class; zeros where they cannot be counted."""
        return tuple(self.counts.tolist()) if self.counts is not None else (0,) * len(self.names)

    @property
    def ratio(self) -> float:
        """Images of the largest class for each of the smallest one that has any; 1 where they cannot be counted."""
        present = self.counts[self.counts > 0] if self.counts is not None else np.ones(1)
        return float(present.max() / present.min()) if len(present) else 1.0

    @property
    def is_unbalanced(self) -> bool:
        """Whether accuracy alone would hide the rare classes."""
        return not self.is_multi_label and self.ratio > UNBALANCED

    def compute_metrics(self, best_by: str) -> Callable[..., dict[str, float]]:
        """The metrics that suit these classes.

        Args:
            best_by (`str`): what chooses the weights, which must be among them.

        Raises:
            ValueError: if images have several labels and accuracy is to choose.
        """
        from hf_sgdr._utils import metrics  # importing `evaluate` takes seconds

        if self.is_multi_label:
            if best_by == "accuracy":
                raise ValueError('best_by="accuracy": of several labels an image there is none; give loss or f1.')
            return metrics.multi_label_of_logits
        return metrics.unbalanced_of_logits if self.is_unbalanced or best_by == "f1" else metrics.accuracy_of_logits

    def weights(self, wanted: str | dict[str, float]) -> NDArray[np.float64]:
        """The weight of each class; see [`class_weights`].

        Raises:
            ValueError: if a name is none of the classes, or training images cannot be counted.
        """
        if self.counts is None:
            raise ValueError("class_weights needs training images whose labels can be counted: a datasets.Dataset.")
        return class_weights(wanted, self.counts, self.images, self.names, self.is_multi_label)

    def loss(self, wanted: str | dict[str, float]) -> BalancedLoss:
        """The loss with these weights in training, and the plain one in evaluation."""
        return BalancedLoss(self.weights(wanted).tolist(), self.is_multi_label)

    def row_weights(self, wanted: str | dict[str, float], labels: torch.Tensor) -> torch.Tensor:
        """The weights of rows, (rows,), or of their labels, (rows, classes), for [`solve_head`].

        Args:
            wanted: as for `weights`.
            labels (`Tensor`): class ids (rows,), or 0 and 1 (rows, classes).
        """
        weights = torch.from_numpy(self.weights(wanted)).float()
        return torch.where(labels > 0.5, weights, 1.0) if self.is_multi_label else weights[labels]

    def warn(self, *, is_weighted: bool) -> None:
        """Say once that classes are very unequal, with the flag that helps, unless it is given."""
        if is_weighted or self.counts is None or self.is_multi_label or self.ratio < VERY_UNBALANCED:
            return
        present = np.flatnonzero(self.counts)
        least, most = (present[index] for index in (self.counts[present].argmin(), self.counts[present].argmax()))
        logger.warning(
            f"{printable(self.names[most])} has {self.counts[most]} training images and {printable(self.names[least])} "
            f'{self.counts[least]}: with class_weights="balanced" (--class_weights balanced) rare classes count alike, '
            'and best_by="f1" (--best_by f1) chooses the weights by macro-F1.'
        )
