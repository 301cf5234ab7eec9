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

    Give the Trainer `logging_nan_inf_filter=False`, or it hides such a loss.

    Args:
        trainer (`Trainer`): whose loss it looks at.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    @override
    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Look at the loss of this step.

        Raises:
            FloatingPointError: in every process, if it is NaN or infinite in any.
        """
        losses = loss_since_last_log(self.trainer)
        if args.world_size > 1:
            losses = self.trainer.accelerator.gather(losses.reshape(1))
        if torch.isfinite(losses).all():
            return
        rates = ", ".join(
            f"{group.get('name', i)} {group['lr']:.2e}" for i, group in enumerate(kwargs["optimizer"].param_groups)
        )
        raise FloatingPointError(
            f"The loss is {'NaN' if torch.isnan(losses).any() else 'infinite'} at step {state.global_step + 1} of "
            f"{state.max_steps}, learning rate {rates}. The weights are those of before this step. Take a lower rate; "
            "lr_find() shows where the loss takes off."
        )
