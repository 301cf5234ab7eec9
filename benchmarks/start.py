"""Where the time goes from the command to the first answer: the head on the features of a folder, through the launcher.

    accelerate launch recipes/train.py --stages precomputed --n_aug 0 --data_dir dogscats

from an empty cache. A child process runs the recipe with a clock around each kind of work of its main thread; time
counts for the innermost of them, so that the parts add up. Images are decoded by other threads, so of that only the
waiting shows, and what it takes from the forward passes beside it.
"""

import functools
import importlib._bootstrap
import json
import os
import runpy
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

TRAIN = Path(__file__).parent.parent / "recipes" / "train.py"
STARTED = "HF_SGDR_BENCHMARK_STARTED"
# The kinds of work, in the order of the table; what is in none of them is "the rest".
KINDS = (
    "launcher and imports", "audit of the images", "waiting for images", "forward passes", "keys of stores",
    "solving the head", "range test", "training the head", "card", "plots", "saving", "the rest",
)  # fmt: skip
NOT_OURS = ("launcher and imports", "forward passes")


def start(data_dir: Path, repetitions: int) -> list[str]:
    """A table of seconds, medians of several runs."""
    runs = [_run(data_dir) for _ in range(repetitions)]
    medians = {kind: statistics.median(run[kind] for run in runs) for kind in KINDS}
    images = int(statistics.median(run["images"] for run in runs))
    lines = [f"| what, {images} images, tf_efficientnet_lite0 | seconds |", "|---|---|"]
    lines += [f"| {kind} | {seconds:.2f} |" for kind, seconds in medians.items()]
    ours = statistics.median(sum(run[kind] for kind in KINDS if kind not in NOT_OURS) for run in runs)
    lines.append(f"| all but launcher, imports and forward passes | {ours:.2f} |")
    whole = statistics.median(sum(run[kind] for kind in KINDS) for run in runs)
    return [*lines, f"| from command to answer | {whole:.2f} |"]


def _run(data_dir: Path) -> dict[str, float]:
    from hf_sgdr.demo import DEMO_MODEL, demo_weights_file

    with tempfile.TemporaryDirectory() as place:
        words = ["--model", DEMO_MODEL, "--weights_file", str(demo_weights_file()), "--data_dir", str(data_dir)]
        words += ["--stages", "precomputed", "--n_aug", "0", "--output_dir", f"{place}/out", "--disable_tqdm", "true"]
        variables = {"HF_SGDR_CACHE": f"{place}/cache", STARTED: str(time.time())}
        command = [sys.executable, "-m", "accelerate.commands.launch", __file__, f"{place}/seconds.json", *words]
        subprocess.run(command, env={**os.environ, **variables}, check=True, stdout=subprocess.DEVNULL)
        seconds: dict[str, float] = json.loads(Path(place, "seconds.json").read_text())
        return seconds


class Clock:
    """Seconds of each kind of work; time within an inner one does not count for the outer."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(KINDS, 0.0)
        self._stack = ["the rest"]
        self._since = time.perf_counter()

    def _switch(self) -> None:
        now = time.perf_counter()
        self.seconds[self._stack[-1]] += now - self._since
        self._since = now

    def around(self, owner: Any, name: str, kind: str) -> None:
        """Count what a function takes for a kind; it is found where it is looked up when it is called."""
        function: Callable[..., Any] = getattr(owner, name)

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            if threading.current_thread() is not threading.main_thread():
                return function(*args, **kwargs)
            self._switch()
            self._stack.append(kind)
            try:
                return function(*args, **kwargs)
            finally:
                self._switch()
                self._stack.pop()

        setattr(owner, name, timed)

    def stop(self) -> dict[str, float]:
        """The seconds so far."""
        self._switch()
        return self.seconds


def _child() -> None:
    """What the launcher runs: the recipe, with clocks."""
    results, sys.argv = Path(sys.argv[1]), [str(TRAIN), *sys.argv[2:]]
    recipe = runpy.run_path(str(TRAIN), run_name="recipe")  # its imports
    import matplotlib.figure
    import torch
    from transformers import Trainer
    from transformers.models.timm_wrapper.modeling_timm_wrapper import TimmWrapperForImageClassification

    from hf_sgdr import SGDRTrainer
    from hf_sgdr.cli import build
    from hf_sgdr.data import folders
    from hf_sgdr.data.dataset import ImageDataset
    from hf_sgdr.features import extract, reader
    from hf_sgdr.optim import range_test

    clock = Clock()
    clock.seconds["launcher and imports"] = time.time() - float(os.environ[STARTED])
    images = []
    clock.around(importlib._bootstrap, "_find_and_load", "launcher and imports")  # those of functions, too
    clock.around(folders, "readable", "audit of the images")
    clock.around(Future, "result", "waiting for images")
    clock.around(ImageDataset, "content_hash", "keys of stores")
    clock.around(extract, "module_hash", "keys of stores")
    clock.around(TimmWrapperForImageClassification, "forward", "forward passes")
    clock.around(reader, "solve_head", "solving the head")
    clock.around(range_test.LRRangeTest, "run", "range test")
    clock.around(Trainer, "train", "training the head")
    clock.around(matplotlib.figure.Figure, "savefig", "plots")
    clock.around(SGDRTrainer, "save_model", "saving")
    clock.around(torch, "save", "saving")
    clock.around(SGDRTrainer, "create_model_card", "card")
    load = build.load_image_folder

    def counted(*args: Any, **kwargs: Any) -> Any:
        splits = load(*args, **kwargs)
        images.append(sum(map(len, splits.values())))
        return splits

    build.load_image_folder = counted
    status = recipe["main"](sys.argv[1:])
    results.write_text(json.dumps({**clock.stop(), "images": images[0]}))
    sys.exit(status)


if __name__ == "__main__":
    _child()
