"""Labels are class ids: those of a data set must mean what they mean to the model."""

import itertools
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import datasets
import torch
from transformers import PreTrainedConfig

from hf_sgdr._utils.text import few, printable

# What transformers calls several labels an image.
MULTI_LABEL: Final = "multi_label_classification"
# The class id of an image whose label is not known.
UNLABELLED = -1


def class_names(config: PreTrainedConfig) -> list[str]:
    """A model's classes in the order of their ids; `LABEL_0` and so on where they have no names."""
    names: dict[Any, str] = config.id2label or {}
    return [str(names.get(i, f"LABEL_{i}")) for i in range(config.num_labels or 0)]


def class_id(of_class: str | int, names: Sequence[str]) -> int:
    """A class by its name or id.

    Raises:
        ValueError: if there is none.
    """
    if isinstance(of_class, str) and of_class in names:
        return names.index(of_class)
    if isinstance(of_class, str) or not 0 <= of_class < len(names):
        ids = f"0 to {len(names) - 1}"
        raise ValueError(f"of_class={of_class!r}: give a class by its name ({few(names)}) or its id ({ids}).")
    return of_class


def label_names(feature: Any) -> list[str] | None:
    """The names of the classes of a `datasets.ClassLabel`, or of a list of it; None for any other feature."""
    feature = getattr(feature, "feature", feature)
    return list(feature.names) if isinstance(feature, datasets.ClassLabel) else None


def is_multi_label(feature: Any) -> bool:
    """Whether a feature holds several labels an image: a list of class ids."""
    return isinstance(feature, datasets.List | datasets.LargeList) and label_names(feature) is not None


def column_values(dataset: datasets.Dataset, name: str) -> list[Any]:
    """A column of plain values at once; iterating over `dataset[name]` takes a hundred times as long."""
    feature = dataset.features[name]
    if isinstance(getattr(feature, "feature", feature), getattr(datasets, "Json", ())):  # of several kinds, as its text
        return list(dataset[name][:])
    values: list[Any] = dataset.select_columns(name).with_format("arrow")[:][name].combine_chunks().to_pylist()
    return values


def label_values(dataset: datasets.Dataset) -> list[Any]:
    """The name of each row's `label`, None for an unknown one; or the names of its labels."""
    names = label_names(dataset.features["label"]) or []
    return [_named(label, names) for label in column_values(dataset, "label")]


def _named(label: Any, names: Sequence[str]) -> Any:
    if isinstance(label, list):
        return [names[one] for one in label if one is not None and one >= 0]
    return None if label is None or label < 0 else names[label]


class LabelEncoder:
    """A label as training takes it: a class id, or float32 (classes,) of 0 and 1 where images have several; or None.

    Args:
        num_labels (`int` or None): how many classes there are, where images have several labels.
        names (sequence of `str`, *optional*): of the classes.
        by_name (`bool`, *optional*, defaults to False): whether integers, too, are names and no class ids.
    """

    def __init__(self, num_labels: int | None, names: Sequence[str] | None = None, by_name: bool = False) -> None:
        self.num_labels = num_labels
        self._ids = None if names is None else {name: number for number, name in enumerate(names)}
        self.by_name = by_name

    @classmethod
    def of(cls, rows: Any, label_column: str, names: Sequence[str] | None) -> "LabelEncoder":
        """For rows of any kind.

        Args:
            rows (`datasets.Dataset`, or any sequence of dicts): of others than the first, the first row tells.
            label_column (`str`): where labels are.
            names (sequence of `str`, *optional*): the model's classes.
        """
        feature = (getattr(rows, "features", None) or {}).get(label_column)
        known = label_names(feature)
        if isinstance(rows, datasets.Dataset):
            several = is_multi_label(feature)
        else:
            several = isinstance(rows[0].get(label_column), list | tuple | set) if len(rows) else False
        names = known if known is not None else names
        are_numbers = names is not None and all(name.lstrip("-").isdigit() for name in names)
        by_name = known is None and are_numbers and list(names or ()) != [str(i) for i in range(len(names or ()))]
        return cls(len(names or ()) if several else None, names, by_name)

    @property
    def is_multi_label(self) -> bool:
        """Whether an image has several labels."""
        return self.num_labels is not None

    def __call__(self, label: Any) -> Any:
        """The target of a label; None for an unknown one, which is None or negative.

        Raises:
            ValueError: if it is of no class.
        """
        if self.num_labels is None or label is None:
            return self._id(label)
        ids = [self._id(one) for one in label]
        if not all(id_ is not None and id_ < self.num_labels for id_ in ids):
            raise ValueError(f"The labels {label!r}: must be of the {self.num_labels} classes.")
        return torch.zeros(self.num_labels).index_fill_(0, torch.tensor(ids, dtype=torch.int64), 1.0)

    def _id(self, label: Any) -> int | None:
        if label is None:
            return None
        if isinstance(label, str) or self.by_name:
            if self._ids is None or str(label) not in self._ids:
                known = "the model names no classes" if self._ids is None else f"the classes are {few(list(self._ids))}"
                raise ValueError(f"The label {printable(repr(label))} is of no class: {known}.")
            return self._ids[str(label)]
        try:
            id_ = operator.index(label)  # also of NumPy and of a tensor
        except TypeError as error:
            raise ValueError(
                f"The label {label!r} is a {type(label).__name__}; it must be a class id (integer) or a name."
            ) from error
        if self._ids is not None and id_ >= len(self._ids):
            raise ValueError(
                f"The label {id_} is of no class: ids are 0 to {len(self._ids) - 1} ({few(list(self._ids))})."
            )
        return id_ if id_ >= 0 else None


def as_labels(value: Any, delimiter: str | None = None) -> Any:
    """A cell as somebody wrote it: a label, a list of several, or None where it is empty.

    Args:
        value: text, a number, a list of them, or None.
        delimiter (`str`, *optional*): what parts labels in text; then the cell is always a list, maybe an empty one.

    Raises:
        ValueError: if it is of another kind.
    """
    if isinstance(value, list):
        return [label for one in value if (label := _as_label(one)) is not None]
    if delimiter is not None:
        return [part.strip() for part in str(value if value is not None else "").split(delimiter) if part.strip()]
    return _as_label(value)


def _as_label(value: Any) -> Any:
    if isinstance(value, dict | list):
        raise ValueError(f"The label {printable(repr(value))} must be text, a number or a list of these.")
    is_missing = value is None or value != value or (isinstance(value, str) and not value.strip())  # NaN is not itself
    return None if is_missing else value


def encode_labels(
    labels: Sequence[Any], titles: Sequence[str], feature: Any, where: str, *, may_lack: bool = False
) -> tuple[list[Any], Any]:
    """Labels as class ids, numbered once, by the training rows.

    Args:
        labels (sequence): of each image, as [`as_labels`] gives them; numbers and strings are named by their text.
        titles (sequence of `str`): what the images are called.
        feature (`datasets.ClassLabel` or `datasets.List` of it, or None): of the training rows; None for these.
        where (`str`): what the rows are called.
        may_lack (`bool`, *optional*, defaults to False): a missing label becomes -1.

    Returns:
        Class ids, or lists of them, and the feature.

    Raises:
        ValueError: if a label is missing or train lacks it, or there is one class alone.
    """
    several = any(isinstance(label, list) for label in labels) if feature is None else is_multi_label(feature)
    if several:
        labels = [label if isinstance(label, list) else [] if label is None else [label] for label in labels]
    missing = [title for title, label in zip(titles, labels, strict=True) if label is None]
    if missing and not may_lack:
        raise ValueError(f"{where}: {len(missing)} images have no label: {few(missing)}. Give each one, or remove it.")
    values = set(itertools.chain.from_iterable(labels)) if several else set(labels) - {None}
    if feature is None:
        numbers = all(isinstance(value, int) for value in values)
        names = [str(value) for value in sorted(values, key=None if numbers else str)]
        if len(names) < 2:
            raise ValueError(f"{where}: one class only ({few(names)}); at least two are needed.")
        feature = datasets.ClassLabel(names=names)
        feature = datasets.List(feature) if several else feature
    names = label_names(feature) or []
    unknown = sorted({str(value) for value in values} - set(names))
    if unknown:
        raise ValueError(
            f"{where}: {few(unknown)} not among the classes of the training images ({few(names)}). Add images of it "
            "there, or take them out here."
        )
    ids = {name: number for number, name in enumerate(names)}
    if several:
        return [sorted({ids[str(value)] for value in label}) for label in labels], feature
    return [UNLABELLED if label is None else ids[str(label)] for label in labels], feature


@dataclass(frozen=True)
class ClassNames:
    """The classes that labels are compared with.

    Args:
        names (`list[str]`): in the order of their ids.
        owner (`str`): whose they are, for messages.
        are_given (`bool`): False where nobody named them, so that any names fit.
    """

    names: list[str]
    owner: str
    are_given: bool

    @classmethod
    def of(cls, config: PreTrainedConfig, train_dataset: Any, label_column: str) -> "ClassNames":
        """A model's own; where it has none, those of the training data.

        Args:
            config (`PreTrainedConfig`): of the model.
            train_dataset (`datasets.Dataset` or any other kind, which has no names).
            label_column (`str`): its column of class ids.
        """
        names = class_names(config)
        unnamed = [f"LABEL_{i}" for i in range(len(names))]
        trained = label_names((getattr(train_dataset, "features", None) or {}).get(label_column))
        if names == unnamed and trained is not None and len(trained) == len(names):
            return cls(list(trained), "train_dataset", True)
        return cls(names, "the model", names != unnamed)

    def check(self, what: str, dataset: Any, label_column: str) -> None:
        """Compare a data set's labels; one that is no `datasets.Dataset` or has no labels passes.

        Args:
            what (`str`): what the data set is called in the message.
            dataset (`datasets.Dataset`): with class names, or with integers.
            label_column (`str`): its column of class ids.

        Raises:
            ValueError: if its class names are others or in another order, or a label is no class of the model.
        """
        features = getattr(dataset, "features", None) or {}
        if not isinstance(dataset, datasets.Dataset | datasets.IterableDataset) or label_column not in features:
            return
        feature, count = dataset.features[label_column], len(self.names)
        if (names := label_names(feature)) is not None:
            if names != self.names and (self.are_given or len(names) != count):
                raise ValueError(self._difference(what, names))
        elif not isinstance(feature, datasets.Value) or not len(dataset):
            return
        elif feature.dtype in ("string", "large_string") or LabelEncoder.of(dataset, label_column, self.names).by_name:
            values = {str(value) for value in column_values(dataset, label_column) if value is not None}
            if unknown := sorted(values - set(self.names)):
                raise ValueError(
                    f"{what} has labels that are none of {self.owner}'s classes: {few(unknown)}; these are "
                    f"{few(self.names)}. Give create_image_classifier the names, or mend the labels."
                )
        elif feature.dtype.startswith(("int", "uint")):
            highest = max((value for value in column_values(dataset, label_column) if value is not None), default=-1)
            if highest >= count:
                raise ValueError(
                    f"{what} has the label {highest}, but the model has {count} classes ({few(self.names)}): labels "
                    f"must be class ids from 0 to {count - 1}; mend them, or give a model with more classes."
                )

    def _difference(self, what: str, names: list[str]) -> str:
        pairs = enumerate(itertools.zip_longest(names, self.names))
        first, (theirs, ours) = next((i, pair) for i, pair in pairs if pair[0] != pair[1])
        return (
            f"{what} has the classes {few(names)} and {self.owner} has {few(self.names)}: label {first} is "
            f"{_quoted(theirs)} there and {_quoted(ours)} here. Give datasets.ClassLabel(names=...) the names in that "
            "order, or the model the data's names: create_image_classifier(name, labels=names)."
        )


def _quoted(name: str | None) -> str:
    return "none" if name is None else repr(printable(name))
