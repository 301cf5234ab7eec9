import pytest
import torch
from transformers import TrainerControl, TrainerState, TrainingArguments

from hf_sgdr import get_sgdr_schedule
from hf_sgdr.callbacks.best_weights import judged_losses
from hf_sgdr.callbacks.overfitting import StopWhenOverfitting


@pytest.fixture
def args(tmp_path):
    return TrainingArguments(str(tmp_path), use_cpu=True)


def scheduled(*cycles):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    return get_sgdr_schedule(optimizer, *cycles)


def cycles_until_stop(args, validation, training):
    """How many cycles of one step are run before the stop, given each cycle's losses."""
    stopper, scheduler = StopWhenOverfitting(), scheduled(1, 1, len(validation))
    state, control = TrainerState(), TrainerControl()
    for step, (valid, train) in enumerate(zip(validation, training, strict=True), 1):
        state.global_step = step
        state.log_history += [{"loss": train, "step": step}, {"eval_loss": valid, "step": step}]
        stopper.on_evaluate(args, state, control, lr_scheduler=scheduler)
        if control.should_training_stop:
            return step
    return None


@pytest.mark.parametrize(
    ("validation", "training", "stops_after"),
    [
        ([0.5, 0.4, 0.3], [0.5, 0.4, 0.3], None),
        ([0.5, 0.6, 0.7], [0.5, 0.4, 0.3], 2),
        ([0.5, 0.504, 0.6], [0.5, 0.4, 0.3], 3),  # within one per cent is chance
        ([0.5, 0.6, 0.7], [0.5, 0.6, 0.7], None),  # the training loss rises too: no over-fitting
        ([0.5, 0.3, 0.4], [0.5, 0.4, 0.3], 3),
    ],
)
def test_over_fitting_ends_training_at_the_end_of_a_cycle(args, validation, training, stops_after):
    assert cycles_until_stop(args, validation, training) == stops_after


def test_in_the_middle_of_a_cycle_nothing_stops(args):
    stopper, scheduler = StopWhenOverfitting(), scheduled(4, 2, 2)
    state, control = TrainerState(), TrainerControl()
    for step in range(1, 13):
        state.global_step = step
        state.log_history += [{"loss": 1.0 / step, "step": step}, {"eval_loss": 0.1 * step, "step": step}]
        stopper.on_evaluate(args, state, control, lr_scheduler=scheduler)
        assert control.should_training_stop is (step == 12)


def test_over_fitting_of_several_sets_is_judged_once_all_are_evaluated(make_trainer, images):
    whole = images["validation"]
    trainer = make_trainer(eval_dataset={"large": whole.select(range(1, 8)), "small": whole.select(range(1))})
    stopper, scheduler = StopWhenOverfitting(judged_losses(trainer)), scheduled(1, 1, 2)
    state, control = TrainerState(), TrainerControl()
    seen = []
    for step, (train, large, small) in enumerate([(0.5, 0.4, 0.4), (0.4, 0.5, 0.4)], 1):
        state.global_step = step
        state.log_history.append({"loss": train, "step": step})
        for name, loss in (("large", large), ("small", small)):
            state.log_history.append({f"eval_{name}_loss": loss, "step": step})
            stopper.on_evaluate(trainer.args, state, control, lr_scheduler=scheduler)
            seen.append(control.should_training_stop)
    assert seen == [False, False, False, True]
