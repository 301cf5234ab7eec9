"""Folders of images and data sets of the Hub as one `DatasetDict`: train, validation, test; columns image and label.

The folder layout is that of `datasets`' imagefolder, without its traps: labels come from the folder below the split
whatever the depth, class ids come from train alone, and what lies beside the splits (fast.ai's `sample/`) stays out.
"""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value, load_dataset
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from transformers.utils import logging

from hf_sgdr._utils.files import RUNS_FOLDER, UNFINISHED_RUNS_FOLDER
from hf_sgdr._utils.text import printable
from hf_sgdr.data.audit import OnError, check_on_error, readable
from hf_sgdr.data.images import undecoded

logger = logging.get_logger(__name__)

VALIDATION_FOLDERS = ("validation", "valid", "val")
TEST_FOLDERS = ("test", "test1")
UNLABELLED = -1
# imagefolder would leave telephones' HEIC images out without a word; here they are named, with the mend.
ENDINGS = {*ImageFolder.EXTENSIONS, ".heic", ".heif"}
# What the recipes write into an output folder: train.py while it runs and at its end, find_lr.py.
RUN_SIGNS = (RUNS_FOLDER, UNFINISHED_RUNS_FOLDER, "results.json", "recipe.yaml", "range-test.json")
LAYOUT = "Lay the images out as PATH/CLASS/*.jpg, or as PATH/train/CLASS/*.jpg and PATH/valid/CLASS/*.jpg."


FilesByClass = dict[str, list[str]]


def load_image_folder(
    path: str | os.PathLike[str],
    *,
    validation_fraction: float = 0.2,
    seed: int = 42,
    on_error: OnError = "raise",
) -> DatasetDict:
    """Read a folder of images, one folder a class.

    With a folder `train`, the splits are `train`, `validation` (from validation, valid or val) and `test` (from test
    or test1; without class folders it is unlabelled, all labels -1). Otherwise the folders in `path` are the classes.
    Without a validation folder a share of each class is split off, and the log says so. Folders that a run wrote into,
    such as a recipe's `output_dir`, are no classes; the log names them.

    Args:
        path (`str` or `PathLike`): the folder.
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
        ValueError: if it holds no image, only one class, or a class that train lacks; or `validation_fraction` is off.
    """
    check_on_error(on_error)
    root = Path(path)
    if not root.is_dir():
        beside = _names(root.parent) if root.parent.is_dir() else []
        raise FileNotFoundError(
            f"{printable(root)}: {'is a file, not a folder' if root.exists() else 'no such folder'}. "
            f"{f'Beside it: {_few(beside)}. ' if beside else ''}{LAYOUT}"
        )
    check_fraction(validation_fraction)
    train_root = root / "train"
    validation_root = next((root / name for name in VALIDATION_FOLDERS if (root / name).is_dir()), None)
    if not train_root.is_dir():
        if validation_root is not None:
            raise ValueError(f"{printable(root)}: there is {validation_root.name}/ but no train/. {LAYOUT}")
        train_root = root
        nested = [folder.name for folder in root.iterdir() if (folder / "train").is_dir()]
        if nested:
            raise ValueError(
                f"{printable(root)}: {_few(sorted(nested))} are data sets of their own, with train/ inside. Name one."
            )
    by_split = {"train": _images_by_class(train_root)}
    _check_train(by_split["train"], train_root)  # before all images are looked at
    if validation_root is not None:
        by_split["validation"] = _images_by_class(validation_root)
    test_root = next((root / name for name in TEST_FOLDERS if train_root != root and (root / name).is_dir()), None)
    if test_root is not None:
        by_class = _images_by_class(test_root, quiet=True)
        is_labelled = bool(set(by_class) & set(by_split["train"]))
        by_split["test"] = by_class if is_labelled else {"": list(map(_absolute, image_files(test_root)))}
    by_split = _readable_images(by_split, on_error)
    names = _check_train(by_split["train"], train_root)
    splits = {"train": _to_dataset(by_split["train"], names)}
    if validation_root is not None:
        _check_classes(by_split["validation"], names, validation_root)
        splits["validation"] = _to_dataset(by_split["validation"], names)
    else:
        splits["train"], splits["validation"] = _split_off(splits["train"], validation_fraction, seed, printable(root))
    if test_root is not None and any(by_split["test"].values()):
        if "" not in by_split["test"]:
            _check_classes(by_split["test"], names, test_root)
        splits["test"] = _to_dataset(by_split["test"], names)
    return DatasetDict(splits)


def load_image_dataset(
    name: str,
    *,
    image_column_name: str = "image",
    label_column_name: str = "label",
    train_split_name: str = "train",
    validation_split_name: str | None = None,
    validation_fraction: float = 0.2,
    seed: int = 42,
    on_error: OnError = "raise",
) -> DatasetDict:
    """Read a labelled image data set of the Hub, or a local folder that `datasets.load_dataset` reads.

    Labels that are not a `datasets.ClassLabel` yet, such as strings, are numbered in the order of the training split's
    sorted values. Both splits count the classes as the training split does; a missing label becomes -1.

    Args:
        name (`str`): what `datasets.load_dataset` takes.
        image_column_name, label_column_name (`str`, *optional*): its columns; they become `image` and `label`.
        train_split_name (`str`, *optional*, defaults to "train"): its training split.
        validation_split_name (`str`, *optional*): its validation split; by default "validation", "valid", "val" or
            "test", whichever there is, else a share of each class is split off.
        validation_fraction (`float`, *optional*, defaults to 0.2): that share.
        seed (`int`, *optional*, defaults to 42): for that split.
        on_error (`"raise"`, `"skip"` or None, *optional*, defaults to `"raise"`): as in [`load_image_folder`].

    Raises:
        UnreadableImagesError: a `ValueError`, if images cannot be read; see `on_error`.
        ValueError: if a split or a column is not there, the label is not a class, or the validation split has a class
            that the training split lacks.
    """
    check_fraction(validation_fraction)
    check_on_error(on_error)
    loaded = load_dataset(name)
    if validation_split_name is None:
        validation_split_name = next((split for split in (*VALIDATION_FOLDERS, "test") if split in loaded), None)
    splits = {"train": train_split_name, "validation": validation_split_name}
    result = DatasetDict()
    for split, given in splits.items():
        if given is None:
            continue
        if given not in loaded:
            raise ValueError(
                f"{name} has no split {given!r}: it has {_few(sorted(loaded))}. Name it with {split}_split_name."
            )
        rows = _two_columns(loaded[given], name, image_column_name, label_column_name)
        classes = result["train"].features["label"].names if split != "train" else _class_names(rows, name)
        rows = _numbered(rows, classes, f"{name}, split {given!r}")
        titles = [f"{given} image {number}" for number in range(len(rows))]
        keep = readable(undecoded(rows)["image"], titles, on_error)
        if not keep:
            raise ValueError(f"{name}, split {given!r}: no image that can be read; it must have at least one.")
        result[split] = rows if len(keep) == len(rows) else rows.select(keep)
    if "validation" not in result:
        result["train"], result["validation"] = _split_off(result["train"], validation_fraction, seed, name)
    return result


def stratified_split(dataset: Dataset, fraction: float, seed: int) -> tuple[Dataset, Dataset]:
    """Split off a share of each class, at least one image where a class has two; the order within each is kept."""
    labels = np.asarray(dataset["label"])
    rng = np.random.default_rng(seed)
    held_out = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        count = min(max(1, round(len(members) * fraction)), len(members) - 1)
        held_out[rng.permutation(members)[:count]] = True
    logger.warning(
        f"No validation images given: {held_out.sum()} of {len(labels)} split off, {fraction:.0%} of each class "
        f"(seed {seed})."
    )
    return dataset.select(np.flatnonzero(~held_out)), dataset.select(np.flatnonzero(held_out))


def _split_off(dataset: Dataset, fraction: float, seed: int, where: str) -> tuple[Dataset, Dataset]:
    """[`stratified_split`] into two that both have images."""
    if max(Counter(dataset["label"]).values()) < 2:
        raise ValueError(
            f"{where}: no validation images, and none can be split off, since each class has one image only "
            f"({len(dataset)} in all). At least one class must have two. {LAYOUT}"
        )
    return stratified_split(dataset, fraction, seed)


def check_fraction(fraction: float) -> None:
    """Raise a ValueError unless a share lies between 0 and 1."""
    if not 0.0 < fraction < 1.0:
        raise ValueError(f"validation_fraction={fraction!r}: give a share between 0 and 1, such as 0.2.")


def image_files(folder: Path) -> Iterator[Path]:
    """All picture files below a folder, sorted; hidden ones are left out, links are followed but never upwards.

    A folder that cannot be listed is given itself, so that it is named where images are read.
    """
    above = {str(parent) for parent in Path(os.path.realpath(folder)).parents}
    seen: set[str] = set()
    not_listed: list[Path] = []
    for parent, folders, files in os.walk(
        folder, followlinks=True, onerror=lambda error: not_listed.append(Path(error.filename))
    ):
        real = os.path.realpath(parent)
        if real in seen or real in above:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in ENDINGS:
                yield Path(parent, name)
    yield from not_listed


def _absolute(file: Path) -> str:
    return str(file.absolute())


def class_folders(root: Path) -> list[Path]:
    """The folders in `root` that may be classes, sorted; without hidden ones, and the log names what is no class.

    Such are links to a folder that they lie in, and folders of a run, whose figures are no images of a class.
    """
    folders: list[Path] = []
    for folder in sorted(entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith(".")):
        if root.resolve().is_relative_to(folder.resolve()):
            logger.warning(f"{printable(folder)}: a link to a folder that it lies in, so it is not a class.")
        elif sign := _sign_of_a_run(folder):
            logger.warning(f"{printable(folder)}: holds {sign}, so it is the output of a run and not a class.")
        else:
            folders.append(folder)
    return folders


def _sign_of_a_run(folder: Path) -> str | None:
    """What shows that a recipe or a trainer wrote into a folder; None if nothing does."""
    found = [name for name in RUN_SIGNS if (folder / name).exists()]
    if not found and (folder / "config.json").exists() and (folder / "model.safetensors").exists():
        found = ["config.json and model.safetensors"]
    return found[0] if found else None


def _images_by_class(root: Path, quiet: bool = False) -> FilesByClass:
    images: FilesByClass = {}
    for folder in class_folders(root):
        if files := list(map(_absolute, image_files(folder))):
            images[_utf8_name(folder)] = files
        elif not quiet:
            logger.warning(f"{printable(folder)}: no image in it, so it is not a class.")
    return images


def _utf8_name(folder: Path) -> str:
    try:
        folder.name.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{printable(folder)}: its name is not UTF-8, so it can name no class. Rename it.") from error
    return folder.name


def _readable_images(by_split: dict[str, FilesByClass], on_error: OnError) -> dict[str, FilesByClass]:
    """Without the images that cannot be read, and without classes that had only such."""
    rows = [
        (split, name, file) for split, images in by_split.items() for name, files in images.items() for file in files
    ]
    files = [file for _, _, file in rows]
    result: dict[str, FilesByClass] = {split: {} for split in by_split}
    for position in readable(files, files, on_error):
        split, name, file = rows[position]
        result[split].setdefault(name, []).append(file)
    for split, images in by_split.items():
        if lost := sorted(set(images) - set(result[split])):
            logger.warning(f"{split}: no image of {_few(lost)} can be read, so it is not a class there.")
    return result


def _to_dataset(images: FilesByClass, names: list[str]) -> Dataset:
    """Rows in the order of the classes; the name "" is no class but stands for images without labels."""
    rows = [(file, names.index(name) if name else UNLABELLED) for name, files in images.items() for file in files]
    features = Features({"image": Image(), "label": ClassLabel(names=names)})
    return Dataset.from_dict({"image": [file for file, _ in rows], "label": [id_ for _, id_ in rows]}, features)


def _check_train(images: FilesByClass, root: Path) -> list[str]:
    """The names of the classes, which are those of train; two at least."""
    if len(images) < 2:
        raise ValueError(_too_few_classes(root, images))
    return sorted(images)


def _check_classes(images: FilesByClass, names: list[str], root: Path) -> None:
    if not images:
        raise ValueError(f"{printable(root)}: no image in class folders; it holds {_few(_names(root))}. {LAYOUT}")
    unknown = sorted(set(images) - set(names))
    if unknown:
        raise ValueError(
            f"{printable(root)}: {_few(unknown)} not among the classes of train ({_few(names)}). "
            "Add images of it to train, or take the folder out."
        )
    missing = sorted(set(names) - set(images))
    if missing:
        logger.warning(f"{printable(root)}: no image of {_few(missing)}; its figures say nothing about it.")


def _too_few_classes(root: Path, images: FilesByClass) -> str:
    kinds = Counter(file.suffix.lower() or "no ending" for file in root.rglob("*") if file.is_file())
    found = f"one class only ({_few(list(images))})" if images else "no image in class folders"
    listing = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(3)) or "no file at all"
    return (
        f"{printable(root)}: {found}; it holds {_few(_names(root))} ({listing}). "
        f"At least two classes are needed. {LAYOUT}"
    )


def _two_columns(dataset: Dataset, name: str, image_column: str, label_column: str) -> Dataset:
    for column, argument in ((image_column, "image_column_name"), (label_column, "label_column_name")):
        if column not in dataset.column_names:
            raise ValueError(
                f"{name} has no column {column!r}: it has {_few(dataset.column_names)}. Name it with {argument}."
            )
    dataset = dataset.select_columns([image_column, label_column])
    dataset = dataset.rename_columns(
        {old: new for old, new in ((image_column, "image"), (label_column, "label")) if old != new}
    )
    if not isinstance(dataset.features["image"], Image):
        raise ValueError(f"{name}: column {image_column!r} holds {dataset.features['image']}, not images.")
    if not isinstance(dataset.features["label"], ClassLabel | Value):
        kind = dataset.features["label"]
        raise ValueError(f"{name}: column {label_column!r} holds {kind}; it must hold one class an image.")
    return dataset


def _class_names(dataset: Dataset, name: str) -> list[str]:
    """The classes of a split in the order of their ids: as its `ClassLabel` has them, else its values, sorted."""
    feature = dataset.features["label"]
    if isinstance(feature, ClassLabel):
        return list(feature.names)
    values = sorted({value for value in dataset["label"] if value is not None})
    if not values:
        raise ValueError(f"{name}: no label in its training split; it must have one for each image.")
    return [str(value) for value in values]


def _numbered(dataset: Dataset, classes: list[str], where: str) -> Dataset:
    """The same rows, labels as ids of these classes."""
    feature = dataset.features["label"]
    if isinstance(feature, ClassLabel) and feature.names == classes:
        return dataset
    ids = {name: id_ for id_, name in enumerate(classes)}
    labels = list(dataset["label"])
    if isinstance(feature, ClassLabel):
        found = [None if label is None or label < 0 else feature.names[label] for label in labels]
    else:
        found = [None if label is None else str(label) for label in labels]
    unknown = sorted({name for name in found if name is not None} - set(ids))
    if unknown:
        raise ValueError(
            f"{where}: {_few(unknown)} not among the classes of the training split ({_few(classes)}). "
            "Add images of it there, or take them out here."
        )
    numbered = [UNLABELLED if name is None else ids[name] for name in found]
    return dataset.remove_columns("label").add_column("label", numbered, feature=ClassLabel(names=classes))


def _names(folder: Path) -> list[str]:
    return sorted(entry.name + ("/" if entry.is_dir() else "") for entry in folder.iterdir())


def _few(names: list[str], most: int = 8) -> str:
    shown = ", ".join(repr(name) for name in names[:most])
    return (shown or "nothing") + (f" and {len(names) - most} more" if len(names) > most else "")
