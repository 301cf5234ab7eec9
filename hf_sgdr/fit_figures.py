"""What one fit did, in plain values: an entry of `results.json` and a line of the model card."""

from typing import Any

from transformers import TrainerState

from hf_sgdr.schedule import SGDRSchedule
from hf_sgdr.training_args import SGDRTrainingArguments


def fit_figures(
    state: TrainerState,
    schedule: SGDRSchedule | None,
    args: SGDRTrainingArguments,
    *,
    name: str,
    learning_rates: list[float],
    seconds: float,
    precompute: bool,
    freeze_to: int,
) -> dict[str, Any]:
    """The figures of a fit that has just ended.

    Args:
        state (`TrainerState`): with the last losses in its history; None where there was none.
        schedule ([`SGDRSchedule`] or None): says how many cycles were finished; None is a constant rate.
        args ([`SGDRTrainingArguments`]): of the fit.
        name (`str`): of the fit.
        learning_rates (`list[float]`): the highest of each layer group.
        seconds (`float`): how long it took.
        precompute (`bool`), freeze_to (`int`): what trained, and on what.
    """
    evaluation: dict[str, Any] = next((entry for entry in reversed(state.log_history) if "eval_loss" in entry), {})
    training: dict[str, Any] = next((entry for entry in reversed(state.log_history) if "loss" in entry), {})
    cycles = sum(end <= state.global_step for end in schedule.cycle_ends) if schedule else args.num_cycles
    return {
        "name": name,
        "epochs": round(state.epoch or 0),
        "cycles": cycles,
        "learning_rates": learning_rates,
        "train_loss": training.get("loss"),
        "eval_loss": evaluation.get("eval_loss"),
        "eval_accuracy": evaluation.get("eval_accuracy"),
        "seconds": round(seconds, 2),
        "precompute": precompute,
        "freeze_to": freeze_to,
    }
