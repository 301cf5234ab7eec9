"""The views of an image: the evaluation transform of the model, and the lesson's training augmentations.

fast.ai 0.7's `tfms_from_model(arch, size, aug_tfms=transforms_side_on, max_zoom=1.1)` is
`image_transforms(model, image_size=size, augment="side_on", max_zoom=1.1)`.
"""

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as vision

from hf_sgdr._utils.scoped import modes_restored
from hf_sgdr.data.image_spec import ImageSpec
from hf_sgdr.data.images import read_image, read_pixels
from hf_sgdr.models.patches import blank_images, take_square_images

Augment = Literal["basic", "side_on", "top_down"]

# fast.ai 0.7 `transforms.py`: transforms_basic = [RandomRotate(10), RandomLighting(0.05, 0.05)], both bounds inclusive;
# RandomRotate and RandomScale act with p .75, RandomFlip with .5.
ROTATE_DEGREES, ROTATE_P = 10.0, 0.75
LIGHTING = 0.05
ZOOM_P = 0.75
FLIP_P = 0.5


@dataclass(frozen=True)
class ImageTransform:
    """Turns an image into the model's input; a training transform draws a new view each time.

    Call it for one normalised picture, or let an `ImageDataset` take `pixels` in its workers and `normalize` whole
    batches on the device.

    Args:
        spec ([`ImageSpec`]): the model's evaluation transform.
        augment (`str`, *optional*): None, "basic", "side_on" or "top_down".
        max_zoom (`float`, *optional*, defaults to 1.0): the highest zoom, at least 1.
        exact (`bool`, *optional*, defaults to True): evaluate with the very resizing of the model's stock processor,
            so that probabilities agree with a stock pipeline's; otherwise always with the faster one on tensors.
    """

    spec: ImageSpec
    augment: Augment | None = None
    max_zoom: float = 1.0
    exact: bool = True

    def __post_init__(self) -> None:
        if self.augment is not None and self.augment not in get_args(Augment):
            raise ValueError(f"augment={self.augment!r}: give None or one of {', '.join(get_args(Augment))}.")
        if not 1.0 <= self.max_zoom < float("inf"):
            raise ValueError(f"max_zoom={self.max_zoom!r}: give a number of at least 1.0 (1.0 zooms nothing).")

    @property
    def is_random(self) -> bool:
        """Whether two calls on one image differ."""
        return self.augment is not None or self.max_zoom > 1.0

    def __call__(self, image: Any) -> torch.Tensor:
        """The normalised picture, float32 (3, size, size); random choices come from torch's global generator."""
        seed = (int(torch.randint(2**31, ())),) if self.is_random else (0,)
        return self.normalize(self.pixels(image, seed)[None])[0]

    def pixels(self, image: Any, seed: tuple[int, ...]) -> torch.Tensor:
        """The picture before normalising, uint8 (3, size, size); the same seed gives the same view."""
        if self.is_random:
            return self._random_view(read_pixels(image, self._highest_zoom), np.random.default_rng(seed))
        if self.exact:
            return self._exact_view(read_image(image))
        pixels = read_pixels(image, self.spec.resize)
        return self._centre_of(self._resize(pixels, *self._resized(*pixels.shape[1:])))

    def to_keep(self, image: Any) -> torch.Tensor:
        """What a cache keeps of an image, uint8 (3, height, width).

        The view itself unless that is random; then the whole picture, its shorter side no longer than the highest zoom.
        """
        if not self.is_random:
            return self.pixels(image, (0,))
        pixels = read_pixels(image, self._highest_zoom)
        scale = self._highest_zoom / min(pixels.shape[1:])
        if scale >= 1:
            return pixels
        height, width = (max(self._highest_zoom, round(side * scale)) for side in pixels.shape[1:])
        return self._resize(pixels, height, width)

    def of_kept(self, pixels: torch.Tensor, seed: tuple[int, ...]) -> torch.Tensor:
        """The view that `pixels(image, seed)` would be, up to one more resizing, from what `to_keep(image)` was."""
        return self._random_view(pixels, np.random.default_rng(seed)) if self.is_random else pixels

    def views(self, image: Image.Image | torch.Tensor, plain: torch.Tensor, numbers: Iterable[int]) -> torch.Tensor:
        """Augmented views of an image for test-time augmentation, uint8 (views, 3, size, size).

        Args:
            image (`Image.Image`, or uint8 `Tensor` (3, height, width)): in RGB, upright.
            plain (`Tensor`): its plain view, whose pixels seed the draw: the same views whichever way it is given.
            numbers (iterable of `int`): which views.
        """
        kept = self.to_keep(image)
        content = int.from_bytes(hashlib.sha256(plain.numpy().tobytes()).digest())
        return torch.stack([self.of_kept(kept, (content, number)) for number in numbers])

    def kept(self) -> dict[str, Any]:
        """All that decides what is kept, as plain values."""
        if not self.is_random:
            return self.to_dict()
        return {"shorter_side": self._highest_zoom, "interpolation": self.spec.interpolation, "decoding": "scaled"}

    def normalize(self, pixels: torch.Tensor) -> torch.Tensor:
        """A batch of pixels, uint8 (N, 3, H, W) on any device, as float32 with the model's mean and std."""
        scaled = pixels.to(torch.float32).div_(255)
        mean, std = (torch.tensor(v, device=pixels.device).view(3, 1, 1) for v in (self.spec.mean, self.spec.std))
        return scaled.sub_(mean).div_(std)

    def fast(self) -> "ImageTransform":
        """The same view, decoded no larger than needed and resized on tensors: more than three times as fast."""
        return replace(self, exact=False)

    def to_dict(self) -> dict[str, Any]:
        """All that decides the pixels, as plain values."""
        exact = self.exact and not self.is_random
        return {
            **self.spec.to_dict(),
            "resizer": self.spec.resizer if exact else "torch",
            "decoding": "full" if exact else "scaled",
            "augment": self.augment,
            "max_zoom": self.max_zoom,
        }

    @property
    def _highest_zoom(self) -> int:
        """The shorter side of a picture at the highest zoom, in pixels."""
        return int(self.spec.size * self.max_zoom)

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of a picture once it is resized, rounded as torchvision and transformers round."""
        short = self.spec.resize
        if self.spec.squash:
            return short, short
        return (short, int(short * width / height)) if height <= width else (int(short * height / width), short)

    def _exact_view(self, image: Image.Image) -> torch.Tensor:
        height, width = self._resized(image.height, image.width)
        if self.spec.resizer == "pillow":
            resample = Image.Resampling[self.spec.interpolation.upper()]
            return self._centre_of(_to_tensor(image.resize((width, height), resample)))
        return self._centre_of(self._resize(_to_tensor(image), height, width))

    def _centre_of(self, pixels: torch.Tensor) -> torch.Tensor:
        # Half a pixel: timm rounds the crop's corner to the even side, transformers' processors round it down.
        half, size = round if self.spec.resizer == "pillow" else int, self.spec.size
        top, left = (half((side - size) / 2) for side in pixels.shape[1:])
        return vision.crop(pixels, top, left, size, size)

    def _resize(self, pixels: torch.Tensor, height: int, width: int) -> torch.Tensor:
        mode = InterpolationMode(self.spec.interpolation)
        return vision.resize(pixels, [height, width], interpolation=mode, antialias=True)

    def _random_view(self, pixels: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
        """Zoom, rotate, light, crop at random, flip: fast.ai 0.7's order, with rotation and crop sampled in one go."""
        size = self.spec.size
        zoom = rng.uniform(1.0, self.max_zoom) if rng.random() < ZOOM_P else 1.0
        short = max(size, int(size * zoom))
        height, width = pixels.shape[1:]
        scale = short / min(height, width)
        height, width = max(size, int(height * scale)), max(size, int(width * scale))
        pixels = self._resize(pixels, height, width)
        top, left = int(rng.integers(height - size + 1)), int(rng.integers(width - size + 1))
        if self.augment is None:
            return vision.crop(pixels, top, left, size, size)
        picture = pixels.to(torch.float32, memory_format=torch.contiguous_format)
        degrees = rng.uniform(-ROTATE_DEGREES, ROTATE_DEGREES) if rng.random() < ROTATE_P else 0.0
        view = _rotated_crop(picture, degrees, top, left, size)
        view = _lit(view, picture.mean(), rng.uniform(-LIGHTING, LIGHTING), rng.uniform(-LIGHTING, LIGHTING))
        if self.augment == "top_down":
            view = torch.rot90(view, int(rng.integers(4)), dims=(1, 2))
        if self.augment != "basic" and rng.random() < FLIP_P:
            view = view.flip(2)
        return view.round_().clamp_(0, 255).to(torch.uint8)


def image_transforms(
    model: nn.Module,
    *,
    image_size: int | None = None,
    augment: Augment | None = None,
    max_zoom: float = 1.0,
) -> tuple[ImageTransform, ImageTransform]:
    """The training and the evaluation transform for a model, from its own size, crop, interpolation, mean and std.

    Training: with probability .75 the shorter side becomes `image_size * U(1, max_zoom)`, then a random crop. "basic"
    adds a rotation of U(-10, 10) degrees with probability .75, its corners reflected, and lighting: contrast and
    brightness changed by U(-.05, .05). "side_on" adds a horizontal flip with probability .5, for images taken from the
    side; "top_down" adds one of the eight symmetries of the square, for satellite and microscope pictures. Without
    augmentation and zoom the training transform is the evaluation transform. (Lesson step 1; fast.ai 0.7
    `transforms.py`.)

    Args:
        model (`PreTrainedModel` or a timm model): what the pictures are for; it is not changed.
        image_size (`int`, *optional*): side of the square input in pixels; the model's own by default.
        augment (`str`, *optional*): None, "basic", "side_on" or "top_down".
        max_zoom (`float`, *optional*, defaults to 1.0): at least 1; the lesson uses 1.1.

    Returns:
        `tuple[ImageTransform, ImageTransform]`: each takes an image (path, bytes, Pillow image or array) and returns
        a float32 tensor (3, image_size, image_size).

    Raises:
        ValueError: if an argument is out of range, or the model cannot take pictures of that size.
    """
    spec = ImageSpec.from_model(model)
    if image_size is not None and image_size != spec.size:
        spec = spec.with_size(image_size)
        _check_size(model, spec.size)
    return ImageTransform(spec, augment, max_zoom), ImageTransform(spec)


def _check_size(model: nn.Module, size: int) -> None:
    take_square_images(model)
    try:
        with modes_restored(model), torch.inference_mode():
            model.eval()(blank_images(model, 1, size))
    except (AssertionError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"image_size={size}: {type(model).__name__} cannot take pictures of that size ({reason}). "
            "Leave image_size out to use the model's own."
        ) from error


def _to_tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _rotated_crop(pixels: torch.Tensor, degrees: float, top: int, left: int, size: int) -> torch.Tensor:
    """The crop at (top, left) of a float32 picture turned about its centre, borders reflected."""
    if degrees == 0.0:
        return vision.crop(pixels, top, left, size, size)
    height, width = pixels.shape[1:]
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    x, y = left + (size - width) / 2, top + (size - height) / 2  # the crop's centre, from the picture's
    # `affine_grid` makes this grid by a batched matrix product, which takes longer than sampling.
    steps = torch.arange(size) + (1 - size) / 2
    column, row = steps, steps[:, None]
    grid = torch.empty(1, size, size, 2)
    torch.add((cos * (column + x) - sin * y) * (2 / width), row * (-sin * 2 / width), out=grid[0, ..., 0])
    torch.add((sin * (column + x) + cos * y) * (2 / height), row * (cos * 2 / height), out=grid[0, ..., 1])
    return F.grid_sample(pixels[None], grid, "bilinear", padding_mode="reflection", align_corners=False)[0]


def _lit(pixels: torch.Tensor, mean: torch.Tensor, brightness: float, contrast: float) -> torch.Tensor:
    """fast.ai 0.7's lighting: contrast about the picture's mean, then brightness as a share of the full range."""
    factor = 1 + contrast if contrast >= 0 else 1 / (1 - contrast)
    return (pixels - mean).mul_(factor).add_(mean + 255 * brightness)
