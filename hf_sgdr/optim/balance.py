"""Weights of classes in a loss, for classes of unequal size."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike, NDArray

BALANCED = "balanced"
_IGNORED = -100  # torch's own, of a label that does not count


class BalancedLoss:
    """A weighted loss for the argument `compute_loss_func` of a Trainer: [`balanced_loss`] makes one.

    Where no gradient is wanted, as in evaluation, the loss is the plain one.

    Args:
        weights (sequence of `float`): of each class; with several labels an image, of the images that have the label.
        is_multi_label (`bool`, *optional*, defaults to False): whether images have several labels.
    """

    def __init__(self, weights: Sequence[float], is_multi_label: bool = False) -> None:
        self.weights = torch.tensor(weights, dtype=torch.float32)
        self.is_multi_label = is_multi_label

    def __call__(self, outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        """The mean over the labels of a batch, or their sum over `num_items_in_batch`; class ids of -100 do not count.

        Args:
            outputs (mapping or `ModelOutput`): with `logits` (images, classes).
            labels (`Tensor`): class ids (images,), or 0 and 1 (images, classes).
            num_items_in_batch (`int` or `Tensor`, *optional*): labels of all micro-batches of the step, images times
                classes with several an image, as the Trainer counts them.
        """
        logits = outputs["logits"].float()
        labels = labels.to(logits.device)
        weights = self.weights.to(logits.device) if torch.is_grad_enabled() else None
        if self.is_multi_label:
            losses = F.binary_cross_entropy_with_logits(logits, labels.float(), pos_weight=weights, reduction="none")
        else:
            if weights is not None:  # the last classes may have no image, which is a weight of 1
                weights = F.pad(weights, (0, logits.shape[-1] - len(weights)), value=1.0)
            losses = F.cross_entropy(logits, labels, weight=weights, reduction="none")
        count = (labels != _IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
        return losses.sum() / count


def balanced_loss(labels: ArrayLike) -> BalancedLoss:
    """A loss in which all classes count alike, `Trainer(compute_loss_func=balanced_loss(labels))`, on any Trainer.

    Args:
        labels (array of int): class ids of the training images, (images,), or 0 and 1, (images, classes).

    Raises:
        ValueError: if the labels are neither.
    """
    given = np.asarray(labels)
    if given.ndim not in (1, 2) or not given.size or given.min() < 0 or (given.ndim == 2 and given.max() > 1):
        raise ValueError(f"labels of shape {given.shape}: give class ids (images,), or 0 and 1 (images, classes).")
    is_multi_label = given.ndim == 2
    counts = given.sum(axis=0) if is_multi_label else np.bincount(given.astype(np.int64))
    return BalancedLoss(class_weights(BALANCED, counts, len(given), (), is_multi_label).tolist(), is_multi_label)


def class_weights(
    wanted: str | Mapping[str, float],
    counts: ArrayLike,
    images: int,
    names: Sequence[str],
    is_multi_label: bool = False,
) -> NDArray[np.float64]:
    """The weight of each class, (classes,).

    "balanced" is scikit-learn's: the images, divided by the classes times those of the class; with several labels an
    image, those without the label divided by those with it. A class without images has the weight 1.

    Args:
        wanted (`str` or mapping): as [`checked_class_weights`] gives it.
        counts (array of int (classes,)): images of each class.
        images (`int`): how many there are.
        names (sequence of `str`): of the classes.
        is_multi_label (`bool`, *optional*, defaults to False): whether images have several labels.

    Raises:
        ValueError: if a class of a mapping is none of the names.
    """
    if isinstance(wanted, Mapping):
        unknown = sorted(set(wanted) - set(names))
        if unknown:
            raise ValueError(f"class_weights: {', '.join(map(repr, unknown))} not among {', '.join(map(repr, names))}.")
        return np.array([float(wanted.get(name, 1.0)) for name in names])
    of_class = np.asarray(counts, dtype=np.float64)
    present = of_class > 0
    share = (images - of_class) if is_multi_label else np.full_like(of_class, images / present.sum())
    weights = np.ones_like(of_class)
    weights[present] = share[present] / of_class[present]
    return np.where(weights > 0, weights, 1.0)


def checked_class_weights(value: Any) -> str | dict[str, float] | None:
    """What the argument `class_weights` may be: "balanced", weights by class names, also as JSON, or None.

    Raises:
        ValueError: if it is something else, or a weight is no finite number above 0.
    """
    if value is None or value == BALANCED:
        return value
    given = value
    if isinstance(value, str):
        try:
            given = json.loads(value)
        except ValueError:
            given = None
    is_number = isinstance(given, Mapping) and all(
        isinstance(weight, int | float) and not isinstance(weight, bool) and 0 < weight < math.inf
        for weight in given.values()
    )
    if not is_number or not given:
        raise ValueError(
            f'class_weights={value!r}: give "balanced", or weights above 0 by class name, such as {{"cats": 2.0}}.'
        )
    return {str(name): float(weight) for name, weight in given.items()}
