"""`TrainingHistory`: what a trainer's fits did, and what a recipe's stages would be told to do the same."""

import re
import time
from collections.abc import Sequence
from typing import Any, cast

from transformers import TrainerState

from hf_sgdr.callbacks.best_weights import best_evaluation, metrics_of
from hf_sgdr.optim.range_test import LRRangeResult
from hf_sgdr.optim.schedule import SGDRSchedule
from hf_sgdr.recipe import FitRecord, RunResults, Stage
from hf_sgdr.training.arguments import SGDRTrainingArguments


class TrainingHistory:
    """The fits of one trainer.

    Attributes:
        fits (`list[FitRecord]`): in their order.
        range_tests (`dict[str, LRRangeResult]`): by the name of the fit that came after it.
        run (`tuple` or None): stages and results of the last [`run_stages`], until something else is trained.
        trained_at (`float`): when the last fit ended, in seconds since the epoch.
        starting_weights (`str` or None): the hash of those that the present run began with.
    """

    def __init__(self) -> None:
        self.fits: list[FitRecord] = []
        self.range_tests: dict[str, LRRangeResult] = {}
        self.run: tuple[tuple[Stage, ...], RunResults] | None = None
        self.trained_at = 0.0
        self.starting_weights: str | None = None
        self._stages: list[dict[str, Any]] = []
        self._range_test: LRRangeResult | None = None

    def add_range_test(self, result: LRRangeResult) -> None:
        """Keep a range test for the fit that follows it."""
        self._range_test = result

    def add_fit(self, record: FitRecord, args: SGDRTrainingArguments, freeze_batch_norm: bool) -> None:
        """Note a fit that has just ended, with the arguments that it had."""
        self.fits.append(record)
        self._stages.append(
            {
                "lr": record["learning_rates"],
                "cycles": args.num_cycles,
                "cycle_len": args.cycle_len,
                "cycle_mult": args.cycle_mult,
                "freeze_to": record["freeze_to"],
                "precompute": record["precompute"],
                "freeze_batch_norm": freeze_batch_norm,
            }
        )
        self.trained_at = time.time()
        if self._range_test is not None:
            self.range_tests[record["name"]], self._range_test = self._range_test, None

    def recipe(self) -> tuple[Stage, ...]:
        """The stages of the last run, or else the fits as stages that would do the same."""
        if self.run is not None:
            return self.run[0]
        stages: list[Stage] = []
        for record, values in zip(self.fits, self._stages, strict=True):
            name = re.sub(r"[^a-z0-9_-]+", "-", record["name"].lower())
            taken = sum(re.fullmatch(rf"{name}(-again-\d+)?", stage.name) is not None for stage in stages)
            stages.append(Stage(name=f"{name}-again-{taken}" if taken else name, **values))
        return tuple(stages)

    def results(self, world_size: int) -> RunResults:
        """The results of the last run, or else those of the fits; the weights are those that the last one left."""
        if self.run is not None:
            return self.run[1]
        results = RunResults(world_size, list(self.fits))
        if self.fits:
            results.best = {"stage": self.fits[-1]["name"], **self.fits[-1]["kept"]}
        return results


def fit_record(
    state: TrainerState,
    schedule: SGDRSchedule | None,
    *,
    name: str,
    learning_rates: Sequence[float],
    seconds: float,
    precompute: bool,
    freeze_to: int,
    max_steps: int,
) -> FitRecord:
    """The record of a fit that has just ended; the weights kept are those of its last step.

    Args:
        state (`TrainerState`): with the last losses in its history.
        schedule ([`SGDRSchedule`] or None): says how many cycles were finished; None is a constant rate.
        name, learning_rates, seconds, precompute, freeze_to: see [`FitRecord`].
        max_steps (`int`): where the fit was cut off; -1 or less: not.
    """
    evaluation: dict[str, Any] = next((entry for entry in reversed(state.log_history) if "eval_loss" in entry), {})
    training: dict[str, Any] = next((entry for entry in reversed(state.log_history) if "loss" in entry), {})
    best = best_evaluation(state.log_history)
    epochs = round(state.epoch or 0, 4)
    cycles = sum(end <= state.global_step for end in schedule.cycle_ends) if schedule else int(epochs)
    metrics = metrics_of(evaluation, ["eval_loss"])
    record = {
        "name": name,
        "epochs": int(epochs) if epochs == int(epochs) else epochs,
        "cycles": cycles,
        "learning_rates": list(learning_rates),
        "train_loss": training.get("loss"),
        **metrics,
        "seconds": round(seconds, 2),
        "precompute": precompute,
        "freeze_to": freeze_to,
        "best_epoch": None if best is None else best.get("epoch"),
        "kept": {"epoch": state.epoch, **metrics},
        "max_steps": max_steps if max_steps > 0 else None,
    }
    return cast(FitRecord, record)
