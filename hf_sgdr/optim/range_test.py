"""The learning rate range test: raise the rate step by step, watch the loss, put everything back.

A driver over any `transformers.Trainer`, because no callback is told the loss of a step. After Smith 2017, "Cyclical
Learning Rates", section 3.3, as the lesson's `lr_find()` uses it.
"""

import math
from collections.abc import Generator, Iterator
from contextlib import closing, nullcontext
from dataclasses import dataclass, field
from itertools import count, islice
from typing import Any, Literal, get_args

import numpy as np
import torch
from matplotlib.axes import Axes
from tqdm.auto import tqdm
from transformers import Trainer
from transformers.utils import logging

from hf_sgdr._utils._compat import num_items_in_batch
from hf_sgdr._utils.plots import plot_range_test, plot_rates
from hf_sgdr.optim.restore import torch_optimizer, trainer_restored
from hf_sgdr.optim.schedule import checked_steps, require_whole
from hf_sgdr.optim.suggestions import FALLEN, SLACK, SUGGESTIONS, edge, falling, smooth, smoothed_losses

logger = logging.get_logger(__name__)

SuggestionMethod = Literal["lesson", "valley", "steep", "minimum"]

# fastai's own: the running average forgets a fiftieth a step, and four times the best loss is beyond repair, if that is
# more than a batch may have by chance (`SLACK`).
SMOOTHING = 0.98
DIVERGED = 4.0


@dataclass
class LRRangeResult:
    """What a range test saw.

    Args:
        history (`dict[str, list]`): a list each, one entry a step: `step`, `lr` (the head's, that is the last parameter
            group's), `loss`, `smoothed_loss`, and `learning_rates` (a list of every parameter group's rate).
        stop_reason (`str`): "finished", or why it ended early.
        group_names (`list[str]`): the parameter groups' names.
    """

    history: dict[str, list[Any]]
    stop_reason: str
    group_names: list[str] = field(default_factory=list)
    reason: str | None = None

    def __repr__(self) -> str:
        lrs = self.history["lr"]
        tested = f", {lrs[0]:.1e} to {lrs[-1]:.1e}" if lrs else ""
        return f"{type(self).__name__}({len(lrs)} steps{tested}, stop_reason={self.stop_reason!r})"

    def suggestion(self, method: SuggestionMethod = "lesson") -> float | None:
        """A learning rate for the head; None where the curve has no answer, and then `reason` says why.

        Args:
            method (`str`, *optional*, defaults to "lesson"): "lesson": the highest rate at which the loss is still
                clearly improving; "valley": about half way down the longest fall; "steep": where it falls steepest;
                "minimum": a tenth of the rate with the lowest loss. (`hf_sgdr.optim.suggestions`)

        Raises:
            ValueError: if there is no such method.
        """
        if method not in get_args(SuggestionMethod):
            raise ValueError(f"method={method!r}: give one of {', '.join(get_args(SuggestionMethod))}.")
        rate, self.reason = SUGGESTIONS[method](self.history["lr"], self.history["loss"])
        return rate

    def edge(self) -> float | None:
        """The head's rate from which on the loss is half as high again as at first; None if it never is.

        A test that ended early has it where it ended, at the latest; the last step of one that did not may be chance.
        """
        lrs = self.history["lr"]
        rate, last = edge(lrs, self.history["loss"]), lrs[-1] if lrs else None
        if self.stop_reason != "finished":
            return last if rate is None else rate
        return None if rate == last else rate

    def plot(
        self, ax: Axes | None = None, *, skip_start: int = 0, skip_end: int = 0, chosen: float | None = None
    ) -> Axes:
        """Loss against the head's rate, log axis, and what the lesson's suggestion follows from.

        Faintly the loss of each step, over it the smoothed curve that the rule reads. Shaded is where the loss falls,
        or, where it does not, the rates below the one at which it takes off; then the reason is written inside. A rate
        that was chosen above the suggestion was chosen by how far it can go, so the suggestion is left out.

        Args:
            ax (`Axes`, *optional*): where to draw; by default a new figure.
            skip_start, skip_end (`int`, *optional*, default to 0): so many steps at the ends are not drawn (fast.ai
                0.7's `plot` left out ten and five); they count for the suggestion.
            chosen (`float`, *optional*): the rate that is used, to be marked, too.

        Raises:
            ValueError: if a number is negative, or no step is left.
        """
        skip_start = require_whole("skip_start", skip_start, at_least=0)
        stop = len(self.history["lr"]) - require_whole("skip_end", skip_end, at_least=0)
        if skip_start >= stop and (skip_start or skip_end):
            raise ValueError(
                f"skip_start={skip_start} and skip_end={skip_end} leave none of {len(self.history['lr'])} steps: "
                "give less."
            )
        lrs, losses, rate = self.history["lr"], self.history["loss"], self.suggestion()
        why, usable = self.reason, None
        if rate is not None:
            is_unseen = rate == lrs[-1] / 10
            why = (
                "a tenth of the last, where it still falls" if is_unseen else f"where {FALLEN:.0%} of the fall is done"
            )
        if chosen is not None and rate is not None and chosen > rate:
            rate = why = None
        if rate is not None and (fall := falling(lrs, losses)) is not None:
            usable = (*fall, "the loss falls")
        elif (edge := self.edge()) is not None:
            usable = (lrs[0], edge, f"below {edge:.1e}, where the loss takes off")
        elif chosen is not None and lrs:
            usable = (lrs[0], lrs[-1], "the loss does not take off")
        drawn = slice(skip_start, stop)
        ax = plot_range_test(
            lrs[drawn],
            losses[drawn],
            smooth(losses)[drawn],
            ax,
            suggestion=rate,
            why=why,
            chosen=chosen,
            usable=usable,
        )
        if skip_start or skip_end:
            ax.set_xlim(lrs[skip_start], lrs[stop - 1])
        return ax

    def plot_lr(self, ax: Axes | None = None) -> Axes:
        """Each group's rate against the step."""
        columns = list(zip(*self.history["learning_rates"], strict=True))
        names = self.group_names or [f"group {i}" for i in range(len(columns))]
        return plot_rates(dict(zip(names, columns, strict=False)), ax, log_scale=True)


@dataclass(frozen=True)
class LRRangeTest:
    """A range test for any Trainer: `LRRangeTest().run(trainer)`.

    Rate `i` of `n` is `start_lr * (end_lr / start_lr)**(i / (n - 1))`, so both ends are reached. One multiplier moves
    all parameter groups: they keep the ratios that the Trainer's optimizer gives them, and `start_lr` and `end_lr` are
    the last group's. It ends early where the loss is no longer finite, or its running average exceeds four times the
    best. Gradient accumulation counts optimizer steps, and all processes see the same mean loss.

    Args:
        start_lr (`float`, *optional*, defaults to 1e-7): the first rate.
        end_lr (`float`, *optional*, defaults to 10.0): the last one, above the first.
        num_steps (`int`, *optional*, defaults to 100): optimizer steps, at least 2.

    Raises:
        ValueError: if the rates are not 0 < start_lr < end_lr, or there are fewer than two steps.
    """

    start_lr: float = 1e-7
    end_lr: float = 10.0
    num_steps: int = 100

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_steps", checked_steps(self.start_lr, self.end_lr, self.num_steps))

    def learning_rates(self) -> list[float]:
        """The last group's rate at each step."""
        return [float(rate) for rate in np.geomspace(self.start_lr, self.end_lr, self.num_steps)]

    def run(self, trainer: Trainer, *, max_steps: int | None = None) -> LRRangeResult:
        """Train on the Trainer's own data with rising rates, then put everything back, bit for bit.

        Put back are weights and buffers, gradients, optimizer, scheduler, scaler, random generators, train and
        requires_grad flags and the Trainer's state: also after an exception or Ctrl-C. No callback is called and
        nothing is written.

        Args:
            trainer (`Trainer`): whose model and data.
            max_steps (`int`, *optional*): end after this many steps, whatever the rate is then; -1 is None.

        Raises:
            ValueError: if an epoch has no batch, or `max_steps` is 0 or below -1.
        """
        most = None if max_steps in (None, -1) else require_whole("max_steps", max_steps, at_least=1)
        assert trainer.model is not None
        for callback in trainer.callback_handler.callbacks:
            if hasattr(callback, "freeze_to") and all(value.requires_grad for value in trainer.model.parameters()):
                logger.warning(
                    f"The range test moves all parameters, which {type(callback).__name__} does not at first: for the "
                    "rate of its first epochs call freeze_to of a LayerGroups before the test, and unfreeze after it."
                )
        with trainer_restored(trainer), closing(_endless_batches(trainer)) as batches:
            return self._run(trainer, batches, self.learning_rates()[:most])

    def _run(self, trainer: Trainer, batches: Iterator[list[Any]], tested: list[float]) -> LRRangeResult:
        assert trainer.model is not None
        trainer.model_wrapped = trainer.model
        if trainer.optimizer is None:
            trainer.create_optimizer()
        model, optimizer = trainer.accelerator.prepare(trainer.model, torch_optimizer(trainer.optimizer))
        trainer.model_wrapped, trainer.optimizer = model, optimizer
        groups = optimizer.param_groups
        rates = [float(group.get("initial_lr", group["lr"])) for group in groups]
        ratios = [rate / rates[-1] if rates[-1] else 1.0 for rate in rates]
        history: dict[str, list[Any]] = {name: [] for name in ("step", "lr", "loss", "smoothed_loss", "learning_rates")}
        stop_reason, best = "finished", math.inf
        hidden = trainer.args.disable_tqdm or not trainer.is_local_process_zero()
        model.zero_grad()
        for step, lr in enumerate(tqdm(tested, desc="Range test", disable=hidden or None, leave=False)):
            for group, ratio in zip(groups, ratios, strict=True):
                group["lr"] = lr * ratio
            loss = _step_loss(trainer, model, batches)
            if not math.isfinite(loss):
                stop_reason = f"the loss was {loss} at step {step}, learning rate {lr:.2e}"
                break
            optimizer.step()
            model.zero_grad()
            history["step"].append(step)
            history["lr"].append(lr)
            history["loss"].append(loss)
            history["smoothed_loss"].append(smoothed_losses(history["loss"], SMOOTHING)[-1])
            history["learning_rates"].append([group["lr"] for group in groups])
            best = min(best, history["smoothed_loss"][-1])
            if history["smoothed_loss"][-1] > DIVERGED * max(best, SLACK):
                stop_reason = f"the smoothed loss exceeded {DIVERGED:g} times its best at learning rate {lr:.2e}"
                break
        names = [group.get("name", f"group {i}") for i, group in enumerate(groups)]
        return LRRangeResult(history, stop_reason, names)


def _step_loss(trainer: Trainer, model: torch.nn.Module, batches: Iterator[list[Any]]) -> float:
    """Forward and backward for one optimizer step; the mean loss over its batches and all processes."""
    accelerator, micro_batches = trainer.accelerator, next(batches)
    num_items = num_items_in_batch(trainer, micro_batches)
    trainer.current_gradient_accumulation_steps = len(micro_batches)
    loss = torch.zeros((), device=trainer.args.device)
    for i, inputs in enumerate(micro_batches, 1):
        accelerator.sync_gradients = i == len(micro_batches)
        with nullcontext() if accelerator.sync_gradients else accelerator.no_sync(model):
            loss += trainer.training_step(model, inputs, num_items)
    if trainer.args.max_grad_norm and trainer.args.max_grad_norm > 0:
        accelerator.clip_grad_norm_(model.parameters(), trainer.args.max_grad_norm)
    return float(accelerator.gather(loss).mean())


def _endless_batches(trainer: Trainer) -> Generator[list[Any], None, None]:
    """The batches of one optimizer step at a time, epoch after epoch."""
    loader = trainer.get_train_dataloader()
    for epoch in count():
        for part in (loader, loader.dataset):
            if hasattr(part, "set_epoch"):
                part.set_epoch(epoch)
        batches = iter(loader)
        micro_batches = list(islice(batches, trainer.args.gradient_accumulation_steps))
        if not micro_batches:
            raise ValueError(
                f"The training data give no batch: {trainer.num_examples(loader)} rows, for batches of "
                f"{trainer.args.train_batch_size} a process with dataloader_drop_last="
                f"{trainer.args.dataloader_drop_last}. Give more rows or a smaller batch size, or leave "
                "dataloader_drop_last out."
            )
        while micro_batches:
            yield micro_batches
            micro_batches = list(islice(batches, trainer.args.gradient_accumulation_steps))
