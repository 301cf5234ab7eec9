"""What extraction takes of memory and time at 1,000 and at 50,000 photos, and what a second process brings.

Each measurement is a process of its own; the photos are links to the given ones, over and over. The network is small
and its input 64 pixels wide, so that 50,000 photos take minutes: what grows with their number does so here too.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

CHILD = """
import json, os, resource, sys, time
import torch
from hf_sgdr import LayerGroups, create_image_classifier, image_transforms
from hf_sgdr.memory import keep_freed_memory
from hf_sgdr.photos import PhotoDataset
from hf_sgdr.precompute import extract_features

folder, count, rank, world = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
torch.set_num_threads(max(1, torch.get_num_threads() // world))
keep_freed_memory()
torch.manual_seed(0)
model = create_image_classifier(sys.argv[5], labels=["a", "b"], pretrained=False).eval()
model = model.to(memory_format=torch.channels_last)
head = LayerGroups.from_model(model).head
transform = image_transforms(model, image_size=int(sys.argv[6]))[1].fast()
files = sorted(os.listdir(folder))
photos = PhotoDataset([{"image": os.path.join(folder, files[i % len(files)])} for i in range(count)], transform)
start = time.perf_counter()
extract_features(model, head, photos, dtype=torch.float32, rank=rank, world_size=world)
seconds = time.perf_counter() - start
print(json.dumps({"seconds": seconds, "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}))
"""


def memory(files: list[Path], many: int) -> list[str]:
    """A table of peak memory and time a photo."""
    lines = ["| photos | peak memory, MB | ms a photo |", "|---|---|---|"]
    few = 1_000
    measured = {}
    for count in (few, many):
        (figures,) = _run(files, count, 1, "test_resnet", 64)
        measured[count] = (figures["peak_mb"], 1e3 * figures["seconds"] / count)
        lines.append(f"| {count:,} | {measured[count][0]:,.0f} | {measured[count][1]:.2f} |")
    growth = measured[many][0] - measured[few][0]
    ratio = measured[many][1] / measured[few][1]
    return [*lines, f"| growth | {growth:+,.0f} | {ratio:.2f} times |"]


def two_processes(files: list[Path]) -> list[str]:
    """Extraction by two processes, half of the processors each, against one with all."""
    seconds = {}
    for world in (1, 2):
        seconds[world] = max(figures["seconds"] for figures in _run(files, 2_048, world, "tf_efficientnet_lite0", 224))
    return [
        "| 2,048 photos, tf_efficientnet_lite0 | seconds |", "|---|---|",
        f"| one process | {seconds[1]:.1f} |", f"| two processes | {seconds[2]:.1f} |",
        f"| ratio | {seconds[1] / seconds[2]:.2f} |",
    ]  # fmt: skip


def _run(files: list[Path], count: int, world: int, model: str, size: int) -> list[dict[str, float]]:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place, "photos")
        folder.mkdir()
        for i, file in enumerate(files):
            (folder / f"{i:05d}{file.suffix}").symlink_to(file.absolute())
        environment = {**os.environ, "HF_SGDR_CACHE": str(Path(place, "cache"))}
        children = [
            subprocess.Popen(
                [sys.executable, "-c", CHILD, str(folder), str(count), str(rank), str(world), model, str(size)],
                env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            )
            for rank in range(world)
        ]  # fmt: skip
        return [json.loads(child.communicate()[0].splitlines()[-1]) for child in children]
