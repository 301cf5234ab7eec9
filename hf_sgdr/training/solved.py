"""A stage that solves the head instead of training it."""

import time
from typing import Any

from hf_sgdr._utils import scoped
from hf_sgdr.callbacks.best_weights import last_evaluation
from hf_sgdr.recipe import FitRecord


def solved_record(trainer: Any, losses: list[str], *, name: str, views: int) -> FitRecord:
    """Solve the head and evaluate it on features; the trainer's callbacks see the evaluation, as of epoch 0.

    Args:
        trainer ([`SGDRTrainer`]): whose body counts as frozen.
        losses (`list[str]`): by which weights are judged.
        name (`str`): of the record.
        views (`int`): augmented views of each image beside the plain one.

    Raises:
        ValueError: if the model cannot be cut at a linear head.
    """
    start = time.perf_counter()
    frozen, precompute = trainer.layer_groups.frozen, trainer.precompute
    trainer.freeze()
    trainer.features.check()
    try:
        with (
            scoped.attributes(trainer.args, precompute_views=views),
            scoped.attributes(trainer.features, are_used=True),
        ):
            solution = trainer.solve_head()
            with trainer.on_features(), scoped.attributes(trainer.state, epoch=0.0):
                trainer.evaluate()
        loss, accuracy = last_evaluation(trainer.state.log_history, losses)
    finally:
        trainer.layer_groups.freeze_to(frozen)
        trainer.features.are_used = precompute
    return {
        "name": name,
        "epochs": 0,
        "cycles": 0,
        "learning_rates": [0.0] * len(trainer.layer_groups),
        "train_loss": None,
        "eval_loss": loss,
        "eval_accuracy": accuracy,
        "seconds": round(time.perf_counter() - start, 2),
        "precompute": True,
        "freeze_to": len(trainer.layer_groups) - 1,
        "best_epoch": 0.0,
        "kept": {"epoch": 0.0, "eval_loss": loss, "eval_accuracy": accuracy},
        "max_steps": None,
        "cv_loss": solution.cv_loss,
        "cv_accuracy": solution.cv_accuracy,
    }
