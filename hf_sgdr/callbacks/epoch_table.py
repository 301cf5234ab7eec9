"""The table that grows by a line an epoch: epoch, train loss, validation loss, metrics, head's rate, seconds."""

import math
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
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK
from transformers.utils.import_utils import is_in_notebook
from typing_extensions import override

from hf_sgdr._utils.text import html_text
from hf_sgdr.callbacks.best_weights import best_evaluation

# What transformers says of an evaluation beside its loss and metrics.
_NOT_METRICS = ("_runtime", "_samples_per_second", "_steps_per_second", "_model_preparation_time")


class EpochTable(TrainerCallback):
    """Prints the lesson's table during training, in the place of transformers' dictionaries.

    The rate is the head's highest of the epoch: at the end of a cycle it is always nearly zero. With several evaluation
    sets a line has the loss and the metrics of each; where no training loss was logged it has a dash. A star marks the
    lowest validation loss of all lines so far, those of earlier fits too, and the last line says which epoch was best.
    """

    def __init__(self) -> None:
        self._start = 0.0
        self._losses: list[tuple[int, float]] = []
        self._steps_before = 0
        self._has_trained = False  # since the last line with an evaluation
        self._rate = 0.0
        self._has_header = False
        self._metrics: dict[str, float] = {}  # of the evaluations that are to go into the next line
        self._seconds = 0.0
        self._lowest = math.inf

    @override
    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A new table."""
        self._has_header, self._has_trained, self._metrics = False, False, {}

    @override
    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A new line."""
        self._finish_line(state)
        self._start, self._losses, self._steps_before, self._rate = time.perf_counter(), [], state.global_step, 0.0

    @override
    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remember the head's highest rate."""
        self._finish_line(state)
        self._has_trained = True
        self._rate = max(self._rate, float(kwargs["optimizer"].param_groups[-1]["lr"]))

    @override
    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Collect the training losses of the epoch, each a mean over the steps since the one before."""
        logs: dict[str, float] = kwargs["logs"]
        if "loss" in logs:
            self._losses.append((state.global_step - self._steps_before, logs["loss"]))
            self._steps_before = state.global_step
            if args.eval_strategy == "no":
                self._print(state, {}, time.perf_counter() - self._start)

    @override
    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Print the line of an epoch in which nothing is evaluated or logged."""
        if args.eval_strategy == "no" and not self._losses and not control.should_log:
            self._print(state, {}, time.perf_counter() - self._start)

    @override
    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Print the line, if this evaluation belongs to training; with several sets, when the last one is done."""
        metrics: dict[str, float] = kwargs["metrics"]
        if not self._has_trained or not metrics:
            return
        self._metrics |= metrics
        self._seconds = time.perf_counter() - self._start
        if "eval_loss" in metrics:
            self._finish_line(state)

    @override
    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Say which epoch was best."""
        self._finish_line(state)
        self._has_trained = False
        best = best_evaluation(state.log_history)
        if self._has_header and best is not None:
            self.write_best(f"best: epoch {best['epoch']:g}, valid loss {best['eval_loss']:.4f}")

    def _finish_line(self, state: TrainerState) -> None:
        """Nothing tells a callback that the last of several sets is done: the next step or epoch does."""
        if self._metrics:
            self._print(state, self._metrics, self._seconds)
            self._losses, self._metrics, self._has_trained = [], {}, False

    def _print(self, state: TrainerState, metrics: dict[str, float], seconds: float) -> None:
        if not state.is_world_process_zero:
            return
        steps = sum(count for count, _ in self._losses)
        total = sum(count * loss for count, loss in self._losses)
        train_loss = f"{total / max(steps, 1):.4f}" if self._losses else "–"
        self.print_line(f"{state.epoch:g}", train_loss, metrics, f"{self._rate:.2e}", seconds)

    def print_line(self, epoch: str, train_loss: str, metrics: dict[str, float], rate: str, seconds: float) -> None:
        """Print a line, after the names of the columns if it is the first one."""
        columns = {"epoch": epoch, "train loss": train_loss}
        if "eval_loss" in metrics:
            columns["valid loss"] = f"{metrics['eval_loss']:.4f}"
        columns |= {
            name.removeprefix("eval_"): f"{value:.4f}"
            for name, value in metrics.items()
            if name.startswith("eval_") and name != "eval_loss" and not name.endswith(_NOT_METRICS)
        }
        columns |= {"lr (head)": rate, "time": f"{seconds:.1f} s"}
        is_best = metrics.get("eval_loss", math.inf) < self._lowest
        self._lowest = min(self._lowest, metrics.get("eval_loss", math.inf))
        self.write_line(columns, is_best, is_first=not self._has_header)
        self._has_header = True

    def write_line(self, columns: dict[str, str], is_best: bool, is_first: bool) -> None:
        """Print a line's cells by their columns' names, below the names if it is the first line."""
        widths = [max(len(name), 10) for name in columns]
        if is_first:
            tqdm.write("  ".join(name.rjust(width) for name, width in zip(columns, widths, strict=True)))
        line = "  ".join(value.rjust(width) for value, width in zip(columns.values(), widths, strict=True))
        tqdm.write(f"{line} *" if is_best else line)

    def write_best(self, line: str) -> None:
        """Print the last line."""
        tqdm.write(line)


class NotebookEpochTable(EpochTable):
    """The same table as HTML in a notebook; the lines that the star would mark are bold."""

    def __init__(self) -> None:
        super().__init__()
        self._rows: list[str] = []
        self._display: Any = None

    @override
    def write_line(self, columns: dict[str, str], is_best: bool, is_first: bool) -> None:
        """Show the table anew in its place."""
        from IPython.display import HTML, display  # nothing but a notebook needs IPython

        if is_first:
            self._rows, self._display = [], display(HTML(""), display_id=True)
        cells = "".join(f"<td>{'<b>' * is_best}{html_text(cell)}{'</b>' * is_best}</td>" for cell in columns.values())
        self._rows.append(f"<tr>{cells}</tr>")
        head = "".join(f"<th>{html_text(name)}</th>" for name in columns)
        self._display.update(HTML(f"<table><tr>{head}</tr>{''.join(self._rows)}</table>"))

    @override
    def write_best(self, line: str) -> None:
        """The last bold line is the best one of all so far."""


class QuietProgressCallback(ProgressCallback):
    """transformers' progress bars, without its dictionaries of logs."""

    @override
    def on_log(self, *args: Any, **kwargs: Any) -> None:
        """Say nothing: the table does."""


def print_row(trainer: Trainer, name: str, metrics: dict[str, float], seconds: float) -> None:
    """Add a line to the Trainer's [`EpochTable`], if it has one, for weights that no epoch ended with."""
    for table in trainer.callback_handler.callbacks:
        if isinstance(table, EpochTable) and trainer.is_world_process_zero():
            table.print_line(name, "–", metrics, "–", seconds)


def show_epoch_table(trainer: Trainer) -> None:
    """Replace transformers' printed dictionaries, and its table of a notebook, by ours."""
    for callback in list(trainer.callback_handler.callbacks):
        if type(callback) in (PrinterCallback, DEFAULT_PROGRESS_CALLBACK):
            trainer.remove_callback(callback)
            if not isinstance(callback, PrinterCallback):
                trainer.add_callback(QuietProgressCallback)
            trainer.add_callback(NotebookEpochTable() if is_in_notebook() else EpochTable())
