"""Parts of a data set that are held out in turn: stratified by class, all views of an image on one side."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hf_sgdr.optim.schedule import require_whole

Folds = list[tuple[NDArray[np.int64], NDArray[np.int64]]]


def plain_rows(groups: NDArray[Any]) -> NDArray[np.int64]:
    """The first row of each group, in the order of the rows."""
    return np.sort(np.unique(groups, return_index=True)[1])


def stratified_folds(labels: NDArray[Any], folds: int, seed: int, groups: NDArray[Any]) -> Folds:
    """Rows to train on and rows that are held out, for each fold; every class is spread evenly over the folds.

    An image of a class that has no second one is never held out: a fold without it would know nothing of its class.

    Args:
        labels (array of int (rows,), or of 0 and 1 (rows, classes)): several labels of one row count as a class.
        folds (`int`): how many, at least 2; empty ones are left out.
        seed (`int`): of the draw.
        groups (array of int (rows,)): the image of each row.

    Raises:
        ValueError: if `folds` is out of range, or no class has two images.
    """
    folds = require_whole("folds", folds, at_least=2)
    kinds = labels if labels.ndim == 1 else np.unique(labels, axis=0, return_inverse=True)[1].reshape(-1)
    plain = plain_rows(groups)
    counts = np.bincount(kinds[plain])
    if labels.ndim > 1:  # a combination of labels that occurs once may be held out: each label has other images
        kinds = np.where(counts[kinds] >= 2, kinds, len(counts))
        counts = np.bincount(kinds[plain])
    if counts.max() < 2:
        raise ValueError("No class has two images, so none can be held out: give more images.")
    rng = np.random.default_rng(seed)
    part = np.full(len(plain), -1)
    start = 0
    for kind in np.flatnonzero(counts >= 2):
        members = rng.permutation(np.flatnonzero(kinds[plain] == kind))
        part[members] = (start + np.arange(len(members))) % folds
        start += len(members)  # the next class goes on where this one ended, so that folds are of one size
    part_of_group = dict(zip(groups[plain].tolist(), part.tolist(), strict=True))
    part_of_row = np.array([part_of_group[group] for group in groups.tolist()])
    held_out = [np.flatnonzero(part_of_row == number) for number in range(folds)]
    return [(np.flatnonzero(part_of_row != number), rows) for number, rows in enumerate(held_out) if len(rows)]


def checked_folds(
    folds: int | Sequence[tuple[Any, Any]], labels: NDArray[Any], seed: int, groups: NDArray[Any]
) -> Folds:
    """[`stratified_folds`] for a number; given ones as they are, if they are rows of the data.

    Raises:
        ValueError: if a fold has no rows to train on or none held out, names a row that is not there, or is a mask of
            another length.
    """
    if not isinstance(folds, Sequence):
        return stratified_folds(labels, folds, seed, groups)
    given = [(_positions(train, len(labels)), _positions(held_out, len(labels))) for train, held_out in folds]
    for number, (train, held_out) in enumerate(given):
        both = np.concatenate([train, held_out])
        if not len(train) or not len(held_out) or both.min() < 0 or both.max() >= len(labels):
            raise ValueError(
                f"folds[{number}] trains on {len(train)} rows and holds {len(held_out)} out: both must be rows of the "
                f"{len(labels)} features, at least one each."
            )
    return given


def _positions(rows: Any, count: int) -> NDArray[np.int64]:
    """Rows by their numbers, of a mask as well."""
    given = np.asarray(rows)
    if given.dtype != bool:
        return given.astype(np.int64)
    if given.shape != (count,):
        raise ValueError(f"folds has a mask of shape {given.shape} for {count} rows: must be one value a row.")
    return np.flatnonzero(given)


def folds_of_views(folds: Sequence[tuple[Any, Any]], images: int, views: int) -> list[tuple[Any, ...]]:
    """Folds by images as those of all their views, which lie one set after the other; folds by rows as they are."""

    def all_views(part: NDArray[Any]) -> NDArray[Any]:
        numbers = np.flatnonzero(part) if part.dtype == bool else part.astype(np.int64)
        return (numbers + images * np.arange(views)[:, None]).reshape(-1)

    given = [tuple(np.asarray(part) for part in fold) for fold in folds]
    parts = [part for fold in given for part in fold]
    if all(part.shape == (images,) if part.dtype == bool else (part < images).all() for part in parts):
        return [tuple(map(all_views, fold)) for fold in given]
    return list(given)
