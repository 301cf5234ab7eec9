"""`ImageInputs`: which pixels a model sees of a data set's images, in training, in evaluation and in stored views."""

import hashlib
from typing import Any

import datasets
import numpy as np
import torch
from transformers import BaseImageProcessor, PreTrainedModel

from hf_sgdr.data.cache import ImageCaches
from hf_sgdr.data.dataset import ImageDataset, require_images, rows_of
from hf_sgdr.data.labels import ClassNames
from hf_sgdr.data.transforms import ImageTransform


class ImageInputs:
    """The images of data sets as a model's inputs: transformed to 8-bit pixels, normalised on the device.

    Args:
        train ([`ImageTransform`] or None): for training; the evaluation transform by default.
        evaluation ([`ImageTransform`]): for evaluation, and what is saved with the model.
        columns (`tuple[str, str]`): of the images and of the labels.
        seed (`int`): of the augmentation.
        caches ([`ImageCaches`], *optional*): keeps decoded images on disk.

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
        caches: ImageCaches | None = None,
    ) -> None:
        self.eval_transform = evaluation
        self._train_transform = _checked("train_transform", train) if train is not None else None
        self.image_column, self.label_column = columns
        self.seed = seed
        self.caches = caches

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

    # ---- Data sets ----

    def are_in(self, rows: Any) -> bool:
        """Whether these rows hold images that are to be read, rather than a model's inputs."""
        return isinstance(rows, datasets.Dataset) and self.image_column in rows.column_names

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
        classes.check(name, rows, self.label_column)

    def training(self, rows: Any, draw: int) -> ImageDataset:
        """Training images.

        Args:
            rows (`datasets.Dataset`): with images and labels.
            draw (`int`): which fit it is; each draws augmentations of its own.
        """
        return self._kept(self._dataset(rows, self.train_transform, "train", draw), rows, "train")

    def evaluation(self, rows: Any, *, name: str | None = None) -> ImageDataset:
        """Images as evaluation sees them.

        Args:
            rows (`datasets.Dataset` or [`ImageDataset`]): with images.
            name (`str`, *optional*): what their cache is called; by default they are not cached.
        """
        images = self._dataset(rows, self.eval_transform)
        return images if name is None else self._kept(images, rows, name)

    def view(self, rows: Any, number: int) -> ImageDataset:
        """A view of training images, to be stored: 0 is the plain one, those from 1 on are augmented."""
        if number == 0:
            return self._dataset(rows, self.eval_transform.fast())
        return self._dataset(rows, self.train_transform, "view", number - 1)

    def normalize(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A batch whose 8-bit pixels, uint8 (batch, 3, size, size), are normalised; anything else stays."""
        pixels = batch.get("pixel_values")
        if pixels is None or pixels.dtype != torch.uint8:
            return batch
        values = self.eval_transform.normalize(pixels)
        return {**batch, "pixel_values": values.contiguous(memory_format=torch.channels_last)}

    def content_hash(self, rows: Any) -> str:
        """SHA-256 of a data set's images and labels, in order."""
        images = self._dataset(rows, self.eval_transform)
        return hashlib.sha256(f"{images.content_hash()} {images.labels()}".encode()).hexdigest()

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
            model.config.hf_sgdr = {"augment": transform.augment, "max_zoom": transform.max_zoom}
        return processor

    # ---- Helpers ----

    def _dataset(self, rows: Any, transform: ImageTransform, use: str = "", number: int = 0) -> ImageDataset:
        words = [self.seed, *((sum(use.encode()), number) if use else ())]
        return ImageDataset(
            rows_of(rows),
            transform,
            image_column=self.image_column,
            label_column=self.label_column,
            seed=int(np.random.SeedSequence(words).generate_state(1)[0]),
        )

    def _kept(self, images: ImageDataset, rows: Any, name: str) -> ImageDataset:
        if self.caches is not None:
            images.cache = self.caches.of(images, rows, name)
        return images


def _checked(name: str, value: Any) -> ImageTransform:
    if not isinstance(value, ImageTransform):
        raise TypeError(f"{name} is {type(value).__name__}: give one of those of image_transforms(model).")
    return value
