"""Training on precomputed features: the small model and the rows of data that take the places of the large.

Both are ordinary for a Trainer: a module with a loss, and a data set that indexes a whole batch at once.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import Dataset
from transformers import PreTrainedModel
from transformers.utils import logging

from hf_sgdr._utils.store import available_memory
from hf_sgdr.data.cache import CacheArguments
from hf_sgdr.data.images import ImageDataset
from hf_sgdr.features.extract import extract_features, resolve_feature_dtype
from hf_sgdr.features.store import FeatureStore, RowsOnDisk
from hf_sgdr.models.boundary import Boundary

logger = logging.get_logger(__name__)

# On the CPU a small batch stays in its caches, and the first one is five times as fast as with 64.
CPU_BATCH = 32

Rows = torch.Tensor | RowsOnDisk


class FeatureDataset(Dataset[dict[str, torch.Tensor]]):
    """Rows of features and their labels; a whole batch is one indexing operation.

    Args:
        views (sequence of `Tensor` or [`RowsOnDisk`]): the features of each view of the images, each (rows, ...), of
            any floating type; epoch `e` gives view `e % len(views)`.
        labels (`Tensor`): (rows,), class ids.
    """

    def __init__(self, views: Sequence[Rows], labels: torch.Tensor) -> None:
        self.views, self.labels = views, labels
        self.features = views[0]

    def set_epoch(self, epoch: int) -> None:
        """Give the view of another epoch; [`DatasetEpoch`] calls it."""
        self.features = self.views[epoch % len(self.views)]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"features": self.features[index].float(), "labels": self.labels[index]}

    def __getitems__(self, indices: list[int]) -> dict[str, torch.Tensor]:
        rows = torch.as_tensor(indices)
        return {"features": self.features[rows].float(), "labels": self.labels[rows]}


def whole_batch(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The collator for a dataset that already returns whole batches."""
    return batch


class HeadClassifier(nn.Module):
    """A model's head alone, on precomputed features; its tensors are the model's own.

    Args:
        model (`PreTrainedModel`): the whole classifier, for its configuration and loss.
        head (`nn.Module`): the model's last layer group.
    """

    main_input_name = "features"

    def __init__(self, model: PreTrainedModel, head: nn.Module) -> None:
        super().__init__()
        self.head = head
        self.config = model.config
        self._whole = (model,)  # in a tuple, because it is no part of this module
        self.loss_function = model.loss_function

    def activation_checkpointing_enable(self, **kwargs: Any) -> None:
        """A head alone has no activations worth computing twice; the Trainer asks for it all the same."""

    gradient_checkpointing_enable = activation_checkpointing_enable  # its name before transformers 5.23

    @property
    def whole_model(self) -> PreTrainedModel:
        """The model that the head belongs to."""
        return self._whole[0]

    def forward(
        self, features: torch.Tensor, labels: torch.Tensor | None = None, **loss_kwargs: Any
    ) -> dict[str, torch.Tensor]:
        """Logits (batch, classes), and the model's own loss where labels are given."""
        logits = self.head(features)
        if labels is None:
            return {"logits": logits}
        return {"loss": self.loss_function(labels, logits, self.config, **loss_kwargs), "logits": logits}


class ExtractionArguments(CacheArguments, Protocol):
    """What extraction wants to know of a Trainer's arguments; [`SGDRTrainingArguments`] say it."""

    dataloader_num_workers: int
    feature_memory_gb: float | None

    @property
    def eval_batch_size(self) -> int:
        """Images of an evaluation step."""


class FeatureReader:
    """Features of images for one model: read from their store, after what it lacks was computed.

    Args:
        model (`PreTrainedModel`): the whole classifier.
        args ([`ExtractionArguments`]): batch size, workers, budgets, progress bars.
        accelerator (`Accelerator`): the processes that share the work.
    """

    def __init__(self, model: PreTrainedModel, args: ExtractionArguments, accelerator: Accelerator) -> None:
        self.model, self.args, self.accelerator = model, args, accelerator
        self._read: dict[str, Rows] = {}

    def dataset(self, views: Sequence[ImageDataset], boundary: Boundary, name: str, dtype: str) -> FeatureDataset:
        """The features of one or more views of the same images, with their labels.

        Args:
            views (sequence of [`ImageDataset`]): the plain one first.
            boundary ([`Boundary`]): what part of the model makes them.
            name (`str`): for the progress bar.
            dtype (`str`): see [`~hf_sgdr.features.extract.feature_dtype`].
        """
        count = len(views) - 1
        features = [
            self._features(view, boundary, f"{name}, view {i} of {count}" if i else name, dtype)
            for i, view in enumerate(views)
        ]
        if count:
            megabytes = sum(view.nbytes for view in features) / 1e6
            logger.warning(
                f"Features of the plain images and {count} augmented views take {megabytes:.1f} MB; "
                f"epoch e trains on view e % {count + 1}, of which 0 is the plain one."
            )
        return FeatureDataset(features, torch.as_tensor(views[0].labels()))

    def _features(self, images: ImageDataset, boundary: Boundary, name: str, wanted_dtype: str) -> Rows:
        on_cpu = self.accelerator.device.type == "cpu"
        is_shown = self.accelerator.is_local_main_process and not self.args.disable_tqdm
        store = extract_features(
            self.model,
            boundary,
            images,
            dtype=resolve_feature_dtype(self.accelerator.device, wanted_dtype),
            batch_size=CPU_BATCH if on_cpu else self.args.eval_batch_size,
            num_workers=self.args.dataloader_num_workers,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
            progress=f"Features ({name})" if is_shown else None,
            max_gb=self.args.cache_disk_gb,
        )
        self.accelerator.wait_for_everyone()
        if store.key not in self._read:
            self._read[store.key] = self._within_budget(store, name)
        return self._read[store.key]

    def _within_budget(self, store: FeatureStore, name: str) -> Rows:
        """In memory if they fit, in place of those read longest ago if need be; else row by row from disk."""
        on_disk = store.open()
        in_memory = {key: rows.nbytes for key, rows in self._read.items() if isinstance(rows, torch.Tensor)}
        budget = self.args.feature_memory_gb
        # what is held already may be given up for it
        limit = available_memory() / 2 + sum(in_memory.values()) if budget is None else budget * 1e9
        if on_disk.nbytes > limit:
            logger.warning(
                f"Features ({name}) take {on_disk.nbytes / 1e9:.2f} GB, more than the {limit / 1e9:.2f} GB of "
                "memory that they may (feature_memory_gb): they are read from disk, row by row."
            )
            return on_disk
        for key in list(in_memory):
            if on_disk.nbytes + sum(in_memory.values()) <= limit:
                break
            del self._read[key], in_memory[key]
        return store.read()
