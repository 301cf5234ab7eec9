"""The solved head in a recipe: as a stage of its own, and as the yardstick of those that train on features."""

import time
from typing import Any

from transformers.utils import logging

from hf_sgdr._utils import scoped
from hf_sgdr.callbacks.best_weights import last_evaluation
from hf_sgdr.recipe import FitRecord

logger = logging.get_logger(__name__)

SOLVED_HEAD = "solved head"


def solved_record(trainer: Any, losses: list[str], *, name: str, views: int, keep: bool) -> FitRecord:
    """Solve the head and evaluate it on features; the trainer's callbacks see the evaluation, as of epoch 0.

    Args:
        trainer ([`SGDRTrainer`]): whose body counts as frozen.
        losses (`list[str]`): by which weights are judged.
        name (`str`): of the record.
        views (`int`): augmented views of each image beside the plain one.
        keep (`bool`): False gives the head its own weights back.

    Raises:
        ValueError: if the model cannot be cut at a linear head.
    """
    start = time.perf_counter()
    frozen, precompute = trainer.layer_groups.frozen, trainer.precompute
    linear = trainer.features.linear_head()
    before = {key: value.detach().clone() for key, value in linear.state_dict().items()}
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
        if not keep:
            linear.load_state_dict(before)
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


def yardstick(trainer: Any, losses: list[str], best: Any) -> FitRecord | None:
    """The record of the solved head on plain images, whose weights compete for the best; None where there is none."""
    best.stage = SOLVED_HEAD
    try:
        record = solved_record(trainer, losses, name=SOLVED_HEAD, views=0, keep=False)
    except ValueError as error:
        logger.warning(f"The solved head is left out: {error}")
        return None
    if trainer.is_world_process_zero():
        print(
            f"\n{SOLVED_HEAD}: valid loss {record['eval_loss']:.4f}, accuracy {record['eval_accuracy']:.4f}, in "
            f"cross-validation {record['cv_loss']:.4f} / {record['cv_accuracy']:.4f}, {record['seconds']:.1f} s",
            flush=True,
        )
    return record
