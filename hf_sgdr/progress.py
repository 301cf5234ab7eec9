"""How far a recipe is, on disk: what `run_stages(resume=True)` goes on from.

Below `output_dir/_runs` lie `progress.json`, the best weights, and for each stage a folder with its checkpoints and,
when it is done, the weights it ended with. Each file is replaced, never half written, and in an order that makes every
moment one to go on from: the weights of a stage before the word that it is done, that word before anything is removed.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_model
from transformers import PreTrainedModel
from transformers.utils import logging

from hf_sgdr.shards import replace_file, replace_weights

logger = logging.get_logger(__name__)

_UNFINISHED = "_runs-unfinished"


class RunProgress:
    """The progress of one run.

    Args:
        folder (`Path`): `output_dir/_runs`.
        depends_on (`dict`): plain values, all that decides what the run does; a run goes on only with the same.
    """

    def __init__(self, folder: Path, depends_on: dict[str, Any]) -> None:
        self.folder = folder
        self.depends_on: dict[str, Any] = json.loads(json.dumps(depends_on))
        self.stages: list[dict[str, Any]] = []
        self.rates: dict[str, list[float]] = {}

    @property
    def exists(self) -> bool:
        """Whether there is a run that was begun here."""
        return (self.folder / "progress.json").exists()

    def load(self) -> None:
        """Go on with the run that was begun here.

        Raises:
            ValueError: if it was begun with other arguments; nothing is changed.
        """
        content = json.loads((self.folder / "progress.json").read_text(encoding="utf-8"))
        before = content["depends_on"]
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
                "then; to begin another one, give another output_dir or leave out --resume."
            )
        self.stages, self.rates = content["stages"], content["rates"]

    def save(self) -> None:
        """Write `progress.json`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        names = ("depends_on", "stages", "rates")
        content = {name: getattr(self, name) for name in names}
        replace_file(self.folder / "progress.json", json.dumps(content, indent=1).encode())

    def set_aside(self) -> None:
        """Make room for a run that begins: what an unfinished one left is kept beside it, and the log says so."""
        if self.exists:
            kept = self.folder.with_name(_UNFINISHED)
            logger.warning(
                f"{self.folder.parent} holds an unfinished run. --resume goes on with it; this one begins anew, and "
                f"what that one left is kept in {kept}, in place of an older one."
            )
            shutil.rmtree(kept, ignore_errors=True)
            self.folder.rename(kept)
        (self.folder / "best.safetensors").unlink(missing_ok=True)
        shutil.rmtree(self.folder / "snapshots", ignore_errors=True)
        for stage in self.depends_on["stages"]:
            shutil.rmtree(self.folder / stage["name"], ignore_errors=True)
            for plot in ("range-test", "learning-rate"):  # of an earlier run, which may have had another recipe
                (self.folder.parent / f"{stage['name']}-{plot}.png").unlink(missing_ok=True)

    def finish_stage(self, model: PreTrainedModel, figures: dict[str, Any]) -> None:
        """Note that a stage is done, with its weights; what it took to get there is removed."""
        name = figures["name"]
        folder = self.folder / name
        folder.mkdir(parents=True, exist_ok=True)
        replace_weights(folder / "weights.safetensors", model)
        before = [stage["name"] for stage in self.stages]
        self.stages.append(figures)
        self.save()
        for path in folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
        for earlier in before:
            shutil.rmtree(self.folder / earlier, ignore_errors=True)

    def restore_weights(self, model: PreTrainedModel) -> None:
        """Give the model the weights that the last finished stage ended with."""
        if self.stages:
            load_model(model, self.folder / self.stages[-1]["name"] / "weights.safetensors")

    @staticmethod
    def finish(folder: Path, names: list[str]) -> None:
        """The run's results are written: nothing is left to go on with, only the best weights stay."""
        (folder / "progress.json").unlink(missing_ok=True)
        for name in names:
            shutil.rmtree(folder / name, ignore_errors=True)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
