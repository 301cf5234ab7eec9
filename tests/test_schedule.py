import dataclasses
import io
import itertools
import json
import math
import re

import numpy as np
import pytest
import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_sgdr import SGDRSchedule, Stage, get_sgdr_schedule

COMBINATIONS = list(itertools.product((1, 3, 10, 37), (1, 2, 3), (1, 2, 4), (0.0, 0.1, 1.0)))


def by_walking(cycle_steps: int, cycle_mult: int, num_cycles: int, floor: float) -> list[float]:
    """The formula of SGDR, cycle after cycle."""
    curve, steps = [], cycle_steps
    for _ in range(num_cycles):
        curve += [floor + (1 - floor) / 2 * (1 + math.cos(math.pi * i / steps)) for i in range(steps)]
        steps *= cycle_mult
    return curve


def test_there_are_a_hundred_combinations():
    assert len(COMBINATIONS) >= 100


@pytest.mark.parametrize(("steps", "mult", "cycles", "floor"), COMBINATIONS)
def test_the_multiplier_is_the_formula_at_every_step(steps, mult, cycles, floor):
    schedule = SGDRSchedule(steps, mult, cycles, min_lr_ratio=floor)
    expected = by_walking(steps, mult, cycles, floor)
    assert schedule.simulate() == expected
    assert schedule.total_steps == len(expected)
    assert all(expected[step] == 1.0 for step in (0, *schedule.restarts))


@pytest.mark.parametrize("steps_per_epoch", [1, 7, 360])
def test_three_cycles_that_double_are_seven_epochs(steps_per_epoch):
    schedule = SGDRSchedule(steps_per_epoch, 2, 3)
    assert schedule.total_steps == 7 * steps_per_epoch
    assert schedule.restarts == [steps_per_epoch, 3 * steps_per_epoch]
    assert schedule.cycle_ends == [steps_per_epoch, 3 * steps_per_epoch, 7 * steps_per_epoch]


@pytest.mark.parametrize("mult", [1, 2, 3])
def test_cycle_of_counts_cycles_exactly_where_they_begin(mult):
    schedule = SGDRSchedule(5, mult, 4)
    cycles = [schedule.cycle_of(step) for step in range(schedule.total_steps)]
    assert cycles == [cycle for cycle in range(4) for _ in range(5 * mult**cycle)]


def test_large_steps_stay_exact_where_float_logarithms_would_not():
    schedule = SGDRSchedule(7, 3, 30)
    for cycle in (20, 29):
        start = schedule.cycle_start(cycle)
        assert (schedule.cycle_of(start - 1), schedule.cycle_of(start)) == (cycle - 1, cycle)
        assert schedule.multiplier(start) == 1.0


@pytest.mark.parametrize("mult", [1, 2])
def test_past_the_end_further_cycles_follow_and_the_rate_is_never_zero(mult):
    schedule = SGDRSchedule(4, mult, 1)
    longer = SGDRSchedule(4, mult, 4)
    beyond = [schedule.multiplier(step) for step in range(longer.total_steps)]
    assert beyond == longer.simulate()
    assert min(beyond) > 0


def test_warmup_is_the_beginning_of_the_first_cycle():
    schedule = SGDRSchedule(10, 2, 2, warmup_steps=3)
    plain = SGDRSchedule(10, 2, 2).simulate()
    assert schedule.simulate() == [0.01] * 3 + plain[3:]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cycle_steps": 0}, "cycle_steps=0: must be an integer >= 1."),
        ({"cycle_steps": 2.0}, "cycle_steps=2.0: must be an integer >= 1."),
        ({"cycle_steps": True}, "cycle_steps=True: must be an integer >= 1."),
        ({"cycle_steps": 2, "cycle_mult": 0}, "cycle_mult=0: must be an integer >= 1."),
        ({"cycle_steps": 2, "cycle_mult": 1.5}, "cycle_mult=1.5: must be an integer >= 1."),
        ({"cycle_steps": 2, "num_cycles": 0}, "num_cycles=0: must be an integer >= 1."),
        ({"cycle_steps": 2, "warmup_steps": -1}, "warmup_steps=-1: must be an integer >= 0."),
        (
            {"cycle_steps": 2, "min_lr_ratio": math.nan},
            "min_lr_ratio=nan: give a share of the highest rate, from 0 to 1.",
        ),
    ],
)
def test_wrong_numbers_are_refused(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        SGDRSchedule(**arguments)
    assert str(error.value) == message


def optimizer_of_three_groups() -> torch.optim.SGD:
    parameters = [nn.Parameter(torch.zeros(2)) for _ in range(3)]
    rates = (1e-4, 1e-3, 1e-2)
    return torch.optim.SGD([{"params": [p], "lr": lr} for p, lr in zip(parameters, rates, strict=True)], lr=1.0)


def step(optimizer: torch.optim.Optimizer, scheduler) -> list[float]:
    rates = [group["lr"] for group in optimizer.param_groups]
    optimizer.step()
    scheduler.step()
    return rates


def test_every_group_keeps_its_own_highest_rate():
    optimizer = optimizer_of_three_groups()
    scheduler = get_sgdr_schedule(optimizer, 4, 2, 2, min_lr_ratio=0.1)
    for multiplier in by_walking(4, 2, 2, 0.1):
        assert step(optimizer, scheduler) == [1e-4 * multiplier, 1e-3 * multiplier, 1e-2 * multiplier]


def test_its_state_is_plain_numbers_and_goes_on_identically():
    optimizer = optimizer_of_three_groups()
    scheduler = get_sgdr_schedule(optimizer, 5, 2, 3, warmup_steps=2)
    for _ in range(8):
        step(optimizer, scheduler)
    file = io.BytesIO()
    torch.save({"scheduler": scheduler.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    other = optimizer_of_three_groups()
    resumed = get_sgdr_schedule(other, 1)
    other.load_state_dict(loaded["optimizer"])
    resumed.load_state_dict(loaded["scheduler"])
    assert resumed.schedule == scheduler.schedule
    assert [step(other, resumed) for _ in range(20)] == [step(optimizer, scheduler) for _ in range(20)]


class Line(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        y = self.layer(x)
        return {"loss": ((y - labels) ** 2).mean(), "logits": y}


def test_it_works_on_a_stock_trainer(tmp_path):
    seen = []

    class Recorder(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
            seen.append(optimizer.param_groups[0]["lr"])

    model = Line()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = Trainer(
        model,
        TrainingArguments(
            str(tmp_path),
            max_steps=6,
            per_device_train_batch_size=2,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
        ),
        train_dataset=[{"x": torch.tensor([float(i)]), "labels": torch.tensor([2.0 * i])} for i in range(4)],
        optimizers=(optimizer, get_sgdr_schedule(optimizer, 2, 2, 2)),
        callbacks=[Recorder()],
    )
    trainer.train()
    assert seen == [0.1 * multiplier for multiplier in by_walking(2, 2, 2, 0.0)]


def test_numpys_integers_are_whole_numbers_and_the_state_stays_plain(tmp_path):
    schedule = SGDRSchedule(np.int64(4), np.int32(2), np.uint8(2), warmup_steps=np.int64(1))
    assert schedule == SGDRSchedule(4, 2, 2, warmup_steps=1)
    assert schedule.cycle_of(np.int64(5)) == 1
    torch.save(get_sgdr_schedule(optimizer_of_three_groups(), np.int64(4)).state_dict(), tmp_path / "scheduler.pt")
    assert torch.load(tmp_path / "scheduler.pt", weights_only=True)["schedule"]["cycle_steps"] == 4
    for value in (np.float64(4), np.bool_(True), "4", None):
        with pytest.raises(ValueError, match="must be an integer >= 1"):
            SGDRSchedule(value)


def test_stepped_past_its_end_it_warns_once(logs):
    optimizer = optimizer_of_three_groups()
    scheduler = get_sgdr_schedule(optimizer, 2, 2, 2)
    for _ in range(6):
        step(optimizer, scheduler)
    assert not logs.records
    for _ in range(6):
        step(optimizer, scheduler)
    assert [record.message for record in logs.records] == [
        "The schedule ends after 6 steps, but training goes on: another cycle has begun, at the highest rate. Give "
        "get_sgdr_schedule as many cycles as there are steps (cycle_steps, cycle_mult, num_cycles), or the Trainer "
        "max_steps=6."
    ]


def test_a_prolonged_run_has_its_own_number_of_cycles_and_no_warning(logs):
    first = get_sgdr_schedule(optimizer_of_three_groups(), 2)
    optimizer = optimizer_of_three_groups()
    longer = get_sgdr_schedule(optimizer, 2, num_cycles=3)
    longer.load_state_dict(first.state_dict())
    assert longer.schedule.total_steps == 6
    for _ in range(6):
        step(optimizer, longer)
    assert not logs.records


def test_a_state_of_another_scheduler_is_refused_and_other_cycles_are_named(logs):
    optimizer = optimizer_of_three_groups()
    other = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0).state_dict()
    with pytest.raises(ValueError, match=r"The checkpoint's scheduler has .*lr_lambdas.* none of get_sgdr_schedule"):
        get_sgdr_schedule(optimizer, 2).load_state_dict(other)
    scheduler = get_sgdr_schedule(optimizer, 3)
    scheduler.load_state_dict(get_sgdr_schedule(optimizer, 2).state_dict())
    assert scheduler.schedule == SGDRSchedule(2)
    assert logs.text.count("The run goes on with the cycles of its checkpoint, SGDRSchedule(cycle_steps=2") == 1


def test_its_repr_is_one_short_line():
    scheduler = get_sgdr_schedule(optimizer_of_three_groups(), 4, 2, 2)
    assert repr(scheduler) == (
        "SGDRScheduler(SGDRSchedule(cycle_steps=4, cycle_mult=2, num_cycles=2, min_lr_ratio=0.0, warmup_steps=0), "
        "step=0)"
    )


def test_numpys_integers_make_stages_that_can_be_written_down():
    stage = Stage("head", cycles=np.int64(2), cycle_len=np.int32(1), range_test_steps=np.int64(20))
    assert json.loads(json.dumps(dataclasses.asdict(stage)))["cycles"] == 2


def test_a_cycle_may_be_given_in_epochs_of_known_steps():
    in_epochs = get_sgdr_schedule(
        optimizer_of_three_groups(), cycle_epochs=2, steps_per_epoch=13, cycle_mult=2, num_cycles=3
    )
    assert in_epochs.schedule == get_sgdr_schedule(optimizer_of_three_groups(), 26, 2, 3).schedule
    for given in ({}, {"cycle_epochs": 1}, {"cycle_steps": 4, "steps_per_epoch": 4}):
        with pytest.raises(ValueError, match=r"give cycle_steps, or cycle_epochs and steps_per_epoch\.$"):
            get_sgdr_schedule(optimizer_of_three_groups(), **given)
    with pytest.raises(ValueError, match=r"cycle_epochs=0: must be an integer >= 1"):
        get_sgdr_schedule(optimizer_of_three_groups(), cycle_epochs=0, steps_per_epoch=4)
