"""Test-time augmentation: the views of an image that a model predicts from, and one prediction of them all.

The plain view is what the model's image processor makes; the augmented ones are drawn as the model was trained, by the
image's content and their number alone, so that trainer and pipeline see the same.
"""

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import BaseImageProcessor, PreTrainedConfig
from transformers.utils import logging

from hf_sgdr.data.image_spec import ImageSpec
from hf_sgdr.data.images import read_image, read_pixels
from hf_sgdr.data.transforms import Augment, ImageTransform, recorded_views

logger = logging.get_logger(__name__)

# For a model whose configuration does not say how it was trained: the lesson's views.
DEFAULT_AUGMENT: Augment = "side_on"
DEFAULT_MAX_ZOOM = 1.1
# Of the plain view in the mean logit, where validation chose none, and those it chooses among.
PLAIN_WEIGHT = 0.5
WEIGHTS = [step / 20 for step in range(20, -1, -1)]
# Of normalised pixels: rounding alone. One of 255 steps is 4e-3 or more.
_SAME_PIXELS = 1e-4


def mean_of_views(
    logits: torch.Tensor,
    scores: Callable[[torch.Tensor], torch.Tensor],
    beta: float | None = None,
    weight: float = PLAIN_WEIGHT,
) -> torch.Tensor:
    """The scores of an image, or of many, from the logits of its views, the plain one first.

    By default those of the mean logit, in which the plain view counts `weight`: of probabilities that is the weighted
    geometric mean. The arithmetic one is unsure wherever a single view is; with fast.ai's equal weights its
    loss was higher on four sets, on one of them hardly (docs/experiments.md, "Test-time augmentation").

    Args:
        logits (`Tensor` of float (views, ..., classes)): of each view.
        scores (callable): what makes scores of logits, such as a softmax over the last axis.
        beta (`float`, *optional*): the arithmetic mean of scores instead, in which the plain view counts `beta` and the
            mean of the others the rest (fastai v2: 0.25; `1 / views` is fast.ai 0.7's, all alike).
        weight (`float`, *optional*, defaults to 0.5): of the plain view; see [`plain_weight`].
    """
    if len(logits) == 1:
        return scores(logits[0])
    if beta is None:
        return scores(torch.lerp(logits[1:].mean(0), logits[0], weight))
    each = scores(logits)
    return beta * each[0] + (1 - beta) * each[1:].mean(0)


def fitted_weight(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """The plain view's weight in the mean logit with the lowest loss on labelled images, of equals the highest.

    The loss is convex in it, so there is one best weight. Where images hardly differ from each other in size and place,
    views mislead and it is near 1; where they do, views tell more (Shanmugam et al. 2021, arXiv 2011.11156, who learn
    weights for each class and view; this is one number).

    Args:
        logits (`Tensor` of float (views, images, classes)): the plain view first.
        labels (`Tensor`): class ids (images,), or 0 and 1 (images, classes).
    """
    plain, others = logits[0].double(), logits[1:].double().mean(0)
    return min(WEIGHTS, key=lambda weight: float(log_loss(torch.lerp(others, plain, weight), labels)))


def log_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of class ids (images,), or binary cross-entropy of 0 and 1 (images, classes)."""
    if labels.ndim == 2:
        return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))
    return F.cross_entropy(logits, labels)


def plain_weight(config: PreTrainedConfig) -> float:
    """The plain view's weight that a model's configuration names, else `PLAIN_WEIGHT`.

    Raises:
        ValueError: if it is no number from 0 to 1.
    """
    weight = recorded_views(config).get("plain_weight", PLAIN_WEIGHT)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight <= 1:
        raise ValueError(
            f"plain_weight={weight!r} in the model's config.hf_sgdr must be a number from 0 to 1: set it, or use tta=0."
        )
    return weight


def views_at_once(device: torch.device) -> int:
    """Views a forward pass: on the CPU a small batch stays in its caches."""
    return 32 if device.type == "cpu" else 64


def check_beta(beta: float | None) -> None:
    """Raise a ValueError unless a weight of the plain view lies in [0, 1]."""
    if beta is not None and not 0.0 <= beta <= 1.0:
        raise ValueError(f"beta={beta!r}: give the plain image's weight, from 0 to 1.")


def same_transform(processor: BaseImageProcessor) -> ImageTransform | None:
    """The transform that reads images just as an image processor does, None if there is none.

    Configurations of processors say less than their code does, so the two are compared on made-up images.
    """
    try:
        spec = ImageSpec.from_processor(processor)
    except (KeyError, TypeError, ValueError):  # it has no size, or no single one
        return None
    rng = np.random.default_rng(0)
    size = spec.size
    images = [
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).resize((2 * width, 2 * height))
        for height, width in ((size, size + 25), (size + 38, size), (size // 4, size // 3))
    ]
    for resizer in sorted(("pillow", "torch"), key=lambda name: name != spec.resizer):
        transform = ImageTransform(replace(spec, resizer=resizer))
        if all(_agree(transform, processor, image) for image in images):
            return transform
    return None


def _agree(transform: ImageTransform, processor: BaseImageProcessor, image: Image.Image) -> bool:
    inputs = processor(images=image, return_tensors="pt")
    if set(inputs) != {"pixel_values"}:
        return False
    theirs, ours = inputs["pixel_values"], transform(image)[None]
    return theirs.shape == ours.shape and bool((theirs - ours).abs().max() < _SAME_PIXELS)


class ModelViews:
    """Makes a model's views of images.

    Args:
        processor (`BaseImageProcessor`): the model's own. Where it does more than resize, crop to a square and
            normalise, it makes the views itself, which takes longer; the log says so.
        config (`PreTrainedConfig`): the model's; its `hf_sgdr` holds the `augment` and `max_zoom` of training.
            Without it they are `DEFAULT_AUGMENT` and `DEFAULT_MAX_ZOOM`, and the log says so.
        augment, max_zoom (*optional*): instead of those; see [`image_transforms`].
        exact (`bool`, *optional*, defaults to True): the very pixels of the image processor; otherwise images are
            resized on tensors, and JPEGs decoded no larger than needed.

    `plain` is the transform of the plain view, None where the image processor makes it.
    """

    def __init__(
        self,
        processor: BaseImageProcessor,
        config: PreTrainedConfig,
        *,
        augment: Augment | None = None,
        max_zoom: float | None = None,
        exact: bool = True,
    ) -> None:
        self.processor, self.config = processor, config
        self._augment, self._max_zoom = augment, max_zoom
        self.plain = same_transform(processor)
        if self.plain is None:
            logger.warning(
                f"{type(processor).__name__} does more than resize, crop and normalise to a square, so it reads the "
                "images itself, which takes longer."
            )
        elif not exact:
            self.plain = self.plain.fast()

    @functools.cached_property
    def augmented(self) -> ImageTransform:
        """The transform that draws an augmented view.

        Raises:
            ValueError: if there are no views to draw.
        """
        recorded = getattr(self.config, "hf_sgdr", None)
        if recorded is None:
            recorded = {"augment": DEFAULT_AUGMENT, "max_zoom": DEFAULT_MAX_ZOOM}
            if self._augment is None:
                logger.warning(
                    "The model's configuration does not say how it was augmented: test-time augmentation draws "
                    f'views with augment="{DEFAULT_AUGMENT}" (which flips) and max_zoom={DEFAULT_MAX_ZOOM}, unless '
                    "you give others."
                )
        try:
            transform = ImageTransform(
                self._processor_size() if self.plain is None else self.plain.spec,
                recorded["augment"] if self._augment is None else self._augment,
                recorded["max_zoom"] if self._max_zoom is None else self._max_zoom,
            )
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"config.hf_sgdr={recorded!r} does not say which views to draw: give augment= and max_zoom=."
            ) from error
        if not transform.is_random:
            raise ValueError(
                "tta needs views to draw, and this model was trained without augmentation: use tta=0, or give "
                'augment="basic" (or "side_on", "top_down") and max_zoom=1.1.'
            )
        plain_weight(self.config)  # an error of it shows with those of the views
        return transform

    def reader(self, tta: int) -> Callable[[Any], Any]:
        """What reads an image for the views: the whole picture, or no more of a JPEG than they need."""
        if self.plain is None or self.plain.exact:
            return read_image
        spec = self.plain.spec
        shorter_side = max(spec.resize, math.ceil(spec.size * self.augmented.max_zoom)) if tta else spec.resize
        return functools.partial(read_pixels, shorter_side=shorter_side)

    def __call__(self, image: Image.Image | torch.Tensor, tta: int = 0) -> dict[str, torch.Tensor]:
        """The plain view and `tta` augmented ones, as `{"pixel_values": uint8 (1, 1 + tta, 3, size, size)}`.

        Where the image processor makes the views, they are what it gives, with an axis for the views.
        """
        if self.plain is not None:
            plain = {"pixel_values": self.plain.pixels(image, (0,))[None]}
        else:
            plain = dict(self.processor(images=image, return_tensors="pt"))
        if not tta:
            return {name: value[:, None] for name, value in plain.items()}
        views = self.augmented.views(image, plain["pixel_values"], range(tta))
        if self.plain is None:
            settings = self.processor.to_dict()
            as_they_are: dict[str, Any] = {name: False for name in ("do_resize", "do_center_crop") if name in settings}
            views = self.processor(images=list(views), return_tensors="pt", **as_they_are)["pixel_values"]
        return {"pixel_values": torch.cat([plain["pixel_values"], views])[None]}

    def model_inputs(self, views: Mapping[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Views of a batch, (images, ...) on any device, normalised and in the model's precision."""
        if self.plain is not None:
            pixels = self.plain.normalize(views["pixel_values"]).to(dtype)
            return {"pixel_values": pixels.contiguous(memory_format=torch.channels_last)}
        return {name: value.to(dtype) if value.is_floating_point() else value for name, value in views.items()}

    def _processor_size(self) -> ImageSpec:
        """For views that the image processor finishes: the size of its output alone."""
        inputs = self.processor(images=Image.new("RGB", (64, 64)), return_tensors="pt")
        shape = tuple(inputs["pixel_values"].shape)
        if set(inputs) != {"pixel_values"} or len(shape) != 4 or shape[1] != 3 or shape[2] != shape[3]:
            raise ValueError(f"tta: {type(self.processor).__name__} gives no square images to augment. Use tta=0.")
        return ImageSpec(shape[2], shape[2], False, "bicubic", (0.0,) * 3, (1.0,) * 3, "torch")
