"""What a recipe listens to during a stage: weights worth keeping, and the end of learning."""

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open
from safetensors.torch import load_model
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from hf_sgdr.shards import replace_weights

if TYPE_CHECKING:
    from hf_sgdr.trainer import SGDRTrainer

logger = logging.get_logger(__name__)

# Worse means worse by more than a hundredth: less is chance.
OVERFITTING = 1.01


class KeepBestWeights(TrainerCallback):
    """Writes the model's weights whenever an evaluation during training has the lowest loss so far.

    The file's metadata says which weights they are, so that a run goes on with the best of what was before.

    Args:
        model (`PreTrainedModel`): the whole model, also while its head alone is trained.
        path (`Path`): a safetensors file; it is replaced, never half written.
    """

    def __init__(self, model: PreTrainedModel, path: Path) -> None:
        self.model, self.path = model, path
        self.stage = ""
        self.figures: dict[str, Any] = {}
        if path.exists():
            with safe_open(path, "pt") as file:
                self.figures = json.loads(file.metadata()["figures"])

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
            replace_weights(self.path, self.model, {"figures": json.dumps(self.figures)})

    def restore(self) -> None:
        """Give the model the best weights back."""
        if self.figures:
            load_model(self.model, self.path)


class StopWhenOverfitting(TrainerCallback):
    """Ends training at the end of a cycle that over-fits; see [`Stage`].

    It knows nothing but the Trainer's own history, so a resumed run decides as an uninterrupted one.

    Args:
        trainer ([`SGDRTrainer`]): whose schedule says where cycles end.
    """

    def __init__(self, trainer: "SGDRTrainer") -> None:
        self.trainer = trainer

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """At the end of a cycle, compare it with the best one."""
        schedule = self.trainer.schedule
        if schedule is None or state.global_step not in schedule.cycle_ends:
            return
        ends = self._cycle_ends(state, schedule.cycle_ends)
        if len(ends) < 2:
            return
        now, (best_validation, best_train) = ends[-1], min(ends[:-1])
        if now[0] > OVERFITTING * best_validation and now[1] < best_train:
            logger.warning(
                f"Over-fitting: validation loss {now[0]:.4f} after {best_validation:.4f}, while the training loss "
                f"fell from {best_train:.4f} to {now[1]:.4f}. Training ends here."
            )
            control.should_training_stop = True
            control.should_save = False  # a checkpoint from here would be gone on from, past the end

    def _cycle_ends(self, state: TrainerState, steps: list[int]) -> list[tuple[float, float]]:
        """Validation and training loss at each cycle's end so far."""
        found: dict[int, tuple[float, float]] = {}
        train_loss = math.nan
        for entry in state.log_history:
            train_loss = entry.get("loss", train_loss)
            if "eval_loss" in entry and entry["step"] in steps:
                found[entry["step"]] = (entry["eval_loss"], train_loss)
        return list(found.values())
