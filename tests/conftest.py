"""Fixtures of all tests: images made here, a tiny model, caches of their own, and no network."""

import os
import tempfile

# Before anything imports the stack, which reads these once.
_FOLDER = tempfile.TemporaryDirectory(prefix="hf_sgdr_tests_")
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "HF_HOME": os.path.join(_FOLDER.name, "hf"),
    "HF_SGDR_CACHE": os.path.join(_FOLDER.name, "cache"),
    "MPLBACKEND": "agg",
}
if "PYTEST_XDIST_WORKER" in os.environ:  # as many workers as cores: more threads would only stand in each other's way
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_SGDR_NUM_THREADS": "1"}

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import tiny_resnet
from huggingface_hub import HfApi, constants
from loopback_hub import TOKEN, running_hub
from PIL import Image
from transformers import Trainer, TrainingArguments
from transformers.utils import logging

import hf_sgdr
from hf_sgdr.data.labels import label_names

IMAGES = Path(os.environ.get("HF_SGDR_DATA") or Path(__file__).parents[2] / "shared" / "data")


def pytest_configure(config: pytest.Config) -> None:
    # What the stack is about to change must not be called by us.
    for kind in ("DeprecationWarning", "FutureWarning", "PendingDeprecationWarning"):
        config.addinivalue_line("filterwarnings", f"error::{kind}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # The longest files first, so that no worker is left with one at the end (needs --no-loadscope-reorder).
    items.sort(key=lambda item: not {"commands", "notebook", "ranks"} & {mark.name for mark in item.iter_markers()})


@pytest.fixture(scope="session")
def make_image_folder() -> Callable[..., Path]:
    """`make_image_folder(root, {"train": {"cats": 8}})` writes seeded JPEGs, each class with a hue of its own."""

    def make(root: Path, splits: dict[str, dict[str, int]]) -> Path:
        for split, classes in splits.items():
            for number, (name, count) in enumerate(sorted(classes.items())):
                folder = root / split / name
                folder.mkdir(parents=True, exist_ok=True)
                for i in range(count):
                    rng = np.random.default_rng((sum(split.encode()), number, i))
                    height, width = (60, 80) if i % 2 else (84, 56)
                    pixels = rng.integers(0, 90, (height, width, 3))
                    pixels[..., number % 3] += 140
                    Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i:03d}.jpg", quality=92)
        return root

    return make


@pytest.fixture(scope="module")
def images(request, tmp_path_factory, make_image_folder):
    """The module's `SPLITS` (26 training and 11 validation images by default), for four steps of 8 an epoch."""
    splits = {"train": {"cats": 13, "dogs": 13}, "valid": {"cats": 5, "dogs": 6}}
    folder = make_image_folder(tmp_path_factory.mktemp("images"), getattr(request.module, "SPLITS", splits))
    return hf_sgdr.load_image_folder(folder)


@pytest.fixture
def logs(caplog):
    """`caplog` with what is logged through transformers, which hands nothing on by default."""
    logging.enable_propagation()
    yield caplog
    logging.disable_propagation()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch):
    """A Hub of this test's own, which the client talks to."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with running_hub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        yield hub


@pytest.fixture
def api(hub) -> HfApi:
    """Ann, who is logged in there."""
    return HfApi(endpoint=hub.endpoint, token=TOKEN)


@pytest.fixture
def tiny_model():
    return tiny_resnet()


# Quick, quiet and without a file, unless a test asks for them.
ARGUMENTS = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no"}


def parted(kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a Trainer takes itself, and what its arguments take."""
    own = {*inspect.signature(Trainer).parameters, *inspect.signature(hf_sgdr.SGDRTrainer).parameters} - {"args"}
    return {k: v for k, v in kwargs.items() if k in own}, {k: v for k, v in kwargs.items() if k not in own}


@pytest.fixture(scope="session")
def build_trainer() -> Callable[..., "hf_sgdr.SGDRTrainer"]:
    """`make_trainer` for fixtures of a module, which have no folder of their own: it comes first."""

    def build(output_dir, images, model=None, *, image_size=32, augment="side_on", max_zoom=1.1, **kwargs):
        images = hf_sgdr.load_image_folder(images) if isinstance(images, Path) else images
        model = tiny_resnet(label_names(images["train"].features["label"])) if model is None else model
        views = hf_sgdr.image_transforms(model, image_size=image_size, augment=augment, max_zoom=max_zoom)
        given, arguments = parted(kwargs)
        given = {
            "train_dataset": images["train"],
            "eval_dataset": images["validation"],
            "train_transform": views[0],
            "eval_transform": views[1],
            **given,
        }
        arguments = {**ARGUMENTS, "per_device_train_batch_size": 8, **arguments}
        return hf_sgdr.SGDRTrainer(model, hf_sgdr.SGDRTrainingArguments(str(output_dir), **arguments), **given)

    return build


@pytest.fixture
def make_trainer(build_trainer, tmp_path, request):
    """`make_trainer(freeze_to=0)` is an SGDRTrainer on `images`, which writes to `tmp_path / "out"`.

    It takes what the trainer and its arguments take, `folder` for another name than "out", `images` as splits or as
    their folder, and `augment`, `max_zoom` and `image_size` for its transforms. Without `model` each call makes the
    same seeded one anew.
    """

    def make(model=None, *, images=None, folder="out", **kwargs):
        images = request.getfixturevalue("images") if images is None else images
        return build_trainer(tmp_path / folder, images, model, **kwargs)

    return make


@pytest.fixture
def make_stock_trainer(tmp_path):
    """`make_stock_trainer(model, rows, learning_rate=0.1)` is a Trainer of transformers."""

    def make(model, rows, **kwargs):
        given, arguments = parted(kwargs)
        arguments = TrainingArguments(str(tmp_path / "out"), **{**ARGUMENTS, **arguments})
        return Trainer(model, arguments, **{"train_dataset": rows, **given})

    return make


@pytest.fixture(scope="session")
def shared_photos() -> Path:
    """The folder of real images; tests that use it carry the marker `images`."""
    if not IMAGES.is_dir():
        pytest.skip(f"no real images at {IMAGES}; HF_SGDR_DATA may name their folder")
    return IMAGES
