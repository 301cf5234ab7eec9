"""Fixtures of all tests: images made here, a tiny model, caches of their own, and no network."""

import os
import tempfile

# Before anything imports the stack, which reads these once.
_PLACE = tempfile.TemporaryDirectory(prefix="hf_sgdr_tests_")
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "HF_HOME": os.path.join(_PLACE.name, "hf"),
    "HF_SGDR_CACHE": os.path.join(_PLACE.name, "cache"),
    "MPLBACKEND": "agg",
}
if "PYTEST_XDIST_WORKER" in os.environ:  # as many workers as cores: more threads would only stand in each other's way
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_SGDR_NUM_THREADS": "1"}

from collections.abc import Callable  # noqa: E402
from pathlib import Path  # noqa: E402

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from huggingface_hub import HfApi, constants  # noqa: E402
from loopback_hub import TOKEN, running_hub  # noqa: E402
from PIL import Image  # noqa: E402

from hf_sgdr import create_image_classifier  # noqa: E402

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
    """A residual network of 373,000 weights, random but seeded."""
    torch.manual_seed(0)
    return create_image_classifier("test_resnet", labels=["cats", "dogs"], pretrained=False)


@pytest.fixture(scope="session")
def shared_photos() -> Path:
    """The folder of real images; tests that use it carry the marker `images`."""
    if not IMAGES.is_dir():
        pytest.skip(f"no real images at {IMAGES}; HF_SGDR_DATA may name their folder")
    return IMAGES
