"""Bookkeeping at 10,000, 100,000 and 1,000,000 images: seconds and growth of memory of each step.

    python benchmarks/million.py [--counts 10000 100000 1000000] [--write]

By simulation: the images are links to a few pictures of 8 x 8 pixels, and rows of features are made up, so that what is
measured is the work that grows with the number of images and not the network's. The second run is a new process, on the
files and the store of the first one. Growth is of pages that belong to the process (RssAnon), against its start.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image
from timing import write_section

PICTURES, CLASSES, WIDTH = 8, 10, 64
COUNTS = [10_000, 100_000, 1_000_000]

RUN = """
import json, os, sys, time, threading
import torch
from hf_sgdr import image_transforms, load_image_folder, load_image_table
from hf_sgdr.data.dataset import ImageDataset
from hf_sgdr.features.head import FeatureDataset
from hf_sgdr.features.store import FeatureStore
from hf_sgdr.models.classifiers import create_image_classifier

folder, is_second = sys.argv[1], sys.argv[2] == "second"
transform = image_transforms(create_image_classifier("test_resnet", labels=["a", "b"], pretrained=False))[1].fast()
steps = {}

def held():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024

highest, is_done = [held()], threading.Event()

def watch():
    while not is_done.wait(0.01):
        highest[0] = max(highest[0], held())

threading.Thread(target=watch, daemon=True).start()
base = held()

def step(name, work):
    highest[0] = held()
    start = time.perf_counter()
    result = work()
    steps[name] = [time.perf_counter() - start, max(highest[0], held()) - base]
    return result

rows = step("list, label and audit the files", lambda: load_image_folder(folder)["train"])
images = ImageDataset(rows, transform)
key = step("key: hash all images", images.content_hash)
labels = step("labels", lambda: torch.as_tensor(images.labels()))
store = FeatureStore({"photos": key}, len(rows))
missing = step("plan: what the store lacks", store.missing)
half = len(missing) // 2

def write(shards):
    for shard in shards:
        store.write(shard, torch.rand(len(store.shard_rows(shard)), WIDTH))

if is_second:
    assert not missing, missing
else:
    assert len(missing) == store.num_shards
    step("write rows and manifest, half of them", lambda: write(missing[:half]))
    missing = step("what is left, as a resumed run finds it", store.missing)
    assert len(missing) == store.num_shards - half
    step("write the rest", lambda: write(missing))
on_disk = step("open the store", store.open)

def epoch():
    rows_of = FeatureDataset([on_disk], labels)
    order = torch.randperm(len(rows_of), generator=torch.Generator().manual_seed(0)).tolist()
    for start in range(0, len(order), 64):
        rows_of.__getitems__(order[start : start + 64])

step("an epoch of rows from disk, shuffled", epoch)
step("a table of them, no image looked at", lambda: load_image_table(folder + "/table.csv", on_error=None))
is_done.set()
print(json.dumps(steps))
"""


def million(counts: list[int]) -> list[str]:
    """A table: each step of a first and of a second run, by the number of images."""
    seconds: dict[str, dict[int, tuple[float, float]]] = {}
    for count in counts:
        with linked(count) as folder:
            for run in ("first", "second"):
                words = [sys.executable, "-c", RUN.replace("WIDTH", str(WIDTH)), str(folder), run]
                environment = {**os.environ, "HF_SGDR_CACHE": f"{folder}-cache", "HF_HOME": f"{folder}-hf"}
                start = time.perf_counter()
                done = subprocess.run(words, env=environment, check=True, stdout=subprocess.PIPE, text=True)
                steps = json.loads(done.stdout.splitlines()[-1])
                steps["all of it, imports too"] = [time.perf_counter() - start, max(mb for _, mb in steps.values())]
                for name, (took, grown) in steps.items():
                    seconds.setdefault(f"{run} run: {name}", {})[count] = took, grown
    head = "| what | " + " | ".join(f"{count:,}: s | MB more" for count in counts) + " |"
    lines = [head, "|---" * (1 + 2 * len(counts)) + "|"]
    for name, by_count in seconds.items():
        cells = " | ".join(f"{by_count[count][0]:,.2f} | {by_count[count][1]:+,.0f}" for count in counts)
        lines.append(f"| {name} | {cells} |")
    return lines


@contextmanager
def linked(count: int) -> Iterator[Path]:
    """A folder of so many links to a few small pictures, in ten classes, and one a class for validation."""
    with tempfile.TemporaryDirectory() as place:
        pictures, folder = Path(place, "pictures"), Path(place, "images")
        pictures.mkdir()
        for number in range(PICTURES):
            pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(pictures / f"{number}.jpg")
        for split, images in (("train", count), ("valid", CLASSES)):
            for kind in range(CLASSES):
                (folder / split / f"class-{kind}").mkdir(parents=True)
            for i in range(images):
                target = f"{pictures}/{i % PICTURES}.jpg"
                os.symlink(target, f"{folder}/{split}/class-{i % CLASSES}/{i:07d}.jpg")
        rows = [f"train/class-{i % CLASSES}/{i:07d}.jpg,class-{i % CLASSES}\n" for i in range(count)]
        Path(folder, "table.csv").write_text("file_name,label\n" + "".join(rows), encoding="utf-8")
        yield folder


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", type=int, nargs="+", default=COUNTS)
    parser.add_argument("--write", action="store_true", help="write benchmarks/RESULTS.md")
    options = parser.parse_args()
    lines = million(options.counts)
    print("\n".join(lines))
    if options.write:
        write_section("A million images", lines, "one run each")


if __name__ == "__main__":
    main()
