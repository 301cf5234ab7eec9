"""`TrainingHistory`: what a trainer's fits did, and what a recipe's stages would be told to do the same."""

import re
import time
from collections.abc import Sequence
from typing import Any, TypedDict, cast

from matplotlib.figure import Figure
from transformers import TrainerState

from hf_sgdr._utils.run_picture import plot_run
from hf_sgdr.callbacks.best_weights import best_evaluation, last_evaluation, mean_of, metrics_of
from hf_sgdr.optim.range_test import LRRangeResult
from hf_sgdr.optim.schedule import SGDRSchedule
from hf_sgdr.recipe import SOLVED_HEAD, FitRecord, RunResults, Stage
from hf_sgdr.training.arguments import SGDRTrainingArguments

# Of a fit, in its curve: more than a picture has points.
MOST_RATES = 500


class FitCurve(TypedDict):
    """What the picture of a run draws of a fit, in plain values.

    Keys:
        name (`str`): of the fit.
        epochs (`float`): how many it had.
        rates (`dict[str, list[float]]`): of each layer group that trained, at evenly spaced steps from the first on, at
            most `MOST_RATES` or so.
        points (`list[dict]`): each log's epoch, with its loss or its eval_loss, eval_accuracy and so on.
    """

    name: str
    epochs: float
    rates: dict[str, list[float]]
    points: list[dict[str, float | None]]


class TrainingHistory:
    """The fits of one trainer.

    Attributes:
        fits (`list[FitRecord]`): in their order.
        curves (`list[FitCurve]`): how each of them went; from a [`run_stages`] on those of its stages.
        range_tests (`dict[str, LRRangeResult]`): by the name of the fit that came after it.
        run (`tuple` or None): stages and results of the last [`run_stages`], until something else is trained.
        trained_at (`float`): when the last fit ended, in seconds since the epoch.
        starting_weights (`str` or None): the hash of those that the present run began with.
    """

    def __init__(self) -> None:
        self.fits: list[FitRecord] = []
        self.curves: list[FitCurve] = []
        self.range_tests: dict[str, LRRangeResult] = {}
        self.run: tuple[tuple[Stage, ...], RunResults] | None = None
        self.trained_at = 0.0
        self.starting_weights: str | None = None
        self._stages: list[dict[str, Any]] = []
        self._range_test: LRRangeResult | None = None
        self._was_solved = False

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
        self.trained_at, self._was_solved = time.time(), False
        if self._range_test is not None:
            self.range_tests[record["name"]], self._range_test = self._range_test, None

    def add_solution(self) -> None:
        """Note that the head was solved: files of a run that were written before are of other weights."""
        self.trained_at, self.run, self._was_solved = time.time(), None, True

    def plot(self) -> Figure:
        """The picture of the run: the first range test, rates, losses and metrics by epoch, over all fits.

        A range test that was made before a resume is not shown.

        Raises:
            ValueError: if nothing was trained yet.
        """
        if not self.curves:
            raise ValueError("There is no picture of a run before the first fit: call fit(), train() or run_stages().")
        results = self.results(1)
        tests = [self.range_tests[fit["name"]] for fit in self.curves if fit["name"] in self.range_tests]
        return plot_run(
            self.curves,
            metrics=results.metrics,
            best=results.best,
            solved=results.solved,
            range_test=tests[0].plot if tests else None,
        )

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
        """The results of the last run, or else those of the fits; the weights are those that the last one left.

        Of a head that was solved since, the best weights have its name and no metrics.
        """
        if self.run is not None:
            return self.run[1]
        results = RunResults(world_size, list(self.fits))
        if self.fits:
            last = {"stage": self.fits[-1]["name"], **self.fits[-1]["kept"]}
            results.best = {"stage": SOLVED_HEAD} if self._was_solved else last
        return results


def fit_curve(name: str, state: TrainerState, rates: dict[str, list[float]], losses: Sequence[str]) -> FitCurve:
    """The curve of a fit that has just ended.

    Args:
        name (`str`): of the fit.
        state (`TrainerState`): with its logs.
        rates (`dict[str, list[float]]`): at every step.
        losses (sequence of `str`): those of the evaluations by which weights are judged.
    """
    every = max(1, state.global_step // MOST_RATES)
    thinned = {group: values[::every] for group, values in rates.items()}
    return {"name": name, "epochs": state.epoch or 0.0, "rates": thinned, "points": _points(state, losses)}


def _points(state: TrainerState, losses: Sequence[str]) -> list[dict[str, float | None]]:
    points: list[dict[str, float | None]] = []
    evaluated: dict[str, Any] = {}  # the sets of a dict come one by one
    for entry in state.log_history:
        if "loss" in entry:
            points.append({"epoch": entry.get("epoch"), "loss": entry["loss"]})
        evaluated |= {key: value for key, value in entry.items() if key.startswith("eval_")}
        if mean_of(evaluated, losses) is not None:
            points.append({"epoch": entry.get("epoch"), **metrics_of(evaluated, losses)})
            evaluated = {}
    return points


def fit_record(
    state: TrainerState,
    schedule: SGDRSchedule | None,
    losses: Sequence[str],
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
        losses (sequence of `str`): those of the evaluations by which weights are judged.
        name, learning_rates, seconds, precompute, freeze_to: see [`FitRecord`].
        max_steps (`int`): where the fit was cut off; -1 or less: not.
    """
    training: dict[str, Any] = next((entry for entry in reversed(state.log_history) if "loss" in entry), {})
    best = best_evaluation(_points(state, losses))
    epochs = round(state.epoch or 0, 4)
    cycles = sum(end <= state.global_step for end in schedule.cycle_ends) if schedule else int(epochs)
    metrics = last_evaluation(state.log_history, losses)
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
