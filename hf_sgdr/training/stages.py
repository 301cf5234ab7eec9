"""`run_stages` runs the stages of a recipe on a trainer and keeps the best weights."""

import json
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, set_seed
from transformers.utils import logging

from hf_sgdr._utils import scoped
from hf_sgdr._utils._compat import training_batch_size
from hf_sgdr._utils.files import RUN_PICTURE, RUNS_FOLDER, clear_disk_errors
from hf_sgdr._utils.store import replace_file
from hf_sgdr.callbacks.best_weights import KeepBestWeights, judged_losses
from hf_sgdr.callbacks.overfitting import StopWhenOverfitting
from hf_sgdr.callbacks.snapshots import SnapshotCallback, average_with_start
from hf_sgdr.data.dataset import rows_of
from hf_sgdr.data.hashes import write_image_hashes
from hf_sgdr.data.labels import class_names
from hf_sgdr.data.stream import MATERIALISE, is_stream
from hf_sgdr.features.store import module_hash
from hf_sgdr.hub.card import save_plot
from hf_sgdr.optim.range_test import LRRangeResult
from hf_sgdr.optim.rates import varies
from hf_sgdr.recipe import LESSON, NO_EFFECT_ON_RESULT, SOLVED_HEAD, FitRecord, RunResults, Stage
from hf_sgdr.training.checkpoints import newest_checkpoint
from hf_sgdr.training.progress import RunProgress, run_key, run_lock
from hf_sgdr.training.solved import solved_record
from hf_sgdr.training.trainer import SGDRTrainer

logger = logging.get_logger(__name__)

# Where nothing else says a rate: the lesson's own, which suits a fresh head.
FALLBACK_LR = 1e-2
# Below where the range test sees the loss take off.
BELOW_EDGE = 2
# What trains below the head wants a lower rate than a fresh head did: so far below that one, at least.
BELOW_HEAD = 3


def run_stages(trainer: SGDRTrainer, stages: Sequence[Stage] = LESSON, *, resume: bool = False) -> RunResults:
    """Run a recipe; afterwards the model has the weights with the lowest validation loss of all epochs of all stages.

    In `output_dir` it leaves plots, `<stage>-range-test.png`, `<stage>-learning-rate.png` where the rate is not
    constant, and `run.png`, how rates, losses and metrics went, and below `_runs` the best weights and, until
    [`save_results`], what an interrupted run goes on from: how far it is, and each stage's checkpoints, if
    `save_strategy` asks for them. Each stage begins with the random generators as `args.seed` sets them. One run at a
    time may write to an `output_dir`.

    With a dict as eval_dataset the weights are judged by the mean of the sets' losses, or by one of them if
    `metric_for_best_model` names it (`eval_<name>_loss`), and `results.best["metric"]` says which.

    Args:
        trainer ([`SGDRTrainer`]): with training and validation images, and evaluation each epoch.
        stages (sequence of [`Stage`], *optional*, defaults to `LESSON`): in this order.
        resume (`bool`, *optional*, defaults to False): go on with the unfinished run of `output_dir`, if there is one;
            the result is that of a run without interruption.

    Returns:
        [`RunResults`]: the figures of every stage.

    Raises:
        ValueError: if there is no stage, two have one name, the trainer does not evaluate each epoch, the run to go on
            with was begun with other arguments, images, stages or starting weights, another run is writing to
            `output_dir`, or a file to go on from is damaged.
        OSError: if `output_dir` is full or cannot be written.
    """
    _check_stages(trainer, stages)
    folder = Path(trainer.args.output_dir, RUNS_FOLDER)
    lock = run_lock(folder) if trainer.is_world_process_zero() else nullcontext()
    with clear_disk_errors(trainer.args.output_dir), lock:
        return _run_stages(trainer, stages, resume)


def _run_stages(trainer: SGDRTrainer, stages: Sequence[Stage], resume: bool) -> RunResults:
    progress = _progress(trainer, stages, resume)
    trainer.history.curves = progress.curves  # which the fits go on with
    best = KeepBestWeights(
        trainer.model, progress.folder / "best.safetensors", judged_losses(trainer), by=trainer.args.best_by
    )
    trainer.add_callback(best)
    try:
        for number, stage in enumerate(stages):
            if number < len(progress.stages):
                continue
            with (
                scoped.attributes(trainer.args, precompute_views=_views(trainer, stage)),
                training_batch_size(trainer, stage.batch_size(trainer.args.train_batch_size)),
            ):
                if stage.precompute and not stage.solve and not any(before.precompute for before in stages[:number]):
                    _solve_beside(trainer, progress, best)
                start = time.perf_counter()
                set_seed(trainer.args.seed)
                _prepare(trainer, stage, number)
                best.stage = stage.name
                if stage.solve:
                    record = solved_record(trainer, best.losses, name=stage.name)
                    progress.solved = progress.solved or record
                else:
                    record = _train(trainer, stage, progress, best)
                    record["seconds"] = round(time.perf_counter() - start, 2)  # with the range test
            trainer.accelerator.wait_for_everyone()
            if trainer.is_world_process_zero():
                progress.finish_stage(trainer.model, record)
            else:
                progress.stages.append(record)
    finally:
        trainer.remove_callback(best)
    trainer.precompute = False
    trainer.accelerator.wait_for_everyone()  # the main process has written the best weights
    best.restore()
    results = RunResults(
        trainer.args.world_size,
        progress.stages,
        best.metrics,
        run=run_key(progress.depends_on),
        solved=progress.solved,
    )
    if trainer.is_world_process_zero() and not is_stream(trainer.train_dataset):
        write_image_hashes(rows_of(trainer.train_dataset), trainer.args.image_column_name, progress.folder)
    trainer.history.run = tuple(stages), results
    if trainer.is_world_process_zero() and trainer.history.curves:
        trainer.history.plot().savefig(Path(trainer.args.output_dir, RUN_PICTURE))
    return results


def _views(trainer: SGDRTrainer, stage: Stage) -> int:
    """How many stored views a stage has; none where the training transform does not augment."""
    if stage.views and not trainer.train_transform.is_random:
        logger.warning(f"{stage.name}: views={stage.views} have no effect: the training transform augments nothing.")
        return 0
    return stage.views or trainer.args.precompute_views


def _train(trainer: SGDRTrainer, stage: Stage, progress: RunProgress, best: KeepBestWeights) -> FitRecord:
    """A stage that trains: from where it begins to its average; the model has the weights that it ends with."""
    is_main = trainer.is_world_process_zero()
    begun = None
    if stage.from_best or stage.average:
        begun = progress.begin_stage(stage.name, trainer.model, best if stage.from_best else None, is_main)
    if stage.name not in progress.rates:
        before = next((rates[-1] for rates in reversed(progress.rates.values())), None)
        progress.rates[stage.name] = _rates(trainer, stage, before)
        if is_main:
            progress.save()
    _fit(trainer, stage, progress.rates[stage.name], newest_checkpoint(progress.folder / stage.name))
    record = trainer.history.fits[-1].copy()
    if not best.metrics:
        raise ValueError(
            f"Stage {stage.name!r}: no evaluation gave a finite {' and '.join(best.losses)}, by which the best "
            "weights are chosen: look at label_names, compute_metrics and the validation images."
        )
    if is_main and varies(trainer.learning_rates()):
        save_plot(trainer.plot_lr(), Path(trainer.args.output_dir, f"{stage.name}-learning-rate.png"))
    if stage.average and begun is not None:
        best.stage = f"{stage.name} (average)"
        average_with_start(trainer, begun)
    return record


def _solve_beside(trainer: SGDRTrainer, progress: RunProgress, best: KeepBestWeights) -> None:
    """The yardstick: what algebra makes of the same features. Its weights may be the best; training goes on without."""
    if progress.solved is not None:
        return
    best.stage = SOLVED_HEAD
    try:
        progress.solved = solved_record(trainer, best.losses, name=SOLVED_HEAD, keep=False)
    except ValueError as error:
        logger.warning(f"No solved head beside the stages: {error}")
    trainer.accelerator.wait_for_everyone()  # the main process has written the best weights
    if trainer.is_world_process_zero():
        progress.save()


def is_finished(trainer: SGDRTrainer, stages: Sequence[Stage]) -> bool:
    """Whether the trainer's `output_dir` holds the results of this very run, and its model.

    Results of another run, of other images for example, do not count, and the log says so.

    Args:
        trainer ([`SGDRTrainer`]), stages (sequence of [`Stage`]): as for [`run_stages`], nothing trained yet.
    """
    folder = Path(trainer.args.output_dir)
    path = folder / "results.json"
    if not path.exists() or not (folder / "config.json").exists() or not any(folder.glob("model*.safetensors")):
        return False
    try:
        run = json.loads(path.read_text(encoding="utf-8")).get("run")
    except (ValueError, AttributeError):
        run = None
    progress = RunProgress(folder / RUNS_FOLDER, _depends_on(trainer, stages))
    if run == run_key(progress.depends_on):
        return True
    if not progress.exists and trainer.is_world_process_zero():
        logger.warning(
            f"{path} is of another run: of other images, arguments, stages or starting weights, or of an earlier "
            "version. This run begins anew."
        )
    return False


def _progress(trainer: SGDRTrainer, stages: Sequence[Stage], resume: bool) -> RunProgress:
    """What is done already, the model's weights with it; a run that begins finds an empty place."""
    folder = Path(trainer.args.output_dir, RUNS_FOLDER)
    if not (resume and (folder / "progress.json").exists()):
        trainer.history.starting_weights = None
    progress = RunProgress(folder, _depends_on(trainer, stages))
    trainer.history.starting_weights = progress.depends_on["starting weights"]
    with trainer.accelerator.main_process_first():
        if resume and progress.exists:
            progress.load()
        elif trainer.is_world_process_zero():
            progress.set_aside()
    if progress.stages and trainer.is_world_process_zero():
        done = ", ".join(stage["name"] for stage in progress.stages)
        print(f"Going on with the run in {trainer.args.output_dir}; done: {done}.", flush=True)
    progress.restore_weights(trainer.model)
    if trainer.is_world_process_zero():
        progress.save()
    trainer.accelerator.wait_for_everyone()
    return progress


def _depends_on(trainer: SGDRTrainer, stages: Sequence[Stage]) -> dict[str, Any]:
    args = {name: value for name, value in trainer.args.to_dict().items() if not NO_EFFECT_ON_RESULT.match(name)}
    config = trainer.model.config.to_dict()
    images = {"training images": trainer.train_dataset}
    if isinstance(trainer.eval_dataset, dict):
        images |= {f"validation images ({name})": dataset for name, dataset in trainer.eval_dataset.items()}
    else:
        images["validation images"] = trainer.eval_dataset
    return {
        **json.loads(json.dumps(args, default=str)),
        "feature_dtype": trainer.features.dtype,  # what "auto" means depends on the machine
        "stages": [asdict(stage) for stage in stages],
        "model": config.get("architecture") or type(trainer.model).__name__,
        "classes": list(class_names(trainer.model.config)),
        # in a trainer that was interrupted, weights are no longer those that it began with
        "starting weights": trainer.history.starting_weights or module_hash(trainer.model),
        "transforms": [trainer.train_transform.to_dict(), trainer.eval_transform.to_dict()],
        "processes": trainer.args.world_size,
        **{name: trainer.images.content_hash(dataset) for name, dataset in images.items()},
    }


def _prepare(trainer: SGDRTrainer, stage: Stage, number: int) -> None:
    """Freeze, and precompute or not, as the stage says; augmentation is drawn by the number of the stage."""
    trainer.num_fits = number
    trainer.precompute = False
    trainer.freeze_to(stage.freeze_to)
    trainer.layer_groups.freeze_batch_norm = stage.freeze_batch_norm
    if stage.precompute:
        trainer.features.check()
        # not by the setter, which warns that augmentation has no effect: such a stage says that it wants plain images
        trainer.features.are_used = True


def _fit(trainer: SGDRTrainer, stage: Stage, rates: list[float], checkpoint: Path | None) -> None:
    _announce(trainer, stage, rates)
    callbacks: list[TrainerCallback] = []
    if stage.until_overfitting:
        callbacks.append(StopWhenOverfitting(judged_losses(trainer)))
    if stage.snapshots:
        callbacks.append(SnapshotCallback())
    for callback in callbacks:
        trainer.add_callback(callback)
    try:
        trainer.fit(
            rates,
            stage.num_cycles,
            cycle_len=stage.cycle_len,
            cycle_mult=stage.cycle_mult,
            name=stage.name,
            resume_from_checkpoint=str(checkpoint) if checkpoint is not None else None,
        )
    finally:
        for callback in callbacks:
            trainer.remove_callback(callback)


def _check_stages(trainer: SGDRTrainer, stages: Sequence[Stage]) -> None:
    """Everything that could stop a later stage is said before the first one begins."""
    names = [stage.name for stage in stages]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"Stages {names}: give at least one, each with a name of its own.")
    if trainer.args.eval_strategy != "epoch" or trainer.eval_dataset is None:
        raise ValueError('A recipe keeps the best weights, so it needs an eval_dataset and eval_strategy="epoch".')
    if "labels" not in trainer.label_names:
        raise ValueError(
            f"label_names={trainer.label_names}: images come with `labels`, without which an evaluation has no "
            "eval_loss to choose the best weights by: leave label_names out."
        )
    if is_stream(trainer.train_dataset) and not all(stage.precompute for stage in stages):
        stage = next(stage for stage in stages if not stage.precompute)
        raise ValueError(f"Stage {stage.name!r} trains on the images of a stream: {MATERIALISE}")
    for number, stage in enumerate(stages):
        if stage.lr is None and not stage.solve and number and all(before.solve for before in stages[:number]):
            raise ValueError(f"Stage {stage.name!r}: no stage before it has a rate: give it lr, a number or 'auto'.")
    groups = trainer.layer_groups
    frozen = groups.frozen
    try:
        for stage in stages:
            try:
                if stage.lr is not None and not isinstance(stage.lr, str):
                    groups.learning_rates(stage.lr)
                groups.freeze_to(stage.freeze_to)
                if stage.precompute:
                    trainer.features.check()
            except ValueError as error:
                raise ValueError(f"Stage {stage.name!r}: {error}") from error
    finally:
        groups.freeze_to(frozen)


def _rates(trainer: SGDRTrainer, stage: Stage, before: float | None) -> list[float]:
    """The stage's rates: given, found by the range test, or those of the stage before."""
    if isinstance(stage.lr, list | tuple):
        return trainer.layer_groups.learning_rates(stage.lr)
    if stage.lr is not None and not isinstance(stage.lr, str):
        return _spread(trainer, stage, float(stage.lr))
    if stage.lr is None:
        return _spread(trainer, stage, before or FALLBACK_LR)
    found = trainer.lr_find(
        stage.range_test_start,
        stage.range_test_end,
        stage.range_test_steps,
        group_learning_rates=_spread(trainer, stage, 1.0),
    )
    rate = _suggested(found, stage, before)
    if trainer.is_world_process_zero() and found.history["lr"]:
        save_plot(found.plot(chosen=rate), Path(trainer.args.output_dir, f"{stage.name}-range-test.png"))
    return _spread(trainer, stage, rate)


def _suggested(found: LRRangeResult, stage: Stage, before: float | None) -> float:
    """The lesson's suggestion, at most the rate of the stage before.

    With a head that is trained already the loss has nowhere to fall, and the question is how far a rate can go: what
    lies below it gets half of the one at which the loss takes off, or the last one that was tested, if it never does,
    at most a third of the head's.
    """
    edge, last = found.edge(), (found.history["lr"] or [stage.range_test_start])[-1]
    bound = last if edge is None else edge / BELOW_EDGE
    if before is not None and stage.freeze_to != -1:
        return min(bound, before / BELOW_HEAD)
    rate = found.suggestion()
    if rate is None:
        reason, rate = f"suggests no rate ({found.reason})", min(bound, before or FALLBACK_LR)
    elif before is None or rate <= before:
        # Where the loss still falls at the end, the suggestion keeps a decade away: a test that ends low need not.
        return max(rate, min(bound, before or FALLBACK_LR)) if rate == last / 10 else rate
    else:
        reason, rate = f"suggests {rate:.1e}, more than what the stage before had", before
    logger.warning(f"{stage.name}: the range test {reason}; going on with {rate:.1e}.")
    return rate


def _spread(trainer: SGDRTrainer, stage: Stage, head_rate: float) -> list[float]:
    count = len(trainer.layer_groups)
    return [head_rate / stage.lr_spread ** (count - 1 - i) for i in range(count)]


def _announce(trainer: SGDRTrainer, stage: Stage, rates: list[float]) -> None:
    if trainer.is_world_process_zero():
        trained = trainer.layer_groups.names[trainer.layer_groups.frozen :]
        shown = ", ".join(
            f"{name} {rate:.1e}"
            for name, rate in zip(trainer.layer_groups.names, rates, strict=True)
            if name in trained
        )
        print(
            f"\n{stage.name}: {'precomputed features, ' if stage.precompute else ''}learning rate {shown}", flush=True
        )


def save_results(results: RunResults, path: Path) -> None:
    """Write `results.json`, under a temporary name first; the run is finished, nothing is left to go on with."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, (json.dumps(results.to_dict(), indent=2) + "\n").encode())
    RunProgress.finish(path.parent / RUNS_FOLDER, [stage["name"] for stage in results.stages])
