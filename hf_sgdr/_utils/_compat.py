"""Private attributes of transformers and accelerate: no other file names one. Each has the version it was seen in.

`tests/test_stack_contract.py` fails with the name of what a release has moved.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from transformers import Trainer


def num_items_in_batch(trainer: Trainer, batches: list[Any]) -> torch.Tensor | int | None:
    """By how many items a loss summed over batches is divided; None if it is a mean already.

    transformers 5.24: `Trainer._get_num_items_in_batch`.
    """
    return trainer._get_num_items_in_batch(batches, trainer.args.device)


def loss_since_last_log(trainer: Trainer) -> torch.Tensor:
    """The sum of this process's step losses since the last log line.

    transformers 5.24: `Trainer._tr_loss`.
    """
    return trainer._tr_loss


def loss_counters(trainer: Trainer) -> dict[str, float]:
    """A Trainer's counters of the training loss, plain values for a checkpoint; the same in every process.

    transformers 5.24: `_tr_loss`, summed on the device since the last log line, `_total_loss_scalar`, the sum before
    it, and `_globalstep_last_logged`. It sets all of them to zero when a run is resumed.
    """
    losses = trainer.accelerator.gather(trainer._tr_loss.reshape(1))  # each process has its own
    return {
        "loss": losses.mean().item(),
        "total_loss": trainer._total_loss_scalar,
        "last_logged": trainer._globalstep_last_logged,
    }


def restore_loss_counters(trainer: Trainer, counters: dict[str, Any]) -> None:
    """Set the counters to what [`loss_counters`] gave."""
    trainer._tr_loss = torch.tensor(counters["loss"], device=trainer.args.device)
    trainer._total_loss_scalar = counters["total_loss"]
    trainer._globalstep_last_logged = counters["last_logged"]


def mean_training_loss(trainer: Trainer) -> float:
    """The mean over all steps once training ends, also over those before a resume (transformers 5.24)."""
    return float(trainer._total_loss_scalar / max(trainer.state.global_step, 0.001))


def skip_gradient_norm(trainer: Trainer) -> None:
    """Compute no gradient norm where nothing is clipped, for the log alone (transformers 5.24, `_get_grad_norm`)."""
    setattr(trainer, "_get_grad_norm", lambda model, grad_norm=None: grad_norm)  # noqa: B010  # mypy: a method


@contextmanager
def training_batch_size(trainer: Trainer, size: int) -> Iterator[None]:
    """Inside, a training step takes so many images on each process.

    transformers 5.24: loaders have `Trainer._train_batch_size`, which its own search for a batch size sets, too.
    """
    before = trainer._train_batch_size, trainer.args.per_device_train_batch_size
    try:
        trainer._train_batch_size = trainer.args.per_device_train_batch_size = size
        yield
    finally:
        trainer._train_batch_size, trainer.args.per_device_train_batch_size = before


def forget_prepared_models(accelerator: Accelerator) -> None:
    """Have the next evaluation prepare the model anew, in the place of the head (accelerate 1.15, `_models`)."""
    accelerator._models.clear()
