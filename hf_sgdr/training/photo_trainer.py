"""`ImageTrainer`: transformers' Trainer on images, read and resized by this package and normalised on the device.

It knows nothing of the lesson. Predictions, test-time augmentation and saved models are here, [`SGDRTrainer`] trains.
"""

import hashlib
import itertools
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel
from transformers.models.timm_wrapper.image_processing_timm_wrapper import TimmWrapperImageProcessor
from transformers.trainer_utils import EvalLoopOutput

from hf_sgdr._utils.memory import keep_freed_memory
from hf_sgdr._utils.processors import use_all_processors
from hf_sgdr._utils.store import apply_umask
from hf_sgdr._utils.text import few, printable
from hf_sgdr.data.cache import ImageCaches
from hf_sgdr.data.dataset import ImageDataset, require_images
from hf_sgdr.data.transforms import ImageTransform, image_transforms
from hf_sgdr.inference.tta import AugmentedViews, check_beta, mean_of_views
from hf_sgdr.optim.schedule import require_whole
from hf_sgdr.training.arguments import SGDRTrainingArguments
from hf_sgdr.training.exact_resume import ExactResumeTrainer


class ImageTrainer(ExactResumeTrainer):
    """Train, evaluate and save an image classifier on a data set of images.

    Args:
        model (`PreTrainedModel`): an image classifier.
        args ([`SGDRTrainingArguments`]): which columns, which caches, and transformers' own.
        train_dataset, eval_dataset (`datasets.Dataset`, *optional*): images and labels.
        train_transform, eval_transform ([`ImageTransform`], *optional*): from [`image_transforms`]; by default the
            model's evaluation transform for both.
        **kwargs: everything else that [`~transformers.Trainer`] takes. `compute_metrics` is accuracy by default.

    Raises:
        TypeError: if a transform is not an [`ImageTransform`].
        ValueError: if a data set cannot be used (see [`~hf_sgdr.data.images.require_images`]), or its classes are not
            the model's, in its order.
    """

    args: SGDRTrainingArguments
    _share_of_batch = 1.0  # of the micro-batch that is computed now

    def __init__(
        self,
        model: PreTrainedModel,
        args: SGDRTrainingArguments,
        *,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        train_transform: ImageTransform | None = None,
        eval_transform: ImageTransform | None = None,
        **kwargs: Any,
    ) -> None:
        columns = (args.image_column_name, args.label_column_name)
        require_images("train_dataset", train_dataset, *columns)
        if isinstance(eval_dataset, dict):
            for name, dataset in eval_dataset.items():
                require_images(f"eval_dataset[{name!r}]", dataset, *columns)
        else:
            require_images("eval_dataset", eval_dataset, *columns)
        self.eval_transform = eval_transform if eval_transform is not None else image_transforms(model)[1]
        self._train_transform: ImageTransform | None = None
        if train_transform is not None:
            self.train_transform = train_transform
        self._own_processor = kwargs.get("processing_class") is None
        if "compute_metrics" not in kwargs:
            from hf_sgdr._utils.metrics import accuracy_of_logits  # importing `evaluate` takes seconds

            kwargs["compute_metrics"] = accuracy_of_logits()
        if args.device.type == "cpu":
            keep_freed_memory()
            use_all_processors()
        if sum(isinstance(module, nn.Conv2d) for module in model.modules()) > 1:
            model = model.to(memory_format=torch.channels_last)
        super().__init__(model, args, train_dataset=train_dataset, eval_dataset=eval_dataset, **kwargs)
        self._decoded = ImageCaches(args, self.accelerator)
        self.num_fits = 0  # begun so far; each draws augmentations of its own
        for dataset in (train_dataset, *(eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset])):
            self._check_labels(dataset)

    @property
    def train_transform(self) -> ImageTransform:
        """What training images go through; the evaluation transform where none was given.

        Raises:
            TypeError: on setting it to anything but an [`ImageTransform`].
        """
        return self._train_transform if self._train_transform is not None else self.eval_transform

    @train_transform.setter
    def train_transform(self, value: ImageTransform) -> None:
        self._train_transform = _checked_transform("train_transform", value)

    @property
    def eval_transform(self) -> ImageTransform:
        """What evaluation sees of an image, and what is saved with the model.

        Raises:
            TypeError: on setting it to anything but an [`ImageTransform`].
        """
        return self._eval_transform

    @eval_transform.setter
    def eval_transform(self, value: ImageTransform) -> None:
        self._eval_transform = _checked_transform("eval_transform", value)

    def log_predictions(self, dataset: Any = None) -> NDArray[np.float32]:
        """Log-probabilities (images, classes), in the order of the data set; validation by default."""
        logits = torch.from_numpy(np.asarray(self._logits(self._or_validation(dataset))))
        return torch.log_softmax(logits.float(), dim=-1).numpy()

    def tta(self, n_aug: int = 4, beta: float | None = None, dataset: Any = None) -> NDArray[np.float32]:
        """Test-time augmentation: probabilities (images, classes), averaged over the plain image and augmented views.

        Args:
            n_aug (`int`, *optional*, defaults to 4): augmented views, drawn by the training transform; the same as
                those of [`pipeline`].
            beta (`float`, *optional*): weight of the plain image, in [0, 1], the mean of the augmented ones having the
                rest (fastai v2: 0.25); by default all `1 + n_aug` count alike (fast.ai 0.7).
            dataset (`datasets.Dataset`, *optional*): validation by default.

        Raises:
            ValueError: if there is nothing random to draw views with, or a number is out of range.
        """
        require_whole("n_aug", n_aug, at_least=0)
        check_beta(beta)
        dataset = self._or_validation(dataset)
        if n_aug and not self.train_transform.is_random:
            raise ValueError(
                f"tta(n_aug={n_aug}) needs a training transform that augments: give the trainer the first one of "
                'image_transforms(model, augment="side_on", max_zoom=1.1).'
            )
        plain = np.exp(self.log_predictions(dataset))
        if n_aug == 0:
            return plain
        transform = replace(self.train_transform, spec=self.eval_transform.spec)
        views = AugmentedViews(self._images(dataset, self.eval_transform), transform, n_aug)
        augmented = np.exp(self.log_predictions(views)).reshape(len(plain), n_aug, -1)
        return mean_of_views(np.concatenate([plain[None], augmented.swapaxes(0, 1)]), beta)

    def content_hash(self, dataset: Any) -> str:
        """SHA-256 of a data set's images and labels, in order."""
        images = self._images(dataset, self.eval_transform)
        return hashlib.sha256(f"{images.content_hash()} {images.labels()}".encode()).hexdigest()

    # ---- What differs inside the Trainer ----

    def _get_dataloader(self, dataset: Any, *args: Any, **kwargs: Any) -> DataLoader[Any]:
        if isinstance(dataset, datasets.Dataset) and self.args.image_column_name in dataset.column_names:
            if kwargs.get("is_training"):
                images, name = self._images(dataset, self.train_transform, seed_of=("train", self.num_fits)), "train"
            else:
                images, name = self._images(dataset, self.eval_transform), "validation"
            images.require_equal_labelling()
            dataset = self._cached(images, dataset, name)
        loader = super()._get_dataloader(dataset, *args, **kwargs)
        if self.args.dataloader_drop_last and hasattr(dataset, "__len__") and len(loader) == 0:
            raise ValueError(
                f"dataloader_drop_last=True leaves no batch: the {len(dataset)} images are fewer than a batch of all "
                "processes. Give a smaller batch size, or leave dataloader_drop_last out."
            )
        return loader

    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Transformers' own; under several processes the loss is that of all images, each counted once.

        The Trainer averages the losses of batches there, which the last ones, filled up with images seen before, shift.
        """
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        name = f"{metric_key_prefix}_loss"
        is_ours = self.compute_loss_func is None and self.label_smoother is None and output.label_ids is not None
        if self.args.world_size > 1 and name in output.metrics and is_ours:
            logits = output.predictions[0] if isinstance(output.predictions, tuple) else output.predictions
            labels, logits = torch.from_numpy(output.label_ids), torch.from_numpy(logits).float()
            output.metrics[name] = float(self.model.loss_function(labels, logits, self.model.config))
        return output

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """Forward and backward of a batch; images in micro-batches, whose gradients add up to those of the batch."""
        batch, size = len(next(iter(inputs.values()))), self.args.micro_batch_size
        if "pixel_values" not in inputs or size is None or size >= batch:
            return super().training_step(model, inputs, num_items_in_batch)
        loss = torch.zeros((), device=self.args.device)
        try:
            for start in range(0, batch, size):
                part = {name: value[start : start + size] for name, value in inputs.items()}
                self._share_of_batch = min(size, batch - start) / batch
                items = None if num_items_in_batch is None else num_items_in_batch * self._share_of_batch
                is_last = start + size >= batch
                with nullcontext() if is_last else self.accelerator.no_sync(model):
                    loss += super().training_step(model, part, items)
        finally:
            self._share_of_batch = 1.0
        return loss

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Transformers' own; a micro-batch has the weight of its images."""
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self._share_of_batch == 1.0:
            return result
        return (result[0] * self._share_of_batch, result[1]) if return_outputs else result * self._share_of_batch

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Images come as 8-bit pixels and are normalised here, a batch at a time, on the device."""
        inputs = super()._prepare_inputs(inputs)
        pixels = inputs.get("pixel_values")
        if pixels is not None and pixels.dtype == torch.uint8:
            values = self.eval_transform.normalize(pixels)
            inputs["pixel_values"] = values.contiguous(memory_format=torch.channels_last)
        return inputs

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model, and in its configuration the evaluation transform and the augmentation, as they are now."""
        self._record_transforms()
        super().save_model(output_dir, _internal_call)

    def _record_transforms(self) -> None:
        """Not before something is saved: a trainer that only evaluates leaves the model as it is."""
        processor = self.eval_transform.spec.write_to(self.model)
        if self._own_processor and not isinstance(processor, TimmWrapperImageProcessor):  # that is all in config.json
            self.processing_class = processor
        # What a stock pipeline ignores and test-time augmentation needs; nobody's word does not replace what is there.
        if self._train_transform is not None or not hasattr(self.model.config, "hf_sgdr"):
            transform = self.train_transform
            self.model.config.hf_sgdr = {"augment": transform.augment, "max_zoom": transform.max_zoom}

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        folder = Path(output_dir or self.args.output_dir)
        # A pickle of the arguments, which nothing needs and which would carry them to the Hub.
        (folder / "training_args.bin").unlink(missing_ok=True)
        apply_umask(*folder.glob("*.safetensors"))

    def state_to_keep(self) -> dict[str, Any]:
        """Also which fit it is, whose augmentations a resumed one goes on with."""
        return {**super().state_to_keep(), "num_fits": self.num_fits}

    def before_going_on(self, state: dict[str, Any]) -> None:
        """Draw as the fit that is gone on with."""
        super().before_going_on(state)
        self.num_fits = state["num_fits"]

    # ---- Helpers ----

    def _images(self, dataset: Any, transform: ImageTransform, seed_of: tuple[Any, ...] = ()) -> ImageDataset:
        if isinstance(dataset, ImageDataset):
            dataset = dataset.rows
        self._check_labels(dataset)
        seed = self.args.data_seed if self.args.data_seed is not None else self.args.seed
        words = [seed, *(sum(part.encode()) if isinstance(part, str) else part for part in seed_of)]
        return ImageDataset(
            dataset,
            transform,
            image_column=self.args.image_column_name,
            label_column=self.args.label_column_name,
            seed=int(np.random.SeedSequence(words).generate_state(1)[0]),
        )

    def _check_labels(self, dataset: Any) -> None:
        """The data's labels must mean the model's classes: both count from 0, but each in an order of its own."""
        column = self.args.label_column_name
        if not isinstance(dataset, datasets.Dataset) or column not in dataset.column_names:
            return
        own = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"": self.eval_dataset}
        known = {f"eval_dataset[{name!r}]" if name else "eval_dataset": one for name, one in own.items()}
        known["train_dataset"] = self.train_dataset
        what = next((name for name, one in known.items() if one is dataset), "The data set")
        is_training = dataset is self.train_dataset
        feature, config = dataset.features[column], self.model.config
        classes = [str(config.id2label.get(i, f"LABEL_{i}")) for i in range(config.num_labels)]
        is_unnamed = classes == [f"LABEL_{i}" for i in range(len(classes))]
        if isinstance(feature, datasets.ClassLabel):
            names, other = feature.names, "the model"
            if is_unnamed and len(names) == len(classes) and not is_training:
                trained = getattr(self.train_dataset, "features", None) or {}
                trained_names = getattr(trained.get(column), "names", None)
                classes, other = (trained_names, "train_dataset") if trained_names else (names, other)
            elif is_unnamed and len(names) == len(classes):
                return
            require_same_classes(names, classes, what, other)
        elif isinstance(feature, datasets.Value) and feature.dtype.startswith(("int", "uint")) and len(dataset):
            highest = int(np.max(dataset.with_format("numpy")[column][:]))
            if highest >= len(classes):
                raise ValueError(
                    f"{what} has the label {highest}, but the model has {len(classes)} classes ({few(classes)}): give "
                    f"class ids from 0 to {len(classes) - 1}, or a model with more classes."
                )

    def _cached(self, images: ImageDataset, dataset: Any, name: str) -> ImageDataset:
        """With `cache_images`, the trainer's own images decoded once for all epochs; others as they are."""
        own = self.eval_dataset.values() if isinstance(self.eval_dataset, dict) else [self.eval_dataset]
        if self.args.cache_images and any(dataset is one for one in (self.train_dataset, *own)):
            images.cache = self._decoded.of(images, dataset, name)
        return images

    def _logits(self, dataset: Any) -> Any:
        predictions = self.predict(dataset).predictions
        return predictions[0] if isinstance(predictions, tuple) else predictions

    def _or_validation(self, dataset: Any) -> Any:
        dataset = dataset if dataset is not None else self.eval_dataset
        if dataset is None or isinstance(dataset, dict):
            raise ValueError("Which images? The trainer has no single eval_dataset: give dataset=.")
        return dataset


def require_same_classes(names: Sequence[str], classes: Sequence[str], what: str, other: str) -> None:
    """Raise a ValueError that shows both lists, unless a data set's class names are those that it is compared with."""
    if list(names) == list(classes):
        return
    pairs = itertools.zip_longest(names, classes)
    first, (one, two) = next((i, pair) for i, pair in enumerate(pairs) if pair[0] != pair[1])
    raise ValueError(
        f"{what} has the classes {few(names)} and {other} has {few(classes)}: label {first} is {_named(one)} there and "
        f"{_named(two)} here. Give datasets.ClassLabel(names=...) the names in that order, or the model the data's "
        "names: create_image_classifier(name, labels=names)."
    )


def _named(name: str | None) -> str:
    return "none" if name is None else repr(printable(name))


def _checked_transform(name: str, value: Any) -> ImageTransform:
    if not isinstance(value, ImageTransform):
        raise TypeError(f"{name} is {type(value).__name__}: give one of those of image_transforms(model).")
    return value
