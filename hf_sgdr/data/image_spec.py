"""What a model's evaluation transform is, as a few plain numbers: size, resize, crop, interpolation, mean and std.

Read from the model's own configuration (timm's `pretrained_cfg`, or the image processor of transformers), and written
back into it, so that a saved model is fed by a stock pipeline just as it was fed here.
"""

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from PIL.Image import Resampling
from torch import nn
from transformers import (
    AutoImageProcessor,
    BaseImageProcessor,
    PreTrainedModel,
    Siglip2ImageProcessor,
    ViTImageProcessor,
)
from transformers.models.timm_wrapper.image_processing_timm_wrapper import TimmWrapperImageProcessor
from transformers.utils import logging

from hf_sgdr.optim.architecture import timm_network

logger = logging.get_logger(__name__)

# For a model of transformers that comes with no image processor: ImageNet's usual evaluation.
DEFAULT_SIZE, DEFAULT_CROP_PCT = 224, 0.875
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class ImageSpec:
    """An evaluation transform: resize, centre crop to a square, scale to [0, 1], normalise.

    Args:
        size (`int`): side of the square that the model sees, in pixels.
        resize (`int`): the shorter side after resizing, in pixels; both sides if `squash`.
        squash (`bool`): resize without keeping the aspect ratio.
        interpolation (`str`): a name of Pillow's resampling filters in lower case, such as "bicubic".
        mean, std (`tuple[float, float, float]`): per channel, of pixels scaled to [0, 1].
        resizer (`str`): "pillow" or "torch": what the model's stock processor resizes with. They differ by at most two
            of 255 in a few pixels, which moves probabilities by up to 5e-3.
    """

    size: int
    resize: int
    squash: bool
    interpolation: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resizer: str

    @classmethod
    def from_model(cls, model: nn.Module) -> "ImageSpec":
        """The spec of a timm network, of a wrapped one, or of an image classifier of transformers.

        Raises:
            ValueError: if the model's input is not square and of three channels.
        """
        config = getattr(model, "config", None)
        network = timm_network(model)
        timm_config = getattr(config, "pretrained_cfg", None) or getattr(network, "pretrained_cfg", None)
        if timm_config:
            return _from_timm(dict(timm_config))
        processor = _stock_processor(getattr(config, "name_or_path", None))
        if processor is not None:
            return _from_processor(processor.to_dict())
        vision_config = getattr(config, "vision_config", config)  # CLIP and SigLIP have one for text beside it
        size = getattr(vision_config, "image_size", None) or DEFAULT_SIZE
        size = size if isinstance(size, int) else size[0]
        resize = math.floor(size / DEFAULT_CROP_PCT)
        logger.warning(
            f"{type(model).__name__} comes with no image processor: evaluating at {size} px, shorter side resized to "
            f"{resize} px (bicubic), centre crop, ImageNet's mean and std."
        )
        return cls(size, resize, False, "bicubic", IMAGENET_MEAN, IMAGENET_STD, "torch")

    @classmethod
    def from_processor(cls, processor: BaseImageProcessor) -> "ImageSpec":
        """What an image processor's configuration says of it; its code may do more.

        Raises:
            KeyError, TypeError, ValueError: if that is not a resize and a square crop.
        """
        if isinstance(processor, TimmWrapperImageProcessor):
            return _from_timm(processor.data_config)
        return _from_processor(processor.to_dict())

    def with_size(self, size: int) -> "ImageSpec":
        """The same transform for another input size, the crop's share of the image kept."""
        if isinstance(size, bool) or not isinstance(size, int) or size < 8:
            raise ValueError(f"image_size={size!r}: give the side of the square input in pixels, at least 8.")
        # floor, as timm does; the small term keeps an exact ratio (224 / 0.875) from falling to the pixel below
        return replace(self, size=size, resize=max(size, math.floor(size * self.resize / self.size + 1e-6)))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for keys and configuration files."""
        return {**asdict(self), "mean": list(self.mean), "std": list(self.std)}

    def write_to(self, model: PreTrainedModel) -> BaseImageProcessor:
        """Record the spec in the model's configuration; returns the stock processor that now does the same.

        A timm model's processor reads `config.pretrained_cfg`; other models get a `preprocessor_config.json` when the
        returned processor is saved beside them.
        """
        if getattr(model.config, "model_type", None) == "timm_wrapper":
            model.config.pretrained_cfg = {
                **model.config.pretrained_cfg,
                "input_size": [3, self.size, self.size],
                "crop_pct": _crop_pct(self.size, self.resize),
                "crop_mode": "squash" if self.squash else "center",
                "interpolation": self.interpolation,
                "mean": list(self.mean),
                "std": list(self.std),
            }
            return TimmWrapperImageProcessor(model.config.pretrained_cfg, model.config.architecture)
        pixels: dict[str, Any] = {
            "resample": Resampling[self.interpolation.upper()],
            "image_mean": list(self.mean),
            "image_std": list(self.std),
        }
        if getattr(model.config, "model_type", None) == "siglip2":
            side = model.config.vision_config.patch_size
            return Siglip2ImageProcessor(patch_size=side, max_num_patches=(self.size // side) ** 2, **pixels)
        return ViTImageProcessor(
            do_convert_rgb=True,
            size={"height": self.resize, "width": self.resize} if self.squash else {"shortest_edge": self.resize},
            do_center_crop=not (self.squash and self.resize == self.size),
            crop_size={"height": self.size, "width": self.size},
            **pixels,
        )


def image_processor_of(model: PreTrainedModel) -> BaseImageProcessor:
    """The image processor that a stock pipeline would load with a model; [`ImageSpec`]'s where it came with none."""
    if getattr(model.config, "model_type", None) == "timm_wrapper" and model.config.pretrained_cfg:
        return TimmWrapperImageProcessor(model.config.pretrained_cfg, model.config.architecture)
    return _stock_processor(model.config.name_or_path) or ImageSpec.from_model(model).write_to(model)


def _from_timm(config: dict[str, Any]) -> ImageSpec:
    channels, height, width = config["input_size"]
    if channels != 3 or height != width:
        raise ValueError(f"input_size={config['input_size']}: only square inputs of three channels are supported.")
    interpolation = config.get("interpolation") or "bicubic"
    return ImageSpec(
        size=height,
        resize=math.floor(height / (config.get("crop_pct") or DEFAULT_CROP_PCT)),
        squash=config.get("crop_mode") == "squash",
        interpolation="bilinear" if interpolation == "random" else interpolation,
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        resizer="pillow",
    )


def _from_processor(config: dict[str, Any]) -> ImageSpec:
    size, crop = config.get("size") or {}, config.get("crop_size") or {}
    if "max_num_patches" in config:  # SigLIP 2: an image of any shape, as many patches as make this square
        squash = True
        side = resize = math.isqrt(config["max_num_patches"]) * config["patch_size"]
    elif "crop_pct" in config:  # ConvNeXt: crops below 384 px, squashes from there on
        side = size["shortest_edge"]
        squash = side >= 384
        resize = side if squash else int(side / config["crop_pct"])
    else:
        squash = "height" in size
        resize = size["height"] if squash else size.get("shortest_edge")
        side = crop.get("height") if config.get("do_center_crop") else resize
        is_square = size.get("width", resize) == resize and (side == resize or crop.get("width") == side)
        if not resize or not side or not is_square:
            raise ValueError(f"The image processor's size={dict(size)}, crop_size={dict(crop)}: must make a square.")
    # x * rescale_factor in terms of x / 255
    scale = 255 * config.get("rescale_factor", 1 / 255) if config.get("do_rescale", True) else 255.0
    scale = 1.0 if math.isclose(scale, 1.0) else scale
    mean: Any = (0.0,) * 3
    std: Any = (1.0,) * 3
    if config.get("do_normalize"):
        mean, std = config.get("image_mean") or IMAGENET_MEAN, config.get("image_std") or IMAGENET_STD
    return ImageSpec(
        size=side,
        resize=resize,
        squash=squash,
        interpolation=Resampling(config.get("resample", Resampling.BILINEAR)).name.lower(),
        mean=tuple(value / scale for value in mean),
        std=tuple(value / scale for value in std),
        resizer="torch",
    )


def _stock_processor(name_or_path: str | None) -> BaseImageProcessor | None:
    if not name_or_path:
        return None
    try:
        return AutoImageProcessor.from_pretrained(name_or_path)
    except (OSError, ValueError):  # no preprocessor_config.json there, or nobody to ask
        return None


def _crop_pct(size: int, resize: int) -> float:
    """The share that `floor(size / share)` turns back into `resize`."""
    share = size / resize
    return share if math.floor(size / share) == resize else math.nextafter(share, 0)
