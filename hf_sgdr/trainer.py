"""`SGDRTrainer`: transformers' Trainer with the lesson's calls, wiring the plug-ins together.

It stays a Trainer: loops, callbacks, logging, checkpoints and processes are the ordinary ones. While it trains on
precomputed features, `train()` sees the head as its model and rows of features as its data, and nothing else differs.
"""

import copy
import functools
import hashlib
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedType
from matplotlib.axes import Axes
from numpy.typing import NDArray
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader
from transformers import PreTrainedModel
from transformers.models.timm_wrapper.image_processing_timm_wrapper import TimmWrapperImageProcessor
from transformers.trainer_utils import EvalLoopOutput, TrainOutput
from transformers.utils import logging

from hf_sgdr.cut import Cut
from hf_sgdr.dataset_epoch import DatasetEpoch
from hf_sgdr.epoch_table import show_epoch_table
from hf_sgdr.equal_buffers import EqualBuffers
from hf_sgdr.exact_resume import ExactResumeTrainer
from hf_sgdr.finite_loss import RequireFiniteLoss
from hf_sgdr.fit_figures import fit_figures
from hf_sgdr.head_training import FeatureDataset, FeatureReader, HeadClassifier, whole_batch
from hf_sgdr.layer_groups import LayerGroups
from hf_sgdr.memory import keep_freed_memory, nothing_to_collect
from hf_sgdr.photo_cache import DecodedPhotos
from hf_sgdr.photos import PhotoDataset
from hf_sgdr.plots import plot_rates
from hf_sgdr.range_test import LRRangeResult, LRRangeTest
from hf_sgdr.schedule import SGDRSchedule, SGDRScheduler, get_sgdr_schedule, require_whole
from hf_sgdr.shards import open_as_umask_says
from hf_sgdr.trackers import TrackedFits
from hf_sgdr.training_args import SGDRTrainingArguments
from hf_sgdr.transforms import PhotoTransform, image_transforms

logger = logging.get_logger(__name__)

RUNS_FOLDER = "_runs"

Rates = float | Sequence[float] | slice


class SGDRTrainer(ExactResumeTrainer):
    """Train an image classifier by the lesson's recipe. Only the head trains at first.

    Args:
        model (`PreTrainedModel`): an image classifier; [`create_image_classifier`] makes one.
        args ([`SGDRTrainingArguments`], *optional*): by default those of `SGDRTrainingArguments("hf_sgdr_out")`.
        train_dataset, eval_dataset (`datasets.Dataset`, *optional*): photos and labels; [`load_image_folder`] reads
            them. Validation is what evaluation, `log_predictions` and `tta` take by default.
        train_transform, eval_transform ([`PhotoTransform`], *optional*): from [`image_transforms`]; by default the
            model's evaluation transform for both.
        layer_groups ([`LayerGroups`], *optional*): by default `args.n_groups` groups of the model.
        **kwargs: everything else that [`~transformers.Trainer`] takes. `compute_metrics` is accuracy by default.

    Raises:
        TypeError: if `args` are not [`SGDRTrainingArguments`], or a transform is not a [`PhotoTransform`].
        ValueError: if the model cannot be split into layer groups.
    """

    args: SGDRTrainingArguments

    def __init__(
        self,
        model: PreTrainedModel,
        args: SGDRTrainingArguments | None = None,
        *,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        train_transform: PhotoTransform | None = None,
        eval_transform: PhotoTransform | None = None,
        layer_groups: LayerGroups | None = None,
        **kwargs: Any,
    ) -> None:
        args = args if args is not None else SGDRTrainingArguments("hf_sgdr_out")
        if not isinstance(args, SGDRTrainingArguments):
            raise TypeError(f"args is {type(args).__name__}: give SGDRTrainingArguments.")
        for transform in (train_transform, eval_transform):
            if transform is not None and not isinstance(transform, PhotoTransform):
                raise TypeError(f"A transform is {type(transform).__name__}: give those of image_transforms(model).")
        if eval_transform is None:
            eval_transform = image_transforms(model)[1]
        self.eval_transform = eval_transform
        self.train_transform = train_transform if train_transform is not None else eval_transform
        self.layer_groups = layer_groups or LayerGroups.from_model(model, args.n_groups)
        self.layer_groups.learning_rates(args.group_learning_rates or args.learning_rate)  # a wrong number shows now
        self._record_transforms(model)
        processor = self.eval_transform.spec.write_to(model)
        if not isinstance(processor, TimmWrapperImageProcessor):  # that one is all in config.json
            kwargs.setdefault("processing_class", processor)
        if "compute_metrics" not in kwargs:
            from hf_sgdr.metrics import accuracy_of_logits  # importing `evaluate` takes seconds

            kwargs["compute_metrics"] = accuracy_of_logits()
        if args.device.type == "cpu":
            keep_freed_memory()
        if sum(isinstance(module, nn.Conv2d) for module in model.modules()) > 1:
            model = model.to(memory_format=torch.channels_last)
        super().__init__(model, args, train_dataset=train_dataset, eval_dataset=eval_dataset, **kwargs)
        self.add_callback(DatasetEpoch())
        self.add_callback(RequireFiniteLoss(self))
        self.add_callback(EqualBuffers())
        show_epoch_table(self)
        self._tracked_fits = TrackedFits(self.callback_handler, self.plot_lr)
        self.add_callback(self._tracked_fits)
        self._given_optimizers: tuple[Any, Any] = kwargs.get("optimizers", (None, None))
        self._precompute = False
        self._last_rates: dict[str, list[float]] = {}
        self.num_fits = 0
        self.fits: list[dict[str, Any]] = []  # what each did, as in results.json
        self.range_tests: dict[str, LRRangeResult] = {}  # by the name of the fit that came after it
        self.fit_stages: list[dict[str, Any]] = []  # what a recipe's stage would be told to do the same
        self.run: tuple[Any, Any] | None = None  # stages and results of run_stages, until the next fit
        self.trained_at = 0.0  # seconds since the epoch
        self._fit_name: str | None = None
        self._new_range_test: LRRangeResult | None = None
        self._features = FeatureReader(model, args, self.accelerator)
        self._cuts: dict[int, Cut] = {}
        self._decoded = DecodedPhotos(args, self.accelerator)
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
        resume_from_checkpoint: str | bool | None = None,
    ) -> TrainOutput:
        """Train, as the lesson's `learn.fit(lr, cycles, cycle_len=..., cycle_mult=...)`.

        With `cycle_len` the rate is annealed and restarted: `fit(lr, 3, cycle_len=1, cycle_mult=2)` is 1 + 2 + 4 = 7
        epochs. Without it the rate is constant for `cycles` epochs. Each fit has a new optimizer and a folder for
        checkpoints of its own.

        Args:
            lr (`float`, sequence of `float` or `slice`): highest rate, one for all layer groups or one a group;
                `slice(a, b)` spreads geometrically. With precompute the last one counts.
            cycles (`int`): how many cycles, or epochs without `cycle_len`.
            cycle_len (`int`, *optional*): epochs of the first cycle.
            cycle_mult (`int`, *optional*, defaults to 1): each cycle is this many times as long as the one before.
            name (`str`, *optional*): of the folder below `output_dir/_runs`; by default `fit-` and a number.
            resume_from_checkpoint (`str` or `bool`, *optional*): as in [`~transformers.Trainer.train`].

        Raises:
            ValueError: if a number is out of range, or the rates do not match the layer groups.
        """
        require_whole("cycles", cycles, at_least=1)
        require_whole("cycle_mult", cycle_mult, at_least=1)
        if cycle_len is not None:
            require_whole("cycle_len", cycle_len, at_least=1)
        elif cycle_mult != 1:
            raise ValueError(f"cycle_mult={cycle_mult} needs cycle_len: without it the rate is constant.")
        rates = self.layer_groups.learning_rates(lr)
        self.num_fits += 1
        args = copy.copy(self.args)
        args.group_learning_rates, args.learning_rate = rates, rates[-1]
        args.num_cycles, args.cycle_len, args.cycle_mult = cycles, cycle_len, cycle_mult
        args.num_train_epochs, args.max_steps = args.total_epochs, -1
        name = name or f"fit-{self.num_fits:03d}"
        args.output_dir = str(Path(self.args.output_dir, RUNS_FOLDER, name))
        self._tracked_fits.name_fit(args, self.args.output_dir, name)
        with self._replaced(args=args, _fit_name=name):
            return self.train(resume_from_checkpoint)

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Train as the arguments say: cycles, layer groups, precompute. A new optimizer each time."""
        self._check_before_training()
        self.optimizer, self.lr_scheduler = self._given_optimizers
        self.model_wrapped = self.model
        self._last_rates = {}
        self.run = None
        name, start = self._fit_name or f"train-{len(self.fits) + 1:03d}", time.perf_counter()
        with self._features_instead_of_photos():
            output = super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
        self.fits.append(
            fit_figures(
                self.state,
                self.schedule,
                self.args,
                name=name,
                learning_rates=self.layer_groups.learning_rates(
                    self.args.group_learning_rates or self.args.learning_rate
                ),
                seconds=time.perf_counter() - start,
                precompute=self._precompute,
                freeze_to=self.layer_groups.frozen,
            )
        )
        self.fit_stages.append(
            {
                "lr": self.fits[-1]["learning_rates"],
                "cycles": self.args.num_cycles,
                "cycle_len": self.args.cycle_len,
                "cycle_mult": self.args.cycle_mult,
                "freeze_to": self.layer_groups.frozen,
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
            start_lr, end_lr, num_steps: see [`LRRangeTest`].
            group_learning_rates (*optional*): rates whose ratios the layer groups keep during the test, such as
                `[1e-4, 1e-3, 1e-2]`; by default those of the arguments, else all groups have the same rate.
        """
        test = LRRangeTest(start_lr, end_lr, num_steps)
        self._check_before_training()
        args = copy.copy(self.args)
        if group_learning_rates is not None:
            args.group_learning_rates = self.layer_groups.learning_rates(group_learning_rates)
        given_optimizer, _ = self._given_optimizers
        with self._replaced(args=args, optimizer=given_optimizer), self._features_instead_of_photos():
            found = test.run(self)
        self._tracked_fits.range_test_done(found)
        self._new_range_test = found
        return found

    def freeze(self) -> None:
        """Train the head only."""
        self.freeze_to(-1)

    def freeze_to(self, n: int) -> None:
        """Train layer group `n` and those after it.

        With precompute on, what the last frozen group gives is stored from then on; if nothing is frozen any more,
        precompute is switched off.
        """
        self.layer_groups.freeze_to(n)
        if self._precompute and self.layer_groups.frozen == 0:
            logger.warning("The whole body is to train, so precompute is switched off.")
            self._precompute = False
        elif self._precompute:
            self._cut()

    def unfreeze(self) -> None:
        """Train all layer groups; precompute is switched off."""
        self.freeze_to(0)

    @property
    def precompute(self) -> bool:
        """Whether training uses precomputed features of the photos, so that only what is not frozen runs.

        With the whole body frozen the features are the head's input; after a partial `freeze_to`, the activations
        between the frozen groups and the rest. They are computed when they are first needed.

        Raises:
            ValueError: on setting it True, if nothing is frozen or the model cannot be cut where the frozen groups end.
        """
        return self._precompute

    @precompute.setter
    def precompute(self, value: bool) -> None:
        if value:
            self.check_precompute()
        if value and not self._precompute and self.train_transform.is_random and not self.args.precompute_views:
            logger.warning(
                "Augmentation has no effect with precompute: features are those of the plain photos. "
                "precompute_views=4 would store four augmented views of each."
            )
        self._precompute = value

    def check_precompute(self) -> None:
        """Raise a ValueError if precompute is not possible with what is frozen now."""
        self._cut()
        if self.args.precompute_views and not self.train_transform.is_random:
            raise ValueError(
                f"precompute_views={self.args.precompute_views} needs a training transform that augments: give the "
                'trainer the first one of image_transforms(model, augment="side_on", max_zoom=1.1).'
            )

    def log_predictions(self, dataset: Any = None) -> NDArray[np.float32]:
        """Log-probabilities (photos, classes), in the order of the data set; validation by default."""
        logits = torch.from_numpy(np.asarray(self._logits(self._or_validation(dataset))))
        return torch.log_softmax(logits.float(), dim=-1).numpy()

    def tta(self, n_aug: int = 4, beta: float | None = None, dataset: Any = None) -> NDArray[np.float32]:
        """Test-time augmentation: probabilities (photos, classes), averaged over the plain photo and augmented views.

        Args:
            n_aug (`int`, *optional*, defaults to 4): augmented views, drawn by the training transform.
            beta (`float`, *optional*): weight of the plain photo, in [0, 1], the mean of the augmented ones having the
                rest (fastai v2: 0.25); by default all `1 + n_aug` count alike (fast.ai 0.7).
            dataset (`datasets.Dataset`, *optional*): validation by default.

        Raises:
            ValueError: if there is nothing random to draw views with, or a number is out of range.
        """
        require_whole("n_aug", n_aug, at_least=0)
        if beta is not None and not 0.0 <= beta <= 1.0:
            raise ValueError(f"beta={beta!r}: give the plain photo's weight, from 0 to 1.")
        dataset = self._or_validation(dataset)
        if n_aug and not self.train_transform.is_random:
            raise ValueError(
                f"tta(n_aug={n_aug}) needs a training transform that augments: give the trainer the first one of "
                'image_transforms(model, augment="side_on", max_zoom=1.1).'
            )
        plain = np.exp(self.log_predictions(dataset))
        if n_aug == 0:
            return plain
        views = [
            np.exp(self.log_predictions(self._photos(dataset, self.train_transform, seed_of=("tta", view))))
            for view in range(n_aug)
        ]
        weight = 1 / (1 + n_aug) if beta is None else beta
        return weight * plain + (1 - weight) * np.mean(views, axis=0, dtype=np.float32)

    def content_hash(self, dataset: Any) -> str:
        """SHA-256 of a data set's photos and labels, in order."""
        photos = self._photos(dataset, self.eval_transform)
        return hashlib.sha256(f"{photos.content_hash()} {photos.labels()}".encode()).hexdigest()

    def plot_lr(self, ax: Axes | None = None) -> Axes:
        """The rate of each layer group at each step of the last fit.

        Raises:
            ValueError: if nothing was trained yet.
        """
        if not self._last_rates:
            raise ValueError("plot_lr() shows the rates of the last fit: call fit() or train() first.")
        return plot_rates(self._last_rates, ax)

    def create_model_card(self, **facts: Any) -> None:
        """Write the card, `README.md` and pictures in `output_dir`, from this trainer's fits and what it measures now.

        Args:
            **facts: what nobody can measure: see [`~hf_sgdr.model_card.write_model_card`].
        """
        from hf_sgdr.model_card import write_model_card  # at the side: it knows the trainer

        write_model_card(self, **facts)

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
            **kwargs: facts for the card, which is then written anew: see [`create_model_card`].

        Returns:
            `CommitInfo` of huggingface_hub, or a future of it; None on other processes than the main one.

        Raises:
            HubError: if it cannot be pushed; everything is saved, and the message ends with the command that pushes.
        """
        from hf_sgdr.hub import hub_api, push_folder  # at the side: they know the trainer
        from hf_sgdr.run_files import write_run_files

        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.save_model(_internal_call=True)
        write_run_files(self, kwargs)
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

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Make the repository and look at the login, before anything is trained.

        Raises:
            HubError: if there is no login, it may not write there, or the Hub cannot be asked.
        """
        if self.is_world_process_zero():
            from hf_sgdr.hub import hub_api, prepare_repository

            private = private if private is not None else self.args.hub_private_repo
            self.hub_model_id = prepare_repository(self._hub_name, private=private, api=hub_api(token))
            self.push_in_progress = None

    # ---- What differs inside the Trainer ----

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        """All parameters, in the groups of the layers, each with its rate; frozen ones have no gradient."""
        if self.optimizer is None:
            groups = self._groups_in_training
            rates = self.args.group_learning_rates or [self.args.learning_rate] * len(self.layer_groups)
            if len(groups) == 1 and len(set(rates)) > 1:
                logger.info(f"The head alone trains: of the rates {rates} it takes the last.")
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
                    warmup_steps=args.get_warmup_steps(num_training_steps),
                )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def set_initial_training_values(self, args: Any, dataloader: DataLoader[Any]) -> Any:
        """Transformers' own values; the cycles are laid out in its optimizer steps an epoch."""
        values = super().set_initial_training_values(args, dataloader)
        total = self._steps_per_epoch * self.args.total_epochs
        if args.max_steps > 0 and args.max_steps != total:
            raise ValueError(
                f"max_steps={args.max_steps}, but the cycles are {self.args.total_epochs} epochs of "
                f"{self._steps_per_epoch} steps, {total} in all: leave max_steps out, or change the cycles."
            )
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

    def _get_dataloader(self, dataset: Any, *args: Any, **kwargs: Any) -> DataLoader[Any]:
        if isinstance(dataset, datasets.Dataset) and self.args.image_column_name in dataset.column_names:
            if kwargs.get("is_training"):
                photos = self._photos(dataset, self.train_transform, seed_of=("train", self.num_fits))
                dataset = self._cached(photos, dataset, "train")
            else:
                dataset = self._cached(self._photos(dataset, self.eval_transform), dataset, "validation")
        return super()._get_dataloader(dataset, *args, **kwargs)

    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Transformers' own; under several processes the loss is that of all photos, each counted once.

        The Trainer averages the losses of batches there, which the last ones, filled up with photos seen before, shift.
        """
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        name = f"{metric_key_prefix}_loss"
        is_ours = self.compute_loss_func is None and self.label_smoother is None and output.label_ids is not None
        if self.args.world_size > 1 and name in output.metrics and is_ours:
            logits = output.predictions[0] if isinstance(output.predictions, tuple) else output.predictions
            labels, logits = torch.from_numpy(output.label_ids), torch.from_numpy(logits).float()
            output.metrics[name] = float(self.model.loss_function(labels, logits, self.model.config))
        return output

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Photos come as 8-bit pixels and are normalised here, a batch at a time, on the device."""
        inputs = super()._prepare_inputs(inputs)
        pixels = inputs.get("pixel_values")
        if pixels is not None and pixels.dtype == torch.uint8:
            values = self.eval_transform.normalize(pixels)
            inputs["pixel_values"] = values.contiguous(memory_format=torch.channels_last)
        return inputs

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        folder = Path(output_dir or self.args.output_dir)
        # A pickle of the arguments, which nothing needs and which would carry them to the Hub.
        (folder / "training_args.bin").unlink(missing_ok=True)
        open_as_umask_says(*folder.glob("*.safetensors"))

    # ---- Helpers ----

    @property
    def _hub_name(self) -> str:
        """The repository to push to: as given, else called as the output folder."""
        return self.args.hub_model_id or Path(self.args.output_dir).absolute().name

    @property
    def _groups_in_training(self) -> LayerGroups:
        if isinstance(self.model, HeadClassifier):
            names = [name for name, _ in self.model.named_parameters()]
            return LayerGroups(self.model, {self.layer_groups.names[-1]: names})
        return self.layer_groups

    @contextmanager
    def _replaced(self, **attributes: Any) -> Iterator[None]:
        """Have other values for some attributes inside."""
        before = {name: getattr(self, name) for name in attributes}
        try:
            for name, value in attributes.items():
                setattr(self, name, value)
            yield
        finally:
            for name, value in before.items():
                setattr(self, name, value)

    @contextmanager
    def _features_instead_of_photos(self) -> Iterator[None]:
        """Inside, the model is the head and the data are features, if precompute is on."""
        if not self._precompute:
            yield
            return
        args = copy.copy(self.args)
        args.dataloader_num_workers, args.dataloader_persistent_workers, args.dataloader_prefetch_factor = (
            0,
            False,
            None,
        )
        cut = self._cut()
        train = self._training_features(cut)
        evaluation = self.eval_dataset
        if isinstance(evaluation, dict):
            evaluation = {name: self._evaluation_features(cut, photos, name) for name, photos in evaluation.items()}
        elif evaluation is not None:
            evaluation = self._evaluation_features(cut, evaluation, "validation")
        replaced: dict[str, Any] = {"args": args, "train_dataset": train, "eval_dataset": evaluation}
        if cut.skipped is None:
            head_model = HeadClassifier(self.model, cut.module)
            replaced |= {"model": head_model, "model_wrapped": head_model}
        try:
            with (
                self._replaced(data_collator=whole_batch, **replaced),
                nullcontext() if cut.skipped is None else cut.fed_with_features(),
                nothing_to_collect() if args.device.type == "cpu" else nullcontext(),
            ):
                yield
        finally:
            self.callback_handler.model = self.model
            self.accelerator._models.clear()  # forgets the head, so that the whole model is prepared again

    def _cut(self) -> Cut:
        """Where the frozen groups end.

        Raises:
            ValueError: if nothing is frozen, or the model cannot be cut there.
        """
        frozen = self.layer_groups.frozen
        if frozen not in self._cuts:
            self._cuts[frozen] = Cut.at_boundary(self.layer_groups, self.eval_transform.spec.size)
        return self._cuts[frozen]

    def _training_features(self, cut: Cut) -> FeatureDataset:
        """The plain photos' features, and those of the augmented views, if any."""
        views = [self._photos(self.train_dataset, self.eval_transform.fast())]
        for view in range(self.args.precompute_views):
            views.append(self._photos(self.train_dataset, self.train_transform, seed_of=("view", view)))
        return self._features.dataset(views, cut, "train", self.args.feature_dtype)

    @property
    def feature_dtype(self) -> str:
        """The precision in which training features are computed: "float32" or "bfloat16".

        Setting it decides what `feature_dtype="auto"` means, which a resumed run takes over from the one before.
        """
        photos = self._photos(self.train_dataset, self.eval_transform.fast())
        return str(self._features.dtype(photos, self.args.feature_dtype)).removeprefix("torch.")

    @feature_dtype.setter
    def feature_dtype(self, value: str) -> None:
        self._features.auto_dtype = value

    def _evaluation_features(self, cut: Cut, dataset: Any, name: str) -> FeatureDataset:
        dtype = "bfloat16" if self.args.feature_dtype == "bfloat16" else "float32"
        return self._features.dataset([self._photos(dataset, self.eval_transform)], cut, name, dtype)

    def _photos(self, dataset: Any, transform: PhotoTransform, seed_of: tuple[Any, ...] = ()) -> PhotoDataset:
        if isinstance(dataset, PhotoDataset):
            dataset = dataset.rows
        seed = self.args.data_seed if self.args.data_seed is not None else self.args.seed
        words = [seed, *(sum(part.encode()) if isinstance(part, str) else part for part in seed_of)]
        return PhotoDataset(
            dataset,
            transform,
            image_column=self.args.image_column_name,
            label_column=self.args.label_column_name,
            seed=int(np.random.SeedSequence(words).generate_state(1)[0]),
        )

    def _cached(self, photos: PhotoDataset, dataset: Any, name: str) -> PhotoDataset:
        """With `cache_images`, the trainer's own photos decoded once for all epochs; others as they are."""
        own = self.eval_dataset.values() if isinstance(self.eval_dataset, dict) else [self.eval_dataset]
        if self.args.cache_images and any(dataset is one for one in (self.train_dataset, *own)):
            photos.cache = self._decoded.of(photos, dataset, name)
        return photos

    def _logits(self, dataset: Any) -> Any:
        predictions = self.predict(dataset).predictions
        return predictions[0] if isinstance(predictions, tuple) else predictions

    def _or_validation(self, dataset: Any) -> Any:
        dataset = dataset if dataset is not None else self.eval_dataset
        if dataset is None or isinstance(dataset, dict):
            raise ValueError("Which photos? The trainer has no single eval_dataset: give dataset=.")
        return dataset

    def _check_before_training(self) -> None:
        if self.train_dataset is None:
            raise ValueError("Nothing to train on: give the trainer a train_dataset.")
        if self.args.eval_strategy != "no" and self.eval_dataset is None:
            raise ValueError('Nothing to evaluate on: give the trainer an eval_dataset, or eval_strategy="no".')

    def _record_transforms(self, model: PreTrainedModel) -> None:
        """What a stock pipeline ignores and test-time augmentation needs, in the model's configuration."""
        model.config.hf_sgdr = {"augment": self.train_transform.augment, "max_zoom": self.train_transform.max_zoom}
