"""Ratios of speed, measured in one run on one machine: medians of several repetitions.

    python benchmarks/run.py --data_dir dogscats [--repetitions 5] [--write]

Compared are like with like: the same photos, network, precision and memory layout. `--write` puts the table, the
machine and the versions into benchmarks/RESULTS.md.
"""

import argparse
import contextlib
import io
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.utils import logging

from hf_sgdr import SGDRTrainer, SGDRTrainingArguments, create_image_classifier, get_sgdr_schedule, image_transforms
from hf_sgdr.data import photo_files
from hf_sgdr.demo import DEMO_MODEL, demo_weights_file
from hf_sgdr.head_training import CPU_BATCH, FeatureDataset
from hf_sgdr.layer_groups import LayerGroups
from hf_sgdr.memory import keep_freed_memory
from hf_sgdr.photos import PhotoDataset
from hf_sgdr.precompute import extract_features

RESULTS = Path(__file__).parent / "RESULTS.md"
PHOTOS, ROWS, WIDTH, BATCH = 256, 64_000, 512, 64
Row = tuple[str, str, float, float]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, required=True, help="a folder with at least 256 photos below it")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--write", action="store_true", help="write benchmarks/RESULTS.md")
    options = parser.parse_args()
    logging.set_verbosity_error()
    keep_freed_memory()
    files = [file for _, file in zip(range(PHOTOS), photo_files(options.data_dir), strict=False)]
    rows = [*decoding(files, options.repetitions), *extraction(files, options.repetitions), *head(options.repetitions)]
    table = ["| what | against | ours, a second | theirs, a second | ratio |", "|---|---|---|---|---|"]
    table += [f"| {what} | {against} | {a:,.0f} | {b:,.0f} | {a / b:.2f} |" for what, against, a, b in rows]
    print("\n".join(table))
    if options.write:
        RESULTS.write_text("\n".join([*_heading(options.repetitions), "", *table, ""]), encoding="utf-8")


def decoding(files: list[Path], repetitions: int) -> list[Row]:
    """Photos a second and core, from file to network input, against timm's evaluation transform on Pillow images."""
    model = create_image_classifier(DEMO_MODEL, labels=["a", "b"], weights_file=demo_weights_file())
    theirs = create_transform(**resolve_data_config(model.config.pretrained_cfg), is_training=False)
    train, exact = image_transforms(model, augment="side_on", max_zoom=1.1)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def every(read: Callable[[Path], Any]) -> Callable[[], None]:
        return lambda: [read(file) for file in files] and None

    seconds = _medians(
        {
            "timm": every(lambda file: theirs(Image.open(file).convert("RGB"))),
            "fast": every(lambda file: exact.fast().pixels(file, (0,))),
            "exact": every(lambda file: exact.pixels(file, (0,))),
            "augmented": every(lambda file: train.pixels(file, (1, 2, 3))),
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
    ]


def extraction(files: list[Path], repetitions: int) -> list[Row]:
    """Photos a second of extraction, hashing, decoding and storing included, against the bare forward pass."""
    model = create_image_classifier(DEMO_MODEL, labels=["a", "b"], weights_file=demo_weights_file()).eval()
    model = model.to(memory_format=torch.channels_last)
    groups = LayerGroups.from_model(model)
    assert groups.head is not None
    _, exact = image_transforms(model)
    photos = PhotoDataset([{"image": str(file)} for file in files], exact.fast())
    pixels = torch.stack([photos[i]["pixel_values"] for i in range(len(files))])
    batches = exact.normalize(pixels).contiguous(memory_format=torch.channels_last).split(CPU_BATCH)
    rows = []
    for dtype, name in ((torch.bfloat16, "bfloat16"), (torch.float32, "float32")):

        def bare(dtype: torch.dtype = dtype) -> None:
            with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                for batch in batches:
                    model(batch)

        def ours(dtype: torch.dtype = dtype) -> None:
            with tempfile.TemporaryDirectory() as place:
                os.environ["HF_SGDR_CACHE"] = place
                extract_features(model, groups.head, photos, dtype=dtype, batch_size=CPU_BATCH)

        seconds = _medians({"bare": bare, "ours": ours}, repetitions)
        rates = {key: len(files) / value for key, value in seconds.items()}
        rows.append(
            (f"extraction, {name}", "the bare forward pass on a tensor in memory", rates["ours"], rates["bare"])
        )
    return rows


def head(repetitions: int) -> list[Row]:
    """Optimizer steps a second of a linear head on features in memory, an epoch of 1,000 steps."""
    features = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(0))
    labels = (features[:, 0] > 0).long()
    model = create_image_classifier("test_resnet", labels=["a", "b"], pretrained=False)
    linear = model.timm_model.fc = nn.Linear(WIDTH, 2)
    values = {"use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "report_to": "none"}
    with tempfile.TemporaryDirectory() as place:
        arguments = SGDRTrainingArguments(place, eval_strategy="no", **values)
        trainer = SGDRTrainer(model, arguments, train_dataset=[0])
        trainer.precompute = True
        trainer._training_features = lambda: FeatureDataset([features], labels)  # type: ignore[method-assign]
        rows = [{"features": row, "labels": label} for row, label in zip(features, labels, strict=True)]

        class Stock(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.head = linear

            def forward(self, features: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
                logits = self.head(features)
                return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}

        def stock() -> None:
            args = TrainingArguments(place, num_train_epochs=1, per_device_train_batch_size=BATCH, **values)
            optimizer = torch.optim.SGD(linear.parameters(), lr=0.01, momentum=0.9)
            schedule = get_sgdr_schedule(optimizer, ROWS // BATCH)
            Trainer(Stock(), args, train_dataset=rows, optimizers=(optimizer, schedule)).train()

        def raw() -> None:
            optimizer = torch.optim.SGD(linear.parameters(), lr=0.01, momentum=0.9)
            schedule = get_sgdr_schedule(optimizer, ROWS // BATCH)
            for chosen in torch.randperm(ROWS).split(BATCH):
                nn.functional.cross_entropy(linear(features[chosen]), labels[chosen]).backward()
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()

        seconds = _medians({"ours": lambda: trainer.fit(0.01, 1, cycle_len=1), "raw": raw, "stock": stock}, repetitions)
    rates = {name: ROWS / BATCH / value for name, value in seconds.items()}
    return [
        ("head epoch, SGDRTrainer", "a raw torch loop", rates["ours"], rates["raw"]),
        ("head epoch, SGDRTrainer", "a stock Trainer on rows of tensors", rates["ours"], rates["stock"]),
    ]


def _medians(runs: dict[str, Callable[[], Any]], repetitions: int) -> dict[str, float]:
    """Median seconds of each, taken in turn so that all meet the same drifts of the machine; one round to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repetitions + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            with contextlib.redirect_stdout(io.StringIO()):
                run()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


def _heading(repetitions: int) -> list[str]:
    cpu = next(
        (line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")), platform.processor()
    )
    names = ("torch", "transformers", "timm", "accelerate", "pillow")
    packages = ", ".join(f"{name} {version(name)}" for name in names)
    return [
        "# Measured",
        f"{date.today()}, {cpu}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}; "
        f"{packages}; {DEMO_MODEL}, {PHOTOS} photos; medians of {repetitions}, each round in turn.",
        "",
        "Written by `python benchmarks/run.py --data_dir dogscats --write`. A ratio above 1 means that ours is faster.",
    ]


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


if __name__ == "__main__":
    main()
