from transformers import TrainerState

from hf_sgdr import SGDRSchedule
from hf_sgdr.training.history import fit_record


def record(state: TrainerState, schedule: SGDRSchedule | None, losses=("eval_loss",)) -> dict:
    return fit_record(
        state, schedule, losses, max_steps=-1,
        name="head", learning_rates=[1e-3, 1e-2], seconds=1.23456, precompute=True, freeze_to=-1,
    )  # fmt: skip


def test_the_last_losses_count_and_the_cycles_that_were_finished():
    history = [
        {"loss": 2.0},
        {"eval_loss": 1.5, "eval_accuracy": 0.5, "epoch": 1.0},
        {"loss": 1.0},
        {"eval_loss": 0.25, "eval_accuracy": 0.5, "epoch": 2.0},
        {"eval_loss": 0.5, "eval_accuracy": 0.75, "epoch": 3.0},
    ]
    state = TrainerState(epoch=3.0, global_step=30, log_history=history)
    fit = record(state, SGDRSchedule(10, cycle_mult=2, num_cycles=3))  # ends after 10, 30 and 70 steps
    assert fit == {
        "name": "head", "epochs": 3, "cycles": 2, "learning_rates": [1e-3, 1e-2], "train_loss": 1.0, "eval_loss": 0.5,
        "eval_accuracy": 0.75, "seconds": 1.23, "precompute": True, "freeze_to": -1,
        "max_steps": None, "best_epoch": 2.0, "kept": {"epoch": 3.0, "eval_loss": 0.5, "eval_accuracy": 0.75},
    }  # fmt: skip


def test_of_several_evaluation_sets_the_means_count():
    history = [
        {"eval_a_loss": 0.5, "eval_a_accuracy": 1.0, "epoch": 1.0},
        {"eval_b_loss": 0.25, "eval_b_accuracy": 0.5, "epoch": 1.0},
        {"eval_a_loss": 0.25, "eval_a_accuracy": 0.5, "epoch": 2.0},
        {"eval_b_loss": 0.75, "eval_b_accuracy": 0.5, "epoch": 2.0},
    ]
    fit = record(TrainerState(epoch=2.0, log_history=history), None, ["eval_a_loss", "eval_b_loss"])
    assert (fit["eval_loss"], fit["eval_accuracy"], fit["best_epoch"]) == (0.5, 0.5, 1.0)
    assert fit["kept"] == {"epoch": 2.0, "eval_loss": 0.5, "eval_accuracy": 0.5}


def test_without_a_schedule_the_cycles_are_those_of_the_arguments_and_what_was_not_measured_is_none():
    fit = record(TrainerState(epoch=3.0, global_step=30), None)
    assert fit["cycles"] == 3
    assert (fit["train_loss"], fit["eval_loss"], fit["eval_accuracy"]) == (None, None, None)
