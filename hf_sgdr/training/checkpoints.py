"""Checkpoints that are whole or do not count, and runs that resume to the bit.

transformers restores weights, optimizer, scheduler, random generators and the place in the data. What is added: a
checkpoint is used only if its manifest, written last, is complete; the loss since the last log line goes on; a
checkpoint at the end of an epoch is written after that epoch was evaluated, not before; and SIGTERM writes one.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors import safe_open
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, sort_checkpoints
from transformers.utils import SAFE_WEIGHTS_NAME, logging

from hf_sgdr._utils import termination
from hf_sgdr._utils.store import replace_file, replace_weights

logger = logging.get_logger(__name__)

MANIFEST = "sgdr_state.json"
# Beside an accelerator, which every question makes wait, several processes ask each other so rarely whether to end.
ASK_EVERY = 16


def keep_own_names(path: Path, model: Any) -> None:
    """Save weights again if `save_pretrained` called them as earlier versions of transformers did.

    It does so for ViT, Swin and others, and the Trainer, which loads a checkpoint by the present names, would go on
    without these weights (transformers 5.24, `Trainer._load_from_checkpoint`).
    """
    if isinstance(model, PreTrainedModel) and path.is_file():
        with safe_open(path, framework="pt") as file:
            is_own = model.state_dict().keys() >= set(file.keys())
        if not is_own:
            replace_weights(path, model, {"format": "pt"})


class SealCheckpoints(TrainerCallback):
    """Writes the manifest of each checkpoint last, then removes older checkpoints; ends the run that SIGTERM ends.

    That run saves a checkpoint after its present step, or after the evaluation that it is in; of several processes all
    do as soon as one was told to.

    Args:
        state (`Callable[[], dict]`): plain values that a resumed run needs beside transformers' own; every process
            calls it.
        restore (`Callable[[dict], None]`): is given them back when a resumed training begins.
    """

    def __init__(self, state: Callable[[], dict[str, Any]], restore: Callable[[dict[str, Any]], None]) -> None:
        self._state, self._restore = state, restore
        self.resumed: dict[str, Any] = {}  # of the checkpoint that the next training goes on from
        self.limit: int | None = None  # `save_total_limit`, which the Trainer would apply before the manifest is there
        self._save_after_epoch = False
        self._is_ending = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Restore the state of a resumed run."""
        self._save_after_epoch = self._is_ending = False
        if self.resumed:
            self._restore(self.resumed)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Save if the run is to end; put a checkpoint of an epoch's last step off until the epoch was evaluated."""
        if args.device.type == "cpu" or args.world_size == 1 or state.global_step % ASK_EVERY == 0:
            self._save_if_ending(args, control)
        is_last = float(state.epoch or 0).is_integer() or state.global_step >= state.max_steps
        if control.should_save and is_last:
            control.should_save, self._save_after_epoch = False, True

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Save what was put off."""
        control.should_save |= self._save_after_epoch
        self._save_after_epoch = False

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Save if the run is to end; an evaluation may take longer than whoever ends it waits."""
        if termination.is_deferred():
            self._save_if_ending(args, control)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the manifest, then remove the oldest checkpoints, or end."""
        values = self._state()
        if args.should_save:
            folder = args.output_dir or ""
            checkpoint = Path(folder, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
            keep_own_names(checkpoint / SAFE_WEIGHTS_NAME, kwargs["model"])
            seal(checkpoint, values)
            _remove_oldest(Path(folder), self.limit, state.best_model_checkpoint)
        if self._is_ending:
            termination.ignore_sigterm()  # a launcher ends all processes when the first one has ended
            PartialState().wait_for_everyone()
            termination.end()

    def _save_if_ending(self, args: TrainingArguments, control: TrainerControl) -> None:
        is_told = termination.is_requested()
        if args.world_size > 1:
            told = torch.tensor(float(is_told), device=args.device)
            torch.distributed.all_reduce(told)
            is_told = bool(told)
        self._is_ending |= is_told
        control.should_save |= is_told


def seal(checkpoint: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint's manifest: the hashes of all its files, and plain values to go on with."""
    files = {
        str(path.relative_to(checkpoint)): _sha256(path)
        for path in sorted(checkpoint.rglob("*"))
        if path.is_file() and path.name != MANIFEST and not path.name.startswith(".tmp-")
    }
    content = {"files": files, "state": state, "saved_at": time.time()}
    replace_file(checkpoint / MANIFEST, json.dumps(content).encode())


def sealed_state(checkpoint: Path) -> dict[str, Any] | None:
    """What [`seal`] was given, None if the checkpoint is not whole: a file is missing, cut off or changed."""
    try:
        content = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        if any(_sha256(checkpoint / name) != digest for name, digest in content["files"].items()):
            return None
        state: dict[str, Any] = content["state"]
        return state
    except (OSError, ValueError, KeyError, TypeError):
        return None


def newest_checkpoint(folder: Path) -> Path | None:
    """The last whole checkpoint of a folder; a later one that is not whole is named in a warning and passed over."""
    for checkpoint in reversed(_by_age(folder)):
        if sealed_state(checkpoint) is not None:
            return checkpoint
        logger.warning(f"{checkpoint} was not written to its end, or was changed: passed over for the one before it.")
    return None


def _by_age(folder: Path) -> list[Path]:
    """A folder's checkpoints, the oldest first: an earlier training may have left later steps there."""
    return sorted(map(Path, sort_checkpoints(str(folder))), key=_saved_at)


def _saved_at(checkpoint: Path) -> float:
    try:
        return float(json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["saved_at"])
    except (OSError, ValueError, KeyError, TypeError):
        return checkpoint.stat().st_mtime


def _remove_oldest(folder: Path, limit: int | None, best: str | None) -> None:
    """Keep so many checkpoints, with the last one and the best one among them; transformers' own goes by the step."""
    if limit is None or limit <= 0:
        return
    checkpoints = _by_age(folder)
    removable = [checkpoint for checkpoint in checkpoints[:-1] if best is None or checkpoint != Path(best)]
    for checkpoint in removable[: max(0, len(checkpoints) - limit)]:
        shutil.rmtree(checkpoint, ignore_errors=True)


def checkpoint_to_resume(wanted: str | bool | None, folder: Path) -> tuple[str | None, dict[str, Any], int]:
    """Where a training goes on from.

    Args:
        wanted (`str`, `bool` or None): a checkpoint; True is the last whole one of the folder.
        folder (`Path`): of the checkpoints.

    Returns:
        `tuple[str | None, dict, int]`: the checkpoint, what [`seal`] was given, and its optimizer step.

    Raises:
        ValueError: if there is none, or the named one is not whole.
    """
    if wanted is True:
        wanted = str(newest_checkpoint(folder) or "")
        if not wanted:
            raise ValueError(f"{folder} holds no whole checkpoint to resume from.")
    if not wanted:
        return None, {}, 0
    state = sealed_state(Path(wanted)) if Path(wanted, MANIFEST).exists() else {}
    if state is None:
        raise ValueError(
            f"{wanted} is damaged: a file is missing, cut off or changed. resume_from_checkpoint=True takes the last "
            "one that is whole."
        )
    file, step = Path(wanted, TRAINER_STATE_NAME), 0
    if file.exists():
        step = TrainerState.load_from_json(str(file)).global_step
    return wanted, state, step


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
