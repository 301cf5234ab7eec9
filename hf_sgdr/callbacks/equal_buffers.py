"""Batch-norm statistics made equal in all processes, before anything is evaluated or saved."""

from typing import Any

import torch.distributed
from timm.utils import distribute_bn
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


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

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Within an epoch, where something is evaluated or saved."""
        if control.should_evaluate or control.should_save:
            equal_buffers(kwargs["model"])

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """At an epoch's end."""
        equal_buffers(kwargs["model"])
