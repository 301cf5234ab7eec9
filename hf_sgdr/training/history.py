"""What one fit did, in plain values: an entry of `results.json` and a line of the model card."""

from typing import Any

from transformers import TrainerState

from hf_sgdr.callbacks.best_weights import best_evaluation
from hf_sgdr.optim.schedule import SGDRSchedule
from hf_sgdr.training.arguments import SGDRTrainingArguments


def fit_metrics(
    state: TrainerState,
    schedule: SGDRSchedule | None,
    args: SGDRTrainingArguments,
    *,
    name: str,
    learning_rates: list[float],
    seconds: float,
    precompute: bool,
    freeze_to: int,
    kept: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The figures of a fit that has just ended.

    Args:
        state (`TrainerState`): with the last losses in its history; None where there was none.
        schedule ([`SGDRSchedule`] or None): says how many cycles were finished; None is a constant rate.
        args ([`SGDRTrainingArguments`]): of the fit; with `max_steps`, the epochs may be a fraction.
        name (`str`): of the fit.
        learning_rates (`list[float]`): the highest of each layer group.
        seconds (`float`): how long it took.
        precompute (`bool`), freeze_to (`int`): what trained, and on what.
        kept (`dict`, *optional*): epoch, eval_loss and eval_accuracy of the weights that the model has now; by default
            those of the last epoch.
    """
    evaluation: dict[str, Any] = next((entry for entry in reversed(state.log_history) if "eval_loss" in entry), {})
    training: dict[str, Any] = next((entry for entry in reversed(state.log_history) if "loss" in entry), {})
    epochs = round(state.epoch or 0, 4)
    cycles = sum(end <= state.global_step for end in schedule.cycle_ends) if schedule else int(epochs)
    best = best_evaluation(state.log_history)
    kept = kept or {"epoch": state.epoch, **{name: evaluation.get(name) for name in ("eval_loss", "eval_accuracy")}}
    return {
        "name": name,
        "epochs": int(epochs) if epochs == int(epochs) else epochs,
        "cycles": cycles,
        "learning_rates": learning_rates,
        "train_loss": training.get("loss"),
        "eval_loss": evaluation.get("eval_loss"),
        "eval_accuracy": evaluation.get("eval_accuracy"),
        "seconds": round(seconds, 2),
        "precompute": precompute,
        "freeze_to": freeze_to,
        "best_epoch": None if best is None else best.get("epoch"),
        "kept": {name: kept.get(name) for name in ("epoch", "eval_loss", "eval_accuracy")},
        "max_steps": args.max_steps if args.max_steps > 0 else None,
    }
