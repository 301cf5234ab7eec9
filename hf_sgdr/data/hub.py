"""Data sets of the Hub, or of whatever `datasets` reads, as one `DatasetDict` with the columns image and label."""

from typing import Any

from datasets import ClassLabel, Dataset, DatasetDict, Image, Value, load_dataset

from hf_sgdr._utils.text import few
from hf_sgdr.data.audit import OnError, check_on_error, readable
from hf_sgdr.data.images import undecoded
from hf_sgdr.data.labels import as_labels, column_values, encode_labels, label_names, label_values
from hf_sgdr.data.splits import VALIDATION_NAMES, check_fraction, split_off
from hf_sgdr.data.stream import check_stream


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
    streaming: bool = False,
) -> DatasetDict:
    """Read a labelled image data set of the Hub, or a local folder that `datasets.load_dataset` reads.

    Labels that are not a `datasets.ClassLabel` yet, such as strings, are numbered in the order of the training split's
    sorted values; lists are several labels an image. Both splits count the classes as the training split does; a
    missing label becomes -1.

    Args:
        name (`str`): what `datasets.load_dataset` takes.
        image_column_name, label_column_name (`str`, *optional*): its columns; they become `image` and `label`.
        train_split_name (`str`, *optional*, defaults to "train"): its training split.
        validation_split_name (`str`, *optional*): its validation split; by default "validation", "valid", "val" or
            "test", whichever there is, else a share of each class is split off.
        validation_fraction (`float`, *optional*, defaults to 0.2): that share.
        seed (`int`, *optional*, defaults to 42): for that split.
        on_error (`"raise"`, `"skip"` or None, *optional*, defaults to `"raise"`): as in [`load_image_folder`].
        streaming (`bool`, *optional*, defaults to False): leave the training split a `datasets.IterableDataset`, which
            must know its classes; its images are looked at when they are read. Validation is loaded whole.

    Raises:
        UnreadableImagesError: a `ValueError`, if images cannot be read; see `on_error`.
        ValueError: if a split or a column is not there, the label is not a class, or the validation split has a class
            that the training split lacks.
    """
    check_fraction(validation_fraction)
    check_on_error(on_error)
    loaded: Any = load_dataset(name, streaming=streaming)
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
        if streaming and split == "train":
            result[split] = _two_columns(loaded[given], name, image_column_name, label_column_name)
            check_stream(f"{name}, split {given!r},", result[split], "image", "label")
            continue
        found = load_dataset(name, split=given) if streaming else loaded[given]
        rows = _two_columns(found, name, image_column_name, label_column_name)
        known = result["train"].features["label"] if split != "train" else None
        rows = _encoded(rows, known, f"{name}, split {given!r}")
        titles = [f"{given} image {number}" for number in range(len(rows))]
        keep = readable(undecoded(rows)["image"], titles, on_error)
        if not keep:
            raise ValueError(f"{name}, split {given!r}: no image that can be read; it must have at least one.")
        result[split] = rows if len(keep) == len(rows) else rows.select(keep)
    if "validation" not in result and streaming:
        raise ValueError(f"{name} has no validation split, and none can be split off a stream: leave streaming out.")
    if "validation" not in result:
        result["train"], result["validation"] = split_off(result["train"], validation_fraction, seed, name)
    return result


def _two_columns(dataset: Any, name: str, image_column: str, label_column: str) -> Any:
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
    kind = dataset.features["label"]
    if not isinstance(getattr(kind, "feature", kind), ClassLabel | Value):
        raise ValueError(f"{name}: column {label_column!r} holds {kind}; it must hold classes.")
    return dataset


def _encoded(dataset: Dataset, known: Any, where: str) -> Dataset:
    """The same rows, labels as ids of the known classes; of these rows' own where none are known."""
    feature = dataset.features["label"]
    if label_names(feature):
        given = column_values(dataset, "label")
        lacks = any(label is None or (isinstance(label, list) and None in label) for label in given)
        if not lacks and (known is None or known == feature):
            return dataset
        known = feature if known is None else known
        labels = label_values(dataset)
    else:
        labels = [as_labels(label) for label in dataset["label"][:]]
        if known is None and all(label is None for label in labels):
            raise ValueError(f"{where}: no label in it; there must be one for each image.")
    titles = [f"image {number}" for number in range(len(labels))]
    ids, feature = encode_labels(labels, titles, known, where, may_lack=True)
    return dataset.remove_columns("label").add_column("label", ids, feature=feature)
