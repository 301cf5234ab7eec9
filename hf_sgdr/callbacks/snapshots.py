"""Snapshots at the ends of cycles, their average and their ensemble (Huang et al. 2017, "Snapshot Ensembles")."""

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from typing_extensions import override

from hf_sgdr._utils.files import RUNS_FOLDER
from hf_sgdr._utils.store import replace_file, replace_weights
from hf_sgdr.callbacks.best_weights import KeepBestWeights, judged_losses, mean_of, metrics_of
from hf_sgdr.callbacks.epoch_table import print_row
from hf_sgdr.callbacks.loop import equal_buffers
from hf_sgdr.data.labels import MULTI_LABEL
from hf_sgdr.optim.schedule import SGDRScheduler

METRICS_FILE = "figures.json"

Snapshots = str | Path | Sequence[str | Path]


class SnapshotCallback(TrainerCallback):
    """Saves the model's weights at the end of each cycle, after its last step, and those with the best validation loss.

    The files are `cycle-001.safetensors` and so on, and `best.safetensors`; `figures.json` holds loss and metrics of
    the evaluations at the ends of cycles. Each is replaced, never half written. Works on any Trainer whose scheduler is
    that of [`get_sgdr_schedule`].

    Args:
        folder (`str` or `Path`, *optional*): where; by default `_runs/snapshots` in the Trainer's `output_dir`. What an
            earlier training left there is removed when another one begins.
        losses (sequence of `str`, *optional*, defaults to `["eval_loss"]`): of several, the mean counts; see
            [`judged_losses`], which an [`SGDRTrainer`] gives by itself.

    Raises:
        ValueError: when training begins, if the scheduler has no cycles.
    """

    def __init__(self, folder: str | Path | None = None, losses: Sequence[str] = ("eval_loss",)) -> None:
        self.folder = Path(folder) if folder is not None else None
        self.losses = list(losses)
        self._evaluated: dict[str, Any] = {}  # since the last full one: the sets of a dict come one by one
        self._best: KeepBestWeights | None = None

    @override
    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Look at the scheduler."""
        scheduler = kwargs["lr_scheduler"]
        if not isinstance(scheduler, SGDRScheduler):
            raise ValueError(
                f"SnapshotCallback needs the cycles of get_sgdr_schedule, but the scheduler is a "
                f"{type(scheduler).__name__}: give the Trainer optimizers=(optimizer, get_sgdr_schedule(optimizer, "
                "cycle_steps)), or an SGDRTrainer a cycle_len."
            )
        if self.folder is None:
            output = Path(args.output_dir or "")  # a fit of an SGDRTrainer has a folder below `_runs` already
            self.folder = (output.parent if output.parent.name == RUNS_FOLDER else output / RUNS_FOLDER) / "snapshots"
        best = self.folder / "best.safetensors"
        if state.global_step == 0 and state.is_world_process_zero:
            for old in (best, self.folder / METRICS_FILE, *self.folder.glob("cycle-*.safetensors")):
                old.unlink(missing_ok=True)
        self._best = KeepBestWeights(whole_model(kwargs["model"]), best, self.losses)
        self._evaluated = {}

    @override
    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Save, if a cycle ends here."""
        path = self._ending_here(state, kwargs["lr_scheduler"])
        if path is None:
            return
        equal_buffers(kwargs["model"])
        if state.is_world_process_zero:
            replace_weights(path, whole_model(kwargs["model"]))

    @override
    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Keep the weights if they are the best, and record the metrics of a cycle's end."""
        if self._best is None:
            return
        self._best.on_evaluate(args, state, control, **kwargs)
        self._evaluated |= kwargs["metrics"]
        if mean_of(self._evaluated, self.losses) is None:
            return
        now, self._evaluated = {"epoch": state.epoch, **metrics_of(self._evaluated, self.losses)}, {}
        path = self._ending_here(state, kwargs["lr_scheduler"])
        if path is not None and path.exists() and state.is_world_process_zero:
            recorded = recorded_metrics(path.parent)
            recorded[path.stem] = now  # after a resume the file of a cycle is written anew
            replace_file(path.with_name(METRICS_FILE), json.dumps(recorded, indent=1).encode())

    @override
    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Keep nothing more: whoever evaluates after training may do so on other images or with other weights."""
        if self._best is not None:
            self._best.on_train_end(args, state, control, **kwargs)
        self._best = None

    def _ending_here(self, state: TrainerState, scheduler: SGDRScheduler) -> Path | None:
        """The file of the cycle that ends with this step, if one does."""
        finished = scheduler.schedule.cycle_of(state.global_step)
        if self.folder is None or finished == 0 or state.global_step != scheduler.schedule.cycle_start(finished):
            return None
        return self.folder / f"cycle-{finished:03d}.safetensors"


def whole_model(model: nn.Module) -> nn.Module:
    """The model whose head trains in its place on precomputed features; any other model itself."""
    whole: nn.Module = getattr(model, "whole_model", model)
    return whole


def recorded_metrics(folder: Path) -> dict[str, dict[str, Any]]:
    """Epoch, loss and metrics of the evaluations at the ends of cycles, by snapshot."""
    path = folder / METRICS_FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def snapshot_files(snapshots: Snapshots) -> list[Path]:
    """The files of a folder of snapshots, in the order of their cycles; or those that are given.

    Raises:
        ValueError: if there is none.
    """
    if isinstance(snapshots, str | Path):
        files = sorted(Path(snapshots).glob("cycle-*.safetensors"))
    else:
        files = [Path(file) for file in snapshots]
    if not files:
        raise ValueError(f"{snapshots}: no snapshot there; SnapshotCallback writes cycle-001.safetensors and so on.")
    return files


def best_snapshots(snapshots: Snapshots, count: int) -> list[Path]:
    """The snapshots with the lowest validation loss at the end of their cycle, in the order of their cycles.

    Args:
        snapshots: a folder of [`SnapshotCallback`], or safetensors files.
        count (`int`): how many.

    Raises:
        ValueError: if there is no snapshot, fewer than `count`, or one without a recorded loss.
    """
    files = snapshot_files(snapshots)
    if not 1 <= count <= len(files):
        raise ValueError(f"The {count} best of {len(files)} snapshots: give a number from 1 to {len(files)}.")
    losses: dict[Path, Any] = {
        file: recorded_metrics(file.parent).get(file.stem, {}).get("eval_loss") for file in files
    }
    for file, loss in losses.items():
        if loss is None:
            raise ValueError(
                f"{file}: no validation loss is recorded: the best need an evaluation at each end of a cycle."
            )
    return sorted(sorted(files, key=losses.__getitem__)[:count])


def _fitting_weights(file: str | Path, model: nn.Module) -> dict[str, torch.Tensor]:
    weights = load_file(file)
    _require_fit(file, weights, model)
    return weights


def _require_fit(file: str | Path, weights: dict[str, torch.Tensor], model: nn.Module) -> None:
    own = _shapes(model.state_dict())
    for name, shape in _shapes(weights).items():
        if name not in own:
            raise ValueError(
                f"{file} is of another model than this {type(model).__name__}, or has other names for its weights, as "
                f"checkpoints of some models have: {name} is none of the model's. Give a file of SnapshotCallback, or "
                "of safetensors.torch.save_model(model, path)."
            )
        if shape != own[name]:
            raise ValueError(
                f"{file} is of another model than this {type(model).__name__}: {name} is {tuple(shape)} in the file "
                f"and {tuple(own[name])} in the model."
            )


def _shapes(weights: dict[str, torch.Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in weights.items()}


def average_weights(snapshots: Snapshots, model: nn.Module | None = None) -> dict[str, torch.Tensor]:
    """The mean of weights and buffers over snapshots; counters are those of the last one.

    With batch norm in training, statistics belong to their own weights: run `torch.optim.swa_utils.update_bn` on the
    average, or train with `freeze_batch_norm`.

    Args:
        snapshots: a folder of [`SnapshotCallback`], or safetensors files.
        model (`nn.Module`, *optional*): gets the average.

    Raises:
        ValueError: if there is no snapshot, or they are not of one model.
    """
    files = snapshot_files(snapshots)
    mean = load_file(files[-1])
    sums = {name: tensor.double() for name, tensor in mean.items() if tensor.is_floating_point()}
    for file in files[:-1]:
        weights = load_file(file)
        if _shapes(weights) != _shapes(mean):
            raise ValueError(f"{file} is of another model than {files[-1]}.")
        for name in sums:
            sums[name] += weights[name]
    mean |= {name: (total / len(files)).to(mean[name].dtype) for name, total in sums.items()}
    if model is not None:
        _require_fit(files[-1], mean, model)
        model.load_state_dict(mean, strict=False)
    return mean


def average_with_start(
    trainer: Trainer, start: str | Path, shares: Sequence[float] = (0.25, 0.5, 0.75)
) -> dict[float, float]:
    """Evaluate averages of the weights that a training began with and those that the model has; it keeps the best.

    Fine-tuning on few images takes the loss of validation down and up again; on the straight way between the two ends
    it is often lower than at both. Source: Wortsman et al. 2021, "Robust fine-tuning of zero-shot models" (WiSE-FT,
    arXiv 2109.01903), section 3.

    Args:
        trainer (`Trainer`): after training, with an eval_dataset. Its callbacks see each evaluation.
        start (`str` or `Path`): a safetensors file of the model's weights before.
        shares (sequence of `float`, *optional*, defaults to `(0.25, 0.5, 0.75)`): of the present weights, above 0 and
            below 1.

    Returns:
        `dict[float, float]`: the loss for each share, with that of the present weights at 1.0; of several evaluation
        sets, the mean.

    Raises:
        ValueError: if the file is of another model, a share is out of range, or no evaluation gives a finite loss. The
            model then has its present weights, as after any other exception.
    """
    model = trainer.model
    assert model is not None
    if not all(0 < share < 1 for share in shares):
        raise ValueError(f"shares={shares}: each must be above 0 and below 1.")
    before = _fitting_weights(start, model)
    end = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    losses: dict[float, float] = {}
    weights: dict[float, dict[str, torch.Tensor]] = {}
    try:
        for share in (*shares, 1.0):
            weights[share] = {
                name: torch.lerp(before[name].to(value), value, share) if value.is_floating_point() else value
                for name, value in end.items()
                if name in before
            }
            model.load_state_dict(weights[share], strict=False)
            began = time.perf_counter()
            metrics = trainer.evaluate()
            loss = mean_of(metrics, judged_losses(trainer))
            losses[share] = math.inf if loss is None or not math.isfinite(loss) else loss
            print_row(trainer, f"at {share:g}", metrics, time.perf_counter() - began)
        if min(losses.values()) == math.inf:
            raise ValueError(
                f"No evaluation gave a finite {' and '.join(judged_losses(trainer))}: look at label_names and the "
                "validation images."
            )
    except BaseException:
        model.load_state_dict(end)
        raise
    best = min(reversed(losses), key=losses.__getitem__)  # of equal ones the nearest to the present weights
    model.load_state_dict(weights[best], strict=False)
    return losses


def ensemble_predictions(trainer: Trainer, snapshots: Snapshots, dataset: Any = None) -> NDArray[np.float32]:
    """Probabilities (images, classes), the mean over snapshots; afterwards the model has its own weights again.

    With several labels an image they are each label's own, as in `log_predictions`.

    Args:
        trainer (`Trainer`): whose model and data.
        snapshots: a folder of [`SnapshotCallback`], or safetensors files.
        dataset (*optional*): validation by default.

    Raises:
        ValueError: if there is no snapshot, one does not fit the model, there is not one data set, or the predictions
            are not logits (images, classes).
    """
    model = trainer.model
    rows: Any = trainer.eval_dataset if dataset is None else dataset
    assert model is not None
    if rows is None or isinstance(rows, dict):
        raise ValueError("An ensemble is of one data set, and the trainer has no single eval_dataset: give dataset=.")
    before = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    files = snapshot_files(snapshots)
    is_multi_label = getattr(getattr(model, "config", None), "problem_type", None) == MULTI_LABEL
    total: Any = 0
    try:
        for file in files:
            model.load_state_dict(_fitting_weights(file, model), strict=False)
            predictions = trainer.predict(rows).predictions
            values = np.asarray(predictions[0] if isinstance(predictions, tuple) else predictions)
            if values.ndim != 2 or (values.shape[1] < 2 and not is_multi_label):
                raise ValueError(
                    f"The predictions are of shape {values.shape}, and an ensemble is of logits (images, classes): "
                    "look at preprocess_logits_for_metrics and the model's num_labels."
                )
            logits = torch.from_numpy(values).float()
            total = total + (logits.sigmoid() if is_multi_label else logits.softmax(dim=-1)).numpy()
    finally:
        model.load_state_dict(before)
    return np.asarray(total / len(files), dtype=np.float32)
