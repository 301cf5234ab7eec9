"""`SGDRTrainer`: transformers' Trainer with the lesson's calls, wiring the plug-ins together.

It stays a Trainer: loops, callbacks, logging, checkpoints and processes are the ordinary ones. Its bases add one thing
each: exact resume, images, precomputed features, pushing.
"""

import copy
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedType
from matplotlib.axes import Axes
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader
from transformers import PreTrainedModel
from transformers.trainer_utils import TrainOutput
from transformers.utils import logging

from hf_sgdr._utils.files import RUNS_FOLDER
from hf_sgdr._utils.plots import plot_rates
from hf_sgdr.callbacks.best_weights import KeepBestWeights, judged_losses
from hf_sgdr.callbacks.epoch_table import show_epoch_table
from hf_sgdr.callbacks.loop import DatasetEpoch, EqualBuffers, StopOnNonFiniteLoss
from hf_sgdr.callbacks.trackers import TrackedFits
from hf_sgdr.data.transforms import ImageTransform
from hf_sgdr.features.head import HeadClassifier
from hf_sgdr.optim.layer_groups import LayerGroups
from hf_sgdr.optim.range_test import LRRangeResult, LRRangeTest
from hf_sgdr.optim.schedule import SGDRSchedule, SGDRScheduler, get_sgdr_schedule, require_whole
from hf_sgdr.training.arguments import SGDRTrainingArguments
from hf_sgdr.training.history import fit_metrics
from hf_sgdr.training.hub_trainer import HubTrainer
from hf_sgdr.training.precompute_trainer import PrecomputeTrainer

logger = logging.get_logger(__name__)

Rates = float | Sequence[float] | slice


class SGDRTrainer(HubTrainer, PrecomputeTrainer):
    """Train an image classifier by the lesson's recipe. Only the head trains at first.

    Args:
        model (`PreTrainedModel`): an image classifier; [`create_image_classifier`] makes one.
        args ([`SGDRTrainingArguments`], *optional*): by default those of `SGDRTrainingArguments("hf_sgdr_out")`.
        train_dataset, eval_dataset (`datasets.Dataset`, *optional*): images and labels; [`load_image_folder`] reads
            them. Validation is what evaluation, `log_predictions` and `tta` take by default.
        train_transform, eval_transform ([`ImageTransform`], *optional*): from [`image_transforms`]; by default the
            model's evaluation transform for both.
        layer_groups ([`LayerGroups`], *optional*): by default `args.n_groups` groups of the model.
        **kwargs: everything else that [`~transformers.Trainer`] takes. `compute_metrics` is accuracy by default.

    Raises:
        TypeError: if `args` are not [`SGDRTrainingArguments`], or a transform is not an [`ImageTransform`].
        ValueError: if the model cannot be split into layer groups, or a data set's classes are not the model's.
    """

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
        super().__init__(
            model,
            args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            train_transform=train_transform,
            eval_transform=eval_transform,
            layer_groups=layer_groups,
            **kwargs,
        )
        self.add_callback(DatasetEpoch())
        self.add_callback(StopOnNonFiniteLoss(self))
        self.add_callback(EqualBuffers())
        show_epoch_table(self)
        self._tracked_fits = TrackedFits(self.callback_handler, self.plot_lr)
        self.add_callback(self._tracked_fits)
        self._given_optimizers: tuple[Any, Any] = kwargs.get("optimizers", (None, None))
        self._last_rates: dict[str, list[float]] = {}
        self.fits: list[dict[str, Any]] = []  # what each did, as in results.json
        self.range_tests: dict[str, LRRangeResult] = {}  # by the name of the fit that came after it
        self.fit_stages: list[dict[str, Any]] = []  # what a recipe's stage would be told to do the same
        self.run: tuple[Any, Any] | None = None  # stages and results of run_stages, until the next fit
        self.starting_weights: str | None = None  # the hash of those that run_stages began with
        self.trained_at = 0.0  # seconds since the epoch
        self._fit_name: str | None = None
        self._best: KeepBestWeights | None = None
        self._new_range_test: LRRangeResult | None = None

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
        rates = self.layer_groups.learning_rates(lr)
        if keep_best and self.args.eval_strategy == "no":
            raise ValueError('keep_best=True compares validation losses: it needs an eval_strategy other than "no".')
        args = copy.copy(self.args)
        args.group_learning_rates, args.learning_rate = rates, rates[-1]
        args.num_cycles, args.cycle_len, args.cycle_mult = cycles, cycle_len, cycle_mult
        args.num_train_epochs = None
        name = name or f"fit-{self.num_fits + 1:03d}"
        args.output_dir = str(Path(self.args.output_dir, RUNS_FOLDER, name))
        self._tracked_fits.name_fit(args, self.args.output_dir, name)
        with self._replaced(args=args, _fit_name=name), self._best_kept(keep_best, bool(resume_from_checkpoint)):
            return self.train(resume_from_checkpoint)

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Train as the arguments say: cycles, layer groups, precompute. A new optimizer each time.

        A given optimizer keeps its own rates, unless the arguments have `group_learning_rates`.
        """
        self._check_before_training()
        self.args.settle_epochs()
        self.optimizer, self.lr_scheduler = self._given_optimizers
        if self.optimizer is not None and self.args.group_learning_rates is not None:
            self._set_rates_of(self.optimizer, self.args.group_learning_rates)
        self.num_fits += 1
        self.model_wrapped = self.model
        self._last_rates = {}
        self.run = None
        name, start = self._fit_name or f"train-{len(self.fits) + 1:03d}", time.perf_counter()
        with self._features_instead_of_images():
            output = super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
        if self._best is not None:
            self.accelerator.wait_for_everyone()  # the main process has written the best weights
            self._best.restore()
        self.fits.append(
            fit_metrics(
                self.state,
                self.schedule,
                self.args,
                name=name,
                learning_rates=self._highest_rates(),
                seconds=time.perf_counter() - start,
                precompute=self._precompute,
                freeze_to=self.layer_groups.first_trained,
                kept=self._best.metrics if self._best is not None else None,
            )
        )
        self.fit_stages.append(
            {
                "lr": self.fits[-1]["learning_rates"],
                "cycles": self.args.num_cycles,
                "cycle_len": self.args.cycle_len,
                "cycle_mult": self.args.cycle_mult,
                "freeze_to": self.layer_groups.first_trained,
                "precompute": self._precompute,
                "freeze_batch_norm": self.layer_groups.freeze_batch_norm,
            }
        )
        self.trained_at = time.time()
        if self._new_range_test is not None:
            self.range_tests[name], self._new_range_test = self._new_range_test, None
        return output

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
        given_optimizer, _ = self._given_optimizers
        before = [dict(group) for group in given_optimizer.param_groups] if given_optimizer is not None else []
        try:
            if given_optimizer is not None and args.group_learning_rates is not None:
                self._set_rates_of(given_optimizer, args.group_learning_rates)
            with self._replaced(args=args, optimizer=given_optimizer), self._features_instead_of_images():
                found = test.run(self, max_steps=most)
        finally:
            if given_optimizer is not None:
                for group, values in zip(given_optimizer.param_groups, before, strict=True):
                    group.clear()
                    group.update(values)
        self._tracked_fits.range_test_done(found)
        self._new_range_test = found
        return found

    def plot_lr(self, ax: Axes | None = None) -> Axes:
        """The rate of each layer group at each step of the last fit.

        Raises:
            ValueError: if nothing was trained yet.
        """
        if not self._last_rates:
            raise ValueError("plot_lr() shows the rates of the last fit: call fit() or train() first.")
        return plot_rates(self._last_rates, ax)

    # ---- What differs inside the Trainer ----

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        """All parameters, in the groups of the layers, each with its rate; frozen ones have no gradient."""
        if self.optimizer is None:
            groups = self._groups_in_training
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

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> LRScheduler:
        """SGDR in whole optimizer steps, or a constant rate without `cycle_len`."""
        if self.lr_scheduler is None:
            optimizer = optimizer if optimizer is not None else self._light_optimizer()
            args = self.args
            if args.cycle_len is None:
                self.lr_scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0, total_iters=0)
            else:
                self.lr_scheduler = get_sgdr_schedule(
                    optimizer,
                    args.cycle_len * self._steps_per_epoch,
                    args.cycle_mult,
                    args.num_cycles,
                    min_lr_ratio=args.min_lr_ratio,
                    # of the whole cycles, also where max_steps cuts them off
                    warmup_steps=args.get_warmup_steps(self._steps_per_epoch * args.total_epochs),
                )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def set_initial_training_values(self, args: Any, dataloader: DataLoader[Any]) -> Any:
        """Transformers' own values, for all cycles, or for `max_steps` where that ends them early."""
        whole = copy.copy(args)
        whole.num_train_epochs, whole.max_steps = args.total_epochs, -1
        values = super().set_initial_training_values(whole, dataloader)
        if 0 < args.max_steps < values[-1]:
            values = super().set_initial_training_values(args, dataloader)
        return values

    @property
    def schedule(self) -> SGDRSchedule | None:
        """The present schedule in optimizer steps; None before training and at a constant rate."""
        return self.lr_scheduler.schedule if isinstance(self.lr_scheduler, SGDRScheduler) else None

    def state_to_keep(self) -> dict[str, Any]:
        """Also every step's rates, for the plot."""
        return {**super().state_to_keep(), "rates": self._last_rates}

    def go_on_with(self, state: dict[str, Any]) -> None:
        """Also every step's rates."""
        super().go_on_with(state)
        self._last_rates = {name: list(rates) for name, rates in state["rates"].items()}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log; beside `learning_rate`, the head's, go every group's, `learning_rate/head` and so on, and the `cycle`.

        The cycle is counted from 1; at a constant rate there is none.
        """
        if "learning_rate" in logs and self._last_rates:
            logs = {**logs, **{f"learning_rate/{name}": rates[-1] for name, rates in self._last_rates.items()}}
            if self.schedule is not None:
                logs["cycle"] = 1 + self.schedule.cycle_of(max(self.state.global_step - 1, 0))
        super().log(logs, start_time)

    def _get_learning_rate(self) -> float:
        """The head's rate. Called once a step, before the scheduler's: every group's rate is noted."""
        rates = [float(rate) for rate in self.lr_scheduler.get_last_lr()]
        names = [group.get("name", f"group {i}") for i, group in enumerate(self.optimizer.param_groups)]
        for name, rate in dict(zip(names, rates, strict=True)).items():  # with weight decay two have one name, and rate
            self._last_rates.setdefault(name, []).append(rate)
        return rates[-1]

    def _light_optimizer(self) -> Any:
        """Take accelerate's wrapper off the head's optimizer, where all it does is to pass calls on.

        It looks for an optional package on disk twice a step (accelerate 1.15), which is a quarter of a head's step.
        """
        if (
            isinstance(self.model, HeadClassifier)
            and isinstance(self.optimizer, AcceleratedOptimizer)
            and self.accelerator.distributed_type == DistributedType.NO
            and self.accelerator.scaler is None
        ):
            self.optimizer = self.optimizer.optimizer
        return self.optimizer

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Unless gradients are clipped, nobody asked for their norm: it is not computed in every step."""
        return super()._get_grad_norm(model, grad_norm) if self.args.max_grad_norm > 0 else None

    # ---- Helpers ----

    @contextmanager
    def _best_kept(self, is_wanted: bool, is_resumed: bool) -> Iterator[None]:
        """Inside, evaluations keep the best weights in the fit's folder."""
        if not is_wanted:
            yield
            return
        path = Path(self.args.output_dir, "best.safetensors")
        with self.accelerator.main_process_first():
            if not is_resumed and self.is_world_process_zero():
                path.unlink(missing_ok=True)  # of an earlier run
        best = KeepBestWeights(self.model, path, judged_losses(self))
        best.stage = self._fit_name or ""
        self.add_callback(best)
        try:
            with self._replaced(_best=best):
                yield
        finally:
            self.remove_callback(best)

    def _set_rates_of(self, optimizer: Optimizer, rates: list[float]) -> None:
        """Give each parameter group of somebody's own optimizer the highest rate of its layer group.

        Raises:
            ValueError: if one belongs to no layer group or to several with different rates, or a scheduler of theirs
                decides.
        """
        if self._given_optimizers[1] is not None:
            raise ValueError(
                f"The trainer was given a {type(self._given_optimizers[1]).__name__}, which decides the rates: give "
                "optimizers=(optimizer, None), or call train() without group_learning_rates."
            )
        chosen = []
        for number, owners in enumerate(self._owners_of(optimizer)):
            wanted = {rates[owner] for owner in owners if owner is not None}
            if None in owners or len(wanted) != 1:
                names = ", ".join("no layer group" if i is None else self.layer_groups.names[i] for i in owners)
                raise ValueError(
                    f"Parameter group {number} of the given optimizer holds parameters of {names}, so it cannot have "
                    f"the rates {rates}: give the optimizer trainer.layer_groups.param_groups(lr), or one rate for all."
                )
            chosen.append(wanted.pop())
        for group, rate in zip(optimizer.param_groups, chosen, strict=True):
            group["lr"] = group["initial_lr"] = rate  # schedulers begin from the latter where it is there

    def _owners_of(self, optimizer: Optimizer) -> list[list[int | None]]:
        """For each parameter group of an optimizer the layer groups that its parameters are of; None is of none."""
        groups = self.layer_groups
        owner = {id(parameter): i for i in range(len(groups)) for parameter in groups.parameters(i)}
        return [
            sorted({owner.get(id(parameter)) for parameter in group["params"]}, key=lambda i: -1 if i is None else i)
            for group in optimizer.param_groups
        ]

    def _highest_rates(self) -> list[float]:
        """The highest rate of each layer group in the training that has just ended."""
        optimizer, _ = self._given_optimizers
        if optimizer is None:
            return self.layer_groups.learning_rates(self.args.group_learning_rates or self.args.learning_rate)
        found = [0.0] * len(self.layer_groups)  # what the optimizer does not know does not move
        for i, (group, owners) in enumerate(zip(optimizer.param_groups, self._owners_of(optimizer), strict=True)):
            steps = self._last_rates.get(group.get("name", f"group {i}"), [float(group["lr"])])
            for owner in owners:
                if owner is not None:
                    found[owner] = max(found[owner], *steps)
        return found

    def _check_before_training(self) -> None:
        if self.train_dataset is None:
            raise ValueError("Nothing to train on: give the trainer a train_dataset.")
        if self.args.eval_strategy != "no" and self.eval_dataset is None:
            raise ValueError('Nothing to evaluate on: give the trainer an eval_dataset, or eval_strategy="no".')
