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
from transformers import PreTrainedConfig, PreTrainedModel

from hf_sgdr.data.image_spec import ImageSpec
from hf_sgdr.data.images import read_image, read_pixels
from hf_sgdr.models.patches import size_problem

Augment = Literal["basic", "side_on", "top_down"]

# fast.ai 0.7 `transforms.py`: transforms_basic = [RandomRotate(10), RandomLighting(0.05, 0.05)], both bounds inclusive;
# RandomRotate and RandomScale act with p .75, RandomFlip with .5.
ROTATE_DEGREES, ROTATE_P = 10.0, 0.75
LIGHTING = 0.05
ZOOM_P = 0.75
FLIP_P = 0.5

# How much larger than in its training a network sees images best, and how often networks halve them: five times.
MORE_PIXELS, STRIDE = 9 / 7, 32


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
            return self._random_view(read_pixels(image, self._highest_zoom), seed)
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
        return self._random_view(pixels, seed) if self.is_random else pixels

    def unrendered(self, image: Any, seed: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What `normalize` makes the view `pixels(image, seed)` of on a device, up to one level of 255.

        Reading, zooming and cutting out is done, which is all that pictures of different sizes need one by one.

        Args:
            image: as for `pixels`, or, where views are random, what `to_keep` made of it.
            seed (`tuple[int, ...]`): names the view.

        Returns:
            Pixels, uint8 (3, side, side), a little larger than the view, and what [`render`] does to them, float32
            (8,); None where they are the view itself.
        """
        if not self.is_random:
            return self.pixels(image, seed), None
        picture, view = self._drawn(read_pixels(image, self._highest_zoom), seed)
        if view is None:
            return picture, None
        angle = math.radians(ROTATE_DEGREES)
        margin = math.ceil((self.spec.size * (math.cos(angle) + math.sin(angle) - 1) + 3) / 2)
        return _cut(picture, view, self.spec.size + 2 * margin)

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

    def normalize(self, pixels: torch.Tensor, views: torch.Tensor | None = None) -> torch.Tensor:
        """A batch of pixels, uint8 (N, 3, H, W) on any device, as float32 with the model's mean and std.

        Args:
            pixels (`Tensor`): of views, or `unrendered`.
            views (`Tensor`, *optional*): float32 (N, 8), what is to be rendered of them.
        """
        if views is not None:
            pixels = render(pixels, views, self.spec.size)
        scaled = pixels.to(torch.float32).div_(255)
        # not made on the device, for which a processor would wait
        mean, std = (
            torch.tensor(v).view(3, 1, 1).to(pixels.device, non_blocking=True) for v in (self.spec.mean, self.spec.std)
        )
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

    def _random_view(self, pixels: torch.Tensor, seed: tuple[int, ...]) -> torch.Tensor:
        picture, view = self._drawn(pixels, seed)
        return picture if view is None else render(picture[None], view[None], self.spec.size)[0]

    def _drawn(self, pixels: torch.Tensor, seed: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The zoomed picture, uint8 (3, height, width), and what [`render`] does to it, float32 (8,).

        Zoom, rotation, light, crop and flip are drawn in fast.ai 0.7's order. Without augmentation the picture is
        already cropped, and nothing is left to do.
        """
        rng = np.random.default_rng(seed)
        size = self.spec.size
        zoom = rng.uniform(1.0, self.max_zoom) if rng.random() < ZOOM_P else 1.0
        short = max(size, int(size * zoom))
        height, width = pixels.shape[1:]
        scale = short / min(height, width)
        height, width = max(size, int(height * scale)), max(size, int(width * scale))
        pixels = self._resize(pixels, height, width)
        top, left = int(rng.integers(height - size + 1)), int(rng.integers(width - size + 1))
        if self.augment is None:
            return vision.crop(pixels, top, left, size, size), None
        degrees = rng.uniform(-ROTATE_DEGREES, ROTATE_DEGREES) if rng.random() < ROTATE_P else 0.0
        light = _lighting(pixels, rng.uniform(-LIGHTING, LIGHTING), rng.uniform(-LIGHTING, LIGHTING))
        turns = int(rng.integers(4)) if self.augment == "top_down" else 0
        is_flipped = self.augment != "basic" and rng.random() < FLIP_P
        # The crop's centre, from the picture's.
        x, y = left + (size - width) / 2, top + (size - height) / 2
        return pixels, torch.tensor([*_turned(x, y, degrees, turns, is_flipped), *light])


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
        image_size (`int`, *optional*): side of the square input in pixels; the model's own by default. See
            [`fine_tuning_size`].
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
        if problem := size_problem(model, spec.size):
            raise ValueError(
                f"image_size={spec.size}: {type(model).__name__} cannot take pictures of that size ({problem}). "
                "Leave image_size out to use the model's own."
            )
    return ImageTransform(spec, augment, max_zoom), ImageTransform(spec)


def fine_tuning_size(model: PreTrainedModel) -> int:
    """The image size that a pretrained model is best fine-tuned at, in pixels; what recipes take where none is given.

    A network that was trained on random crops saw things larger there than evaluation shows them, and does best at more
    pixels than it was trained at: Touvron et al. 2019 (arXiv 1906.06423) find 288 after 224. So this is the size that
    timm tests a network at, else 9/7 of its own in whole strides. It is the model's own size where that cannot be
    changed, for models of transformers, and for one that was saved here, whose size was chosen before.

    Args:
        model (`PreTrainedModel`): from [`create_image_classifier`].
    """
    own = ImageSpec.from_model(model).size
    config = getattr(model.config, "pretrained_cfg", None) or {}
    if not config or config.get("fixed_input_size") or hasattr(model.config, "hf_sgdr"):
        return own
    larger = (config.get("test_input_size") or [round(own * MORE_PIXELS / STRIDE) * STRIDE])[-1]
    return own if size_problem(model, larger) else larger


def recorded_views(config: PreTrainedConfig) -> dict[str, Any]:
    """What a model's configuration says of its views; empty where it says nothing that can be read."""
    recorded = getattr(config, "hf_sgdr", None)
    return dict(recorded) if isinstance(recorded, dict) else {}


def _to_tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def render(pixels: torch.Tensor, views: torch.Tensor, size: int) -> torch.Tensor:
    """Rotate, flip, crop and light pictures, each by its own numbers, on their device.

    Args:
        pixels (`Tensor`): uint8 (N, 3, height, width).
        views (`Tensor`): float32 (N, 8): by which matrix (4, by rows) and vector (2) an offset in pixels from a view's
            centre, (column, row), becomes one from the picture's centre; factor and summand of every pixel.
        size (`int`): of the views, in pixels. What they show beyond a picture's border is reflected.

    Returns:
        `Tensor`: uint8 (N, 3, size, size).
    """
    height, width = pixels.shape[2:]
    xx, xy, yx, yy, x, y, factor, summand = views[:, :, None, None].unbind(1)
    # `affine_grid` makes this grid by a batched matrix product, which takes longer than sampling.
    column = torch.arange(size, device=pixels.device) + (1 - size) / 2
    row = column[:, None]
    grid = torch.empty(len(pixels), size, size, 2, device=pixels.device)
    torch.add((xx * column + x) * (2 / width), xy * (2 / width) * row, out=grid[..., 0])
    torch.add((yx * column + y) * (2 / height), yy * (2 / height) * row, out=grid[..., 1])
    pictures = pixels.to(torch.float32, memory_format=torch.contiguous_format)
    sampled = F.grid_sample(pictures, grid, "bilinear", padding_mode="reflection", align_corners=False)
    lit = sampled.mul_(factor[:, None]).add_(summand[:, None])
    return lit.round_().clamp_(0, 255).to(torch.uint8)


def _turned(x: float, y: float, degrees: float, turns: int, is_flipped: bool) -> list[float]:
    """Matrix and vector of [`render`]: a crop at (x, y) from the middle of a picture that is rotated about it.

    The crop itself is then turned by quarters and flipped from left to right.
    """
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    x, y = cos * x - sin * y, sin * x + cos * y
    cos, sin = math.cos(math.radians(degrees + 90 * turns)), math.sin(math.radians(degrees + 90 * turns))
    sign = -1 if is_flipped else 1
    return [sign * cos, -sin, sign * sin, cos, x, y]


def _lighting(pixels: torch.Tensor, brightness: float, contrast: float) -> tuple[float, float]:
    """fast.ai 0.7's lighting, as factor and summand of every pixel.

    That is contrast about the picture's mean, then brightness as a share of the full range.
    """
    factor = 1 + contrast if contrast >= 0 else 1 / (1 - contrast)
    mean = float(pixels.mean(dtype=torch.float32))
    return factor, mean * (1 - factor) + 255 * brightness


def _cut(pixels: torch.Tensor, view: torch.Tensor, side: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The square (3, side, side) about a view's centre, reflected beyond the border, and the view from its middle."""
    height, width = pixels.shape[1:]
    corner = view[4:6] + torch.tensor([width - side, height - side]) / 2
    left, top = corner.floor().int().tolist()
    missing = [(max(0, -start), max(0, start + side - length)) for start, length in ((top, height), (left, width))]
    padded = torch.from_numpy(np.pad(pixels.numpy(), [(0, 0), *missing], mode="symmetric"))
    square = vision.crop(padded, max(0, top), max(0, left), side, side).contiguous()
    return square, torch.cat([view[:4], corner - corner.floor(), view[6:]])
