"""Tells the training data which epoch it is, so that augmentation and stored views change from epoch to epoch."""

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class DatasetEpoch(TrainerCallback):
    """Calls `set_epoch` of a data set that has one, on any Trainer.

    accelerate (1.15) calls it only where its sampler takes no epoch: not under several processes, and not in the epoch
    that a run is resumed in, which would then see other views than an uninterrupted one.
    """

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set it; in the middle of an epoch, after a resume, the whole part counts."""
        dataset: Any = getattr(kwargs["train_dataloader"], "dataset", None)
        if hasattr(dataset, "set_epoch"):
            dataset.set_epoch(int(state.epoch or 0))
