"""A Trainer whose resumed runs end as uninterrupted ones: same weights, same history, to the bit on one CPU process.

transformers restores weights, optimizer, scheduler, random generators and the place in the data. What is added: a
checkpoint counts only when it is whole, the loss since the last log line goes on, and a checkpoint at the last step
of an epoch, or of the run, is written after that epoch was evaluated, not before.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput, rotate_checkpoints

from hf_sgdr.training.checkpoints import SEAL, newest_checkpoint, seal, sealed_state


class ExactResumeTrainer(Trainer):
    """See the module; arguments are those of [`~transformers.Trainer`]."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._resumed: dict[str, Any] = {}
        self._resumed_at = 0
        self._steps_per_epoch = 0
        super().__init__(*args, **kwargs)
        self.add_callback(_GoesOn(self))

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Train; `resume_from_checkpoint=True` goes on from the last checkpoint that is whole.

        Raises:
            ValueError: if there is none, or the named one is not whole.
        """
        self._resumed, self._resumed_at = {}, 0
        if resume_from_checkpoint is True:
            newest = newest_checkpoint(Path(self.args.output_dir))
            if newest is None:
                raise ValueError(f"{self.args.output_dir} holds no whole checkpoint to resume from.")
            resume_from_checkpoint = str(newest)
        if isinstance(resume_from_checkpoint, str) and Path(resume_from_checkpoint, SEAL).exists():
            state = sealed_state(Path(resume_from_checkpoint))
            if state is None:
                raise ValueError(
                    f"{resume_from_checkpoint} is damaged: a file is missing, cut off or changed. "
                    "resume_from_checkpoint=True takes the last one that is whole."
                )
            self._resumed = state
            self.before_going_on(state)
        if isinstance(resume_from_checkpoint, str) and Path(resume_from_checkpoint, TRAINER_STATE_NAME).exists():
            state_file = Path(resume_from_checkpoint, TRAINER_STATE_NAME)
            self._resumed_at = TrainerState.load_from_json(str(state_file)).global_step
        output = super().train(resume_from_checkpoint or None, trial, ignore_keys_for_eval)
        return output._replace(training_loss=output.metrics["train_loss"])  # in both, that of all steps: see `log`

    def set_initial_training_values(self, args: Any, dataloader: DataLoader[Any]) -> Any:
        """Transformers' own values; the steps of an epoch are remembered, and a run that is finished trains no more."""
        values = super().set_initial_training_values(args, dataloader)
        self._steps_per_epoch, max_steps = values[1], values[-1]
        if self._resumed_at >= max_steps:  # transformers would go on in an epoch that max_steps has cut off
            values = (self._resumed_at // self._steps_per_epoch, *values[1:])
        return values

    def state_to_keep(self) -> dict[str, Any]:
        """Plain values that a checkpoint keeps beside transformers' own."""
        losses = self.accelerator.gather(self._tr_loss.reshape(1))  # each process has its own
        return {
            "loss": losses.mean().item(),
            "total_loss": self._total_loss_scalar,
            "last_logged": self._globalstep_last_logged,
        }

    def before_going_on(self, state: dict[str, Any]) -> None:
        """Take up what must be known before the data is prepared; called with what [`state_to_keep`] gave."""

    def go_on_with(self, state: dict[str, Any]) -> None:
        """Take up what [`state_to_keep`] gave."""
        self._tr_loss = torch.tensor(state["loss"], device=self.args.device)
        self._total_loss_scalar = state["total_loss"]
        self._globalstep_last_logged = state["last_logged"]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log; the training loss at the end is that of all steps, also of those before a resume."""
        if "train_loss" in logs:  # in place, as the Trainer adds the epoch: these are the metrics that train() returns
            logs["train_loss"] = float(self._total_loss_scalar / max(self.state.global_step, 0.001))
        super().log(logs, start_time)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = self._get_output_dir(trial=trial)
        checkpoint = Path(folder, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        if self.args.should_save:
            (checkpoint / SEAL).unlink(missing_ok=True)
        limit, self.args.save_total_limit = self.args.save_total_limit, None  # older ones stay until this one is whole
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        state = self.state_to_keep()
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            seal(checkpoint, state)
            rotate_checkpoints(folder, limit, self.state.best_model_checkpoint)


class _GoesOn(TrainerCallback):
    """Where transformers has set its counters to zero, they are set to what they were."""

    def __init__(self, trainer: ExactResumeTrainer) -> None:
        self.trainer = trainer
        self._save_after_epoch = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._save_after_epoch = False
        if self.trainer._resumed:
            self.trainer.go_on_with(self.trainer._resumed)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        is_last = state.global_step % max(1, self.trainer._steps_per_epoch) == 0 or state.global_step >= state.max_steps
        if control.should_save and is_last:
            control.should_save, self._save_after_epoch = False, True

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        control.should_save |= self._save_after_epoch
        self._save_after_epoch = False
