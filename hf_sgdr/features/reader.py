"""Features of images as data sets: read from their store, after what it lacks was computed."""

from collections.abc import Sequence
from typing import Protocol

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel
from transformers.utils import logging

from hf_sgdr._utils.system import available_memory
from hf_sgdr.data.cache import CacheArguments
from hf_sgdr.data.dataset import ImageDataset
from hf_sgdr.features.extract import extract_features, resolve_feature_dtype
from hf_sgdr.features.head import FeatureDataset, Rows
from hf_sgdr.features.store import FeatureStore
from hf_sgdr.models.boundary import Boundary

logger = logging.get_logger(__name__)

# On the CPU a small batch stays in its caches, and the first one is five times as fast as with 64.
CPU_BATCH = 32


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
