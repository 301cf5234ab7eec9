"""Epochs on images, frozen and not: SGDRTrainer, fastai, and a stock Trainer with timm's processor."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, Image
from timing import QUIET, Row, medians
from torch import nn
from torchvision import transforms as vision
from transformers import AutoImageProcessor, PreTrainedModel, Trainer, TrainingArguments

from hf_sgdr import LayerGroups, SGDRTrainer, SGDRTrainingArguments, create_image_classifier, image_transforms
from hf_sgdr.demo import DEMO_MODEL, demo_weights_file
from hf_sgdr.training.arguments import default_num_workers

BATCH, SIZE = 64, 224


def training(files: list[Path], repetitions: int, device: str = "cpu") -> list[Row]:
    """Images a second of a training epoch, evaluation left out; on a GPU all of them in bfloat16."""
    quiet = {**QUIET, "use_cpu": device == "cpu", "bf16": device != "cpu"}
    images = Dataset.from_dict({"image": [str(file) for file in files], "label": [i % 2 for i in range(len(files))]})
    images = images.cast_column("image", Image())
    with tempfile.TemporaryDirectory() as place:
        os.environ["HF_SGDR_CACHE"] = str(Path(place, "cache"))
        ours = _ours(images, place, quiet)
        runs: dict[str, Callable[[], Any]] = {
            "frozen, augmented": lambda: ours("frozen"),
            "frozen, augmented, cache_images": lambda: ours("frozen cached"),
            "unfrozen, augmented": lambda: ours("unfrozen"),
            "unfrozen, augmented, cache_images": lambda: ours("unfrozen cached"),
            "extraction": lambda: ours("extraction"),
            "stock frozen": _stock(images, place, quiet, as_in_example=False),
            "stock unfrozen": _stock(images, place, quiet, as_in_example=True),
        }
        seconds = medians(runs, repetitions)
    if find_spec("fastai"):
        # in a process of its own: it forks workers, which the memory of this one would slow down
        command = [sys.executable, __file__, device, str(repetitions), *map(str, files)]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        seconds |= json.loads(output.splitlines()[-1])
    rates = {name: len(files) / value for name, value in seconds.items()}
    what = "extraction, one pass"
    rows = [(what, "a stock Trainer, frozen body, timm's processor", rates["extraction"], rates["stock frozen"])]
    what, theirs = "unfrozen, augmented", "a stock Trainer, unfrozen, transforms of transformers' example script"
    rows.append((f"epoch, {what}", theirs, rates[what], rates["stock unfrozen"]))
    what = "extraction, one pass"
    if "fastai frozen" in rates:
        rows.append((what, "fastai, frozen epoch", rates["extraction"], rates["fastai frozen"]))
        for kind in ("frozen", "unfrozen"):
            for cached in ("", ", cache_images"):
                what = f"{kind}, augmented{cached}"
                rows.append(
                    (f"epoch, {what}", f"fastai, {kind} epoch, augmented", rates[what], rates[f"fastai {kind}"])
                )
    return rows


def _model() -> PreTrainedModel:
    return create_image_classifier(DEMO_MODEL, labels=["a", "b"], weights_file=demo_weights_file())


def _ours(images: Dataset, place: str, quiet: dict[str, Any]) -> Callable[[str], Any]:
    trainers = {}
    for cached in (False, True):
        model = _model()
        train, evaluation = image_transforms(model, image_size=SIZE, augment="side_on", max_zoom=1.1)
        args = SGDRTrainingArguments(place, eval_strategy="no", cache_images=cached, **quiet)  # batches of BATCH
        trainers[cached] = SGDRTrainer(
            model, args, train_dataset=images, train_transform=train, eval_transform=evaluation
        )

    def run(what: str) -> None:
        trainer = trainers["cached" in what]
        trainer.freeze()
        if what == "extraction":
            with tempfile.TemporaryDirectory() as cache:
                os.environ["HF_SGDR_CACHE"] = cache
                trainer.precompute = True
                trainer.features.training(trainer.train_dataset)
                trainer.features._read.clear()
                trainer.precompute = False
            os.environ["HF_SGDR_CACHE"] = str(Path(place, "cache"))
            return
        if what.startswith("unfrozen"):
            trainer.unfreeze()
            trainer.layer_groups.freeze_batch_norm = True
        trainer.fit(1e-3, 1, cycle_len=1)

    return run


def _stock(images: Dataset, place: str, quiet: dict[str, Any], as_in_example: bool) -> Callable[[], Any]:
    """A frozen body and the model's own processor, or all layers and what run_image_classification.py does."""
    model = _model()
    model.save_pretrained(place)
    processor = AutoImageProcessor.from_pretrained(place)
    if not as_in_example:
        LayerGroups.from_model(model).freeze_to(-1)
    steps = [vision.RandomResizedCrop(SIZE), vision.RandomHorizontalFlip(), vision.ToTensor()]
    augment = vision.Compose([*steps, vision.Normalize([0.5] * 3, [0.5] * 3)])

    def processed(batch: dict[str, list[Any]]) -> dict[str, Any]:
        images = [image.convert("RGB") for image in batch["image"]]
        if as_in_example:
            return {"pixel_values": list(map(augment, images)), "labels": batch["label"]}
        return {"pixel_values": processor(images, return_tensors="pt")["pixel_values"], "labels": batch["label"]}

    rows = images.with_transform(processed)
    workers = default_num_workers()

    def run() -> None:
        args = TrainingArguments(
            place, num_train_epochs=1, per_device_train_batch_size=BATCH, remove_unused_columns=False,
            dataloader_num_workers=workers, dataloader_pin_memory=not quiet["use_cpu"], **quiet,
        )  # fmt: skip
        Trainer(model, args, train_dataset=rows).train()

    return run


def _fastai(files: list[Path], device: str) -> Callable[[bool], Any]:
    from fastai.callback.progress import ProgressCallback  # noqa: F401  (it patches Learner)
    from fastai.data.transforms import Normalize
    from fastai.learner import Learner
    from fastai.optimizer import SGD
    from fastai.vision.augment import Resize, aug_transforms
    from fastai.vision.data import ImageDataLoaders

    network = _model().timm_model
    groups = LayerGroups.from_model(network)
    transforms = aug_transforms(size=SIZE, max_zoom=1.1, max_lighting=0.05, max_warp=0.0, max_rotate=10.0)
    place = {file: i % 2 for i, file in enumerate(files)}
    loaders = ImageDataLoaders.from_path_func(
        files[0].parent, files, lambda file: place[file], valid_pct=0.0, bs=BATCH, device=torch.device(device),
        item_tfms=Resize(256),
        batch_tfms=[*transforms, Normalize.from_stats([0.5] * 3, [0.5] * 3, cuda=device != "cpu")],
    )  # fmt: skip
    learner = Learner(
        loaders, network, loss_func=nn.CrossEntropyLoss(), opt_func=SGD,
        splitter=lambda _: [groups.parameters(i) for i in range(len(groups))],
    )  # fmt: skip
    if device != "cpu":
        learner.to_bf16()
    learner._do_epoch_validate = lambda *args, **kwargs: None

    def run(frozen: bool) -> None:
        (learner.freeze if frozen else learner.unfreeze)()
        with learner.no_bar(), learner.no_logging():
            learner.fit(1, 1e-3)

    return run


if __name__ == "__main__":
    kind, count, *names = sys.argv[1:]
    theirs = _fastai([Path(name) for name in names], kind)
    epochs = {"fastai frozen": lambda: theirs(True), "fastai unfrozen": lambda: theirs(False)}
    print(json.dumps(medians(epochs, int(count))))
