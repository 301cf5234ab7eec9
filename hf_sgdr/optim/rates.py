"""Rates of an optimizer's parameter groups: step by step, and those of somebody's own optimizer."""

from collections.abc import Sequence
from typing import Any

from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from typing_extensions import override

from hf_sgdr.optim.layer_groups import LayerGroups
from hf_sgdr.optim.schedule import SGDRSchedule


def group_names(optimizer: Optimizer) -> list[str]:
    """What the parameter groups are called, by their number where they have no name."""
    return [group.get("name", f"group {i}") for i, group in enumerate(optimizer.param_groups)]


def rates_at(optimizer: Optimizer, schedule: SGDRSchedule | None, step: int) -> dict[str, float]:
    """Each group's rate at an optimizer step: its highest one times the schedule's multiplier.

    Args:
        optimizer (`Optimizer`): after a scheduler was made for it.
        schedule ([`SGDRSchedule`] or None): None is a constant rate.
        step (`int`): counted from 0.
    """
    groups = zip(group_names(optimizer), optimizer.param_groups, strict=True)
    if schedule is None:
        return {name: float(group["lr"]) for name, group in groups}
    return {name: group["initial_lr"] * schedule.multiplier(step) for name, group in groups}


def rates_by_step(optimizer: Optimizer, schedule: SGDRSchedule | None, num_steps: int) -> dict[str, list[float]]:
    """[`rates_at`] each of `num_steps` steps, by the name of the group."""
    by_step = [rates_at(optimizer, schedule, step) for step in range(num_steps)]
    return {name: [rates[name] for rates in by_step] for name in group_names(optimizer)}


def varies(rates: dict[str, list[float]]) -> bool:
    """Whether any group's rate is another one at some step: a constant rate is no picture."""
    return any(len(set(values)) > 1 for values in rates.values())


class RecordRates(TrainerCallback):
    """Records each parameter group's rate at every step: of a scheduler that is no pure function of the step."""

    def __init__(self) -> None:
        self.rates: dict[str, list[float]] = {}

    @override
    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        optimizer = kwargs["optimizer"]
        for name, group in dict(zip(group_names(optimizer), optimizer.param_groups, strict=True)).items():
            self.rates.setdefault(name, []).append(float(group["lr"]))


def owners(optimizer: Optimizer, groups: LayerGroups) -> list[list[int | None]]:
    """For each parameter group of an optimizer the layer groups that its parameters are of; None is of none."""
    owner = {id(parameter): i for i in range(len(groups)) for parameter in groups.parameters(i)}
    return [
        sorted({owner.get(id(parameter)) for parameter in group["params"]}, key=lambda i: -1 if i is None else i)
        for group in optimizer.param_groups
    ]


def set_rates(optimizer: Optimizer, groups: LayerGroups, rates: Sequence[float]) -> None:
    """Give each parameter group of somebody's own optimizer the highest rate of its layer group.

    Raises:
        ValueError: if one belongs to no layer group, or to several with different rates.
    """
    chosen = []
    for number, group_owners in enumerate(owners(optimizer, groups)):
        wanted = {rates[owner] for owner in group_owners if owner is not None}
        if None in group_owners or len(wanted) != 1:
            names = ", ".join("no layer group" if i is None else groups.names[i] for i in group_owners)
            raise ValueError(
                f"Parameter group {number} of the given optimizer holds parameters of {names}, so it cannot have "
                f"the rates {list(rates)}: give the optimizer trainer.layer_groups.param_groups(lr), or one rate for "
                "all."
            )
        chosen.append(wanted.pop())
    for group, rate in zip(optimizer.param_groups, chosen, strict=True):
        group["lr"] = group["initial_lr"] = rate  # schedulers begin from the latter where it is there


def highest_rates(optimizer: Optimizer, groups: LayerGroups, rates: dict[str, list[float]]) -> list[float]:
    """The highest rate that each layer group had, from [`rates_by_step`] or a record; 0 where none of it moved."""
    highest = [0.0] * len(groups)
    for name, group_owners in zip(group_names(optimizer), owners(optimizer, groups), strict=True):
        for owner in group_owners:
            if owner is not None:
                highest[owner] = max(highest[owner], *rates[name])
    return highest
