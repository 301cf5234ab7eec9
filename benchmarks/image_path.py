"""Decoding and extraction: images a second from file to network input, and from file to stored feature."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timing import Row, medians
from timm.data import create_transform, resolve_data_config

from hf_sgdr import create_image_classifier, image_transforms
from hf_sgdr.data.dataset import ImageDataset
from hf_sgdr.demo import DEMO_MODEL, demo_weights_file
from hf_sgdr.features.extract import _depends_on, extract_features, resolve_feature_dtype
from hf_sgdr.features.reader import CPU_BATCH
from hf_sgdr.models.boundary import Boundary
from hf_sgdr.optim.layer_groups import LayerGroups
from hf_sgdr.training.arguments import default_num_workers


def decoding(files: list[Path], repetitions: int) -> list[Row]:
    """Images a second and core, from file to network input, against timm's evaluation transform on Pillow images."""
    model = create_image_classifier(DEMO_MODEL, labels=["a", "b"], weights_file=demo_weights_file())
    theirs = create_transform(**resolve_data_config(model.config.pretrained_cfg), is_training=False)
    train, exact = image_transforms(model, augment="side_on", max_zoom=1.1)
    kept = [train.to_keep(file) for file in files]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def every(read: Callable[[Any], Any], images: list[Any] = files) -> Callable[[], None]:
        return lambda: [read(image) for image in images] and None

    seconds = medians(
        {
            "timm": every(lambda file: theirs(Image.open(file).convert("RGB"))),
            "fast": every(lambda file: exact.fast().pixels(file, (0,))),
            "exact": every(lambda file: exact.pixels(file, (0,))),
            "augmented": every(lambda file: train.pixels(file, (1, 2, 3))),
            "worker's part": every(lambda file: train.unrendered(file, (1, 2, 3))),
            "cached": every(lambda pixels: train.of_kept(pixels, (1, 2, 3)), kept),
            "cached, worker's part": every(lambda pixels: train.unrendered(pixels, (1, 2, 3)), kept),
        },
        repetitions,
    )
    torch.set_num_threads(threads)
    rates = {name: len(files) / value for name, value in seconds.items()}
    against = "timm's evaluation transform, one core"
    return [
        ("decode and transform, as features are computed", against, rates["fast"], rates["timm"]),
        ("decode and transform, evaluation (the same pixels as timm)", against, rates["exact"], rates["timm"]),
        ("decode and transform, side_on and zoom", against, rates["augmented"], rates["timm"]),
        ("the same, a worker's part with augment_on_device", against, rates["worker's part"], rates["timm"]),
        ("side_on and zoom of decoded images (cache_images)", against, rates["cached"], rates["timm"]),
        ("the same, a worker's part with augment_on_device", against, rates["cached, worker's part"], rates["timm"]),
    ]


def extraction(files: list[Path], repetitions: int, device: str = "cpu") -> list[Row]:
    """Images a second of extraction, hashing, decoding and storing included, against the bare forward pass."""
    model = create_image_classifier(DEMO_MODEL, labels=["a", "b"], weights_file=demo_weights_file()).eval()
    model = model.to(torch.device(device), memory_format=torch.channels_last)
    batch_size, workers = CPU_BATCH if device == "cpu" else 64, default_num_workers()
    head = LayerGroups.from_model(model).head
    assert head is not None
    _, exact = image_transforms(model)
    images = ImageDataset([{"image": str(file)} for file in files], exact.fast())
    pixels = torch.stack([images[i]["pixel_values"] for i in range(len(files))])
    pixels = exact.normalize(pixels.to(device)).contiguous(memory_format=torch.channels_last)
    batches = pixels.split(batch_size)
    rows = []
    faster = resolve_feature_dtype(torch.device(device))
    for dtype in dict.fromkeys((faster, torch.float32)):
        name = str(dtype).removeprefix("torch.")

        def bare(dtype: torch.dtype = dtype) -> None:
            with torch.inference_mode(), torch.autocast(device, torch.bfloat16, enabled=dtype == torch.bfloat16):
                for batch in batches:
                    model(batch)

        def ours(dtype: torch.dtype = dtype) -> None:
            with tempfile.TemporaryDirectory() as place:
                os.environ["HF_SGDR_CACHE"] = place
                extract_features(model, head, images, dtype=dtype, batch_size=batch_size, num_workers=workers)

        def key(dtype: torch.dtype = dtype) -> None:
            _depends_on(model, Boundary.at_head(model, head), images, exact.fast(), dtype)

        seconds = medians({"bare": bare, "ours": ours, "key": key}, repetitions)
        rates = {key: len(files) / value for key, value in seconds.items()}
        what = f"extraction, {name}"
        rows.append((what, "the bare forward pass on a tensor in memory", rates["ours"], rates["bare"]))
        rows.append((f"the key alone (SHA-256 of weights and files), {name}", what, rates["key"], rates["ours"]))
    return rows
