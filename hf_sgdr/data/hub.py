"""Data sets of the Hub, or of whatever `datasets` reads, as one `DatasetDict` with the columns image and label."""

from datasets import ClassLabel, Dataset, DatasetDict, Image, Value, load_dataset

from hf_sgdr._utils.text import few
from hf_sgdr.data.audit import OnError, check_on_error, readable
from hf_sgdr.data.images import undecoded
from hf_sgdr.data.splits import UNLABELLED, VALIDATION_NAMES, check_fraction, split_off


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
        validation_split_name = next((split for split in (*VALIDATION_NAMES, "test") if split in loaded), None)
    splits = {"train": train_split_name, "validation": validation_split_name}
    result = DatasetDict()
    for split, given in splits.items():
        if given is None:
            continue
        if given not in loaded:
            raise ValueError(
                f"{name} has no split {given!r}: it has {few(sorted(loaded))}. Name it with {split}_split_name."
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
        result["train"], result["validation"] = split_off(result["train"], validation_fraction, seed, name)
    return result


def _two_columns(dataset: Dataset, name: str, image_column: str, label_column: str) -> Dataset:
    for column, argument in ((image_column, "image_column_name"), (label_column, "label_column_name")):
        if column not in dataset.column_names:
            raise ValueError(
                f"{name} has no column {column!r}: it has {few(dataset.column_names)}. Name it with {argument}."
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
            f"{where}: {few(unknown)} not among the classes of the training split ({few(classes)}). "
            "Add images of it there, or take them out here."
        )
    numbered = [UNLABELLED if name is None else ids[name] for name in found]
    return dataset.remove_columns("label").add_column("label", numbered, feature=ClassLabel(names=classes))
