"""Square images as models take them: blank ones of any size, and patches for NaFlex models."""

from typing import Any

import torch
from torch import nn
from transformers import Siglip2ForImageClassification

from hf_sgdr._utils.scoped import modes_restored


def take_square_images(model: nn.Module) -> None:
    """Let SigLIP 2's NaFlex vision model take images (batch, 3, size, size) beside the patches that it is made for.

    Other models take them anyway. What is saved is the stock class; its processor cuts patches that keep an image's
    shape.
    """
    if not isinstance(model, Siglip2ForImageClassification):
        return
    hooks = model.vision_model._forward_pre_hooks.values()
    if _cut_into_patches not in hooks:
        model.vision_model.register_forward_pre_hook(_cut_into_patches, with_kwargs=True)


def _cut_into_patches(
    module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    pixels = args[0] if args else kwargs.get("pixel_values")
    if pixels is None or pixels.ndim != 4:
        return None
    batch, channels, size, _ = pixels.shape
    side = module.config.patch_size
    if size % side:
        raise ValueError(f"image_size={size}: must be a multiple of the model's patches, which are {side} px wide.")
    count = size // side
    # in a patch height comes first, then width, then channels (transformers 5.23, image_processing_siglip2.py)
    patches = pixels.reshape(batch, channels, count, side, count, side).permute(0, 2, 4, 3, 5, 1)
    return (), {
        **kwargs,
        "pixel_values": patches.reshape(batch, count * count, side * side * channels),
        "pixel_attention_mask": pixels.new_ones(batch, count * count, dtype=torch.int32),
        "spatial_shapes": torch.full((batch, 2), count, device=pixels.device),
    }


def blank_images(model: nn.Module, count: int, size: int) -> torch.Tensor:
    """Black images (count, 3, size, size) of a model's dtype, on its device."""
    return next(model.parameters()).new_zeros(count, 3, size, size)


def size_problem(model: nn.Module, size: int) -> str:
    """Why a model does not take images of this size, in its own words; nothing if it does."""
    take_square_images(model)
    try:
        with modes_restored(model), torch.inference_mode():
            model.eval()(blank_images(model, 1, size))
    except (AssertionError, RuntimeError, ValueError) as error:
        return str(error).splitlines()[0] if str(error) else type(error).__name__
    return ""
