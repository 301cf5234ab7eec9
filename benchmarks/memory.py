"""Peak memory of a child process alone: extraction at 1,000 and at 50,000 images, and the lesson.

Measured is the highest RssAnon that was sampled: pages that belong to the process, without files mapped into it, which
the system may drop. A first row shows that the measurement sees growth. For extraction the network is small and its
input 64 pixels wide, so that 50,000 images take minutes: what grows with their number does so here too.
"""

import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from hf_sgdr.demo import DEMO_MODEL, demo_weights_file

TRAIN = Path(__file__).parent.parent / "recipes" / "train.py"
LESSON = TRAIN.parent / "configs" / "lesson.yaml"
FEW, SAMPLED_EVERY, LEAK_MB = 1_000, 0.01, 100

EXTRACTION = """
import json, os, sys, time
import torch
from hf_sgdr import LayerGroups, create_image_classifier, image_transforms
from hf_sgdr._utils.system import keep_freed_memory
from hf_sgdr.data.dataset import ImageDataset
from hf_sgdr.features.extract import extract_features

folder, count, rank, world, model, size = sys.argv[1], *map(int, sys.argv[2:5]), sys.argv[5], int(sys.argv[6])
os.environ |= {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(world)}  # as the launcher says it
keep_freed_memory()
torch.manual_seed(0)
model = create_image_classifier(model, labels=["a", "b"], pretrained=False).eval()
model = model.to(memory_format=torch.channels_last)
head = LayerGroups.from_model(model).head
transform = image_transforms(model, image_size=size)[1].fast()
files = sorted(os.listdir(folder))
images = ImageDataset([{"image": os.path.join(folder, files[i % len(files)])} for i in range(count)], transform)
start = time.perf_counter()
extract_features(model, head, images, dtype=torch.float32, rank=rank, world_size=world)
print(json.dumps({"seconds": time.perf_counter() - start}))
"""
HELD = "import sys, time; held = b'1' * (int(sys.argv[1]) << 20); time.sleep(0.5)"


def memory(files: list[Path], data_dir: Path, many: int) -> list[str]:
    """A table of peak memory and time an image.

    Raises:
        RuntimeError: if the measurement does not see 100 MB that a process holds.
    """
    small, large = (peak_mb([sys.executable, "-c", HELD, str(held)])[0] for held in (1, LEAK_MB + 1))
    if not 0.95 * LEAK_MB <= large - small <= 1.1 * LEAK_MB:
        raise RuntimeError(f"{LEAK_MB} MB more are seen as {large - small:.0f} MB: these figures would say nothing.")
    lines = ["| what | peak memory, MB | ms an image |", "|---|---|---|"]
    lines.append(f"| self-test: a process that holds {LEAK_MB} MB more | {large - small:+,.0f} | |")
    peaks, milliseconds = {}, {}
    with linked(files) as folder:
        for count in (FEW, many):
            words = [str(folder), str(count), "0", "1", "test_resnet", "64"]
            peaks[count], output = peak_mb(
                [sys.executable, "-c", EXTRACTION, *words], HF_SGDR_CACHE=f"{folder}-{count}"
            )
            milliseconds[count] = 1e3 * json.loads(output.splitlines()[-1])["seconds"] / count
            lines.append(f"| extraction of {count:,} images | {peaks[count]:,.0f} | {milliseconds[count]:.2f} |")
    growth, ratio = peaks[many] - peaks[FEW], milliseconds[many] / milliseconds[FEW]
    lines.append(f"| growth | {growth:+,.0f} | {ratio:.2f} times |")
    random = ["--pretrained", "false", "--image_size", "288"]  # as many pixels as its weights would have
    weights = {DEMO_MODEL: ["--weights_file", str(demo_weights_file())], "resnet34": random}
    for model, words in weights.items():
        peak = lesson_peak(data_dir, [*words, "--model", model])
        lines.append(f"| lesson.yaml, {model} | {peak:,.0f} | |")
    return lines


def lesson_peak(data_dir: Path, words: list[str]) -> float:
    """Peak of `accelerate launch recipes/train.py recipes/configs/lesson.yaml`, each fit cut off after five steps.

    So are the images: five batches, and as many for validation as one, which take as much memory as all.
    """
    with tempfile.TemporaryDirectory() as place:
        launch = [sys.executable, "-m", "accelerate.commands.launch", str(TRAIN), str(LESSON)]
        words = ["--data_dir", str(data_dir), "--output_dir", f"{place}/out", "--max_steps", "5", *words]
        words += ["--max_train_samples", "320", "--max_eval_samples", "64"]
        return peak_mb([*launch, *words], HF_SGDR_CACHE=f"{place}/cache")[0]


def peak_mb(command: list[str], **variables: str) -> tuple[float, str]:
    """The highest RssAnon of any single process that a command starts, and what it printed.

    Raises:
        RuntimeError: if the command fails.
    """
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        process = psutil.Popen(command, env={**os.environ, **variables}, stdout=output, stderr=errors)
        peak = 0.0
        while process.poll() is None:
            peak = max([peak, *map(rss_anon_mb, [process, *_children(process)])])
            time.sleep(SAMPLED_EVERY)
        output.seek(0)
        errors.seek(0)
        if process.returncode != 0:
            raise RuntimeError(f"{' '.join(command[:4])} ... failed: {errors.read()[-2000:]}")
        return peak, output.read()


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return list(process.children(recursive=True))
    except psutil.Error:
        return []


def rss_anon_mb(process: psutil.Process) -> float:
    """What a process has in memory of its own, without mapped files; 0 if it has ended."""
    try:
        lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon")), 0.0)


@contextmanager
def linked(files: list[Path]) -> Iterator[Path]:
    """A folder of links to files, removed afterwards with all beside it."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place, "images")
        folder.mkdir()
        for i, file in enumerate(files):
            (folder / f"{i:05d}{file.suffix}").symlink_to(file.absolute())
        yield folder
