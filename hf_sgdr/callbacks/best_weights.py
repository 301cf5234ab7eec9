"""`KeepBestWeights`: the weights of the evaluation with the lowest loss, kept in a file while training goes on."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_model
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from hf_sgdr._utils.store import replace_weights

logger = logging.get_logger(__name__)


def judged_losses(trainer: Trainer) -> list[str]:
    """The evaluation losses by whose mean weights are judged, as they are called in the Trainer's metrics.

    With one eval_dataset that is `eval_loss`. With a dict it is `eval_<name>_loss` of every set, unless
    `metric_for_best_model` names the loss of one of them, as transformers asks for it.
    """
    if not isinstance(trainer.eval_dataset, dict):
        return ["eval_loss"]
    losses = [f"eval_{name}_loss" for name in trainer.eval_dataset]
    wanted = trainer.args.metric_for_best_model or ""
    wanted = wanted if wanted.startswith("eval_") else f"eval_{wanted}"
    return [wanted] if wanted in losses else losses


class KeepBestWeights(TrainerCallback):
    """Writes the model's weights whenever an evaluation during training has the lowest loss so far.

    The file's metadata says which weights they are, so that a run goes on with the best of what was before.

    Args:
        model (`PreTrainedModel`): the whole model, also while its head alone is trained.
        path (`Path`): a safetensors file; it is replaced, never half written.
        losses (sequence of `str`, *optional*, defaults to `["eval_loss"]`): of several, their mean decides, once all
            sets are evaluated; see [`judged_losses`].

    Raises:
        ValueError: if there is a file already and it is damaged.
    """

    def __init__(self, model: PreTrainedModel, path: Path, losses: Sequence[str] = ("eval_loss",)) -> None:
        self.model, self.path, self.losses = model, path, list(losses)
        self.stage = ""
        self.figures: dict[str, Any] = {}
        self._evaluated: dict[str, Any] = {}  # since weights were last judged: the sets of a dict come one by one
        if path.exists():
            try:
                with safe_open(path, "pt") as file:
                    self.figures = json.loads(file.metadata()["figures"])
            except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
                raise _damaged(path, error) from error

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Keep the weights if they are the best."""
        self._evaluated |= metrics or {}
        loss = mean_of(self._evaluated, self.losses)
        if loss is None:
            return
        evaluated, self._evaluated = self._evaluated, {}
        if not loss < self.figures.get("eval_loss", math.inf):
            return
        self.figures = {
            "stage": self.stage,
            "epoch": state.epoch,
            "eval_loss": loss,
            "eval_accuracy": mean_of(evaluated, [_accuracy_beside(name) for name in self.losses]),
            "metric": self.losses[0] if len(self.losses) == 1 else f"mean of {', '.join(self.losses)}",
        }
        if state.is_world_process_zero:
            replace_weights(self.path, self.model, {"figures": json.dumps(self.figures)})

    def restore(self) -> None:
        """Give the model the best weights back."""
        if self.figures:
            try:
                load_model(self.model, self.path)
            except (OSError, SafetensorError) as error:
                raise _damaged(self.path, error) from error


def best_evaluation(log_history: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The evaluation with the lowest validation loss, the first of several; None if there was none."""
    evaluations = [entry for entry in log_history if math.isfinite(entry.get("eval_loss", math.nan))]
    return min(evaluations, key=lambda entry: entry["eval_loss"], default=None)


def mean_of(values: dict[str, Any], names: Sequence[str]) -> float | None:
    """The mean of some values; None unless all of them are there."""
    chosen = [values.get(name) for name in names]
    return math.fsum(chosen) / len(chosen) if all(isinstance(one, float | int) for one in chosen) else None  # type: ignore[arg-type]


def last_evaluation(history: Sequence[dict[str, Any]], losses: Sequence[str]) -> tuple[float | None, float | None]:
    """Loss and accuracy of the last evaluation in a Trainer's history, means over the sets that are judged by."""
    newest: dict[str, Any] = {}
    for entry in history:
        newest |= {name: value for name, value in entry.items() if name.startswith("eval_")}
    return mean_of(newest, losses), mean_of(newest, [_accuracy_beside(name) for name in losses])


def _accuracy_beside(loss: str) -> str:
    return f"{loss.removesuffix('loss')}accuracy"


def _damaged(path: Path, error: Exception) -> ValueError:
    return ValueError(
        f"{path} is damaged ({' '.join(str(error).split())}): begin the run anew without resume, or delete this file "
        "to go on without the best weights so far."
    )
