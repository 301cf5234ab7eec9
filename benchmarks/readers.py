"""Ways from a file to the network's 8-bit input: images a second on one core and two, and the features they give."""

import contextlib
import functools
import importlib
import math
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import torch
import torch.nn.functional as F
from inference import LARGE_IMAGES, _enlarged
from PIL import Image
from timing import medians
from timm.data import create_transform, resolve_data_config
from torchvision.io import ImageReadMode, decode_jpeg, read_file
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as vision

from hf_sgdr import LayerGroups, create_image_classifier, image_transforms
from hf_sgdr.data.transforms import ImageTransform
from hf_sgdr.demo import DEMO_MODEL, demo_weights_file
from hf_sgdr.models.boundary import Boundary

IMAGES = 64
Read = Callable[[Path], Any]


def readers(files: list[Path], repetitions: int) -> list[str]:
    """A table: each way at 500 px and at 12 megapixels, on one core and on two, against timm's on as many."""
    model = create_image_classifier(DEMO_MODEL, labels=["a", "b"], weights_file=demo_weights_file()).eval()
    train, exact = image_transforms(model, augment="side_on", max_zoom=1.1)
    theirs = create_transform(**resolve_data_config(model.config.pretrained_cfg), is_training=False)
    ways: dict[str, Read] = {
        "timm's evaluation transform": lambda file: theirs(Image.open(file).convert("RGB")),
        "ours, exact=True": lambda file: exact.pixels(file, (0,)),
        "ours, features and exact=False": lambda file: exact.fast().pixels(file, (0,)),
        "ours, an augmented view": lambda file: train.pixels(file, (1, 2, 3)),
        **decoders(exact.spec.resize),
        **resizers(exact),
    }
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    head = (
        "| what | 500 px: images/s, one core | against timm | two cores | against timm | cosine, mean / least "
        "| 12 megapixels: images/s, one core | against timm | two cores | against timm | cosine, mean / least |"
    )
    cells: dict[str, list[str]] = {name: [] for name in ways}
    with tempfile.TemporaryDirectory() as place:
        large = [_enlarged(file, Path(place, f"{i}.jpg")) for i, file in enumerate(files[:LARGE_IMAGES])]
        for images in (files[:: max(1, len(files) // IMAGES)][:IMAGES], large):
            rates = [_rates(ways, images, cores, repetitions) for cores in (1, 2)]
            expected = _features(model, exact, ways["ours, exact=True"], images)
            for name, read in ways.items():
                for rate in rates:
                    against = rate[name] / rate["timm's evaluation transform"]
                    cells[name] += [f"{rate[name]:,.1f}", f"{against:.2f}"]
                features = _features(model, exact, read, images)
                cosine = None if features is None else F.cosine_similarity(features, expected)
                cells[name].append("" if cosine is None else f"{cosine.mean():.5f} / {cosine.min():.5f}")
    torch.set_num_threads(threads)
    return [head, "|---" * 11 + "|", *(f"| {name} | {' | '.join(row)} |" for name, row in cells.items())]


def decoders(short: int) -> dict[str, Read]:
    """Decoding alone; in part: no smaller than twice what is needed."""
    return {
        "decode, Pillow": lambda file: np.asarray(Image.open(file).convert("RGB")),
        "decode in part, Pillow": lambda file: np.asarray(_drafted(file, short)),
        "decode, torchvision": lambda file: decode_jpeg(read_file(str(file)), mode=ImageReadMode.RGB),
        "decode, simplejpeg": lambda file: simplejpeg.decode_jpeg(file.read_bytes()),
        "decode, simplejpeg, fast flags": lambda file: simplejpeg.decode_jpeg(
            file.read_bytes(), fastdct=True, fastupsample=True
        ),
        "decode in part, simplejpeg": functools.partial(_in_part, short=short),
    }


def resizers(transform: ImageTransform) -> dict[str, Read]:
    """Decoding in part and resizing."""
    spec = transform.spec

    def target(width: int, height: int) -> tuple[int, int]:
        return transform._resized(height, width)

    def torch_resized(pixels: torch.Tensor) -> torch.Tensor:
        size = list(target(pixels.shape[2], pixels.shape[1]))
        resized = vision.resize(pixels, size, interpolation=InterpolationMode.BICUBIC, antialias=True)
        return transform._centre_of(resized)

    def pillow_resized(image: Image.Image, gap: float | None) -> torch.Tensor:
        height, width = target(*image.size)
        resized = image.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=gap)
        return transform._centre_of(_as_tensor(np.array(resized)))

    ways: dict[str, Read] = {
        "Pillow, Pillow": lambda file: pillow_resized(_drafted(file, spec.resize), None),
        "Pillow, Pillow with reducing_gap=2": lambda file: pillow_resized(_drafted(file, spec.resize), 2.0),
        "Pillow, torchvision, channels last": lambda file: torch_resized(
            _as_tensor(np.array(_drafted(file, spec.resize)))
        ),
        "torchvision, torchvision, channels last": lambda file: torch_resized(
            decode_jpeg(read_file(str(file)), mode=ImageReadMode.RGB)
        ),
        "simplejpeg, torchvision, channels last": lambda file: torch_resized(_as_tensor(_in_part(file, spec.resize))),
        "simplejpeg, torchvision, channels first": lambda file: torch_resized(
            _as_tensor(_in_part(file, spec.resize)).contiguous()
        ),
    }
    with contextlib.suppress(ImportError):
        cv2 = importlib.import_module("cv2")
        cv2.setNumThreads(0)

        def by_opencv(file: Path, how: int) -> torch.Tensor:
            pixels = _in_part(file, spec.resize)
            height, width = target(pixels.shape[1], pixels.shape[0])
            return transform._centre_of(_as_tensor(cv2.resize(pixels, (width, height), interpolation=how)))

        for name in ("INTER_AREA", "INTER_CUBIC"):
            ways[f"simplejpeg, OpenCV {name}"] = functools.partial(by_opencv, how=getattr(cv2, name))
    with contextlib.suppress(ImportError, OSError):
        pyvips = importlib.import_module("pyvips")

        def by_vips(file: Path) -> torch.Tensor:
            with Image.open(file) as image:
                height, width = target(*image.size)
            thumbnail = pyvips.Image.thumbnail(str(file), width, height=height, size="force")
            return transform._centre_of(_as_tensor(np.ascontiguousarray(thumbnail.numpy()[..., :3])))

        ways["pyvips thumbnail"] = by_vips
    return ways


def _drafted(file: Path, short: int) -> Image.Image:
    image = Image.open(file)
    scale = 2 * short / min(image.size)
    image.draft(None, (math.ceil(image.width * scale), math.ceil(image.height * scale)))
    return image.convert("RGB")


def _in_part(file: Path, short: int) -> np.ndarray:
    content = file.read_bytes()
    height, width, *_ = simplejpeg.decode_jpeg_header(content)
    scale = next((s for s in (8, 4, 2) if min(height, width) >= 2 * s * short), 1)
    return simplejpeg.decode_jpeg(content, min_height=-(-height // scale), min_width=-(-width // scale))


def _as_tensor(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _rates(ways: dict[str, Read], files: list[Path], cores: int, repetitions: int) -> dict[str, float]:
    with ThreadPoolExecutor(cores) as threads:
        runs = {
            name: (lambda read=read: list(threads.map(read, files))) if cores > 1 else
            (lambda read=read: [read(file) for file in files])
            for name, read in ways.items()
        }  # fmt: skip
        return {name: len(files) / seconds for name, seconds in medians(runs, repetitions).items()}


def _features(model: Any, transform: ImageTransform, read: Read, files: list[Path]) -> torch.Tensor | None:
    """The head's input for what a reader gives; None if that is no view of the network's size."""
    views = [read(file) for file in files]
    size = (3, transform.spec.size, transform.spec.size)
    if not isinstance(views[0], torch.Tensor) or any(view.shape != size for view in views):
        return None
    head = LayerGroups.from_model(model).head
    assert head is not None
    batch = torch.stack(views)
    with torch.inference_mode():
        batch = batch if batch.dtype == torch.float32 else transform.normalize(batch)
        return Boundary.at_head(model, head).caught(batch)[0]
