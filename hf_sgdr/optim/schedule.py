"""The SGDR schedule: cosine annealing with warm restarts, as a pure function from optimizer step to multiplier.

The maths knows no optimizer, no epoch and no rate: every parameter group keeps its own maximum, and one multiplier
serves them all. `get_sgdr_schedule` puts it on a torch optimizer, for any loop and any `transformers.Trainer`.
"""

import math
import operator
from dataclasses import KW_ONLY, asdict, dataclass, replace
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers.utils import logging

logger = logging.get_logger(__name__)

# fast.ai 0.7 ran the first steps of a fit at a hundredth of the rate (fastai 0.7 `sgdr.py`, CosAnneal.calc_lr).
WARMUP_MULTIPLIER = 0.01


@dataclass(frozen=True)
class SGDRSchedule:
    """Cosine annealing with warm restarts (Loshchilov & Hutter 2017, "SGDR", equation 5), in optimizer steps.

    Cycle `k` lasts `cycle_steps * cycle_mult**k` steps. Within a cycle of `T` steps, step `i` has the multiplier
    `min_lr_ratio + (1 - min_lr_ratio) / 2 * (1 + cos(pi * i / T))`: 1 at the restart, and, since `i < T`, never 0.

    Args:
        cycle_steps (`int`): optimizer steps of the first cycle.
        cycle_mult (`int`, *optional*, defaults to 1): each cycle is this many times as long as the one before.
        num_cycles (`int`, *optional*, defaults to 1): how many cycles the run has; decides `total_steps` only. Steps
            past the end go on with further cycles, so a run that is prolonged never meets a rate of zero.
        min_lr_ratio (`float`, *optional*, defaults to 0.0): lowest rate as a share of the highest, in [0, 1].
        warmup_steps (`int`, *optional*, defaults to 0): the first steps of the run, at a hundredth of the rate; they
            are part of the first cycle, as in fast.ai 0.7.

    Raises:
        ValueError: if a length is not an integer >= 1, or `min_lr_ratio` is outside [0, 1].
    """

    cycle_steps: int
    cycle_mult: int = 1
    num_cycles: int = 1
    _: KW_ONLY
    min_lr_ratio: float = 0.0
    warmup_steps: int = 0

    def __post_init__(self) -> None:
        lowest = {"cycle_steps": 1, "cycle_mult": 1, "num_cycles": 1, "warmup_steps": 0}
        for name, at_least in lowest.items():
            object.__setattr__(self, name, require_whole(name, getattr(self, name), at_least=at_least))
        if not 0.0 <= self.min_lr_ratio <= 1.0:
            raise ValueError(f"min_lr_ratio={self.min_lr_ratio!r}: give a share of the highest rate, from 0 to 1.")

    @property
    def total_steps(self) -> int:
        """Optimizer steps of all cycles together: a geometric sum."""
        return self.cycle_start(self.num_cycles)

    @property
    def restarts(self) -> list[int]:
        """The steps at which the rate jumps back up: where each cycle but the first begins."""
        return self.cycle_ends[:-1]

    @property
    def cycle_ends(self) -> list[int]:
        """How many steps have been taken when each cycle is over; the last is `total_steps`."""
        return [self.cycle_start(cycle + 1) for cycle in range(self.num_cycles)]

    def cycle_start(self, cycle: int) -> int:
        """The step at which a cycle (counted from 0) begins."""
        if self.cycle_mult == 1:
            return self.cycle_steps * cycle
        return self.cycle_steps * (self.cycle_mult**cycle - 1) // (self.cycle_mult - 1)

    def cycle_of(self, step: int) -> int:
        """The cycle, counted from 0, that a step belongs to."""
        step = require_whole("step", step, at_least=0)
        if self.cycle_mult == 1:
            return step // self.cycle_steps
        cycle = 0
        while self.cycle_start(cycle + 1) <= step:
            cycle += 1
        return cycle

    def multiplier(self, step: int) -> float:
        """What every group's highest rate is multiplied with at a step, counted from 0."""
        cycle = self.cycle_of(step)
        if step < self.warmup_steps:
            return WARMUP_MULTIPLIER
        i = step - self.cycle_start(cycle)
        steps = self.cycle_steps * self.cycle_mult**cycle
        return self.min_lr_ratio + (1 - self.min_lr_ratio) / 2 * (1 + math.cos(math.pi * i / steps))

    def simulate(self) -> list[float]:
        """The whole curve, one multiplier a step, without training anything."""
        return [self.multiplier(step) for step in range(self.total_steps)]


class SGDRScheduler(LRScheduler):
    """`SGDRSchedule` on a torch optimizer; step it once after each optimizer step. Its state is plain numbers.

    Stepped past the end of the schedule, it warns once and goes on with further cycles.
    """

    def __init__(self, optimizer: Optimizer, schedule: SGDRSchedule, last_epoch: int = -1) -> None:
        self.schedule = schedule
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float | Any]:
        """The rate of every parameter group at the present step."""
        if self.last_epoch == self.schedule.total_steps + 1:
            # Whoever made the schedule did not know how long training would be: a rate that jumps up is no mistake of
            # theirs that anything else would show.
            logger.warning(
                f"The schedule ends after {self.schedule.total_steps} steps, but training goes on: another cycle has "
                "begun, at the highest rate. Give get_sgdr_schedule as many cycles as there are steps "
                f"(cycle_steps, cycle_mult, num_cycles), or the Trainer max_steps={self.schedule.total_steps}."
            )
        multiplier = self.schedule.multiplier(self.last_epoch)
        return [base_lr * multiplier for base_lr in self.base_lrs]

    def state_dict(self) -> dict[str, Any]:
        """Numbers, and lists and a dict of numbers: `torch.load(..., weights_only=True)` reads it back."""
        return {**super().state_dict(), "schedule": asdict(self.schedule)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken, with the schedule it was taken under.

        Raises:
            ValueError: if it is of another kind of scheduler.
        """
        if "schedule" not in state_dict:
            raise ValueError(
                f"The checkpoint's scheduler has {', '.join(state_dict)} and no cycles, so it is none of "
                "get_sgdr_schedule: resume with the kind of scheduler that the run began with, or begin it anew."
            )
        schedule = SGDRSchedule(**state_dict["schedule"])
        if replace(schedule, num_cycles=self.schedule.num_cycles) != self.schedule:
            logger.warning(f"The run goes on with the cycles of its checkpoint, {schedule}, not with {self.schedule}.")
        # how many cycles a run has does not change its rates: a run that is prolonged has the more of the two
        schedule = replace(schedule, num_cycles=max(schedule.num_cycles, self.schedule.num_cycles))
        super().load_state_dict({**state_dict, "schedule": schedule})

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.schedule}, step={self.last_epoch})"


def get_sgdr_schedule(
    optimizer: Optimizer,
    cycle_steps: int | None = None,
    cycle_mult: int = 1,
    num_cycles: int = 1,
    *,
    cycle_epochs: int | None = None,
    steps_per_epoch: int | None = None,
    min_lr_ratio: float = 0.0,
    warmup_steps: int = 0,
    last_epoch: int = -1,
) -> SGDRScheduler:
    """A torch scheduler for a loop of your own, or for `transformers.Trainer(optimizers=(optimizer, scheduler))`.

    The first cycle is as long as `cycle_steps` says, or `cycle_epochs` with `steps_per_epoch`.

    Args:
        optimizer (`torch.optim.Optimizer`): each parameter group's `lr` is that group's highest rate; or its
            `initial_lr`, which torch writes there for the first scheduler of an optimizer and every later one takes.
        cycle_steps, cycle_mult, num_cycles, min_lr_ratio, warmup_steps: see [`SGDRSchedule`].
        cycle_epochs (`int`, *optional*): epochs of the first cycle, fast.ai's `cycle_len`.
        steps_per_epoch (`int`, *optional*): optimizer steps of an epoch: the batches of all processes together, divided
            by gradient accumulation and rounded up; in a loop of your own, `len(loader)`.
        last_epoch (`int`, *optional*, defaults to -1): the step to go on from, as in every torch scheduler.

    Raises:
        ValueError: if the length is given in neither way or in both, or a number is out of range.
    """
    given = {"cycle_steps": cycle_steps, "cycle_epochs": cycle_epochs, "steps_per_epoch": steps_per_epoch}
    if tuple(value is not None for value in given.values()) not in ((True, False, False), (False, True, True)):
        words = ", ".join(f"{name}={value}" for name, value in given.items() if value is not None)
        raise ValueError(
            f"{words or 'No length of the first cycle'}: give cycle_steps, or cycle_epochs and steps_per_epoch."
        )
    if cycle_steps is None:
        cycle_steps = require_whole("cycle_epochs", cycle_epochs, at_least=1)
        cycle_steps *= require_whole("steps_per_epoch", steps_per_epoch, at_least=1)
    schedule = SGDRSchedule(cycle_steps, cycle_mult, num_cycles, min_lr_ratio=min_lr_ratio, warmup_steps=warmup_steps)
    return SGDRScheduler(optimizer, schedule, last_epoch)


# More is a slip of the keyboard, and laying it out step by step would take for ever.
MOST_EPOCHS = 100_000


def total_epochs(cycle_len: int | None, cycle_mult: int, num_cycles: int) -> int:
    """Epochs of all cycles together: `cycle_len * (1 + cycle_mult + ...)`, or one each without `cycle_len`.

    Raises:
        ValueError: if they are more than 100,000.
    """
    if cycle_len is None or cycle_mult == 1:
        total = (cycle_len or 1) * num_cycles
    else:
        counted = min(num_cycles, MOST_EPOCHS.bit_length())  # cycles that double are too many long before
        total = cycle_len * (cycle_mult**counted - 1) // (cycle_mult - 1)
    if total > MOST_EPOCHS:
        raise ValueError(
            f"{num_cycles} cycles with cycle_len={cycle_len}, cycle_mult={cycle_mult} are more than {MOST_EPOCHS} "
            "epochs: give fewer or shorter cycles."
        )
    return total


def require_whole(name: str, value: Any, *, at_least: int) -> int:
    """`value` as an `int`: NumPy's integers count, a bool and 3.0 do not.

    Raises:
        ValueError: if it is no integer, or is below `at_least`.
    """
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool) or number < at_least:
        raise ValueError(f"{name}={value!r}: must be an integer >= {at_least}.")
    return number


def checked_steps(start_lr: float, end_lr: float, num_steps: int) -> int:
    """The steps of a range test between two rates.

    Raises:
        ValueError: if the rates are not 0 < start_lr < end_lr, or there are fewer than two steps.
    """
    if not 0 < start_lr < end_lr < math.inf:
        raise ValueError(f"start_lr={start_lr!r}, end_lr={end_lr!r}: give 0 < start_lr < end_lr.")
    return require_whole("num_steps", num_steps, at_least=2)
