"""Two processes of half the processors each against one with all: extraction, and training of all layers.

The global batch is the same, so ideally both take the same time. Training runs through the launcher, as a user starts
it, and counts whole steps after a first one; each process reads its own clock.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from memory import EXTRACTION, linked

from hf_sgdr.demo import DEMO_MODEL, demo_weights_file

GLOBAL_BATCH, EXTRACTED = 64, 1_024

TRAINING = """
import json, os, sys, time
from datasets import ClassLabel, Dataset, Features, Image
from transformers import TrainerCallback
from hf_sgdr import SGDRTrainer, SGDRTrainingArguments, create_image_classifier, image_transforms

folder, weights, batch, place = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
files = sorted(os.path.join(folder, name) for name in os.listdir(folder))
rows = {"image": files, "label": [i % 2 for i in range(len(files))]}
images = Dataset.from_dict(rows, Features({"image": Image(), "label": ClassLabel(names=["a", "b"])}))
model = create_image_classifier("tf_efficientnet_lite0", labels=["a", "b"], weights_file=weights)
train, evaluation = image_transforms(model, image_size=224, augment="side_on", max_zoom=1.1)
args = SGDRTrainingArguments(
    place, use_cpu=True, eval_strategy="no", save_strategy="no", disable_tqdm=True, report_to="none",
    per_device_train_batch_size=batch // int(os.environ.get("WORLD_SIZE", "1")), micro_batch_size=32,
)

class Clock(TrainerCallback):
    def __init__(self):
        self.times = []

    def on_step_end(self, args, state, control, **kwargs):
        self.times.append(time.perf_counter())

clock = Clock()
trainer = SGDRTrainer(model, args, train_dataset=images, train_transform=train, eval_transform=evaluation,
                      callbacks=[clock])
trainer.unfreeze()
trainer.layer_groups.freeze_batch_norm = True
trainer.fit(1e-3, 1, cycle_len=1)
if trainer.is_world_process_zero():
    steps = len(clock.times) - 1
    print("result", json.dumps(batch * steps / (clock.times[-1] - clock.times[0])))
"""


def processes(files: list[Path], repetitions: int) -> list[str]:
    """A table of images a second, medians of several runs in turn."""
    trained: dict[int, list[float]] = {1: [], 2: []}
    extracted: dict[int, list[float]] = {1: [], 2: []}
    with linked(files[: 4 * GLOBAL_BATCH]) as folder:
        for number in range(repetitions):
            for world in (1, 2):
                trained[world].append(_train(folder, world))
                extracted[world].append(_extract(folder, world, f"{folder}-cache-{number}-{world}"))
    lines = [
        "| tf_efficientnet_lite0, images a second | one process | two processes | ratio |",
        "|---|---|---|---|",
    ]
    for what, rates in ((f"training, all layers, global batch {GLOBAL_BATCH}", trained), ("extraction", extracted)):
        one, two = statistics.median(rates[1]), statistics.median(rates[2])
        lines.append(f"| {what} | {one:,.1f} | {two:,.1f} | {two / one:.2f} |")
    return lines


def _train(folder: Path, world: int) -> float:
    with tempfile.TemporaryDirectory() as place:
        script = Path(place, "training.py")
        script.write_text(TRAINING)
        launch = [sys.executable, "-m", "accelerate.commands.launch"]
        launch += ["--multi_gpu", "--num_processes", str(world)] if world > 1 else []
        words = [str(folder), str(demo_weights_file()), str(GLOBAL_BATCH), place]
        done = subprocess.run([*launch, str(script), *words], stdout=subprocess.PIPE, text=True, check=True)
    return float(next(line.split()[1] for line in done.stdout.splitlines() if line.startswith("result")))


def _extract(folder: Path, world: int, cache: str) -> float:
    children = [
        subprocess.Popen(
            [sys.executable, "-c", EXTRACTION, str(folder), str(EXTRACTED), str(rank), str(world), DEMO_MODEL, "224"],
            env={**os.environ, "HF_SGDR_CACHE": cache}, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )
        for rank in range(world)
    ]  # fmt: skip
    seconds = [json.loads(child.communicate()[0].splitlines()[-1])["seconds"] for child in children]
    return EXTRACTED / max(seconds)
