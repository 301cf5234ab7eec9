"""Features of images as data sets: read from their store, after what it lacks was computed."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from hf_sgdr._utils import scoped
from hf_sgdr._utils.system import available_memory, progress_bar
from hf_sgdr.data.cache import CacheArguments, together
from hf_sgdr.data.dataset import ImageDataset
from hf_sgdr.data.inputs import ImageInputs
from hf_sgdr.data.stream import is_stream, stream_chunks
from hf_sgdr.features.extract import extract_features, resolve_feature_dtype
from hf_sgdr.features.head import FeatureDataset, HeadClassifier, Rows
from hf_sgdr.features.store import FeatureStore, module_hash, stacked
from hf_sgdr.models.boundary import Boundary
from hf_sgdr.optim.folds import folds_of_views
from hf_sgdr.optim.layer_groups import LayerGroups
from hf_sgdr.optim.solve import HeadSolution, solve_head

logger = logging.get_logger(__name__)

# On the CPU a small batch stays in its caches, and the first one is five times as fast as with 64.
CPU_BATCH = 32


class ExtractionArguments(CacheArguments, Protocol):
    """What extraction wants to know of a Trainer's arguments; [`SGDRTrainingArguments`] say it."""

    dataloader_num_workers: int
    feature_dtype: str
    feature_memory_gb: float | None
    precompute_views: int

    @property
    def eval_batch_size(self) -> int:
        """Images of an evaluation step."""

    @property
    def n_gpu(self) -> int:
        """GPUs of this process."""


@dataclass(frozen=True)
class Session:
    """What a fit on features trains and evaluates in the places of the model and its images.

    Args:
        model (`nn.Module`): the head alone, or the whole model, which takes features inside the context.
        groups ([`LayerGroups`]): those of `model`.
        train_dataset ([`FeatureDataset`]), eval_dataset ([`FeatureDataset`], dict of them, or None): features.
        context (context manager): to train in.
    """

    model: nn.Module
    groups: LayerGroups
    train_dataset: FeatureDataset
    eval_dataset: FeatureDataset | dict[str, FeatureDataset] | None
    context: AbstractContextManager[None]


class PrecomputedFeatures:
    """Features of images before the layer groups that train: computed when they are first needed, then read.

    Args:
        model (`PreTrainedModel`): the whole classifier.
        groups ([`LayerGroups`]): its layer groups; what is frozen is computed once for every image.
        images ([`ImageInputs`]): which pixels the model sees.
        args ([`ExtractionArguments`]): precision, views, batch size, workers, budgets, progress bars.
        accelerator (`Accelerator`): the processes that share the work.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        groups: LayerGroups,
        images: ImageInputs,
        args: ExtractionArguments,
        accelerator: Accelerator,
    ) -> None:
        self.model, self.groups, self.images, self.args, self.accelerator = model, groups, images, args, accelerator
        self.are_used = False
        self._read: dict[str, Rows] = {}
        self._streams: dict[str, tuple[Any, FeatureDataset]] = {}  # the last one that was read
        self._boundaries: dict[tuple[LayerGroups, int, int], Boundary] = {}

    @property
    def dtype(self) -> str:
        """The precision in which training features are computed: "float32" or "bfloat16"."""
        return str(resolve_feature_dtype(self.accelerator.device, self.args.feature_dtype)).removeprefix("torch.")

    def boundary(self, frozen: int | None = None) -> Boundary:
        """Where the frozen groups end, or would end with so many frozen.

        Raises:
            ValueError: if nothing is frozen, the model cannot be cut there, or several GPUs would train what follows.
        """
        frozen, size = self.groups.frozen if frozen is None else frozen, self.images.eval_transform.spec.size
        key = (self.groups, frozen, size)
        if key not in self._boundaries:
            self._boundaries[key] = Boundary.at_boundary(self.groups, size, frozen)
        boundary = self._boundaries[key]
        if boundary.skipped is not None and self.args.n_gpu > 1:  # nn.DataParallel's threads would share its features
            raise ValueError(
                f"The {self.args.n_gpu} GPUs of one process cannot train on stored activations: start a process for "
                "each (accelerate launch --multi_gpu), set CUDA_VISIBLE_DEVICES=0, or train with precompute=False."
            )
        return boundary

    def check(self) -> None:
        """Raise a ValueError, before anything changes, if there can be no features with what is frozen now."""
        self.boundary()
        if self.args.precompute_views and not self.images.train_transform.is_random:
            raise ValueError(
                f"precompute_views={self.args.precompute_views} needs a training transform that augments: give the "
                'trainer the first one of image_transforms(model, augment="side_on", max_zoom=1.1).'
            )

    def session(self, train_rows: Any, eval_rows: Any) -> Session:
        """What to train on features instead of images; those that are not stored yet are computed.

        Args:
            train_rows (`datasets.Dataset`): images and labels.
            eval_rows (`datasets.Dataset`, a dict of them, or None): likewise.
        """
        boundary = self.boundary()
        train = self.training(train_rows)
        if isinstance(eval_rows, dict):
            evaluation: Any = {name: self._evaluation(rows, name) for name, rows in eval_rows.items()}
        else:
            evaluation = None if eval_rows is None else self._evaluation(eval_rows, "validation")
        if boundary.skipped is not None:
            return Session(self.model, self.groups, train, evaluation, boundary.fed_with_features())
        head = HeadClassifier(self.model, boundary.module)
        names = [name for name, _ in head.named_parameters()]
        groups = LayerGroups(head, {self.groups.names[-1]: names})
        return Session(head, groups, train, evaluation, nullcontext())

    def linear_head(self) -> nn.Linear:
        """The linear layer that gives the logits.

        Raises:
            ValueError: if the head has none, or it has no bias.
        """
        modules = [] if self.groups.head is None else list(self.groups.head.modules())
        linear = next((module for module in reversed(modules) if isinstance(module, nn.Linear)), None)
        if linear is None or linear.out_features != self.model.config.num_labels or linear.bias is None:
            raise ValueError(f"{type(self.model).__name__} has no single linear head with a bias, which can be solved.")
        return linear

    def solve_head(self, rows: Any, **options: Any) -> HeadSolution:
        """[`~hf_sgdr.optim.solve.solve_head`] on the features of training images, with their stored views.

        Args:
            rows (`datasets.Dataset`): images and labels.
            **options: see there; `sample_weight` may be a function of the labels, and `folds` rows or masks of the
                images, whose views follow them.

        Raises:
            ValueError: see there; or the model cannot be cut at a linear head.
        """
        linear = self.linear_head()
        boundary = Boundary.at_head(self.model, linear)
        dataset = self.training(rows, boundary)
        count, views = len(dataset), len(dataset.views)
        labels = torch.cat([dataset.labels] * views)
        groups = torch.arange(count).repeat(views)
        if callable(options.get("sample_weight")):
            options["sample_weight"] = options["sample_weight"](labels)
        if isinstance(folds := options.get("folds"), Sequence):
            options["folds"] = folds_of_views(folds, count, views)
        options |= {"groups": groups.numpy(), "num_classes": linear.out_features}
        return solve_head(stacked(dataset.views), labels, **options)

    def training(self, rows: Any, boundary: Boundary | None = None) -> FeatureDataset:
        """The features of the plain training images, and those of the augmented views, if any."""
        if is_stream(rows):
            return self._streamed(rows, boundary or self.boundary())
        views = [self.images.view(rows, number) for number in range(1 + self.args.precompute_views)]
        return self._dataset(rows, views, "train", self.args.feature_dtype, boundary)

    # ---- Helpers ----

    def _streamed(self, stream: Any, boundary: Boundary) -> FeatureDataset:
        """The features of a stream, which is read once; each chunk of it is a store of its own.

        Every process reads its part, and afterwards all know what all have stored.
        """
        count = 1 + self.args.precompute_views
        transforms = (self.images.eval_transform.to_dict(), self.images.train_transform.to_dict(), count)
        body = module_hash(self.model, leave_out=boundary.names_after())
        key = f"{id(stream)} {boundary.name} {body} {transforms}"
        if key in self._streams:
            return self._streams[key][1]
        rank, world_size = self.accelerator.process_index, self.accelerator.num_processes
        columns = (self.images.image_column, self.images.label_column)
        own: list[tuple[list[Any], list[tuple[Any, int]]]] = []
        what = "Features (stream)" if self.accelerator.is_local_main_process else None
        with together(self.accelerator), progress_bar(what, bars=not self.args.disable_tqdm) as bar:
            for chunk, rows in enumerate(stream_chunks(stream, *columns, rank=rank, world_size=world_size)):
                numbers = [number and number + chunk * (count - 1) for number in range(count)]  # views of their own
                views = [self.images.view(rows, number) for number in numbers]
                stores = [self._stored(view, self.args.feature_dtype, boundary) for view in views]
                own.append((self.images.labels(rows), [(store.manifest["depends_on"], store.rows) for store in stores]))
                bar.update(len(rows))
        every = gather_object(own) if world_size > 1 else own
        parts = [[FeatureStore(*stores[view]) for _, stores in every] for view in range(count)]
        with together(self.accelerator):
            for store in (store for view in parts for store in view):
                store.check_shared()
            is_small = sum(store.open().nbytes for view in parts for store in view) <= self._memory_limit(0)
            views_of_all = [stacked([store.read() if is_small else store.open() for store in view]) for view in parts]
        labels = torch.as_tensor([label for labels, _ in every for label in labels])
        dataset = FeatureDataset(views_of_all, labels)
        self._streams = {key: (stream, dataset)}  # with the stream, so that its id stays its own
        return dataset

    def _evaluation(self, rows: Any, name: str) -> FeatureDataset:
        dtype = "bfloat16" if self.args.feature_dtype == "bfloat16" else "float32"
        return self._dataset(rows, [self.images.evaluation(rows)], name, dtype)

    def _dataset(
        self, rows: Any, views: Sequence[ImageDataset], name: str, dtype: str, boundary: Boundary | None = None
    ) -> FeatureDataset:
        """The features of one or more views of the same images, the plain one first, with their labels."""
        count = len(views) - 1
        stores = [
            self._filled(view, f"{name}, view {number} of {count}" if number else name, dtype, boundary)
            for number, view in enumerate(views)
        ]
        with together(self.accelerator):
            features = self._within_budget(stores, name)
        if count:
            megabytes = sum(view.nbytes for view in features) / 1e6
            logger.warning(
                f"Features of the plain images and of {count} augmented views take {megabytes:.1f} MB; training takes "
                "them in turn, epoch by epoch."
            )
        return FeatureDataset(features, torch.as_tensor(self.images.labels(rows)))

    def _stored(self, images: ImageDataset, wanted_dtype: str, boundary: Boundary, **options: Any) -> FeatureStore:
        """The store of images, once this process has written its part."""
        on_cpu = self.accelerator.device.type == "cpu"
        with _without_autocast(self.model):
            return extract_features(
                self.model,
                boundary,
                images,
                dtype=resolve_feature_dtype(self.accelerator.device, wanted_dtype),
                batch_size=CPU_BATCH if on_cpu else self.args.eval_batch_size,
                num_workers=self.args.dataloader_num_workers,
                max_gb=self.args.cache_disk_gb,
                **options,
            )

    def _filled(
        self, images: ImageDataset, name: str, wanted_dtype: str, boundary: Boundary | None = None
    ) -> FeatureStore:
        """The store of images, once all processes have written their parts."""
        with together(self.accelerator):
            return self._stored(
                images,
                wanted_dtype,
                boundary or self.boundary(),
                rank=self.accelerator.process_index,
                world_size=self.accelerator.num_processes,
                progress=f"Features ({name})" if self.accelerator.is_local_main_process else None,
                bars=not self.args.disable_tqdm,
            )

    def _within_budget(self, stores: Sequence[FeatureStore], name: str) -> list[Rows]:
        """In memory if all fit, in place of those read longest ago if need be; else row by row from disk."""
        if not all(store.key in self._read for store in stores):
            for store in stores:
                store.check_shared()
            on_disk = {store.key: store.open() for store in stores}
            size = sum(rows.nbytes for rows in on_disk.values())
            in_memory = {key: rows.nbytes for key, rows in self._read.items() if isinstance(rows, torch.Tensor)}
            limit = self._memory_limit(sum(in_memory.values()))
            if size > limit:
                logger.warning(
                    f"Features ({name}) take {size / 1e9:.2f} GB, more than the {limit / 1e9:.2f} GB of memory that "
                    "they may (feature_memory_gb): they are read from disk, row by row."
                )
                self._read |= on_disk
            else:
                others = {key: bytes_held for key, bytes_held in in_memory.items() if key not in on_disk}
                for key in list(others):
                    if size + sum(others.values()) <= limit:
                        break
                    del self._read[key], others[key]
                for store in stores:
                    if store.key not in in_memory:
                        self._read[store.key] = store.read()
        return [self._read[store.key] for store in stores]

    def _memory_limit(self, held: int) -> float:
        """Bytes that features may take in memory; those that are held already may be given up for others."""
        budget = self.args.feature_memory_gb
        return available_memory() / 2 + held if budget is None else budget * 1e9


@contextmanager
def _without_autocast(model: nn.Module) -> Iterator[None]:
    """Inside, without what accelerate leaves around a model's forward pass once it was used with `bf16=True`."""
    wrapped, own = vars(model).get("forward"), vars(model).get("_original_forward")
    if wrapped is None or own is None:
        yield
        return
    with scoped.attributes(model, forward=own):
        yield
