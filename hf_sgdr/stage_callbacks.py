"""What a recipe listens to during a stage: weights worth keeping, and the end of learning."""

import math
from pathlib import Path
from typing import Any

from safetensors.torch import load_model, save_model
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from hf_sgdr.trainer import SGDRTrainer

logger = logging.get_logger(__name__)

# Worse means worse by more than a hundredth: less is chance.
OVERFITTING = 1.01


class KeepBestWeights(TrainerCallback):
    """Writes the model's weights whenever an evaluation during training has the lowest loss so far.

    Args:
        model (`PreTrainedModel`): the whole model, also while its head alone is trained.
        path (`Path`): a safetensors file; it is replaced, never half written.
    """

    def __init__(self, model: PreTrainedModel, path: Path) -> None:
        self.model, self.path = model, path
        self.stage = ""
        self.figures: dict[str, Any] = {}

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Keep the weights if they are the best."""
        loss = (metrics or {}).get("eval_loss", math.nan)
        if not loss < self.figures.get("eval_loss", math.inf):
            return
        self.figures = {
            "stage": self.stage,
            "epoch": state.epoch,
            "eval_loss": loss,
            "eval_accuracy": (metrics or {}).get("eval_accuracy"),
        }
        if state.is_world_process_zero:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            temporary = self.path.with_name(".tmp-" + self.path.name)
            save_model(self.model, str(temporary))
            temporary.replace(self.path)

    def restore(self) -> None:
        """Give the model the best weights back."""
        if self.figures:
            load_model(self.model, self.path)


class StopWhenOverfitting(TrainerCallback):
    """Ends training at the end of a cycle that over-fits; see [`Stage`].

    Args:
        trainer ([`SGDRTrainer`]): whose schedule says where cycles end.
    """

    def __init__(self, trainer: SGDRTrainer) -> None:
        self.trainer = trainer
        self.cycle_ends: list[tuple[float, float]] = []
        self._train_loss = math.nan

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Remember the training loss."""
        self._train_loss = (logs or {}).get("loss", self._train_loss)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """At the end of a cycle, compare it with the best one."""
        schedule = self.trainer.schedule
        if metrics is None or schedule is None or state.global_step not in schedule.cycle_ends:
            return
        now = (metrics["eval_loss"], self._train_loss)
        if self.cycle_ends:
            best_validation, best_train = min(self.cycle_ends)
            if now[0] > OVERFITTING * best_validation and now[1] < best_train:
                logger.warning(
                    f"Over-fitting: validation loss {now[0]:.4f} after {best_validation:.4f}, while the training loss "
                    f"fell from {best_train:.4f} to {now[1]:.4f}. Training ends here."
                )
                control.should_training_stop = True
        self.cycle_ends.append(now)
