"""`KeepBestWeights`: the weights of the evaluation with the lowest loss, kept in a file while training goes on."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging
from typing_extensions import override

from hf_sgdr._utils.store import damaged, load_weights, replace_weights

logger = logging.get_logger(__name__)

# What is recorded of an evaluation beside its loss.
METRICS = ("accuracy", "balanced_accuracy", "f1", "map")
_MEND = ": begin the run anew without resume, or delete this file to go on without the best weights so far."


def judged_losses(trainer: Trainer) -> list[str]:
    """The names of the evaluation losses by whose mean weights are judged.

    With one eval_dataset that is `eval_loss`. With a dict it is `eval_<name>_loss` of every set, unless
    `metric_for_best_model` names the loss of one of them, as transformers asks for it.
    """
    if not isinstance(trainer.eval_dataset, dict):
        return ["eval_loss"]
    losses = [f"eval_{name}_loss" for name in trainer.eval_dataset]
    metric = f"eval_{(trainer.args.metric_for_best_model or '').removeprefix('eval_')}"
    return [metric] if metric in losses else losses


class KeepBestWeights(TrainerCallback):
    """Writes the model's weights whenever an evaluation during training has the lowest loss so far.

    The file's metadata holds the metrics of the evaluation, so that a resumed run goes on from the best so far.

    Args:
        model (`nn.Module`): the whole model, also while its head alone is trained.
        path (`Path`): a safetensors file; it is replaced, never half written.
        losses (sequence of `str`, *optional*, defaults to `["eval_loss"]`): of several, their mean decides, once all
            sets are evaluated; see [`judged_losses`].
        by (`str`, *optional*, defaults to "loss"): "loss", the lowest, or another metric of these evaluations such as
            "accuracy" or "f1", the highest; of equal ones the lowest loss decides.

    Raises:
        ValueError: if the file exists and is damaged.
    """

    def __init__(
        self, model: nn.Module, path: Path, losses: Sequence[str] = ("eval_loss",), *, by: str = "loss"
    ) -> None:
        self.model, self.path, self.losses, self.by = model, path, list(losses), by
        self.stage = ""
        self.metrics: dict[str, Any] = {}
        self._evaluated: dict[str, Any] = {}  # since weights were last judged: the sets of a dict come one by one
        if path.exists():
            try:
                with safe_open(path, "pt") as file:
                    self.metrics = json.loads(file.metadata()["figures"])
            except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
                raise damaged(path, error, _MEND) from error

    @override
    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Keep the weights if they are the best."""
        self._evaluated |= kwargs["metrics"]
        if mean_of(self._evaluated, self.losses) is None:
            return
        evaluated, self._evaluated = metrics_of(self._evaluated, self.losses), {}
        if not self._is_better(evaluated):
            return
        judged = [f"{loss.removesuffix('loss')}{self.by}" for loss in self.losses]
        self.metrics = {
            "stage": self.stage,
            "epoch": state.epoch,
            **evaluated,
            "metric": judged[0] if len(judged) == 1 else f"mean of {', '.join(judged)}",
        }
        if state.is_world_process_zero:
            replace_weights(self.path, self.model, {"figures": json.dumps(self.metrics)})

    @override
    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Warn if there were evaluations, but none with all the losses that decide."""
        if self._evaluated and not self.metrics and state.is_world_process_zero:
            seen = [name for name in self._evaluated if name.endswith("_loss")]
            logger.warning(
                f"No weights were kept as the best: the evaluations gave {', '.join(seen) or 'no loss'}, but not "
                f"{' and '.join(self.losses)}. " + (f"Give losses={seen}, whose mean decides." if seen else "")
            )

    def _is_better(self, evaluated: dict[str, Any]) -> bool:
        key, loss = f"eval_{self.by}", evaluated["eval_loss"]
        if self.by != "loss":
            if evaluated.get(key) is None:
                raise ValueError(f"best_by={self.by!r}: the evaluation has no {key}: compute_metrics must give it.")
            if evaluated[key] != self.metrics.get(key, -math.inf):
                return math.isfinite(loss) and evaluated[key] > self.metrics.get(key, -math.inf)
        return bool(loss < self.metrics.get("eval_loss", math.inf))

    def restore(self) -> None:
        """Load the best weights into the model."""
        if self.metrics:
            load_weights(self.model, self.path, _MEND)


def best_evaluation(history: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The evaluation with the lowest validation loss, the first of several; None if there was none."""
    evaluations = [entry for entry in history if math.isfinite(entry.get("eval_loss", math.nan))]
    return min(evaluations, key=lambda entry: entry["eval_loss"], default=None)


def last_evaluation(history: Sequence[dict[str, Any]], losses: Sequence[str]) -> dict[str, float | None]:
    """[`metrics_of`] the last evaluation in a Trainer's history."""
    newest: dict[str, Any] = {}
    for entry in history:
        newest |= {name: value for name, value in entry.items() if name.startswith("eval_")}
    return metrics_of(newest, losses)


def metrics_of(values: dict[str, Any], losses: Sequence[str]) -> dict[str, float | None]:
    """What is recorded of an evaluation: `eval_loss`, and those of `METRICS` that it has, means over the sets.

    `eval_accuracy` is always there, None if need be, but where images have several labels.
    """
    result = {"eval_loss": mean_of(values, losses)}
    for metric in METRICS:
        mean = mean_of(values, [f"{loss.removesuffix('loss')}{metric}" for loss in losses])
        if mean is not None or metric == "accuracy":
            result[f"eval_{metric}"] = mean
    if "eval_map" in result:
        del result["eval_accuracy"]
    return result


def mean_of(values: dict[str, Any], names: Sequence[str]) -> float | None:
    """The mean of some values; None unless each is a number."""
    numbers = [values[name] for name in names if isinstance(values.get(name), float | int)]
    return math.fsum(numbers) / len(names) if len(numbers) == len(names) else None
