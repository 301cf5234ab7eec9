"""Stops training at the first loss that is no number, before it reaches the weights."""

from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class RequireFiniteLoss(TrainerCallback):
    """Raises before the optimizer's step if the loss is NaN or infinite; on any Trainer.

    Give the Trainer `logging_nan_inf_filter=False`, or it hides such a loss.

    Args:
        trainer (`Trainer`): whose loss it looks at.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Look at the loss of this step.

        Raises:
            FloatingPointError: in every process, if it is NaN or infinite in any.
        """
        losses = self.trainer._tr_loss
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
