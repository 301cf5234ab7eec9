"""How far a recipe is, on disk: what `run_stages(resume=True)` goes on from.

Below `output_dir/_runs` lie `progress.json`, the best weights, and for each stage a folder with its checkpoints and,
when it is done, the weights it ended with. Each file is replaced, never half written, and in an order that makes every
moment one to go on from: the weights of a stage before the word that it is done, that word before anything is removed.
"""

import hashlib
import json
import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from transformers import PreTrainedModel
from transformers.utils import logging

from hf_sgdr._utils.files import RUN_PICTURE, STAGE_PLOTS, UNFINISHED_RUNS_FOLDER
from hf_sgdr._utils.store import damaged, load_weights, replace_file, replace_weights
from hf_sgdr.callbacks.best_weights import KeepBestWeights
from hf_sgdr.recipe import FitRecord
from hf_sgdr.training.history import FitCurve

logger = logging.get_logger(__name__)

_LOCK = "lock.json"
# Of progress.json and what lies beside it; raised when a run can no longer go on from what an older version left.
_FORMAT = 3
_MEND = ", so there is nothing to go on with: begin the run anew, do not resume."


def run_key(depends_on: dict[str, Any]) -> str:
    """SHA-256 of what a run depends on: two runs with the same one do the same."""
    return hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Inside, no other run of this machine writes to the folder; the lock of a process that is dead is taken over.

    Args:
        folder (`Path`): `output_dir/_runs`.

    Raises:
        ValueError: if another run has it, with that run's process id.
    """
    path = folder / _LOCK
    own = {"pid": os.getpid(), "started": psutil.Process().create_time(), "machine": platform.node()}
    folder.mkdir(parents=True, exist_ok=True)
    for _ in range(2):
        try:
            with path.open("x", encoding="utf-8") as file:
                json.dump(own, file)
            break
        except FileExistsError:
            _require_stale(path, own)
            path.unlink(missing_ok=True)
    else:
        raise ValueError(f"Another run has just begun in {folder.parent}: wait for it, or give another output_dir.")
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def _require_stale(path: Path, own: dict[str, Any]) -> None:
    try:
        holder = json.loads(path.read_text(encoding="utf-8"))
        pid, started, machine = holder["pid"], holder["started"], holder["machine"]
    except (OSError, ValueError, KeyError, TypeError):
        return  # its process died while it wrote it
    if machine != own["machine"]:  # whether it still runs cannot be seen from here, and machines come and go
        logger.warning(f"{path}: taken over from process {pid} on {machine}. If that run goes on, stop one of the two.")
        return
    try:
        # the same number may be another process by now
        is_alive = abs(psutil.Process(pid).create_time() - started) < 1.0
    except psutil.NoSuchProcess:
        return
    except psutil.AccessDenied:
        is_alive = True
    if is_alive:
        raise ValueError(
            f"{path.parent.parent} is being written by another run, process {pid}: wait for it, stop it, or give "
            "another output_dir."
        )


class RunProgress:
    """The progress of one run.

    Args:
        folder (`Path`): `output_dir/_runs`.
        depends_on (`dict`): plain values, all that decides what the run does; a run goes on only with the same.
    """

    def __init__(self, folder: Path, depends_on: dict[str, Any]) -> None:
        self.folder = folder
        self.depends_on: dict[str, Any] = json.loads(json.dumps(depends_on))
        self.stages: list[FitRecord] = []
        self.rates: dict[str, list[float]] = {}
        self.solved: FitRecord | None = None
        self.curves: list[FitCurve] = []

    @property
    def exists(self) -> bool:
        """Whether there is a run that was begun here."""
        return (self.folder / "progress.json").exists()

    def load(self) -> None:
        """Go on with the run that was begun here.

        Raises:
            ValueError: if it was begun with other arguments or by another version, or `progress.json` is damaged;
                nothing is changed.
        """
        path = self.folder / "progress.json"
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            made_by = content.get("format", 1)
            before, stages, rates = content["depends_on"], content["stages"], content["rates"]
            solved, curves = content.get("solved"), content.get("curves", [])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise damaged(path, error, _MEND) from error
        if made_by != _FORMAT:
            raise ValueError(
                f"The run in {self.folder.parent} was begun by another version of hf_sgdr (its progress has format "
                f"{made_by}, this version's {_FORMAT}): begin it anew without resuming, or give another output_dir."
            )
        changed = sorted(
            name for name in before.keys() | self.depends_on.keys() if before.get(name) != self.depends_on.get(name)
        )
        if changed:
            words = "; ".join(
                f"{name} was {_short(before.get(name))} and is now {_short(self.depends_on.get(name))}"
                for name in changed[:3]
            )
            raise ValueError(
                f"The run in {self.folder.parent} was begun otherwise: {words}. To go on with it, give what was given "
                f"then{_SEED if changed == ['starting weights'] else ''}; to begin another one, give another "
                "output_dir or do not resume."
            )
        self.stages, self.rates, self.solved, self.curves = stages, rates, solved, curves

    def save(self) -> None:
        """Write `progress.json`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        content = {
            "format": _FORMAT,
            "depends_on": self.depends_on,
            "stages": self.stages,
            "rates": self.rates,
            "solved": self.solved,
            "curves": self.curves,
        }
        replace_file(self.folder / "progress.json", json.dumps(content, indent=1).encode())

    def set_aside(self) -> None:
        """Make room for a run that begins: what an unfinished one left is kept beside it, and the log says so."""
        if self.exists:
            kept = self.folder.with_name(UNFINISHED_RUNS_FOLDER)
            logger.warning(
                f"{self.folder.parent} holds an unfinished run. Resuming goes on with it; this one begins anew, and "
                f"what that one left is kept in {kept}, in place of an older one."
            )
            shutil.rmtree(kept, ignore_errors=True)
            kept.mkdir()
            for path in self.folder.iterdir():
                if path.name != _LOCK:
                    shutil.move(path, kept / path.name)  # the folder may be a link to another disk
        (self.folder / "best.safetensors").unlink(missing_ok=True)
        shutil.rmtree(self.folder / "snapshots", ignore_errors=True)
        (self.folder.parent / RUN_PICTURE).unlink(missing_ok=True)
        for stage in self.depends_on["stages"]:
            shutil.rmtree(self.folder / stage["name"], ignore_errors=True)
        for plot in STAGE_PLOTS:  # of an earlier run, which may have had another recipe
            for path in self.folder.parent.glob(plot):
                path.unlink()

    def begin_stage(self, name: str, model: PreTrainedModel, best: KeepBestWeights | None, is_main: bool) -> Path:
        """Keep the weights that a stage begins with, so that it begins with them again if it is interrupted.

        Args:
            name (`str`), model: the stage, and what it trains.
            best ([`KeepBestWeights`] or None): begin from the best weights; None is from those of the model.
            is_main (`bool`): whether this process writes.

        Returns:
            `Path`: a safetensors file.
        """
        path = self.folder / name / "start.safetensors"
        if path.exists():
            load_weights(model, path, _MEND)
        elif best is not None:
            best.restore()
        if is_main and not path.exists():
            replace_weights(path, model)
        return path

    def finish_stage(self, model: PreTrainedModel, record: FitRecord) -> None:
        """Note that a stage is done, with its weights; what it took to get there is removed."""
        name = record["name"]
        folder = self.folder / name
        folder.mkdir(parents=True, exist_ok=True)
        replace_weights(folder / "weights.safetensors", model)
        before = [stage["name"] for stage in self.stages]
        self.stages.append(record)
        self.save()
        (folder / "start.safetensors").unlink(missing_ok=True)
        for path in folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
        for earlier in before:
            shutil.rmtree(self.folder / earlier, ignore_errors=True)

    def restore_weights(self, model: PreTrainedModel) -> None:
        """Give the model the weights that the last finished stage ended with."""
        if self.stages:
            load_weights(model, self.folder / self.stages[-1]["name"] / "weights.safetensors", _MEND)

    @staticmethod
    def finish(folder: Path, names: list[str]) -> None:
        """The run's results are written: nothing is left to go on with, only the best weights stay."""
        (folder / "progress.json").unlink(missing_ok=True)
        for name in names:
            shutil.rmtree(folder / name, ignore_errors=True)


# A fresh head is random, so without a seed it is another one each time.
_SEED = " (call transformers.set_seed before the model is made)"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
