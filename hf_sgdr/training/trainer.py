"""`SGDRTrainer`: transformers' Trainer with the lesson's calls, wiring the plug-ins together.

It stays a Trainer: loops, callbacks, logging, checkpoints and processes are the ordinary ones, reached by public hooks.
"""

import copy
import functools
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import broadcast_object_list
from matplotlib.axes import Axes
from numpy.typing import NDArray
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ConstantLR, LRScheduler
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer
from transformers.models.timm_wrapper.image_processing_timm_wrapper import TimmWrapperImageProcessor
from transformers.trainer_utils import EvalLoopOutput, EvalPrediction, TrainOutput
from transformers.utils import logging
from typing_extensions import override

from hf_sgdr._utils import scoped, termination
from hf_sgdr._utils._compat import (
    forget_prepared_models,
    loss_counters,
    mean_training_loss,
    restore_loss_counters,
    skip_gradient_norm,
)
from hf_sgdr._utils.files import RUNS_FOLDER, clear_disk_errors
from hf_sgdr._utils.plots import plot_images, plot_rates
from hf_sgdr._utils.run_picture import plot_losses
from hf_sgdr._utils.store import apply_umask
from hf_sgdr._utils.system import keep_freed_memory, use_all_processors
from hf_sgdr.callbacks.best_weights import KeepBestWeights, judged_losses
from hf_sgdr.callbacks.epoch_table import show_epoch_table
from hf_sgdr.callbacks.loop import DatasetEpoch, EqualBuffers, StopOnNonFiniteLoss
from hf_sgdr.callbacks.snapshots import SnapshotCallback
from hf_sgdr.callbacks.trackers import TrackedFits
from hf_sgdr.data.cache import ImageCaches
from hf_sgdr.data.dataset import ImageViews, rows_of
from hf_sgdr.data.inputs import ImageInputs
from hf_sgdr.data.labels import ClassNames, class_names
from hf_sgdr.data.stream import MATERIALISE, is_stream
from hf_sgdr.data.transforms import ImageTransform, image_transforms, recorded_views
from hf_sgdr.features.head import HeadClassifier, whole_batch
from hf_sgdr.features.reader import PrecomputedFeatures
from hf_sgdr.hub.card_facts import card_facts
from hf_sgdr.hub.push import PROCESSOR_FILES, hub_api, prepare_repository, push_folder
from hf_sgdr.inference.tta import check_beta, fitted_weight, log_loss, mean_of_views, plain_weight, views_at_once
from hf_sgdr.models.classifiers import check_trainable
from hf_sgdr.optim.balance import BalancedLoss
from hf_sgdr.optim.layer_groups import LayerGroups
from hf_sgdr.optim.range_test import LRRangeResult, LRRangeTest
from hf_sgdr.optim.rates import RecordRates, highest_rates, rates_at, rates_by_step, set_rates
from hf_sgdr.optim.schedule import SGDRSchedule, SGDRScheduler, get_sgdr_schedule, require_whole
from hf_sgdr.optim.solve import HeadSolution
from hf_sgdr.training.arguments import SGDRTrainingArguments
from hf_sgdr.training.checkpoints import SealCheckpoints, checkpoint_to_resume
from hf_sgdr.training.classes import TrainingClasses
from hf_sgdr.training.history import TrainingHistory, fit_curve, fit_record
from hf_sgdr.training.loop import light_optimizer, loop_arguments, loss_of_all, micro_batches, steps_autocast
from hf_sgdr.training.record import write_card, write_run_files

logger = logging.get_logger(__name__)

Rates = float | Sequence[float] | slice


class SGDRTrainer(Trainer):
    """Train an image classifier by the lesson's recipe. Only the head trains at first.

    Args:
        model (`PreTrainedModel`): an image classifier; [`create_image_classifier`] makes one.
        args ([`SGDRTrainingArguments`], *optional*): by default those of `SGDRTrainingArguments("hf_sgdr_out")`.
        train_dataset, eval_dataset (`datasets.Dataset`, torch `Dataset` or sequence of dicts, *optional*): rows with
            an image, whatever [`~hf_sgdr.data.images.read_image`] takes, and a label: a class id, a name of the
            model's, or several; [`load_image_folder`] reads them. A transform of your own (`with_transform`) is
            applied first; where it gives no images but a model's inputs, they are taken as they are. Validation is
            what evaluation, `log_predictions` and `tta` take by default. A stream (`datasets.IterableDataset`) is
            trained on by precomputed features alone.
        train_transform, eval_transform ([`ImageTransform`], *optional*): from [`image_transforms`]; by default the
            model's evaluation transform for both.
        layer_groups ([`LayerGroups`], *optional*): by default `args.n_groups` groups of the model.
        **kwargs: everything else that [`~transformers.Trainer`] takes. `compute_metrics` is accuracy by default;
            where the largest class has more than three times the images of the smallest, balanced accuracy and macro-F1
            beside it; with several labels an image, macro mean average precision and macro-F1.

    Attributes:
        images ([`ImageInputs`]): which pixels the model sees.
        features ([`PrecomputedFeatures`]): what it trains on while `precompute` is on.
        history ([`TrainingHistory`]): what its fits did.
        classes ([`TrainingClasses`]): how its classes are made up.

    Raises:
        TypeError: if `args` are not [`SGDRTrainingArguments`], or a transform is not an [`ImageTransform`].
        ValueError: if the model cannot be trained on images with labels or be split into layer groups, or a data set
            cannot be used, or its classes are not the model's.
    """

    args: SGDRTrainingArguments
    model: PreTrainedModel
    _share_of_batch = 1.0  # of the micro-batch that is computed now

    def __init__(
        self,
        model: PreTrainedModel,
        args: SGDRTrainingArguments | None = None,
        *,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        train_transform: ImageTransform | None = None,
        eval_transform: ImageTransform | None = None,
        layer_groups: LayerGroups | None = None,
        **kwargs: Any,
    ) -> None:
        args = args if args is not None else SGDRTrainingArguments("hf_sgdr_out")
        if not isinstance(args, SGDRTrainingArguments):
            raise TypeError(f"args is {type(args).__name__}: give SGDRTrainingArguments.")
        check_trainable(model)
        layer_groups = layer_groups or LayerGroups.from_model(model, args.n_groups)
        layer_groups.learning_rates(args.group_learning_rates or args.learning_rate)  # a wrong number shows now
        self.images = ImageInputs(
            train_transform,
            eval_transform if eval_transform is not None else image_transforms(model)[1],
            columns=(args.image_column_name, args.label_column_name),
            seed=args.data_seed if args.data_seed is not None else args.seed,
            names=class_names(model.config),
            augment_on_device=args.augment_on_device,
        )
        classes = ClassNames.of(model.config, train_dataset, args.label_column_name)
        for name, rows in _named(train_dataset, eval_dataset).items():
            self.images.check(name, rows, classes)
        self.classes = TrainingClasses.of(model.config, self.images, train_dataset)
        kwargs.setdefault("compute_metrics", self.classes.compute_metrics(args.best_by))
        if args.class_weights is not None:
            if kwargs.get("compute_loss_func") is not None:
                raise ValueError("class_weights and compute_loss_func: give one of the two.")
            kwargs["compute_loss_func"] = self.classes.loss(args.class_weights)
        if self.classes.is_multi_label and args.label_smoothing_factor:
            raise ValueError("label_smoothing_factor needs one label an image: leave it out.")
        if args.device.type == "cpu":
            if args.keep_freed_memory:
                keep_freed_memory()
            use_all_processors()
        if sum(isinstance(module, nn.Conv2d) for module in model.modules()) > 1:
            nn.Module.to(model, memory_format=torch.channels_last)
        of_trainer = None if is_stream(train_dataset) else train_dataset  # which would ask a stream for max_steps
        super().__init__(model, args, train_dataset=of_trainer, eval_dataset=eval_dataset, **kwargs)
        if self.classes.is_multi_label and self.compute_loss_func is None:  # whose loss is a mean whatever it is told
            self.model_accepts_loss_kwargs = False
        self.train_dataset = train_dataset
        if args.cache_images:
            self.images.caches = ImageCaches(args, self.accelerator)
        self.features = PrecomputedFeatures(model, layer_groups, self.images, args, self.accelerator)
        self.history = TrainingHistory()
        self.num_fits = 0  # begun so far; each draws augmentations of its own
        self._own_processor = kwargs.get("processing_class") is None
        self._given_optimizers: tuple[Any, Any] = kwargs.get("optimizers", (None, None))
        self._groups_on_features: LayerGroups | None = None
        self._steps_per_epoch = 0
        self._frozen: int | None = None  # groups, at the end of the last fit; None while one goes on
        if args.max_grad_norm == 0:
            skip_gradient_norm(self)
        self._checkpoints = SealCheckpoints(self._state_to_keep, self._restore_state)
        self._tracked_fits = TrackedFits(self.callback_handler, self.plot_lr)
        self._user_rates = RecordRates()
        callbacks = (self._checkpoints, DatasetEpoch(), StopOnNonFiniteLoss(self), EqualBuffers())
        for callback in (*callbacks, self._tracked_fits, self._user_rates):
            self.add_callback(callback)
        show_epoch_table(self)
        if self.is_world_process_zero():
            self.classes.warn(is_weighted=args.class_weights is not None)
        self.layer_groups.freeze_to(args.freeze_to)
        self.layer_groups.freeze_batch_norm = args.freeze_batch_norm
        self.precompute = args.precompute

    # ---- The lesson's calls ----

    def fit(
        self,
        lr: Rates,
        cycles: int,
        *,
        cycle_len: int | None = None,
        cycle_mult: int = 1,
        name: str | None = None,
        keep_best: bool = False,
        resume_from_checkpoint: str | bool | None = None,
    ) -> TrainOutput:
        """Train, as the lesson's `learn.fit(lr, cycles, cycle_len=..., cycle_mult=...)`.

        With `cycle_len` the rate is annealed and restarted: `fit(lr, 3, cycle_len=1, cycle_mult=2)` is 1 + 2 + 4 = 7
        epochs. Without it the rate is constant for `cycles` epochs. Each fit has a new optimizer and a folder for
        checkpoints of its own. With `args.max_steps` it ends after so many steps, its cycles cut off.

        An optimizer that the trainer was given (`optimizers=(optimizer, None)`) gets the rates: each of its parameter
        groups that of the layer group that it belongs to.

        Args:
            lr (`float`, sequence of `float` or `slice`): highest rate, one for all layer groups or one a group;
                `slice(a, b)` spreads geometrically. With precompute the last one counts.
            cycles (`int`): how many cycles, or epochs without `cycle_len`.
            cycle_len (`int`, *optional*): epochs of the first cycle.
            cycle_mult (`int`, *optional*, defaults to 1): each cycle is this many times as long as the one before.
            name (`str`, *optional*): of the folder below `output_dir/_runs`; by default `fit-` and a number.
            keep_best (`bool`, *optional*, defaults to False): end with the weights of the evaluation with the lowest
                validation loss, which are kept in that folder; by default with those of the last step.
            resume_from_checkpoint (`str` or `bool`, *optional*): as in [`~transformers.Trainer.train`].

        Raises:
            ValueError: if a number is out of range, the rates do not match the layer groups or the given optimizer,
                or there is nothing to find the best weights by.
        """
        cycles = require_whole("cycles", cycles, at_least=1)
        cycle_mult = require_whole("cycle_mult", cycle_mult, at_least=1)
        if cycle_len is not None:
            cycle_len = require_whole("cycle_len", cycle_len, at_least=1)
        elif cycle_mult != 1:
            raise ValueError(f"cycle_mult={cycle_mult} needs cycle_len: without it the rate is constant.")
        if keep_best and self.args.eval_strategy == "no":
            raise ValueError('keep_best=True compares validation losses: it needs an eval_strategy other than "no".')
        name = name or f"fit-{self.num_fits + 1:03d}"
        folder = Path(self.args.output_dir, RUNS_FOLDER, name)
        args = copy.copy(self.args)
        args.group_learning_rates = self.layer_groups.learning_rates(lr)
        args.learning_rate = args.group_learning_rates[-1]
        args.num_cycles, args.cycle_len, args.cycle_mult, args.num_train_epochs = cycles, cycle_len, cycle_mult, None
        args.output_dir = str(folder)
        self._tracked_fits.name_fit(args, self.args.output_dir, name)
        with scoped.attributes(self, args=args):
            if not keep_best:
                return self._train(name, resume_from_checkpoint)
            with self.accelerator.main_process_first():
                if not resume_from_checkpoint and self.is_world_process_zero():
                    (folder / "best.safetensors").unlink(missing_ok=True)  # of an earlier run
            best = KeepBestWeights(self.model, folder / "best.safetensors", judged_losses(self), by=self.args.best_by)
            best.stage = name
            self.add_callback(best)
            try:
                output = self._train(name, resume_from_checkpoint)
            finally:
                self.remove_callback(best)
            self.accelerator.wait_for_everyone()  # the main process has written the best weights
            best.restore()
            kept = self.history.fits[-1]["kept"]
            kept |= {key: best.metrics[key] for key in kept if key in best.metrics}
            return output

    @override
    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Train as the arguments say: cycles, layer groups, precompute. A new optimizer each time.

        A given optimizer keeps its own rates, unless the arguments have `group_learning_rates`. A resumed training ends
        with the very weights and history of an uninterrupted one, on one CPU process to the bit.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*): True goes on from the last checkpoint that is whole.
            trial, ignore_keys_for_eval (*optional*): as in [`~transformers.Trainer.train`].

        Raises:
            ValueError: if a data set is missing, or there is no checkpoint to go on from or it is not whole.
        """
        return self._train(
            f"train-{len(self.history.fits) + 1:03d}", resume_from_checkpoint, trial, ignore_keys_for_eval
        )

    def lr_find(
        self,
        start_lr: float = 1e-7,
        end_lr: float = 10.0,
        num_steps: int = 100,
        *,
        group_learning_rates: Rates | None = None,
    ) -> LRRangeResult:
        """The learning rate range test on what would train now; afterwards everything is as before.

        Args:
            start_lr, end_lr, num_steps: see [`LRRangeTest`]; with `args.max_steps` it has no more steps than that.
            group_learning_rates (*optional*): rates whose ratios the layer groups keep during the test, such as
                `[1e-4, 1e-3, 1e-2]`; by default those of the arguments, else all groups have the same rate.
        """
        num_steps = LRRangeTest(start_lr, end_lr, num_steps).num_steps
        most = self.args.max_steps if self.args.max_steps > 0 else num_steps
        test = LRRangeTest(start_lr, end_lr, max(2, min(num_steps, most)))
        self._check_before_training()
        args = copy.copy(self.args)
        if group_learning_rates is not None:
            args.group_learning_rates = self.layer_groups.learning_rates(group_learning_rates)
        optimizer, _ = self._given_optimizers
        before = [dict(group) for group in optimizer.param_groups] if optimizer is not None else []
        try:
            with scoped.attributes(self, args=args, optimizer=optimizer), self.on_features():
                self._set_given_rates()
                result = test.run(self, max_steps=most)
        finally:
            for group, values in zip(optimizer.param_groups if before else (), before, strict=True):
                group.clear()
                group.update(values)
        self._tracked_fits.range_test_done(result)
        self.history.add_range_test(result)
        return result

    def solve_head(
        self,
        *,
        strengths: Sequence[float] | None = None,
        folds: int | Sequence[tuple[Any, Any]] = 5,
        seed: int = 42,
        sample_weight: Any = None,
    ) -> HeadSolution:
        """Solve the head on the features of the training images, with `precompute_views` also on those of their views.

        Afterwards the model has the solution, the same in every process. Features are computed when they are not
        stored yet, whatever is frozen.

        Args:
            strengths, folds, seed, sample_weight: see [`~hf_sgdr.optim.solve.solve_head`]; `args.class_weights` weigh
                by default, and folds are of images, whose views follow them.

        Returns:
            [`HeadSolution`]: how good it is in cross-validation, too.

        Raises:
            ValueError: if there are no training images, or the model cannot be cut at a linear head.
        """
        self._check_before_training()
        self._check_images("train_dataset", self.train_dataset)
        options = {"strengths": strengths, "folds": folds, "seed": seed, "sample_weight": sample_weight}
        if sample_weight is None and self.args.class_weights is not None:
            options["sample_weight"] = functools.partial(self.classes.row_weights, self.args.class_weights)
        solution = [self.features.solve_head(self.train_dataset, **options)]
        if self.args.world_size > 1:
            broadcast_object_list(solution)
        linear = self.features.linear_head()
        self._forget_plain_weight()
        self.history.add_solution()
        with torch.no_grad():
            linear.weight.copy_(solution[0].weight)
            linear.bias.copy_(solution[0].bias)
        return solution[0]

    def plot_lr(self, ax: Axes | None = None) -> Axes:
        """The rate of each layer group that trained at each step of the last fit, its epochs and cycles marked.

        Raises:
            ValueError: if nothing was trained yet.
        """
        rates = self._rates_of_trained()
        if not rates:
            raise ValueError("plot_lr() shows the rates of the last fit: call fit() or train() first.")
        restarts = [step for step in self.schedule.restarts if step < self.state.global_step] if self.schedule else ()
        return plot_rates(rates, ax, steps_per_epoch=self._steps_per_epoch, restarts=restarts)

    def plot_loss(self, ax: Axes | None = None) -> Axes:
        """Training and validation loss, log by log, over the epochs of all fits; `history.plot()` shows rates, too.

        Raises:
            ValueError: if nothing was trained yet.
        """
        if not self.history.curves:
            raise ValueError("plot_loss() shows the losses of the fits: call fit() or train() first.")
        return plot_losses(self.history.curves, ax)

    def learning_rates(self) -> dict[str, list[float]]:
        """The rate of each layer group at each optimizer step of the last fit; empty before the first one."""
        if self.optimizer is None or self.lr_scheduler is None or self.state.global_step == 0:
            return {}
        if self._given_optimizers[1] is not None:
            return self._user_rates.rates
        return rates_by_step(self.optimizer, self.schedule, self.state.global_step)

    def _rates_of_trained(self) -> dict[str, list[float]]:
        """[`learning_rates`], without those of groups that were frozen then."""
        frozen = self.layer_groups.names[: self._frozen if self._frozen is not None else self.layer_groups.frozen]
        return {name: rates for name, rates in self.learning_rates().items() if name not in frozen}

    @property
    def layer_groups(self) -> LayerGroups:
        """The model's layer groups, from the input to the head, and what is frozen."""
        return self.features.groups

    @layer_groups.setter
    def layer_groups(self, value: LayerGroups) -> None:
        self.features.groups = value

    def freeze(self) -> None:
        """Train the head only."""
        self.freeze_to(-1)

    def freeze_to(self, n: int) -> None:
        """Train layer group `n` and those after it.

        With precompute on, what the last frozen group gives is stored from then on; if nothing is frozen any more,
        precompute is switched off.

        Raises:
            ValueError: if there is no group `n`, or precompute is on and the model cannot be cut there; then what is
                frozen stays as it was.
        """
        frozen = self.layer_groups.index(n)
        if self.precompute and frozen > 0:
            self.features.boundary(frozen)
        self.layer_groups.freeze_to(n)
        if self.precompute and frozen == 0:
            logger.warning("The whole body is to train, so precompute is switched off.")
            self.features.are_used = False

    def unfreeze(self) -> None:
        """Train all layer groups; precompute is switched off."""
        self.freeze_to(0)

    @property
    def precompute(self) -> bool:
        """Whether training uses precomputed features of the images, so that only what is not frozen runs.

        With the whole body frozen the features are the head's input; after a partial `freeze_to`, the activations
        between the frozen groups and the rest. They are computed when they are first needed.

        Raises:
            ValueError: on setting it True, if nothing is frozen or the model cannot be cut where the frozen groups end.
        """
        return self.features.are_used

    @precompute.setter
    def precompute(self, value: bool) -> None:
        if value:
            self.features.check()
        if value and not self.precompute and self.train_transform.is_random and not self.args.precompute_views:
            logger.warning(
                "Augmentation has no effect with precompute: features are those of the plain images. "
                "precompute_views=4 would store four augmented views of each."
            )
        self.features.are_used = value

    @property
    def train_transform(self) -> ImageTransform:
        """What training images go through; the evaluation transform where none was given."""
        return self.images.train_transform

    @train_transform.setter
    def train_transform(self, value: ImageTransform) -> None:
        self.images.train_transform = value
        self._forget_plain_weight()

    @property
    def eval_transform(self) -> ImageTransform:
        """What evaluation sees of an image, and what is saved with the model."""
        return self.images.eval_transform

    @eval_transform.setter
    def eval_transform(self, value: ImageTransform) -> None:
        self.images.eval_transform = value
        self._forget_plain_weight()

    def set_transforms(self, train: ImageTransform, eval: ImageTransform) -> None:
        """Change what images go through, both at once: another size, for example, after a fit at a smaller one.

        `trainer.set_transforms(*image_transforms(model, image_size=224, augment="side_on", max_zoom=1.1))`. Features of
        other images are computed anew, and `save_model` writes the transforms that are set then.

        Args:
            train ([`ImageTransform`]): for training.
            eval ([`ImageTransform`]): for evaluation, and what is saved with the model.

        Raises:
            TypeError: if one is not an [`ImageTransform`].
            ValueError: if the one for evaluation draws at random. Then both stay as they were.
        """
        self.images.set_transforms(train, eval)
        self._forget_plain_weight()

    def show_batch(self, n: int = 8, *, seed: int = 0, ax: Axes | None = None) -> Axes:
        """Training images as the next fit shows them to the model, augmented and cut, with their labels.

        With precompute on they are what features are computed of. Training draws nothing else because of it.

        Args:
            n (`int`, *optional*, defaults to 8): how many.
            seed (`int`, *optional*, defaults to 0): another one shows other images.
            ax (`Axes`, *optional*): where to draw; by default a new figure.

        Raises:
            ValueError: if there are no training images, or they are a stream.
        """
        n, rows = require_whole("n", n, at_least=1), self.train_dataset
        if is_stream(rows) or not self.images.are_in(rows):
            kind = "a stream" if is_stream(rows) else "none" if rows is None else "a model's inputs"
            raise ValueError(f"show_batch() shows training images, and train_dataset is {kind}: give rows of images.")
        self._check_images("train_dataset", rows)
        if self.precompute:
            images = self.images.view(rows, min(1, self.args.precompute_views))
        else:
            images = self.images.training(rows, self.num_fits + 1)
        images.renders_on_device = False
        chosen = np.random.default_rng(require_whole("seed", seed, at_least=0)).permutation(len(images))[:n]
        shown, names = [images[int(index)] for index in chosen], class_names(self.model.config)
        captions = [[_in_words(row["labels"], names)] if "labels" in row else [] for row in shown]
        return plot_images([row["pixel_values"].permute(1, 2, 0).numpy() for row in shown], captions, ax)

    def summary(self) -> str:
        """The model's layer groups in plain text: parameters, and which train. `print(trainer.summary())`."""
        return f"{type(self.model).__name__}, {len(self.layer_groups)} layer groups\n{self.layer_groups.summary()}"

    @property
    def schedule(self) -> SGDRSchedule | None:
        """The present schedule in optimizer steps; None before training and at a constant rate."""
        return self.lr_scheduler.schedule if isinstance(self.lr_scheduler, SGDRScheduler) else None

    # ---- The Trainer's hooks ----

    @override
    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        """All parameters, in the groups of the layers, each with its rate; frozen ones have no gradient."""
        if self.optimizer is None:
            groups = self._groups_on_features or self.layer_groups
            rates = self.args.group_learning_rates or [self.args.learning_rate] * len(self.layer_groups)
            if len(groups) == 1 and len(set(rates)) > 1:
                logger.info(f"The head alone trains: of the rates {rates} it takes the last.")
            if self.optimizer_cls_and_kwargs is not None:
                optimizer_class, kwargs = self.optimizer_cls_and_kwargs
                kwargs = {name: value for name, value in kwargs.items() if name != "lr"}  # each group has its own
            else:
                optimizer_class, kwargs = self.get_optimizer_cls_and_kwargs(self.args, self.model)
                if optimizer_class is torch.optim.SGD:
                    kwargs.setdefault("momentum", self.args.momentum)
            parameters = groups.param_groups(rates[-len(groups) :], self.args.weight_decay)
            self.optimizer = optimizer_class(parameters, **kwargs)
        return self.optimizer

    @override
    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> LRScheduler:
        """SGDR in whole optimizer steps, or a constant rate without `cycle_len`."""
        if self.lr_scheduler is None:
            if optimizer is None and isinstance(self.model, HeadClassifier):
                self.optimizer = light_optimizer(self.optimizer, self.accelerator)
            optimizer, args = optimizer or self.optimizer, self.args
            if args.cycle_len is None:
                self.lr_scheduler: LRScheduler = ConstantLR(optimizer, factor=1.0, total_iters=0)
            else:
                # of the whole cycles, also where max_steps cuts them off
                steps = self._steps_per_epoch or max(1, num_training_steps // args.total_epochs)
                self.lr_scheduler = get_sgdr_schedule(
                    optimizer,
                    args.cycle_len * steps,
                    args.cycle_mult,
                    args.num_cycles,
                    min_lr_ratio=args.min_lr_ratio,
                    warmup_steps=args.get_warmup_steps(steps * args.total_epochs),
                )
        return self.lr_scheduler

    @override
    def get_train_dataloader(self) -> DataLoader[Any]:
        """The training images, or features, in batches; augmentations are those of this fit."""
        rows = self.train_dataset
        if is_stream(rows):
            raise ValueError(
                f"train_dataset is a stream, whose images cannot be trained on epoch by epoch: {MATERIALISE}"
            )
        if self.images.are_in(rows):
            self._check_images("train_dataset", rows)
            rows = self.images.training(rows, self.num_fits)
            rows.require_equal_labelling()
        with scoped.attributes(self, train_dataset=rows):
            return self._not_empty(super().get_train_dataloader())

    @override
    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """Images, or features, in batches, as evaluation sees them."""
        own: Any = self.eval_dataset
        if isinstance(eval_dataset, str):
            own = {**own, eval_dataset: self._evaluation_images(own[eval_dataset])}
        elif eval_dataset is None:
            own = self._evaluation_images(own)
        else:
            eval_dataset = self._evaluation_images(eval_dataset)
        with scoped.attributes(self, eval_dataset=own), self._evaluation_loaders():
            return super().get_eval_dataloader(eval_dataset)

    @override
    def get_test_dataloader(self, test_dataset: Any) -> DataLoader[Any]:
        """Images in batches, as evaluation sees them."""
        images = self._evaluation_images(test_dataset)
        with self._evaluation_loaders():
            return super().get_test_dataloader(images)

    @override
    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """Forward and backward of a batch; images in micro-batches, whose gradients add up to those of the batch."""
        size = self.args.micro_batch_size
        if "pixel_values" not in inputs or size is None or size >= len(inputs["pixel_values"]):
            return super().training_step(model, self.images.normalize(inputs), num_items_in_batch)
        loss = torch.zeros((), device=self.args.device)
        try:
            for part, self._share_of_batch, is_last in micro_batches(inputs, size):
                items = None if num_items_in_batch is None else num_items_in_batch * self._share_of_batch
                with nullcontext() if is_last else self.accelerator.no_sync(model):
                    loss += super().training_step(model, self.images.normalize(part), items)
        finally:
            self._share_of_batch = 1.0
        return loss

    @override
    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Transformers' own; a micro-batch has the weight of its images, and a GPU trains on images in bfloat16."""
        with steps_autocast(self.args) if model.training and "pixel_values" in inputs else nullcontext():
            result: Any = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self._share_of_batch == 1.0:
            return result
        return (result[0] * self._share_of_batch, result[1]) if return_outputs else result * self._share_of_batch

    @override
    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Transformers' own, on normalised images."""
        return super().prediction_step(model, self.images.normalize(inputs), *args, **kwargs)

    @override
    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Transformers' own; under several processes the loss is that of all images, each counted once."""
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        name = f"{metric_key_prefix}_loss"
        is_plain = self.compute_loss_func is None or isinstance(self.compute_loss_func, BalancedLoss)
        is_ours = is_plain and self.label_smoother is None and output.label_ids is not None
        if self.args.world_size > 1 and output.metrics is not None and name in output.metrics and is_ours:
            output.metrics[name] = loss_of_all(self.model, output)
        return output

    @override
    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log; beside `learning_rate`, the head's, go every group's, `learning_rate/head` and so on, and the `cycle`.

        The cycle is counted from 1; at a constant rate there is none. The training loss at the end is that of all
        steps, also of those before a resume.
        """
        if "train_loss" in logs:  # in place, as the Trainer adds the epoch: these are the metrics that train() returns
            logs["train_loss"] = mean_training_loss(self)
        if "learning_rate" in logs:
            step = max(self.state.global_step - 1, 0)
            rates = self._rates_at(step)
            logs = {**logs, "learning_rate": list(rates.values())[-1]}
            logs |= {f"learning_rate/{name}": rate for name, rate in rates.items()}
            if self.schedule is not None:
                logs["cycle"] = 1 + self.schedule.cycle_of(step)
        super().log(logs, start_time)

    @override
    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model, and in its configuration the evaluation transform and the augmentation, as they are now.

        Also in the middle, to come back to: `trainer.save_model("halfway")`, and later, into the same trainer,
        `trainer.model.load_state_dict(type(trainer.model).from_pretrained("halfway").state_dict())`. Features of other
        weights are never taken.
        """
        processor = self.images.record_in(self.features.model)
        if self._own_processor and not isinstance(processor, TimmWrapperImageProcessor):  # that is all in config.json
            self.processing_class = processor
        super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            # A pickle of the arguments, which nothing needs and which would carry them to the Hub.
            (folder / "training_args.bin").unlink(missing_ok=True)
            apply_umask(*folder.glob("*.safetensors"))
            if isinstance(processor, TimmWrapperImageProcessor):  # those of an earlier model would be taken for its own
                for name in PROCESSOR_FILES:
                    (folder / name).unlink(missing_ok=True)

    # ---- Predictions ----

    def log_predictions(self, dataset: Any = None) -> NDArray[np.float32]:
        """Log-probabilities (images, classes), in the order of the data set; validation by default.

        With several labels an image each has a probability of its own.
        """
        logits = self._logits(self._or_validation(dataset))
        return (F.logsigmoid(logits) if self.classes.is_multi_label else logits.log_softmax(dim=-1)).numpy()

    def tta(self, n_aug: int = 4, beta: float | None = None, dataset: Any = None) -> NDArray[np.float32]:
        """Test-time augmentation: probabilities (images, classes) from the plain image and augmented views of it.

        The views are those of [`~hf_sgdr.pipeline`] with the saved model.

        Args:
            n_aug (`int`, *optional*, defaults to 4): augmented views, drawn by the training transform.
            beta (`float`, *optional*): average probabilities, the plain image counting `beta`, in [0, 1], and the mean
                of the augmented ones the rest (fastai v2: 0.25; fast.ai 0.7: `1 / (1 + n_aug)`); by default the logits
                are averaged, the plain image counting what [`fit_tta`] chose, else half.
            dataset (`datasets.Dataset`, *optional*): validation by default.

        Raises:
            ValueError: if there is nothing random to draw views with, or a number is out of range.
        """
        require_whole("n_aug", n_aug, at_least=0)
        check_beta(beta)
        dataset = self._or_validation(dataset)
        if n_aug == 0:
            return np.exp(self.log_predictions(dataset))
        weight = plain_weight(self.features.model.config)
        logits = self._logits_of_views(dataset, n_aug)
        probabilities = torch.sigmoid if self.classes.is_multi_label else functools.partial(torch.softmax, dim=-1)
        return mean_of_views(logits, probabilities, beta, weight).numpy()

    def fit_tta(self, n_aug: int = 4, dataset: Any = None) -> dict[str, float]:
        """Choose how much the plain image counts beside its views in test-time augmentation, and measure that.

        It is the weight with the lowest loss on the validation images. The model's configuration keeps it until the
        model is trained on, and `tta` and the pipeline with the saved model weigh views by it: see
        [`~hf_sgdr.inference.tta.fitted_weight`].

        Args:
            n_aug (`int`, *optional*, defaults to 4): augmented views, drawn by the training transform.
            dataset (`datasets.Dataset`, *optional*): labelled images; validation by default.

        Returns:
            `dict[str, float]`: loss and metrics with test-time augmentation, named as in `results.json`, and
            `plain_weight`; at 1.0 views do not help on these images.

        Raises:
            ValueError: if there is nothing random to draw views with, no single set of validation images, a label is
                missing, or a number is out of range.
        """
        require_whole("n_aug", n_aug, at_least=1)
        dataset, model = self._or_validation(dataset), self.features.model
        labels = torch.as_tensor(self.images.labels(rows_of(dataset)))
        logits = self._logits_of_views(dataset, n_aug)
        weight = fitted_weight(logits, labels)
        self.images.record_in(model)
        model.config.hf_sgdr = recorded_views(model.config) | {"plain_weight": weight}
        mean = mean_of_views(logits, torch.Tensor.clone, weight=weight)
        compute_metrics = self.classes.compute_metrics(self.args.best_by)
        measured = compute_metrics(EvalPrediction(predictions=mean.numpy(), label_ids=labels.numpy()))
        return {"loss": float(log_loss(mean, labels)), **measured, "plain_weight": weight}

    def _forget_plain_weight(self) -> None:
        """What was chosen for other weights or views no longer holds."""
        config = self.features.model.config
        if "plain_weight" in (recorded := recorded_views(config)):
            config.hf_sgdr = {name: value for name, value in recorded.items() if name != "plain_weight"}

    def _logits_of_views(self, dataset: Any, n_aug: int) -> torch.Tensor:
        """Float32 (1 + n_aug, images, classes), the plain view first."""
        if not self.train_transform.is_random:
            raise ValueError(
                f"n_aug={n_aug}: views need a training transform that augments: give the trainer the first one of "
                'image_transforms(model, augment="side_on", max_zoom=1.1).'
            )
        self._check_images("The data set", dataset)
        images = self.images.evaluation(dataset)
        views = ImageViews(images, replace(self.train_transform, spec=self.eval_transform.spec), n_aug)
        # as many at once as the pipeline takes: rounding in convolutions depends on the size of a batch
        with scoped.attributes(self.args, per_device_eval_batch_size=views_at_once(self.args.device)):
            return self._logits(views).unflatten(0, (len(images), 1 + n_aug)).transpose(0, 1)

    # ---- Sharing ----

    @override
    def create_model_card(self, **facts: Any) -> None:  # type: ignore[override]  # by name, as everybody calls it
        """Write the card, `README.md` and pictures in `output_dir`, from this trainer's fits and what it measures now.

        Args:
            **facts: what nobody can measure: see [`~hf_sgdr.hub.card_facts.CardFacts`]. Those of
                [`~transformers.Trainer.create_model_card`] are taken too: `language`, `license`, `tags`, `model_name`,
                `finetuned_from`, `tasks`, `dataset_tags`, `dataset` and `dataset_args`.

        Raises:
            ValueError: if the card cannot hold a fact, or there is no single set of validation images.
        """
        write_card(self, card_facts(facts))

    @override
    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Save the model and push it with its processor, card, plots, `results.json` and `recipe.yaml`.

        What of these is missing in `output_dir`, or older than the last training, is written first; nothing else from
        there is pushed. The model goes on being the whole one while precompute is on.

        Args:
            commit_message, token, revision (`str`, *optional*): as in [`~transformers.Trainer.push_to_hub`].
            blocking (`bool`, *optional*, defaults to True): False pushes in the background and returns a future.
            private (`bool`, *optional*): whether a new repository is private; by default `args.hub_private_repo`.
            **kwargs: facts for the card, which is then written anew: see [`create_model_card`]. Transformers' own names
                are taken, as its example scripts give them.

        Returns:
            `CommitInfo` of huggingface_hub, or a future of it; None on other processes than the main one.

        Raises:
            HubError: if it cannot be pushed; everything is saved, and the message ends with the command that pushes.
            ValueError: if the card cannot hold a fact; nothing is written then.
        """
        facts = card_facts(kwargs) if any(value is not None for value in kwargs.values()) else None
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.save_model(_internal_call=True)
        write_run_files(self, facts)
        if not self.is_world_process_zero():
            return None
        api = hub_api(token)
        push = functools.partial(
            push_folder,
            self.args.output_dir,
            self.hub_model_id or self._hub_name,
            private=private if private is not None else self.args.hub_private_repo,
            revision=revision or self.args.hub_revision,
            commit_message=commit_message or "End of training",
            api=api,
        )
        return push() if blocking else api.run_as_future(push)

    @override
    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Make the repository and look at the login, before anything is trained.

        Raises:
            HubError: if there is no login, it may not write there, or the Hub cannot be asked.
        """
        if self.is_world_process_zero():
            private = private if private is not None else self.args.hub_private_repo
            self.hub_model_id: Any = prepare_repository(self._hub_name, private=private, api=hub_api(token))
            self.push_in_progress = None

    @property
    def _hub_name(self) -> str:
        """The repository to push to: as given, else called as the output folder."""
        return self.args.hub_model_id or Path(self.args.output_dir).absolute().name

    # ---- Helpers ----

    def _train(
        self, name: str, resume: str | bool | None, trial: Any = None, ignore_keys: list[str] | None = None
    ) -> TrainOutput:
        """Train, and note it in the history under this name."""
        self._check_before_training()
        self._forget_plain_weight()
        self.args.settle_epochs()
        self.optimizer, self.lr_scheduler = self._given_optimizers
        self._set_given_rates()
        self._user_rates.rates = {}
        begun = self.num_fits
        self.num_fits += 1
        self.model_wrapped = self.model
        # an evaluation outside training leaves it, and then it is in every later log, but in none of a resumed run
        vars(self).pop("model_preparation_time", None)
        self.history.run, self._frozen = None, None
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, SnapshotCallback):
                callback.losses = judged_losses(self)
        start = time.perf_counter()
        try:
            checkpoint, self._checkpoints.resumed, step = checkpoint_to_resume(resume, Path(self.args.output_dir))
            self.num_fits = self._checkpoints.resumed.get("num_fits", self.num_fits)  # its augmentations go on
            self._checkpoints.limit = self.args.save_total_limit
            with self.on_features():
                batches = len(self.get_train_dataloader())
                self._steps_per_epoch = max(1, -(-batches // self.args.gradient_accumulation_steps))
                in_loop = scoped.attributes(self, args=loop_arguments(self.args, self._steps_per_epoch, step))
                with termination.deferred(), clear_disk_errors(self.args.output_dir), in_loop:
                    output = super().train(checkpoint, trial, ignore_keys)
        except BaseException:
            self.num_fits = begun  # the same call goes on with `resume_from_checkpoint=True`
            raise
        record = fit_record(
            self.state,
            self.schedule,
            judged_losses(self),
            name=name,
            learning_rates=self._highest_rates(),
            seconds=time.perf_counter() - start,
            precompute=self.precompute,
            freeze_to=self.layer_groups.first_trained,
            max_steps=self.args.max_steps,
        )
        self.history.add_fit(record, self.args, self.layer_groups.freeze_batch_norm)
        self._frozen = self.layer_groups.frozen
        self.history.curves.append(fit_curve(name, self.state, self._rates_of_trained(), judged_losses(self)))
        return output._replace(training_loss=output.metrics["train_loss"])  # in both, that of all steps: see `log`

    @contextmanager
    def on_features(self) -> Iterator[None]:
        """Inside, with precompute on, the model is the head and the data are features, as in a fit."""
        if not self.precompute:
            yield
            return
        for name, rows in _named(self.train_dataset, self.eval_dataset).items():
            self._check_images(name, rows)
        session = self.features.session(self.train_dataset, self.eval_dataset)
        if is_stream(self.train_dataset):
            self.classes = self.classes.counted(session.train_dataset.labels)
        args = copy.copy(self.args)
        args.dataloader_num_workers, args.dataloader_persistent_workers = 0, False
        args.dataloader_prefetch_factor = args.dataloader_multiprocessing_context = None
        replaced = {"model": session.model, "model_wrapped": session.model, "_groups_on_features": session.groups}
        replaced |= {"train_dataset": session.train_dataset, "eval_dataset": session.eval_dataset}
        try:
            with scoped.attributes(self, args=args, data_collator=whole_batch, **replaced), session.context:
                yield
        finally:
            self.callback_handler.model = self.model
            forget_prepared_models(self.accelerator)

    def _state_to_keep(self) -> dict[str, Any]:
        """Plain values that a checkpoint keeps beside transformers' own."""
        return {**loss_counters(self), "num_fits": self.num_fits, "rates": self._user_rates.rates}

    def _restore_state(self, state: dict[str, Any]) -> None:
        restore_loss_counters(self, state)
        self._user_rates.rates = {name: list(rates) for name, rates in state["rates"].items()}

    def _rates_at(self, step: int) -> dict[str, float]:
        if self._given_optimizers[1] is not None:
            return {name: rates[-1] for name, rates in self._user_rates.rates.items()}
        optimizer: Any = self.optimizer
        return rates_at(optimizer, self.schedule, step)

    def _highest_rates(self) -> list[float]:
        """The highest rate of each layer group in the training that has just ended."""
        optimizer, _ = self._given_optimizers
        if optimizer is None:
            return self.layer_groups.learning_rates(self.args.group_learning_rates or self.args.learning_rate)
        return highest_rates(optimizer, self.layer_groups, self.learning_rates())

    def _set_given_rates(self) -> None:
        """Give somebody's own optimizer the rates of the arguments, if there are any for the layer groups."""
        optimizer, scheduler = self._given_optimizers
        if optimizer is None or self.args.group_learning_rates is None:
            return
        if scheduler is not None:
            raise ValueError(
                f"The trainer was given a {type(scheduler).__name__}, which decides the rates: give "
                "optimizers=(optimizer, None), or call train() without group_learning_rates."
            )
        set_rates(optimizer, self.layer_groups, self.args.group_learning_rates)

    def _check_before_training(self) -> None:
        if self.train_dataset is None:
            raise ValueError("Nothing to train on: give the trainer a train_dataset.")
        if self.args.eval_strategy != "no" and self.eval_dataset is None:
            raise ValueError('Nothing to evaluate on: give the trainer an eval_dataset, or eval_strategy="no".')

    def _check_images(self, name: str, rows: Any) -> None:
        column = self.images.label_column
        self.images.check(name, rows, ClassNames.of(self.features.model.config, self.train_dataset, column))

    def _evaluation_images(self, rows: Any) -> Any:
        """Rows of images as evaluation sees them; other data sets as they are."""
        if not self.images.are_in(rows):
            return rows
        own = next((name for name, one in _named(None, self.eval_dataset).items() if one is rows), None)
        self._check_images(own or "The data set", rows)
        images = self.images.evaluation(rows, name=own)
        images.require_equal_labelling()
        return images

    def _evaluation_loaders(self) -> AbstractContextManager[None]:
        """Inside, loaders give every image, and none is kept, which would show old images; for data of evaluation."""
        return scoped.attributes(self.args, dataloader_drop_last=False, dataloader_persistent_workers=False)

    def _not_empty(self, loader: DataLoader[Any]) -> DataLoader[Any]:
        if self.args.dataloader_drop_last and hasattr(loader, "__len__") and len(loader) == 0:
            raise ValueError(
                f"dataloader_drop_last=True leaves no batch: the {self.num_examples(loader)} images are fewer than a "
                "batch of all processes. Give a smaller batch size, or leave dataloader_drop_last out."
            )
        return loader

    def _logits(self, dataset: Any) -> torch.Tensor:
        """Float32 (images, classes), in the order of the data set."""
        predictions = self.predict(dataset).predictions
        return torch.from_numpy(np.asarray(predictions[0] if isinstance(predictions, tuple) else predictions)).float()

    def _or_validation(self, dataset: Any) -> Any:
        dataset = dataset if dataset is not None else self.eval_dataset
        if dataset is None or isinstance(dataset, dict):
            raise ValueError("Which images? The trainer has no single eval_dataset: give dataset=.")
        return dataset


def _in_words(label: Any, names: Sequence[str]) -> str:
    """A class id, or a row of 0 and 1, by the names of the classes."""
    ids = np.flatnonzero(label).tolist() if np.ndim(label) else [int(label)]
    return ", ".join(names[i] for i in ids) or "none"


def _named(train_dataset: Any, eval_dataset: Any) -> dict[str, Any]:
    """Data sets by the arguments that hold them."""
    if isinstance(eval_dataset, dict):
        evaluation = {f"eval_dataset[{name!r}]": rows for name, rows in eval_dataset.items()}
    else:
        evaluation = {"eval_dataset": eval_dataset}
    return {"train_dataset": train_dataset, **evaluation}
