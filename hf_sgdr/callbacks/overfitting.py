"""`StopWhenOverfitting`: ends training at the end of the first cycle that over-fits."""

import math
from collections.abc import Sequence
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from hf_sgdr.callbacks.best_weights import mean_of
from hf_sgdr.optim.schedule import SGDRScheduler

logger = logging.get_logger(__name__)

# Worse means worse by more than a hundredth: less is chance.
OVERFITTING = 1.01


class StopWhenOverfitting(TrainerCallback):
    """Ends training at the end of a cycle that over-fits; see [`Stage`].

    It knows nothing but the Trainer's own history and scheduler, so a resumed run decides as an uninterrupted one.

    Args:
        losses (sequence of `str`, *optional*, defaults to `["eval_loss"]`): of several, the mean is compared; see
            [`judged_losses`].
    """

    def __init__(self, losses: Sequence[str] = ("eval_loss",)) -> None:
        self.losses = list(losses)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """At the end of a cycle, compare it with the best one."""
        scheduler = kwargs["lr_scheduler"]
        if not isinstance(scheduler, SGDRScheduler) or state.global_step not in scheduler.schedule.cycle_ends:
            return
        ends = self._cycle_ends(state, scheduler.schedule.cycle_ends)
        if len(ends) < 2 or max(ends) != state.global_step:  # not all sets of a dict are evaluated yet
            return
        *before, now = ends.values()
        (best_validation, best_train) = min(before)
        if now[0] > OVERFITTING * best_validation and now[1] < best_train:
            logger.warning(
                f"Over-fitting: validation loss {now[0]:.4f} after {best_validation:.4f}, while the training loss "
                f"fell from {best_train:.4f} to {now[1]:.4f}. Training ends here."
            )
            control.should_training_stop = True
            control.should_save = False  # a checkpoint from here would be gone on from, past the end

    def _cycle_ends(self, state: TrainerState, steps: list[int]) -> dict[int, tuple[float, float]]:
        """Validation and training loss at each cycle's end so far, by its step."""
        found: dict[int, tuple[float, float]] = {}
        evaluated: dict[int, dict[str, Any]] = {}
        train_loss = math.nan
        for entry in state.log_history:
            train_loss = entry.get("loss", train_loss)
            if entry["step"] in steps:
                values = evaluated.setdefault(entry["step"], {})
                values |= entry
                loss = mean_of(values, self.losses)
                if loss is not None:
                    found[entry["step"]] = (loss, train_loss)
        return found
