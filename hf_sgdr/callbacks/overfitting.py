"""`StopWhenOverfitting`: ends training at the end of the first cycle that over-fits."""

import math
from collections.abc import Sequence
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging
from typing_extensions import override

from hf_sgdr.callbacks.best_weights import mean_of
from hf_sgdr.optim.schedule import SGDRScheduler

logger = logging.get_logger(__name__)

# Worse means worse by more than a hundredth: less is chance.
OVERFITTING = 1.01


class StopWhenOverfitting(TrainerCallback):
    """Ends training at the end of a cycle that over-fits; see [`Stage`].

    It reads the Trainer's own history and scheduler alone, so a resumed run decides as an uninterrupted one.

    Args:
        losses (sequence of `str`, *optional*, defaults to `["eval_loss"]`): of several, the mean is compared; see
            [`judged_losses`].
    """

    def __init__(self, losses: Sequence[str] = ("eval_loss",)) -> None:
        self.losses = list(losses)

    @override
    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """At the end of a cycle, compare it with the best one."""
        scheduler = kwargs["lr_scheduler"]
        if not isinstance(scheduler, SGDRScheduler) or state.global_step not in scheduler.schedule.cycle_ends:
            return
        losses = self._losses_by_cycle(state.log_history, scheduler.schedule.cycle_ends)
        if len(losses) < 2 or max(losses) != state.global_step:  # not all sets of a dict are evaluated yet
            return
        *before, (validation, train) = losses.values()
        best_validation, best_train = min(before)
        if validation > OVERFITTING * best_validation and train < best_train:
            logger.warning(
                f"Over-fitting: validation loss {validation:.4f} after {best_validation:.4f}, while the training loss "
                f"fell from {best_train:.4f} to {train:.4f}. Training ends here."
            )
            control.should_training_stop = True
            control.should_save = False  # a checkpoint from here would be resumed past the end

    def _losses_by_cycle(self, history: list[dict[str, float]], ends: list[int]) -> dict[int, tuple[float, float]]:
        """Validation and training loss at each cycle's end so far, by its step."""
        losses: dict[int, tuple[float, float]] = {}
        metrics: dict[int, dict[str, float]] = {}
        train = math.nan
        for entry in history:
            train, step = entry.get("loss", train), int(entry["step"])
            if step in ends:
                metrics[step] = metrics.get(step, {}) | entry
                validation = mean_of(metrics[step], self.losses)
                if validation is not None:
                    losses[step] = (validation, train)
        return losses
