"""Labels are class ids: those of a data set must mean what they mean to the model."""

import itertools
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
from transformers import PreTrainedConfig

from hf_sgdr._utils.text import few, printable


def class_names(config: PreTrainedConfig) -> list[str]:
    """A model's classes in the order of their ids; `LABEL_0` and so on where they have no names."""
    names: dict[Any, str] = config.id2label or {}
    return [str(names.get(i, f"LABEL_{i}")) for i in range(config.num_labels or 0)]


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
        trained = getattr((getattr(train_dataset, "features", None) or {}).get(label_column), "names", None)
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
        if not isinstance(dataset, datasets.Dataset) or label_column not in dataset.column_names:
            return
        feature, count = dataset.features[label_column], len(self.names)
        if isinstance(feature, datasets.ClassLabel):
            if feature.names != self.names and (self.are_given or len(feature.names) != count):
                raise ValueError(self._difference(what, feature.names))
        elif isinstance(feature, datasets.Value) and feature.dtype.startswith(("int", "uint")) and len(dataset):
            highest = int(np.max(dataset.with_format("numpy")[label_column][:]))
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
