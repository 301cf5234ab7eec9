"""Splitting rows by class: a validation share where there is none, and a sample of the rows."""

import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray
from transformers.utils import logging

logger = logging.get_logger(__name__)

# What a folder or a split of validation or of test images may be called.
VALIDATION_NAMES, TEST_NAMES = ("validation", "valid", "val"), ("test", "test1")
SPLIT_NAMES = {
    "train": "train",
    **dict.fromkeys(VALIDATION_NAMES, "validation"),
    **dict.fromkeys(TEST_NAMES, "test"),
}
LAYOUT = "Lay the images out as PATH/CLASS/*.jpg, or as PATH/train/CLASS/*.jpg and PATH/valid/CLASS/*.jpg."


def stratified_split(dataset: Dataset, fraction: float, seed: int) -> tuple[Dataset, Dataset]:
    """Split off a share of each class, at least one image where a class has two; the order within each is kept."""
    held_out = _shares(dataset["label"][:], fraction, np.random.default_rng(seed))
    logger.warning(
        f"No validation images given: {held_out.sum()} of {len(held_out)} split off, {fraction:.0%} of each class "
        f"(seed {seed})."
    )
    return dataset.select(np.flatnonzero(~held_out)), dataset.select(np.flatnonzero(held_out))


def _shares(labels: Sequence[Any], fraction: float, rng: np.random.Generator) -> NDArray[np.bool_]:
    """Which rows belong to the share: so many of each class.

    With several labels a row, the rows of the rarest label are shared out first (iterative stratification: Sechidis et
    al. 2011, "On the stratification of multi-label data").
    """
    held_out = np.zeros(len(labels), dtype=bool)
    if not len(labels) or not isinstance(labels[0], list):
        ids = np.asarray(labels)
        for label in np.unique(ids):
            members = np.flatnonzero(ids == label)
            count = min(max(1, round(len(members) * fraction)), len(members) - 1)
            held_out[rng.permutation(members)[:count]] = True
        return held_out
    members_of: dict[Any, list[int]] = {}
    for row, several in enumerate(labels):
        for label in several or [None]:
            members_of.setdefault(label, []).append(row)
    is_free = np.ones(len(labels), dtype=bool)
    for members in map(np.asarray, sorted(members_of.values(), key=len)):
        wanted = min(max(1, round(len(members) * fraction)), len(members) - 1) - int(held_out[members].sum())
        free = rng.permutation(members[is_free[members]])
        held_out[free[: max(wanted, 0)]] = True
        is_free[members] = False
    return held_out


def split_off(dataset: Dataset, fraction: float, seed: int, where: str) -> tuple[Dataset, Dataset]:
    """[`stratified_split`] into two that both have images."""
    labels = dataset["label"][:]
    of_classes = itertools.chain.from_iterable(labels) if labels and isinstance(labels[0], list) else labels
    if max(Counter(of_classes).values(), default=0) < 2:
        raise ValueError(
            f"{where}: no validation images, and none can be split off, since each class has one image only "
            f"({len(dataset)} in all). At least one class must have two. {LAYOUT}"
        )
    return stratified_split(dataset, fraction, seed)


def check_fraction(fraction: float) -> None:
    """Raise a ValueError unless a share lies between 0 and 1."""
    if not 0.0 < fraction < 1.0:
        raise ValueError(f"validation_fraction={fraction!r}: give a share between 0 and 1, such as 0.2.")


def stratified_sample(dataset: Dataset, count: int, seed: int) -> Dataset:
    """Draw rows so that each class keeps its share, and none is lost if there are as many rows as classes.

    With several labels a row, any rows are drawn.

    Args:
        dataset (`datasets.Dataset`): with a column `label`.
        count (`int`): how many rows; at most as many as there are.
        seed (`int`): of the draw.

    Returns:
        `datasets.Dataset`: the rows, in the order they had.
    """
    rng = np.random.default_rng(seed)
    if isinstance(dataset["label"][0], list):
        return dataset.select(np.sort(rng.permutation(len(dataset))[:count]))
    labels = np.asarray(dataset["label"][:])
    # A row's place within its class, as a share of the class: the lowest places are an equal share of every class.
    place = np.empty(len(labels))
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        place[members] = (np.arange(len(members)) + 0.5) / len(members)
        place[members[0]] = 0.0  # the first of each class before all others
    chosen = np.lexsort((rng.random(len(labels)), place))[:count]
    return dataset.select(np.sort(chosen))
