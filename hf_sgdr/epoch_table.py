"""The table that grows by a line an epoch: epoch, train loss, validation loss, metrics, head's rate, seconds."""

import time
from typing import Any

from tqdm.auto import tqdm
from transformers import (
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

_NOT_METRICS = ("runtime", "per_second", "preparation_time", "loss")


class EpochTable(TrainerCallback):
    """Prints the lesson's table during training, in the place of transformers' dictionaries.

    The rate is the head's highest of the epoch: at the end of a cycle it is always nearly zero.
    """

    def __init__(self) -> None:
        self._start = 0.0
        self._losses: list[tuple[int, float]] = []
        self._steps_before = 0
        self._rate = 0.0
        self._has_header = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A new table."""
        self._has_header = False

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A new line."""
        self._start, self._losses, self._steps_before, self._rate = time.perf_counter(), [], state.global_step, 0.0

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remember the head's highest rate."""
        self._rate = max(self._rate, float(kwargs["optimizer"].param_groups[-1]["lr"]))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Collect the training losses of the epoch, each a mean over the steps since the one before."""
        if logs and "loss" in logs:
            self._losses.append((state.global_step - self._steps_before, logs["loss"]))
            self._steps_before = state.global_step
            if args.eval_strategy == "no":
                self._print(state, {})

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Print the line, if this evaluation belongs to training."""
        if self._losses and metrics:
            self._print(state, metrics)
            self._losses = []

    def _print(self, state: TrainerState, metrics: dict[str, float]) -> None:
        if not state.is_world_process_zero:
            return
        names = [name for name in metrics if name.startswith("eval_") and not name.endswith(_NOT_METRICS)]
        steps = sum(count for count, _ in self._losses)
        train_loss = sum(count * loss for count, loss in self._losses) / max(steps, 1)
        columns = {"epoch": f"{state.epoch:g}", "train loss": f"{train_loss:.4f}"}
        if "eval_loss" in metrics:
            columns["valid loss"] = f"{metrics['eval_loss']:.4f}"
        columns |= {name.removeprefix("eval_"): f"{metrics[name]:.4f}" for name in names}
        columns |= {"lr (head)": f"{self._rate:.2e}", "time": f"{time.perf_counter() - self._start:.1f} s"}
        widths = [max(len(name), 10) for name in columns]
        if not self._has_header:
            tqdm.write("  ".join(name.rjust(width) for name, width in zip(columns, widths, strict=True)))
            self._has_header = True
        tqdm.write("  ".join(value.rjust(width) for value, width in zip(columns.values(), widths, strict=True)))


class QuietProgressCallback(ProgressCallback):
    """transformers' progress bars, without its dictionaries of logs."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Say nothing: the table does."""


def show_epoch_table(trainer: Trainer) -> None:
    """Replace transformers' printed dictionaries by the table; a notebook's own table stays."""
    handler = trainer.callback_handler
    for callback in list(handler.callbacks):
        if type(callback) in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(callback)
            if isinstance(callback, ProgressCallback):
                trainer.add_callback(QuietProgressCallback)
            trainer.add_callback(EpochTable())
