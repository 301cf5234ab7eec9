"""Batch-norm statistics made equal in all processes, before anything is evaluated or saved."""

from typing import Any

import torch
import torch.distributed
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


def equal_buffers(model: nn.Module) -> None:
    """Give every process the mean of the processes' buffers, such as running means; does nothing in one process.

    Each process sees its own share of a batch, so their statistics drift apart by chance; DDP makes gradients equal,
    not buffers. Counters are those of the first process.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    world_size = torch.distributed.get_world_size()
    for buffer in model.buffers():
        if buffer.is_floating_point():
            torch.distributed.all_reduce(buffer)
            buffer /= world_size
        else:
            torch.distributed.broadcast(buffer, src=0)


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
