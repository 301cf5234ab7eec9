"""The solved head of a run: a stage of its own, or the yardstick beside the others."""

import time
from typing import Any, cast

from hf_sgdr._utils import scoped
from hf_sgdr.callbacks.best_weights import last_evaluation
from hf_sgdr.callbacks.epoch_table import print_row
from hf_sgdr.recipe import FitRecord


def check_solvable(trainer: Any) -> None:
    """Raise a ValueError unless the model can be cut at a linear head."""
    groups, frozen = trainer.layer_groups, trainer.layer_groups.frozen
    groups.freeze_to(-1)
    try:
        trainer.features.check()
        trainer.features.linear_head()
    finally:
        groups.freeze_to(frozen)


def solved_record(trainer: Any, losses: list[str], *, name: str, keep: bool = True) -> FitRecord:
    """Solve the head and evaluate it on features; the trainer's callbacks see the evaluation, as of epoch 0.

    Args:
        trainer ([`SGDRTrainer`]): whose body counts as frozen.
        losses (`list[str]`): by which weights are judged.
        name (`str`): of the record.
        keep (`bool`, *optional*, defaults to True): leave the solution in the model; False puts its head back.

    Raises:
        ValueError: if the model cannot be cut at a linear head, or no head can be solved on these images.
    """
    start = time.perf_counter()
    check_solvable(trainer)
    head, groups, frozen = trainer.features.linear_head(), trainer.layer_groups, trainer.layer_groups.frozen
    before = {key: value.detach().clone() for key, value in head.state_dict().items()}
    groups.freeze_to(-1)
    try:
        with scoped.attributes(trainer.features, are_used=True):
            solution = trainer.solve_head()
            with trainer.on_features(), scoped.attributes(trainer.state, epoch=0.0):
                metrics = trainer.evaluate()
        judged = last_evaluation(trainer.state.log_history, losses)
    finally:
        groups.freeze_to(frozen)
        if not keep:
            head.load_state_dict(before)
    seconds = round(time.perf_counter() - start, 2)
    if trainer.is_world_process_zero():
        print(f"\n{name}: strength {solution.strength:g}, loss in cross-validation {solution.cv_loss:.4f}", flush=True)
    print_row(trainer, "solved", metrics, seconds)
    record = {
        "name": name,
        "epochs": 0,
        "cycles": 0,
        "learning_rates": [0.0] * len(groups),
        "train_loss": None,
        **judged,
        "seconds": seconds,
        "precompute": True,
        "freeze_to": -1,
        "best_epoch": 0.0,
        "kept": {"epoch": 0.0, **judged},
        "max_steps": None,
        "cv_loss": solution.cv_loss,
        "cv_accuracy": solution.cv_accuracy,
    }
    return cast(FitRecord, record)
