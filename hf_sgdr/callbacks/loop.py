"""What a training loop needs beside transformers' own: the data's epoch, equal statistics, a finite loss."""

from typing import Any

import torch
import torch.distributed
from timm.utils.distributed import distribute_bn
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from typing_extensions import override

from hf_sgdr._utils._compat import loss_since_last_log


class DatasetEpoch(TrainerCallback):
    """Calls `set_epoch` of a data set that has one, on any Trainer.

    accelerate (1.15) calls it only where its sampler takes no epoch: not under several processes, and not in the epoch
    that a run is resumed in, which would then see other views than an uninterrupted one.
    """

    @override
    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set it; in the middle of an epoch, after a resume, the whole part counts."""
        dataset: Any = getattr(kwargs["train_dataloader"], "dataset", None)
        if hasattr(dataset, "set_epoch"):
            dataset.set_epoch(int(state.epoch or 0))


def equal_buffers(model: nn.Module) -> None:
    """Give every process the mean of the processes' running statistics of batch norm; does nothing in one process.

    DDP copies the first process's buffers to the others before each training step, and in that step each process moves
    its own by its own share of the batch. So after a step they differ, and evaluation, which the Trainer runs on the
    unwrapped model, and a saved file would take those of whichever process asks. Source: `distribute_bn` of timm's
    training script, with `reduce=True`.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        distribute_bn(model, torch.distributed.get_world_size(), reduce=True)


class EqualBuffers(TrainerCallback):
    """Calls [`equal_buffers`] at the end of every epoch, and before evaluations and checkpoints within; any Trainer."""

    @override
    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Within an epoch, where something is evaluated or saved."""
        if control.should_evaluate or control.should_save:
            equal_buffers(kwargs["model"])

    @override
    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """At an epoch's end."""
        equal_buffers(kwargs["model"])


class StopOnNonFiniteLoss(TrainerCallback):
    """Raises before the optimizer's step if the loss is NaN or infinite; on any Trainer.

    On a GPU it looks at the loss one step later, before something is saved and at the end of an epoch, so that no step
    waits for the device; the weights have then taken the step.

    Give the Trainer `logging_nan_inf_filter=False`, or it hides such a loss.

    Args:
        trainer (`Trainer`): whose loss it looks at.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self._on_its_way: tuple[torch.Tensor, torch.cuda.Event] | None = None

    @override
    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Forget the steps of another training."""
        self._on_its_way = None

    @override
    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Look at the loss of this step, or of the one before.

        Raises:
            FloatingPointError: in every process, if it is NaN or infinite in any.
        """
        losses = loss_since_last_log(self.trainer)
        if args.world_size > 1:
            losses = self.trainer.accelerator.gather(losses.reshape(1))
        if losses.device.type != "cuda":
            _require_finite(losses, state.global_step + 1, "before", state, kwargs["optimizer"])
            return
        self._look_back(state, kwargs["optimizer"])
        event = torch.cuda.Event()
        self._on_its_way = losses.to("cpu", non_blocking=True), event
        event.record()

    @override
    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Look before a checkpoint is written."""
        if control.should_save:
            self._look_back(state, kwargs["optimizer"])

    @override
    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Look at the last step's."""
        self._look_back(state, kwargs["optimizer"])

    def _look_back(self, state: TrainerState, optimizer: Any) -> None:
        if self._on_its_way is not None:
            (losses, event), self._on_its_way = self._on_its_way, None
            event.synchronize()
            _require_finite(losses, state.global_step, "after", state, optimizer)


def _require_finite(losses: torch.Tensor, step: int, when: str, state: TrainerState, optimizer: Any) -> None:
    if torch.isfinite(losses).all():
        return
    rates = ", ".join(f"{group.get('name', i)} {group['lr']:.2e}" for i, group in enumerate(optimizer.param_groups))
    raise FloatingPointError(
        f"The loss is {'NaN' if torch.isnan(losses).any() else 'infinite'} at step {step} of {state.max_steps}, "
        f"learning rate {rates}. The weights are those of {when} this step. Take a lower rate; lr_find() shows where "
        "the loss takes off."
    )
