"""Folders of images as one `DatasetDict`: train, validation, test; columns image and label.

The folder layout is that of `datasets`' imagefolder, without its traps: labels come from the folder below the split
whatever the depth, class ids come from train alone, and what lies beside the splits (fast.ai's `sample/`) stays out.
"""

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from transformers.utils import logging

from hf_sgdr._utils.files import RUNS_FOLDER, UNFINISHED_RUNS_FOLDER
from hf_sgdr._utils.text import few, printable
from hf_sgdr.data.audit import OnError, check_on_error, readable, unreadable_files
from hf_sgdr.data.labels import UNLABELLED
from hf_sgdr.data.splits import (
    LAYOUT,
    SPLIT_NAMES,
    TEST_NAMES,
    VALIDATION_NAMES,
    check_fraction,
    split_off,
    stratified_split,
)
from hf_sgdr.data.tables import METADATA, labelled_splits, rows_of_metadata

logger = logging.get_logger(__name__)

# imagefolder would leave telephones' HEIC images out without a word; here they are named, with the mend.
ENDINGS = {*ImageFolder.EXTENSIONS, ".heic", ".heif"}
# What the recipes write into an output folder: train.py while it runs and at its end, find_lr.py.
RUN_SIGNS = (RUNS_FOLDER, UNFINISHED_RUNS_FOLDER, "results.json", "recipe.yaml", "range-test.json")
MODEL_FILES = ("config.json", "model.safetensors")


FilesByClass = dict[str, list[str]]


def load_image_folder(
    path: str | os.PathLike[str],
    *,
    label_pattern: str | None = None,
    label_column_name: str = "label",
    label_delimiter: str | None = None,
    validation_fraction: float = 0.2,
    seed: int = 42,
    on_error: OnError = "raise",
) -> DatasetDict:
    r"""Read a folder of images, one folder a class, or labels from the files' names or from the folder's own table.

    With a folder `train`, the splits are `train`, `validation` (from validation, valid or val) and `test` (from test
    or test1; without class folders it is unlabelled, all labels -1). Otherwise the folders in `path` are the classes.
    Without a validation folder a share of each class is split off, and the log says so. Folders that a run wrote into,
    such as a recipe's `output_dir`, are no classes; the log names them.

    With `metadata.csv`, `.jsonl` or `.parquet` in it or in its splits, as the ecosystem's imagefolder has them, labels
    come from there; see [`~hf_sgdr.data.tables.load_image_table`].

    Args:
        path (`str` or `PathLike`): the folder.
        label_pattern (`str`, *optional*): a regular expression whose first group, found in a file's name, is its class:
            `r"^(.+)_\d+"` (fast.ai's `from_name_re`). Folders are then no classes.
        label_column_name, label_delimiter (`str`, *optional*): of the folder's table.
        validation_fraction (`float`, *optional*, defaults to 0.2): share of each class for validation, where there is
            no folder for it; between 0 and 1.
        seed (`int`, *optional*, defaults to 42): for that split.
        on_error (`"raise"`, `"skip"` or None, *optional*, defaults to `"raise"`): every image is decoded once, before
            anything else; where some cannot be, "raise" is an error that names each with its reason, and "skip" leaves
            them out and logs the same. None looks at none of them.

    Returns:
        `DatasetDict`: each split with the columns `image` (`datasets.Image`) and `label` (`datasets.ClassLabel`, the
        names sorted, from train).

    Raises:
        FileNotFoundError: if `path` is not a folder.
        UnreadableImagesError: a `ValueError`, if images cannot be read; see `on_error`.
        ValueError: if it holds no image, only one class, or a class that train lacks; `validation_fraction` is off; or
            a column or a delimiter is named and there is no table.
    """
    check_on_error(on_error)
    root = Path(path)
    if not root.is_dir():
        beside = _names(root.parent) if root.parent.is_dir() else []
        raise FileNotFoundError(
            f"{printable(root)}: {'is a file, not a folder' if root.exists() else 'no such folder'}. "
            f"{f'Beside it: {few(beside)}. ' if beside else ''}{LAYOUT}"
        )
    check_fraction(validation_fraction)
    train_root = root / "train"
    validation_root = next((root / name for name in VALIDATION_NAMES if (root / name).is_dir()), None)
    if not train_root.is_dir():
        if validation_root is not None:
            raise ValueError(f"{printable(root)}: there is {validation_root.name}/ but no train/. {LAYOUT}")
        train_root = root
        nested = [folder.name for folder in root.iterdir() if (folder / "train").is_dir()]
        if nested:
            raise ValueError(
                f"{printable(root)}: {few(sorted(nested))} are data sets of their own, with train/ inside. Name one."
            )
        if label_pattern is None:
            _check_splits_spelled(root)
    test_root = next((root / name for name in TEST_NAMES if train_root != root and (root / name).is_dir()), None)
    if label_pattern is None:
        folders = {"": root, "train": train_root, "validation": validation_root, "test": test_root}
        parts = rows_of_metadata(folders, label_column_name, label_delimiter)
        if parts:
            return labelled_splits(parts, printable(root), validation_fraction, seed, on_error)
    if label_delimiter is not None or label_column_name != "label":
        raise ValueError(
            f"{printable(root)}: label_column_name={label_column_name!r}, label_delimiter={label_delimiter!r} are of a "
            f"table, and no {', '.join(METADATA)} is read here: leave them out."
        )
    by_class = _by_pattern(label_pattern) if label_pattern is not None else _images_by_class
    by_split = {"train": by_class(train_root)}
    _check_train(by_split["train"], train_root)  # before all images are looked at
    if validation_root is not None:
        by_split["validation"] = by_class(validation_root)
    if test_root is not None:
        images = by_class(test_root, quiet=True)
        is_labelled = bool(set(images) & set(by_split["train"]))
        by_split["test"] = images if is_labelled else {"": list(image_files(test_root.absolute()))}
    by_split = _readable_images(by_split, on_error)
    names = _check_train(by_split["train"], train_root)
    splits = {"train": _to_dataset(by_split["train"], names)}
    if validation_root is not None:
        _check_classes(by_split["validation"], names, validation_root)
        splits["validation"] = _to_dataset(by_split["validation"], names)
    else:
        splits["train"], splits["validation"] = split_off(splits["train"], validation_fraction, seed, printable(root))
    if test_root is not None and any(by_split["test"].values()):
        if "" not in by_split["test"]:
            _check_classes(by_split["test"], names, test_root)
        splits["test"] = _to_dataset(by_split["test"], names)
    return DatasetDict(splits)


def _check_splits_spelled(root: Path) -> None:
    """Refuse Train/ and Test/, or training_set/ and test_set/, which would be the classes: the same folders in each."""
    folders = [folder for folder in root.iterdir() if folder.is_dir() and not _is_of_a_run(folder, quiet=True)]
    inside = {folder.name: {sub.name for sub in folder.iterdir() if sub.is_dir()} for folder in folders}
    shared = set.intersection(*inside.values()) if inside else set()
    if len(shared) >= 2 and any(name.lower().startswith("train") for name in inside):
        raise ValueError(
            f"{printable(root)}: {few(sorted(inside))} hold the same folders ({few(sorted(shared))}), so they look "
            "like splits: rename them train, validation and test. If they are classes, call none of them train."
        )


def image_files(folder: Path) -> Iterator[str]:
    """All picture files below a folder, sorted; hidden ones are left out, links are followed but never upwards.

    So are the pictures in folders that a run wrote into, which the log names. A folder that cannot be listed is given
    itself, so that it is named where images are read.
    """
    above = {str(parent) for parent in Path(os.path.realpath(folder)).parents}
    seen: set[str] = set()
    not_listed: list[str] = []
    for parent, folders, files in os.walk(
        folder, followlinks=True, onerror=lambda error: not_listed.append(os.fspath(error.filename))
    ):
        real = os.path.realpath(parent)
        if real in seen or real in above:
            folders.clear()
            continue
        seen.add(real)
        visible = (name for name in sorted(folders) if not name.startswith("."))
        folders[:] = [name for name in visible if not _is_of_a_run(Path(parent, name))]
        for name in sorted(files):
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in ENDINGS:
                yield os.path.join(parent, name)  # a million of `Path` would take as long as all the rest
    yield from not_listed


def folders_of_split(root: Path, split: str | None) -> tuple[list[Path], bool]:
    """The folders that hold a split's class folders.

    Args:
        root (`Path`): as for [`load_image_folder`].
        split (`str` or None): train, validation, test or all; by default validation.

    Returns:
        `tuple[list[Path], bool]`: the folders, and whether the split is a share of them, as in training.

    Raises:
        FileNotFoundError, ValueError: if there is no such folder or split.
    """
    if not root.is_dir():
        problem = "a file, not a" if root.exists() else "no such"
        raise FileNotFoundError(f"{printable(root)}: {problem} folder. {LAYOUT}")
    folders = {
        kind: root / name
        for kind, names in (("train", ("train",)), ("validation", VALIDATION_NAMES), ("test", TEST_NAMES))
        for name in reversed(names)
        if (root / name).is_dir()
    }
    if "train" not in folders and {folder.name for folder in class_folders(root)} - set(SPLIT_NAMES):
        folders = {}  # a class is called so
    if not folders and split == "test":
        raise ValueError(f"{printable(root)} has no folder test; --split all takes every image.")
    if not folders:
        return [root], split != "all"
    if split == "all":
        return list(folders.values()), False
    split = split or "validation"
    if split not in folders:
        raise ValueError(f"{printable(root)} is divided into --split {' and '.join(folders)}; it has no {split}.")
    return [folders[split]], False


def labelled_files(folders: Sequence[Path], names: Sequence[str]) -> tuple[Dataset, dict[str, str]]:
    """The images below class folders as rows of `file`, `class` and `label`, and why others cannot be read.

    Args:
        folders (sequence of `Path`): that hold class folders.
        names (sequence of `str`): the classes that there may be.

    Raises:
        ValueError: if there is a class of another name, or no image can be read.
    """
    classes = sorted(entry for folder in folders for entry in class_folders(folder))
    where = " and ".join(map(printable, folders))
    rows = [(file, folder.name) for folder in classes for file in image_files(folder)]
    unknown = sorted({name for _, name in rows} - set(names))
    if unknown:
        raise ValueError(
            f"{where}: {few(unknown)} not among the model's classes, which are {few(names)}. Rename the folder as the "
            "model calls it, or take it out."
        )
    files = [file for file, _ in rows]
    unreadable = unreadable_files(files)
    rows = [(file, name) for file, name in rows if file not in unreadable]
    if not rows:
        raise ValueError(f"{where}: no image in class folders that can be read. {LAYOUT}")
    kinds = sorted({name for _, name in rows})  # as training counts, which the share split off depends on
    columns = {"file": [file for file, _ in rows], "class": [name for _, name in rows]}
    return Dataset.from_dict({**columns, "label": [kinds.index(name) for _, name in rows]}), unreadable


def rows_of_split(rows: Dataset, split: str, fraction: float, seed: int) -> list[int]:
    """The positions of the rows that training takes for a split of a folder without one.

    Raises:
        ValueError: if the share is empty.
    """
    check_fraction(fraction)
    train, validation = stratified_split(rows.add_column("position", range(len(rows))), fraction, seed)
    positions = list((train if split == "train" else validation)["position"])
    if not positions:
        where = printable(Path(rows["file"][0]).parent.parent)
        raise ValueError(f"{where}: too few images to split off any; --split all takes every one.")
    return positions


def class_folders(root: Path) -> list[Path]:
    """The folders in `root` that may be classes, sorted; without hidden ones, and the log names what is no class.

    Such are links to a folder that they lie in, and folders of a run, whose figures are no images of a class.
    """
    folders: list[Path] = []
    for folder in sorted(entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith(".")):
        if root.resolve().is_relative_to(folder.resolve()):
            logger.warning(f"{printable(folder)}: a link to a folder that it lies in, so it is not a class.")
        elif not _is_of_a_run(folder):
            folders.append(folder)
    return folders


def _is_of_a_run(folder: Path, quiet: bool = False) -> bool:
    """Whether a recipe or a trainer wrote into a folder; the log names it."""
    there = {name for name in (*RUN_SIGNS, *MODEL_FILES) if os.path.exists(folder / name)}  # not if it may not be read
    sign = next((name for name in RUN_SIGNS if name in there), None)
    if sign is None and there.issuperset(MODEL_FILES):
        sign = " and ".join(MODEL_FILES)
    if sign is not None and not quiet:
        logger.warning(f"{printable(folder)}: holds {sign}, so it is the output of a run and left out.")
    return sign is not None


def _images_by_class(root: Path, quiet: bool = False) -> FilesByClass:
    images: FilesByClass = {}
    for folder in class_folders(root):
        if files := list(image_files(folder.absolute())):
            images[_utf8_name(folder)] = files
        elif not quiet:
            logger.warning(f"{printable(folder)}: no image in it, so it is not a class.")
    return images


def _by_pattern(pattern: str) -> Callable[..., FilesByClass]:
    """What finds the images below a folder, by the class that a pattern finds in their names."""
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"label_pattern={pattern!r} is no regular expression ({error}).") from error
    if not expression.groups:
        raise ValueError(f"label_pattern={pattern!r}: the class must be a group of it, in brackets: r'^(.+)_\\d+'.")

    def images_by_class(root: Path, quiet: bool = False) -> FilesByClass:
        images: FilesByClass = {}
        without = []
        for file in image_files(root.absolute()):
            match = expression.search(os.path.basename(file))
            if match is None or not match[1]:
                without.append(os.path.relpath(file, root))
            else:
                images.setdefault(match[1], []).append(file)
        if without and not quiet:
            raise ValueError(
                f"{printable(root)}: label_pattern={pattern!r} finds no class in {len(without)} names: {few(without)}."
            )
        return {} if without else dict(sorted(images.items()))

    return images_by_class


def _utf8_name(folder: Path) -> str:
    try:
        folder.name.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{printable(folder)}: its name is not UTF-8, so it can name no class. Rename it.") from error
    return folder.name


def _readable_images(by_split: dict[str, FilesByClass], on_error: OnError) -> dict[str, FilesByClass]:
    """Without the images that cannot be read, and without classes that had only such."""
    files = [file for images in by_split.values() for members in images.values() for file in members]
    positions = readable(files, files, on_error)
    if len(positions) == len(files):
        return by_split
    intact = {files[position] for position in positions}
    result = {
        split: {
            name: kept for name, members in images.items() if (kept := [file for file in members if file in intact])
        }
        for split, images in by_split.items()
    }
    for split, images in by_split.items():
        if lost := sorted(set(images) - set(result[split])):
            logger.warning(f"{split}: no image of {few(lost)} can be read, so it is not a class there.")
    return result


def _to_dataset(images: FilesByClass, names: list[str]) -> Dataset:
    """Rows in the order of the classes; the name "" is no class but stands for images without labels."""
    files = [file for members in images.values() for file in members]
    numbers = [names.index(name) if name else UNLABELLED for name in images]
    labels = np.repeat(numbers, list(map(len, images.values())))
    features = Features({"image": Image(), "label": ClassLabel(names=names)})
    # Of lists, `datasets` would make a dict for each image first.
    columns = {"image": pa.array(files, pa.string()), "label": pa.array(labels, pa.int64())}
    return Dataset.from_dict(columns, features)


def _check_train(images: FilesByClass, root: Path) -> list[str]:
    """The names of the classes, which are those of train; two at least."""
    if len(images) >= 2:
        return sorted(images)
    kinds = Counter(file.suffix.lower() or "no ending" for file in root.rglob("*") if file.is_file())
    classes = f"one class only ({few(list(images))})" if images else "no image in class folders"
    listing = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(3)) or "no file at all"
    raise ValueError(
        f"{printable(root)}: {classes}; it holds {few(_names(root))} ({listing}). "
        f"At least two classes are needed. {LAYOUT}"
    )


def _check_classes(images: FilesByClass, names: list[str], root: Path) -> None:
    if not images:
        raise ValueError(f"{printable(root)}: no image in class folders; it holds {few(_names(root))}. {LAYOUT}")
    unknown = sorted(set(images) - set(names))
    if unknown:
        raise ValueError(
            f"{printable(root)}: {few(unknown)} not among the classes of train ({few(names)}). "
            "Add images of it to train, or take the folder out."
        )
    missing = sorted(set(names) - set(images))
    if missing:
        logger.warning(f"{printable(root)}: no image of {few(missing)}; its metrics say nothing about it.")


def _names(folder: Path) -> list[str]:
    return sorted(entry.name + ("/" if entry.is_dir() else "") for entry in folder.iterdir())
