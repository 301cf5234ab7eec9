"""The images of an evaluation: which files, of which classes, by class folders or by a table."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset

from hf_sgdr._utils.text import few, printable
from hf_sgdr.data.audit import unreadable_files
from hf_sgdr.data.folders import folders_of_split, labelled_files, rows_of_split
from hf_sgdr.data.hashes import content_hashes
from hf_sgdr.data.images import undecoded
from hf_sgdr.data.labels import label_values
from hf_sgdr.data.splits import SPLIT_NAMES
from hf_sgdr.data.tables import METADATA


@dataclass(frozen=True)
class LabelledFiles:
    """Images whose class is known.

    Args:
        files (`list[str]`): those that can be read.
        classes (`list`): the name of each one's class, or the names of its labels.
        title (`str`): which they are, in words.
        folder (`Path`): they are called by their path below it.
        unreadable (`dict[str, str]`): why others cannot be read.
    """

    files: list[str]
    classes: list[Any]
    title: str
    folder: Path
    unreadable: dict[str, str]


def files_of_folder(
    root: str, names: Sequence[str], split: str | None, fraction: float, seed: int, seen: set[str] | None
) -> LabelledFiles:
    """The files of class folders.

    Args:
        root (`str`): the folder.
        names (sequence of `str`): the classes that there may be.
        split (`str` or None): train, validation, test or all; by default validation, and all of a folder without train/
            of which no image was seen.
        fraction (`float`), seed (`int`): of the share that training split off.
        seen (`set[str]` or None): hashes of the images that the model was trained on.

    Raises:
        FileNotFoundError, ValueError: if there is no such folder or split, no image, or a class of another name.
    """
    place = Path(root)
    folders, is_share = folders_of_split(place, split)
    folder = folders[0] if len(folders) == 1 else place
    rows, unreadable = labelled_files(folders, names)
    if is_share and split is None and seen is not None and not seen.intersection(content_hashes(rows["file"])):
        is_share, split = False, "all"
    title = f"all of {place.resolve().name}" if split == "all" else f"{place.resolve().name}/{folder.name}"
    if is_share:
        split = split or "validation"
        rows = rows.select(rows_of_split(rows, split, fraction, seed))
        title = f"the {split} share of {place.resolve().name} (validation is {fraction:g} of each class, seed {seed})"
    return LabelledFiles(list(rows["file"]), list(rows["class"]), title, folder, unreadable)


def is_read_as_table(root: Path) -> bool:
    """Whether training takes a folder's labels from its own table; see [`~hf_sgdr.data.tables.rows_of_metadata`]."""
    return any((folder / name).is_file() for folder in (root, *map(root.joinpath, SPLIT_NAMES)) for name in METADATA)


def files_of_splits(
    splits: Mapping[str, Dataset],
    place: Path,
    folder: Path,
    names: Sequence[str],
    split: str | None,
    seen: set[str] | None = None,
) -> LabelledFiles:
    """The files of splits that were loaded as for training.

    Args:
        splits (mapping of `str` to `datasets.Dataset`): with columns image and label.
        place (`Path`): what they were loaded from.
        folder (`Path`): files are called by their path below it.
        names, split: as in [`files_of_folder`].
        seen (`set[str]`, *optional*): as there, where validation is a share that was split off.

    Raises:
        ValueError: if there is no such split, or a class of another name.
    """
    where = printable(place)
    if split is None:
        hashes = content_hashes(file for part in splits.values() for file in _files(part)) if seen else []
        split = "all" if seen and seen.isdisjoint(hashes) else "validation"
    if split != "all" and split not in splits:
        raise ValueError(f"{where} is divided into {few(list(splits))}; it has no {split}.")
    parts = list(splits.values()) if split == "all" else [splits[split]]
    files = [file for part in parts for file in _files(part)]
    classes = [value for part in parts for value in label_values(part)]
    if None in classes:
        raise ValueError(f"{where}, {split}: {classes.count(None)} images have no label to compare with.")
    given = {name for value in classes for name in ([value] if isinstance(value, str) else value)}
    if unknown := sorted(given - set(names)):
        raise ValueError(f"{where}: {few(unknown)} not among the model's classes, which are {few(names)}.")
    unreadable = unreadable_files(files)
    rows = [row for row in zip(files, classes, strict=True) if row[0] not in unreadable]
    title = f"{split} of {place.resolve().name}"
    return LabelledFiles([file for file, _ in rows], [value for _, value in rows], title, folder, unreadable)


def _files(split: Dataset) -> list[str]:
    return [row["path"] for row in undecoded(split)["image"][:]]
