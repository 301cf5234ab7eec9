"""`ImageInputs`: which pixels a model sees of a data set's images, in training, in evaluation and in stored views."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import numpy as np
import torch
from numpy.typing import NDArray
from transformers import BaseImageProcessor, PreTrainedModel

from hf_sgdr.data.cache import ImageCaches
from hf_sgdr.data.dataset import ImageDataset, require_images, rows_of
from hf_sgdr.data.hashes import image_hash
from hf_sgdr.data.images import has_own_transform, undecoded
from hf_sgdr.data.labels import UNLABELLED, ClassNames
from hf_sgdr.data.stream import MATERIALISE, check_stream, is_stream, stream_identity
from hf_sgdr.data.transforms import ImageTransform, recorded_views

# So many rows are read twice to see whether their own transform is random; of one that flips every other image 0.4 % of
# the times none differs.
_DRAWN = 8


class ImageInputs:
    """The images of data sets as a model's inputs: transformed to 8-bit pixels, normalised on the device.

    Args:
        train ([`ImageTransform`] or None): for training; the evaluation transform by default.
        evaluation ([`ImageTransform`]): for evaluation, and what is saved with the model.
        columns (`tuple[str, str]`): of the images and of the labels.
        seed (`int`): of the augmentation.
        names (sequence of `str`, *optional*): of the classes, by which labels that are text are numbered.
        augment_on_device (`bool`, *optional*, defaults to False): rotate, flip and light training images in batches
            on the device.

    Raises:
        TypeError: if a transform is not an [`ImageTransform`], also when it is set later.
    """

    def __init__(
        self,
        train: ImageTransform | None,
        evaluation: ImageTransform,
        *,
        columns: tuple[str, str],
        seed: int,
        names: Sequence[str] | None = None,
        augment_on_device: bool = False,
    ) -> None:
        self.eval_transform = evaluation
        self._train_transform = _checked("train_transform", train) if train is not None else None
        self.image_column, self.label_column = columns
        self.seed, self.names = seed, names
        self.caches: ImageCaches | None = None  # keep decoded images on disk
        self.augment_on_device = augment_on_device
        self._labels: list[tuple[Any, list[Any]]] = []  # of the rows that were asked for last

    @property
    def train_transform(self) -> ImageTransform:
        """What training images go through; the evaluation transform where none was given."""
        return self._train_transform if self._train_transform is not None else self.eval_transform

    @train_transform.setter
    def train_transform(self, value: ImageTransform) -> None:
        self._train_transform = _checked("train_transform", value)

    @property
    def eval_transform(self) -> ImageTransform:
        """What evaluation sees of an image."""
        return self._eval_transform

    @eval_transform.setter
    def eval_transform(self, value: ImageTransform) -> None:
        self._eval_transform = _checked("eval_transform", value)

    def set_transforms(self, train: ImageTransform, evaluation: ImageTransform) -> None:
        """Set both transforms, or neither; see [`SGDRTrainer.set_transforms`]."""
        train, evaluation = _checked("train", train), _checked("eval", evaluation)
        if evaluation.is_random:
            raise ValueError(
                "The transform for evaluation draws at random: give the two of image_transforms(model) in their order, "
                "first the one for training."
            )
        self._train_transform, self._eval_transform = train, evaluation

    # ---- Data sets ----

    def are_in(self, rows: Any) -> bool:
        """Whether these rows hold images that are to be read, rather than a model's inputs.

        Of a torch data set, a list, and rows with a transform of their user's, the first one tells.
        """
        if isinstance(rows, datasets.Dataset) and not has_own_transform(rows):
            return self.image_column in rows.column_names
        is_indexed = hasattr(rows, "__getitem__") and hasattr(rows, "__len__") and not isinstance(rows, dict)
        if isinstance(rows, ImageDataset) or not is_indexed or not len(rows):
            return False
        first = rows[0]
        return isinstance(first, Mapping) and self.image_column in first

    def sources(self, rows: Any) -> Sequence[Any] | None:
        """The images of rows, still encoded where they are files; None where there are none."""
        if not self.are_in(rows):
            return None
        rows = undecoded(rows, self.image_column)
        if isinstance(rows, datasets.Dataset):
            return rows[self.image_column]
        return [rows[index][self.image_column] for index in range(len(rows))]

    def labels(self, rows: Any) -> list[Any]:
        """Every image's class id, or its row of 0 and 1; read once where rows are asked for one by one.

        Raises:
            ValueError: if an image has no label, or one of no class.
        """
        known = next((labels for of, labels in self._labels if of is rows), None)
        if known is None:
            known = self._dataset(rows, self.eval_transform).labels()
            self._labels = [(rows, known), *self._labels[:3]]
        return known

    def known_labels(self, rows: Any) -> NDArray[Any] | None:
        """The labels of rows with images, class ids (images,), -1 for none, or 0 and 1 (images, classes); else None."""
        rows = rows_of(rows)
        if rows is None or not self.are_in(rows):
            return None
        if isinstance(rows, datasets.Dataset) and self.label_column not in rows.column_names:
            return None
        images = self._dataset(rows, self.eval_transform)
        targets = images.targets()
        if images.is_multi_label:
            return np.stack([target.numpy() for target in targets if target is not None])
        return np.asarray([UNLABELLED if target is None else target for target in targets])

    def check(self, name: str, rows: Any, classes: ClassNames) -> None:
        """Look at a data set before work begins; what is none of `datasets` passes.

        Args:
            name (`str`): what it is called in a message.
            rows (`datasets.Dataset`, [`ImageDataset`] or anything else): the data set.
            classes ([`ClassNames`]): what its labels must mean.

        Raises:
            ValueError: if it cannot be read as images and labels (see [`~hf_sgdr.data.dataset.require_images`]), or
                its labels mean other classes.
        """
        rows = rows_of(rows)
        require_images(name, rows, self.image_column, self.label_column)
        if is_stream(rows):
            if name != "train_dataset":
                raise ValueError(f"{name} is a stream, and evaluation needs rows with a length: {MATERIALISE}")
            check_stream(name, rows, self.image_column, self.label_column)
        if not has_own_transform(rows):
            classes.check(name, rows, self.label_column)

    def training(self, rows: Any, draw: int) -> ImageDataset:
        """Training images.

        Args:
            rows (`datasets.Dataset`): with images and labels.
            draw (`int`): which fit it is; each draws augmentations of its own.
        """
        images = self._dataset(rows, self.train_transform, "train", draw)
        images.renders_on_device = self.augment_on_device
        return self._kept(images, rows, "train")

    def evaluation(self, rows: Any, *, name: str | None = None) -> ImageDataset:
        """Images as evaluation sees them.

        Args:
            rows (`datasets.Dataset` or [`ImageDataset`]): with images.
            name (`str`, *optional*): what their cache is called; by default they are not cached.
        """
        images = self._dataset(rows, self.eval_transform)
        return images if name is None else self._kept(images, rows, name)

    def view(self, rows: Any, number: int) -> ImageDataset:
        """A view of training images, to be stored: 0 is the plain one, those from 1 on are augmented.

        Raises:
            ValueError: if the rows hold no images, or another one each time.
        """
        self._require_steady(rows)
        if number == 0:
            return self._dataset(rows, self.eval_transform.fast())
        images = self._dataset(rows, self.train_transform, "view", number - 1)
        images.renders_on_device = self.augment_on_device
        return images

    def normalize(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A batch whose 8-bit pixels, uint8 (batch, 3, side, side), are rendered and normalised; all else stays."""
        pixels = batch.get("pixel_values")
        if pixels is None or pixels.dtype != torch.uint8:
            return batch
        rest = {name: value for name, value in batch.items() if name not in ("pixel_values", "views")}
        transform = self.train_transform if "views" in batch else self.eval_transform
        values = transform.normalize(pixels, batch.get("views"))
        return {**rest, "pixel_values": values.contiguous(memory_format=torch.channels_last)}

    def content_hash(self, rows: Any) -> str:
        """SHA-256 of a data set's images and labels, in order; of a stream, of what it says of itself."""
        if is_stream(rows):
            return stream_identity(rows)
        images = self._dataset(rows, self.eval_transform)
        return hashlib.sha256(f"{images.content_hash()} {self.labels(rows)}".encode()).hexdigest()

    # ---- What is saved with the model ----

    def record_in(self, model: PreTrainedModel) -> BaseImageProcessor:
        """Write the evaluation transform and the augmentation into a model's configuration.

        Only when something is saved: a trainer that evaluates leaves the model as it is.

        Returns:
            `BaseImageProcessor`: the image processor that makes the evaluation's pixels.
        """
        processor = self.eval_transform.spec.write_to(model)
        if model.config.problem_type is None and (model.config.num_labels or 0) > 1:
            # as transformers notes it with the first loss, which a run that is resumed at its end never computes
            model.config.problem_type = "single_label_classification"
        # What a stock pipeline ignores and test-time augmentation needs; nobody's word does not replace what is there.
        if self._train_transform is not None or not hasattr(model.config, "hf_sgdr"):
            transform = self.train_transform
            views = {"augment": transform.augment, "max_zoom": transform.max_zoom}
            model.config.hf_sgdr = recorded_views(model.config) | views
        return processor

    # ---- Helpers ----

    def _require_steady(self, rows: Any) -> None:
        rows = undecoded(rows_of(rows), self.image_column) if self.are_in(rows_of(rows)) else rows_of(rows)
        if isinstance(rows, datasets.Dataset) and not has_own_transform(rows):
            return
        first = rows[0]
        if isinstance(first, Mapping) and self.image_column not in first:
            raise ValueError(
                f"Precomputing needs images, and these rows have {', '.join(map(str, first))}: give rows with a column "
                f"{self.image_column!r}, and transforms to the trainer."
            )
        images = [[image_hash(rows[i][self.image_column]) for i in range(min(len(rows), _DRAWN))] for _ in range(2)]
        if images[0] != images[1]:
            raise ValueError(
                "Precomputing needs the same image each time, and the rows' own transform draws at random: give "
                "train_transform= to the trainer instead, and precompute_views for augmentation."
            )

    def _dataset(self, rows: Any, transform: ImageTransform, use: str = "", number: int = 0) -> ImageDataset:
        words = [self.seed, *((sum(use.encode()), number) if use else ())]
        return ImageDataset(
            rows_of(rows),
            transform,
            image_column=self.image_column,
            label_column=self.label_column,
            seed=int(np.random.SeedSequence(words).generate_state(1)[0]),
            names=self.names,
        )

    def _kept(self, images: ImageDataset, rows: Any, name: str) -> ImageDataset:
        if self.caches is not None:
            images.cache = self.caches.of(images, rows, name)
        return images


def _checked(name: str, value: Any) -> ImageTransform:
    if not isinstance(value, ImageTransform):
        raise TypeError(f"{name} is {type(value).__name__}: give one of those of image_transforms(model).")
    return value
