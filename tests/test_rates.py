"""Rates of parameter groups: step by step, and those of an optimizer of the user's own."""

import pytest
import torch
from helpers import RateRecorder, cosine
from torch import nn

from hf_sgdr import LayerGroups, SGDRSchedule
from hf_sgdr.optim.rates import group_names, highest_rates, owners, rates_at, rates_by_step, set_rates


@pytest.fixture
def groups():
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(3)))
    return LayerGroups(
        model, {name: [f"{i}.weight", f"{i}.bias"] for i, name in enumerate(("early", "middle", "head"))}
    )


def test_a_rate_is_the_highest_one_times_the_schedules_multiplier(groups):
    optimizer, schedule = torch.optim.SGD(groups.param_groups([1e-4, 1e-3, 1e-2])), SGDRSchedule(4, 2, 2)
    torch.optim.lr_scheduler.LambdaLR(optimizer, schedule.multiplier)
    assert rates_at(optimizer, schedule, 0) == {"early": 1e-4, "middle": 1e-3, "head": 1e-2}
    by_step = rates_by_step(optimizer, schedule, 12)
    assert by_step["middle"] == [1e-3 * cosine(i, 4) for i in range(4)] + [1e-3 * cosine(i, 8) for i in range(8)]
    assert highest_rates(optimizer, groups, by_step) == [1e-4, 1e-3, 1e-2]
    assert rates_by_step(optimizer, None, 2)["head"] == [1e-2, 1e-2]


def test_groups_without_a_name_are_called_by_their_number_and_each_has_its_owners(groups):
    stranger = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([{"params": [*groups.parameters(2), *groups.parameters(0)]}, {"params": [stranger]}])
    assert group_names(optimizer) == ["group 0", "group 1"]
    assert owners(optimizer, groups) == [[0, 2], [None]]
    assert highest_rates(optimizer, groups, {"group 0": [0.25, 0.5], "group 1": [1.0]}) == [0.5, 0.0, 0.5]


def test_layer_groups_that_share_a_parameter_group_can_only_have_one_rate(groups):
    optimizer = torch.optim.SGD([*groups.parameters(0), *groups.parameters(1)], lr=1.0)
    set_rates(optimizer, groups, [0.5, 0.5, 0.25])
    assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["initial_lr"]) == (0.5, 0.5)
    with pytest.raises(ValueError, match="group 0 of the given optimizer holds parameters of early, middle, so it"):
        set_rates(optimizer, groups, [0.5, 0.25, 0.25])
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_a_given_optimizer_trains_at_the_rates_of_the_fit(make_trainer, tiny_model):
    recorder = RateRecorder()
    optimizer = torch.optim.SGD(tiny_model.parameters(), lr=1e-3)
    trainer = make_trainer(tiny_model, optimizers=(optimizer, None), callbacks=[recorder], freeze_to=0)
    assert trainer.lr_find(1e-4, 1e-2, 4, group_learning_rates=0.5).history["lr"]
    assert (optimizer.param_groups[0]["lr"], "initial_lr" in optimizer.param_groups[0]) == (1e-3, False)
    trainer.fit(0.05, 1, cycle_len=1)
    assert [rates[-1] for rates in recorder.rates] == [0.05 * cosine(step, 4) for step in range(4)]
    assert trainer.history.fits[-1]["learning_rates"] == [0.05] * 3
    trainer.fit(0.02, 1)  # the last fit's rates are forgotten
    assert recorder.rates[-1] == [0.02]
    assert trainer.lr_find(1e-4, 1e-2, 4, group_learning_rates=0.5).history["lr"]
    assert optimizer.param_groups[0]["lr"] == 0.02


def test_a_given_optimizers_groups_get_the_rates_of_their_layer_groups(make_trainer, tiny_model):
    recorder = RateRecorder()
    groups = LayerGroups.from_model(tiny_model)
    optimizer = torch.optim.SGD(list(reversed(groups.param_groups(1.0, weight_decay=1e-4))), lr=1.0)
    trainer = make_trainer(
        tiny_model, optimizers=(optimizer, None), callbacks=[recorder], layer_groups=groups, freeze_to=0
    )
    trainer.fit([1e-4, 1e-3, 1e-2], 1)
    assert recorder.rates[0] == [1e-2, 1e-2, 1e-3, 1e-3, 1e-4, 1e-4]
    assert trainer.history.fits[-1]["learning_rates"] == [1e-4, 1e-3, 1e-2]


def test_what_a_given_optimizer_cannot_be_told_is_refused_before_any_work(make_trainer, tiny_model):
    optimizer = torch.optim.SGD(tiny_model.parameters(), lr=1e-3)
    trainer = make_trainer(tiny_model, optimizers=(optimizer, None))
    with pytest.raises(ValueError, match=r"Parameter group 0 of the given optimizer holds parameters of early, middle"):
        trainer.fit([1e-4, 1e-3, 1e-2], 1)
    stranger = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1e-3)
    with pytest.raises(ValueError, match=r"holds parameters of no layer group, so it cannot have the rates"):
        make_trainer(tiny_model, optimizers=(stranger, None)).fit(1e-2, 1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    with pytest.raises(ValueError, match=r"was given a LambdaLR, which decides the rates: give optimizers="):
        make_trainer(tiny_model, optimizers=(optimizer, scheduler)).fit(1e-2, 1)


def test_train_leaves_a_given_optimizer_its_rates_and_records_them(make_trainer, tiny_model):
    groups = LayerGroups.from_model(tiny_model)
    optimizer = torch.optim.SGD(groups.parameters(-1), lr=3e-3)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    trainer = make_trainer(tiny_model, optimizers=(optimizer, scheduler), num_cycles=1, precompute=True)
    trainer.train()
    assert trainer.history.fits[-1]["learning_rates"] == [0.0, 0.0, 1.5e-3]
