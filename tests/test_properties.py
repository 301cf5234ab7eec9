"""What holds for every schedule, curve, model and store; hypothesis looks for one that breaks it."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("hypothesis", reason="hypothesis is not installed; the extra `test` has it")

from hypothesis import given, settings
from hypothesis import strategies as st

from hf_sgdr import FeatureStore, LayerGroups, SGDRSchedule
from hf_sgdr.optim.schedule import MOST_EPOCHS, total_epochs
from hf_sgdr.optim.suggestions import MIN_STEPS, SUGGESTIONS

settings.register_profile("seeded", derandomize=True, database=None, deadline=None, max_examples=50)
settings.load_profile("seeded")

schedules = st.builds(
    SGDRSchedule,
    st.integers(1, 12),
    st.integers(1, 3),
    st.integers(1, 4),
    min_lr_ratio=st.floats(0.0, 1.0),
    warmup_steps=st.just(0),
)
methods = st.sampled_from(sorted(SUGGESTIONS))


# ---- The SGDR schedule ----


@given(schedules)
def test_the_rate_is_highest_where_a_cycle_begins_and_nowhere_else(schedule):
    curve = schedule.simulate()
    assert len(curve) == schedule.total_steps == schedule.cycle_ends[-1]
    assert schedule.restarts == schedule.cycle_ends[:-1]
    starts = {0, *schedule.restarts}
    for step, multiplier in enumerate(curve):
        assert schedule.min_lr_ratio <= multiplier <= 1.0
        assert multiplier > 0.0
        if step in starts:
            assert multiplier == 1.0
        else:
            assert multiplier <= curve[step - 1]


@given(schedules, st.integers(0, 500))
def test_a_step_lies_in_its_cycle_also_past_the_end(schedule, step):
    cycle = schedule.cycle_of(step)
    assert schedule.cycle_start(cycle) <= step < schedule.cycle_start(cycle + 1)
    length = schedule.cycle_start(cycle + 1) - schedule.cycle_start(cycle)
    assert length == schedule.cycle_steps * schedule.cycle_mult**cycle
    assert schedule.min_lr_ratio <= schedule.multiplier(step) <= 1.0


@given(schedules, st.integers(1, 5))
def test_a_schedule_that_is_cut_off_or_prolonged_has_the_same_rates(schedule, num_cycles):
    other = SGDRSchedule(
        schedule.cycle_steps, schedule.cycle_mult, num_cycles, min_lr_ratio=schedule.min_lr_ratio
    ).simulate()
    shared = min(len(other), schedule.total_steps)
    assert other[:shared] == schedule.simulate()[:shared]


@given(schedules, st.integers(1, 20))
def test_warm_up_changes_its_own_steps_alone(schedule, warmup_steps):
    warm = SGDRSchedule(
        schedule.cycle_steps,
        schedule.cycle_mult,
        schedule.num_cycles,
        min_lr_ratio=schedule.min_lr_ratio,
        warmup_steps=warmup_steps,
    ).simulate()
    assert set(warm[:warmup_steps]) == {0.01}
    assert warm[warmup_steps:] == schedule.simulate()[warmup_steps:]


@given(st.none() | st.integers(1, 50), st.integers(1, 5), st.integers(1, 60))
def test_the_epochs_are_the_sum_of_the_cycles_or_refused_as_too_many(cycle_len, cycle_mult, num_cycles):
    cycles = [cycle_len * cycle_mult**i if cycle_len else 1 for i in range(num_cycles)]
    if sum(cycles) <= MOST_EPOCHS:
        assert total_epochs(cycle_len, cycle_mult, num_cycles) == sum(cycles)
    else:
        with pytest.raises(ValueError, match=f"more than {MOST_EPOCHS} epochs"):
            total_epochs(cycle_len, cycle_mult, num_cycles)


# ---- Suggestions ----


@st.composite
def falling_curves(draw):
    """Rates that rise exponentially, and a loss that falls about one of them, with some noise."""
    steps = draw(st.integers(30, 120))
    lowest, decades = draw(st.floats(-8, -3)), draw(st.floats(2, 8))
    exponents = np.linspace(lowest, lowest + decades, steps)
    centre = lowest + decades * draw(st.floats(0.3, 0.7))
    width = decades * draw(st.floats(0.03, 0.1))
    noise = np.random.default_rng(draw(st.integers(0, 999))).normal(0, draw(st.sampled_from([0.0, 0.01])), steps)
    losses = 0.1 + draw(st.floats(0.5, 5)) / (1 + np.exp((exponents - centre) / width)) + noise
    return [float(rate) for rate in 10**exponents], [float(loss) for loss in losses]


@given(falling_curves(), methods)
def test_a_suggestion_lies_within_the_tested_rates_and_is_given_for_every_clear_fall(curve, method):
    rates, losses = curve
    rate, reason = SUGGESTIONS[method](rates, losses)
    assert reason is None
    assert rates[0] / 10 <= rate <= rates[-1]  # a tenth of the minimum may lie below the first rate
    assert method == "minimum" or rates[0] <= rate


@given(falling_curves(), methods, st.integers(-6, 6), st.integers(-6, 6))
def test_a_suggestion_moves_with_the_rates_and_not_with_the_size_of_the_loss(curve, method, by, larger):
    rates, losses = curve
    rate, _ = SUGGESTIONS[method](rates, losses)
    moved, _ = SUGGESTIONS[method]([r * 10.0**by for r in rates], [loss * 2.0**larger for loss in losses])
    assert moved == pytest.approx(rate * 10.0**by, rel=1e-6)


@given(methods, st.integers(0, 200), st.floats(0.01, 100), st.integers(0, 999), st.sampled_from([0.0, 0.009]))
def test_a_curve_that_is_flat_but_for_noise_has_no_suggestion_but_a_reason(method, steps, level, seed, noise):
    rates = [float(rate) for rate in np.geomspace(1e-6, 10, max(steps, 2))][:steps]
    losses = level * (1 + np.random.default_rng(seed).uniform(0, noise, steps))
    rate, reason = SUGGESTIONS[method](rates, [float(loss) for loss in losses])
    if steps < MIN_STEPS:
        assert reason.startswith(f"the test has {steps} steps")
    else:
        assert reason.startswith("the loss does not clearly fall")
    assert rate is None


@pytest.mark.parametrize("steps", [MIN_STEPS, 30, 100])
def test_less_than_a_third_of_mere_noise_is_taken_for_a_fall(steps):
    rates = [float(rate) for rate in np.geomspace(1e-6, 10, steps)]
    curves = np.random.default_rng(0).normal(1, 0.1, (300, steps))
    answers = [SUGGESTIONS["lesson"](rates, [float(loss) for loss in losses]) for losses in curves]
    assert all((rate is None) == (reason is not None) for rate, reason in answers)
    assert sum(rate is not None for rate, _ in answers) < 100


# ---- Layer groups ----


class Body(nn.Module):
    """As many blocks as it is told, and a head, as transformers builds classifiers."""

    base_model_prefix = "body"

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.body = nn.Module()
        self.body.stem = nn.Linear(2, 2)
        self.body.blocks = nn.ModuleList(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)) for _ in range(blocks))
        self.body.norm = nn.LayerNorm(2)
        self.head = nn.Linear(2, 3)

    @property
    def base_model(self) -> nn.Module:
        return self.body


bodies = st.integers(2, 9)


@given(bodies, st.integers(2, 6), st.data())
def test_every_parameter_is_in_one_group_in_order_and_frozen_from_the_input_on(blocks, n_groups, data):
    model = Body(blocks)
    names = [name for name, _ in model.named_parameters()]
    if n_groups > blocks + 2:
        with pytest.raises(ValueError, match=f"has {blocks + 1} stages"):
            LayerGroups.from_model(model, n_groups)
        return
    groups = LayerGroups.from_model(model, n_groups)
    assert [name for i in range(n_groups) for name in groups.parameter_names(i)] == names
    assert all(groups.parameter_names(i) for i in range(n_groups))
    n = data.draw(st.integers(-n_groups, n_groups - 1))
    groups.freeze_to(n)
    assert groups.frozen == n % n_groups
    trains = [parameter.requires_grad for i in range(n_groups) for parameter in groups.parameters(i)]
    assert trains == sorted(trains)
    assert sum(trains) == sum(len(groups.parameter_names(i)) for i in range(n % n_groups, n_groups))
    assert all(parameter.requires_grad for parameter in model.head.parameters())


@given(bodies, st.integers(2, 4), st.floats(1e-9, 1), st.floats(1e-9, 1), st.sampled_from([0.0, 0.1]))
def test_rates_are_as_many_as_groups_and_those_of_a_slice_have_one_ratio(blocks, n_groups, low, high, weight_decay):
    groups = LayerGroups.from_model(Body(blocks), n_groups)
    rates = groups.learning_rates(slice(low, high))
    assert len(rates) == n_groups
    assert rates[0] == pytest.approx(low)
    assert rates[-1] == pytest.approx(high)
    ratios = [later / earlier for earlier, later in pairwise(rates)]
    assert ratios == pytest.approx([ratios[0]] * len(ratios))
    assert groups.learning_rates(rates) == rates
    assert groups.learning_rates(low) == [low] * n_groups
    for wrong in (rates[1:], [*rates, high], [-low, *rates[1:]], [math.nan, *rates[1:]], [0.0] * n_groups):
        with pytest.raises(ValueError, match="earning rates"):
            groups.learning_rates(wrong)
    parameter_groups = groups.param_groups(rates, weight_decay)
    parameters = [id(parameter) for group in parameter_groups for parameter in group["params"]]
    assert sorted(parameters) == sorted(id(parameter) for parameter in groups.model.parameters())
    assert {group["lr"] for group in parameter_groups} == set(rates)
    assert [group["name"] for group in parameter_groups] == sorted(
        (group["name"] for group in parameter_groups), key=groups.names.index
    )


# ---- Shards ----


@settings(max_examples=25)
@given(st.data())
def test_rows_written_in_any_order_by_any_number_of_ranks_are_read_back_equal(tmp_path_factory, data):
    count = data.draw(st.integers(1, 23))
    shape = data.draw(st.lists(st.integers(1, 3), max_size=2))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.uint8]))
    rows = torch.randint(0, 255, (count, *shape), generator=torch.Generator().manual_seed(count)).to(dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hf_sgdr._utils.store.ROWS_PER_SHARD", data.draw(st.integers(1, 7)))
        root = tmp_path_factory.mktemp("store")
        ranks = [FeatureStore({"rows": "any"}, count, root) for _ in range(data.draw(st.integers(1, 4)))]
    every = range(ranks[0].num_shards)
    assert [row for shard in every for row in ranks[0].shard_rows(shard)] == list(range(count))
    for shard in data.draw(st.permutations(every)):
        store = ranks[shard % len(ranks)]
        assert shard in store.missing()
        store.write(shard, rows[list(store.shard_rows(shard))])
    assert ranks[-1].missing() == []
    read = ranks[-1].read()
    assert read.dtype == dtype
    assert torch.equal(read, rows)
    wanted = torch.tensor(data.draw(st.lists(st.integers(0, count - 1), max_size=6)), dtype=torch.int64)
    assert torch.equal(ranks[0].open()[wanted], rows[wanted])
