"""A torch dataset of transformed images.

The pixels stay 8-bit until they are on the device, where a whole batch is normalised at once: workers hand over a
quarter of the bytes.
"""

import hashlib
import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import datasets
import torch
from torch.utils.data import Dataset, get_worker_info

from hf_sgdr._utils.termination import is_caught, leave_sigterm_to_main_process
from hf_sgdr.data.hashes import image_hashes
from hf_sgdr.data.images import has_own_transform, read_image, readers, undecoded
from hf_sgdr.data.labels import LabelEncoder, column_values, label_names

if TYPE_CHECKING:  # transforms know models, whose import takes longer than whoever reads images alone would wait
    from hf_sgdr.data.transforms import ImageTransform


# What plain labels may be.
PLAIN_LABELS = ("int", "uint", "bool", "null", "string", "large_string")


class DecodedImages(Protocol):
    """What an [`ImageCache`] is to a data set: decoded images by their number."""

    def __getitem__(self, index: int) -> torch.Tensor: ...


class ImageDataset(Dataset[dict[str, Any]]):
    """The images of a `datasets.Dataset` as `{"pixel_values": uint8 (3, size, size), "labels": int}`.

    Several labels an image, a `datasets.List` of `ClassLabel`, become float32 (classes,) of 0 and 1.

    What is random depends on the seed, the epoch and the image's index alone, so neither the number of workers nor the
    order of the images changes it.

    Args:
        dataset (`datasets.Dataset`, or any sequence of dicts): rows with an image and, if labelled, a label.
        transform ([`ImageTransform`]): turns an image into pixels.
        image_column, label_column (`str`, *optional*, default to "image" and "label"): where they are; rows without the
            label column, or with an unknown label (None or -1), give no "labels".
        seed (`int`, *optional*, defaults to 0): for the augmentation.
        names (sequence of `str`, *optional*): of the classes, by which labels that are text are numbered, and integers
            where the names are integers other than 0, 1, 2 and so on.
        cache ([`ImageCache`], *optional*): what is kept of the same images, so that none is decoded.
        renders_on_device (`bool`, *optional*, defaults to False): leave rotation, flip and light to
            `transform.normalize`; "views" beside the pixels, float32 (8,), says which.

    Raises:
        ValueError: if the dataset is of no use; see [`require_images`].
    """

    def __init__(
        self,
        dataset: Any,
        transform: "ImageTransform",
        *,
        image_column: str = "image",
        label_column: str = "label",
        seed: int = 0,
        names: Sequence[str] | None = None,
        cache: DecodedImages | None = None,
        renders_on_device: bool = False,
    ) -> None:
        require_images("dataset", dataset, image_column, label_column)
        self.rows = undecoded(dataset, image_column)
        self.transform = transform
        self.image_column, self.label_column = image_column, label_column
        self._encode = LabelEncoder.of(self.rows, label_column, names)
        self.seed = seed
        self.cache = cache
        self.renders_on_device = renders_on_device
        self._leaves_sigterm = is_caught()  # otherwise workers end by it, as multiprocessing expects at exit
        # In shared memory, so that persistent workers see a new epoch too.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Draw the augmentations of another epoch; [`DatasetEpoch`] calls it."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        seed = (self.seed, int(self._epoch), index)
        item: dict[str, Any] = {}
        if self.renders_on_device and self.transform.is_random:
            image = row[self.image_column] if self.cache is None else self.cache[index]
            item["pixel_values"], view = self.transform.unrendered(image, seed)
            if view is not None:
                item["views"] = view
        elif self.cache is not None:
            item["pixel_values"] = self.transform.of_kept(self.cache[index], seed)
        else:
            item["pixel_values"] = self.transform.pixels(row[self.image_column], seed)
        label = self._encode(row.get(self.label_column))
        return item if label is None else {**item, "labels": label}

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        """A batch at once. Outside worker processes its images are read by threads, one a processor.

        Where the processor also computes, that beats worker processes: decoding and resizing release the interpreter's
        lock, no batch is copied between processes, and no fork makes the parent's memory copy-on-write.
        """
        if get_worker_info() is not None:
            if self._leaves_sigterm:
                leave_sigterm_to_main_process()
        elif len(indices) > 1:
            return list(readers().map(self.__getitem__, indices))
        return [self[index] for index in indices]

    @property
    def is_multi_label(self) -> bool:
        """Whether an image has several labels."""
        return self._encode.is_multi_label

    def require_equal_labelling(self) -> None:
        """Raise a ValueError if some images of a `datasets.Dataset` have a label and some have none."""
        if not isinstance(self.rows, datasets.Dataset) or self.label_column not in self.rows.column_names:
            return
        unknown = sum(label is None for label in self.targets())
        if 0 < unknown < len(self):
            raise ValueError(
                f"{unknown} of {len(self)} images have no label. Give each a label or leave those images out; to "
                f"predict only, give dataset.remove_columns({self.label_column!r})."
            )

    def labels(self) -> list[Any]:
        """Every image's class id, or its row of 0 and 1 where images have several labels.

        Raises:
            ValueError: if there is no column of labels, an image has none, or one is of no class.
        """
        if isinstance(self.rows, datasets.Dataset) and self.label_column not in self.rows.column_names:
            raise ValueError(
                f"No label column {self.label_column!r}: the dataset has {self.rows.column_names}. "
                "Name it with label_column_name."
            )
        labels = self.targets()
        unknown = sum(label is None for label in labels)
        if unknown:
            raise ValueError(f"{unknown} of {len(self)} images have no label: training and evaluation need them all.")
        return [label.tolist() for label in labels] if self.is_multi_label else labels

    def targets(self) -> list[Any]:
        """Every image's class id, or its labels as float32 (classes,); None where none is known."""
        if isinstance(self.rows, datasets.Dataset):
            return list(map(self._encode, column_values(self.rows, self.label_column)))
        return [self._encode(self.rows[index].get(self.label_column)) for index in range(len(self))]

    def content_hash(self) -> str:
        """SHA-256 over every image's content, in order; labels do not count. See [`image_hash`]."""
        digest = hashlib.sha256()
        for image in image_hashes(self.rows, self.image_column):
            digest.update(image)
        return digest.hexdigest()


class ImageViews(Dataset[dict[str, torch.Tensor]]):
    """The views of a data set's images, those of an image in a row, as `{"pixel_values": uint8 (3, size, size)}`.

    Args:
        images ([`ImageDataset`]): with the evaluation transform, which makes the plain view, the first one.
        transform ([`ImageTransform`]): draws an augmented one.
        augmented (`int`): how many of these.
    """

    def __init__(self, images: ImageDataset, transform: "ImageTransform", augmented: int) -> None:
        self.images, self.transform, self.views = images, transform, 1 + augmented

    def __len__(self) -> int:
        return len(self.images) * self.views

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, torch.Tensor]]:
        """A batch at once, each image read once; outside worker processes by threads."""
        by_image = [list(group) for _, group in itertools.groupby(indices, lambda index: index // self.views)]
        views = (map if get_worker_info() is not None else readers().map)(self._views_of_image, by_image)
        return [{"pixel_values": view} for views_of_image in views for view in views_of_image]

    def _views_of_image(self, indices: Sequence[int]) -> torch.Tensor:
        image = read_image(self.images.rows[indices[0] // self.views][self.images.image_column])
        plain = self.images.transform.pixels(image, (0,))
        numbers = [index % self.views for index in indices]
        views = [plain[None]] if 0 in numbers else []
        if augmented := [number - 1 for number in numbers if number]:
            views.append(self.transform.views(image, plain, augmented))
        return torch.cat(views)


def rows_of(dataset: Any) -> Any:
    """The rows that an [`ImageDataset`] was made of; another data set itself."""
    return dataset.rows if isinstance(dataset, ImageDataset) else dataset


def require_images(name: str, dataset: Any, image_column: str = "image", label_column: str = "label") -> None:
    """Raise a ValueError if a data set cannot be read as images and labels; what is of another kind passes.

    Args:
        name (`str`): the argument that holds the data set, for the message.
        dataset (`datasets.Dataset`, or any sequence of dicts): what was given.
        image_column, label_column (`str`, *optional*, default to "image" and "label"): where they are.

    Raises:
        ValueError: if it holds several splits or no row, or labels that are neither class ids nor names.
    """
    if isinstance(dataset, datasets.DatasetDict | datasets.IterableDatasetDict):
        splits = list(dataset)
        example = f", such as {name}[{splits[0]!r}]" if splits else ""
        raise ValueError(f"{name} is a {type(dataset).__name__} of the splits {splits}: give one of them{example}.")
    if hasattr(dataset, "__len__") and len(dataset) == 0:
        raise ValueError(f"{name} is empty: it must have at least one image.")
    if not isinstance(dataset, datasets.Dataset) or has_own_transform(dataset):
        return
    if image_column not in dataset.column_names:
        return
    feature = dataset.features.get(label_column)
    is_plain = isinstance(feature, datasets.Value) and feature.dtype.startswith(PLAIN_LABELS)
    if feature is not None and label_names(feature) is None and not is_plain:
        raise ValueError(f"{name}: the labels in {label_column!r} are {feature}; they must be class ids or names.")
