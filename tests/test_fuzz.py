"""Images changed at random: each is read or reported, the process never dies and no worker hangs."""

import io
import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

COUNT = 900
CODE = """
import json, sys, torch
from torch.utils.data import DataLoader
from hf_sgdr import create_image_classifier, image_transforms, load_image_folder
from hf_sgdr.data.dataset import ImageDataset
from hf_sgdr.data.images import read_image
images = load_image_folder(sys.argv[1], on_error="skip")
torch.manual_seed(0)
model = create_image_classifier("test_resnet", labels=["a", "b"], pretrained=False)
train, evaluation = image_transforms(model, image_size=32, augment="side_on", max_zoom=1.1)
rows = images["train"]
read = set()
for workers in (0, 2):
    for transform in (train, evaluation, evaluation.fast()):
        dataset = ImageDataset(rows, transform)
        loader = DataLoader(dataset, 32, num_workers=workers, timeout=60 if workers else 0)
        assert sum(len(batch["labels"]) for batch in loader) == len(rows)
print(json.dumps([row["image"]["path"] for row in dataset.rows]))
"""


def originals(folder) -> list[bytes]:
    """Real images, and the same in other formats."""
    images = [path.read_bytes() for path in sorted(folder.glob("train/cats/*.jpg"))[:12]]
    others = []
    for number, (kind, mode) in enumerate(
        [("PNG", "RGB"), ("PNG", "P"), ("GIF", "P"), ("WEBP", "RGB"), ("TIFF", "CMYK"), ("BMP", "RGB"), ("JPEG", "L")]
    ):
        image = Image.open(io.BytesIO(images[number])).convert("RGB").resize((160, 120)).convert(mode)
        file = io.BytesIO()
        image.save(file, kind)
        others.append(file.getvalue())
    return images + others


def mutated(rng: np.random.Generator, content: bytes, other: bytes) -> bytes:
    """Bytes flipped, cut off, cut out, doubled or spliced with those of another file; headers are hit as often."""
    data = bytearray(content)
    end = len(data) if rng.random() < 0.5 else min(1024, len(data))
    kind = rng.integers(6)
    if kind == 0:
        for at in rng.integers(0, end, rng.integers(1, 60)):
            data[at] ^= 1 << int(rng.integers(8))
    elif kind == 1:
        del data[int(rng.integers(0, end)) :]
    elif kind == 2:
        start = int(rng.integers(0, end))
        del data[start : start + int(rng.integers(1, 4000))]
    elif kind == 3:
        start = int(rng.integers(0, end))
        data[start:start] = data[start : start + int(rng.integers(1, 4000))]
    elif kind == 4:
        boundary = int(rng.integers(0, end))
        data = data[:boundary] + other[int(rng.integers(0, len(other))) :]
    else:
        start = int(rng.integers(0, end))
        data[start : start + int(rng.integers(1, 64))] = rng.bytes(int(rng.integers(1, 64)))
    return bytes(data)


@pytest.mark.fuzz
@pytest.mark.photos
def test_mutated_images_are_read_or_reported(tmp_path, shared_photos):
    rng = np.random.default_rng(0)
    sources = originals(shared_photos / "dogscats")
    for split, classes in {"train": ("a", "b"), "valid": ("a", "b")}.items():
        for name in classes:
            (tmp_path / split / name).mkdir(parents=True)
            (tmp_path / split / name / "whole.jpg").write_bytes(sources[0])
    for number in range(COUNT):
        content, other = (sources[i] for i in rng.integers(0, len(sources), 2))
        path = tmp_path / "train" / "ab"[number % 2] / f"{number:04d}.jpg"
        path.write_bytes(mutated(rng, content, other))
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", CODE, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    read = {path for path in json.loads(done.stdout.splitlines()[-1]) if not path.endswith("whole.jpg")}
    reported = {line.split(": left out")[0] for line in done.stderr.splitlines() if ": left out, it cannot" in line}
    assert not read & reported
    assert len(read | reported) == COUNT
    assert min(len(read), len(reported)) > COUNT // 10  # the mutations are neither all harmless nor all fatal
