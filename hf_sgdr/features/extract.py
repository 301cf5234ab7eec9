"""Precomputing: what the trained part of a model receives, computed once for every image.

Correct by construction: the features are caught in the model's own forward pass, and extraction stops if the rest of
the model does not make the whole model's logits of them.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

import timm
import torch
import transformers
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel
from transformers.utils import logging

from hf_sgdr._utils.system import progress_bar, use_all_processors
from hf_sgdr.data.dataset import ImageDataset
from hf_sgdr.data.images import one_ahead, pixel_versions
from hf_sgdr.data.transforms import ImageTransform
from hf_sgdr.features.store import FeatureStore, module_hash
from hf_sgdr.models.boundary import Boundary
from hf_sgdr.models.fuse import fused_batch_norms

logger = logging.get_logger(__name__)

# What the model's configuration says about labels and provenance does not change its features.
_NOT_IN_KEY = {
    "_name_or_path", "dtype", "hf_sgdr", "id2label", "label2id", "label_names", "name_or_path", "num_classes",
    "num_labels", "pretrained_cfg", "problem_type", "transformers_version",
}  # fmt: skip


def extract_features(
    model: PreTrainedModel,
    at: nn.Module | Boundary,
    images: ImageDataset,
    *,
    dtype: torch.dtype,
    batch_size: int = 32,
    num_workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    progress: str | None = None,
    bars: bool = True,
    max_gb: float = math.inf,
) -> FeatureStore:
    """Compute, where they are not stored yet, the inputs of the head, or of another place, for every image.

    This is the lesson's step 1, `precompute=True`. Every process writes its own shards and returns when those are done;
    read the store after all have.

    Args:
        model (`PreTrainedModel`): the whole classifier, on the device that computes.
        at (`nn.Module` or [`Boundary`]): the head, whose input is stored as it is computed; or a boundary, whose
            activations are stored in 16 bits: bfloat16 if that is the `dtype`, else float16.
        images ([`ImageDataset`]): a random transform gives the views of its seed and epoch 0.
        dtype (`torch.dtype`): precision of the forward pass: float32, or bfloat16 by autocast.
        batch_size (`int`, *optional*, defaults to 32): images a forward pass.
        num_workers (`int`, *optional*, defaults to 0): processes that read images.
        rank, world_size (`int`, *optional*): this process, and how many share the work.
        progress (`str`, *optional*): what progress is called; None shows none.
        bars (`bool`, *optional*, defaults to True): show it as a bar where one can be seen, else as lines of a log.
        max_gb (`float`, *optional*): refuse if the store would take more GB than this.

    Returns:
        [`FeatureStore`]: rows in the order of the images.

    Raises:
        ValueError: if there is no head, the rest of the model does not give its logits, or the store would be larger
            than `max_gb`.
        TypeError: if the transform is not an [`ImageTransform`].
        OSError: if the store cannot be written, or the disk has not enough room.
        OverflowError: if an activation exceeds float16; bfloat16 would hold it.
    """
    transform = images.transform
    if not isinstance(transform, ImageTransform):
        raise TypeError(f"The transform is {type(transform).__name__}: give one of image_transforms(model).")
    if at is None:
        raise ValueError(
            f"The head of {type(model).__name__} is None, as LayerGroups has it where it is not one module: the input "
            "of one alone is stored. Give a model with one head."
        )
    boundary = at if isinstance(at, Boundary) else Boundary.at_head(model, at)
    store = FeatureStore(_depends_on(model, boundary, images, transform, dtype), len(images))
    missing = store.missing()
    todo = [shard for shard in missing if shard % world_size == rank]
    if not todo:
        logger.info(f"Features of {len(images)} images are read from {store.folder}.")
        return store
    device = next(model.parameters()).device
    if device.type == "cpu":
        use_all_processors()
    row = _one_row(model, boundary, transform.spec.size, device, dtype)
    size = len(images) * row.numel() * row.element_size()
    shape = " x ".join(map(str, row.shape))
    (logger.info if boundary.skipped is None else logger.warning)(
        f"Features before {boundary.name}: {shape} of {str(row.dtype).removeprefix('torch.')}, "
        f"{size / 1e6:,.1f} MB in all."
    )
    what = f"Features before {boundary.name} of {len(images)} images"
    store.check_space(size, missing, what, max_gb, "cache_disk_gb")
    batches = [
        list(store.shard_rows(shard)[start : start + batch_size])
        for shard in todo
        for start in range(0, len(store.shard_rows(shard)), batch_size)
    ]
    loader = DataLoader(
        images,
        batch_sampler=batches,
        num_workers=num_workers,
        pin_memory=device.type == "cuda",
        collate_fn=_stack,
        generator=torch.Generator(),  # of its own: a warm store must leave the global one just as a cold one does
    )
    features = _features_of_batches(model, boundary, loader, transform, device, dtype)
    with (
        fused_batch_norms(model, transform.spec.size, boundary.module),
        progress_bar(progress, sum(map(len, batches)), bars=bars) as bar,
    ):
        for shard in todo:
            rows: list[torch.Tensor] = []
            while sum(map(len, rows)) < len(store.shard_rows(shard)):
                rows.append(_as_stored(next(features), row.dtype))
                bar.update(len(rows[-1]))
            store.write(shard, torch.cat(rows))
    return store


# What torch calls the instructions that multiply in bfloat16, on x86 and on 64-bit Arm.
_BFLOAT16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")


def resolve_feature_dtype(device: torch.device, wanted: str = "auto") -> torch.dtype:
    """The precision to extract features in.

    Args:
        device (`torch.device`): where they are computed.
        wanted (`str`, *optional*, defaults to "auto"): "float32", "bfloat16", or "auto" for bfloat16 where the
            processor or GPU has instructions for it, else float32. A rule and no measurement, so that all processes
            and runs on machines of one kind agree.
    """
    if wanted != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[wanted]
    if device.type == "cuda":
        has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu":
        # before torch 2.10 it could not be asked
        capabilities: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
        has_bfloat16 = any(capabilities.get(name, False) for name in _BFLOAT16_INSTRUCTIONS)
    else:
        has_bfloat16 = False
    return torch.bfloat16 if has_bfloat16 else torch.float32


def _autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)


def _one_row(model: nn.Module, boundary: Boundary, size: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """An empty row as it will be stored."""
    model.eval()
    with torch.inference_mode(), _autocast(device, dtype):
        features, _ = boundary.caught(torch.zeros(1, 3, size, size, device=device))
    if boundary.skipped is None:
        return features[0]
    return features[0].to(torch.bfloat16 if dtype == torch.bfloat16 else torch.float16)


def _as_stored(features: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    stored = features.to(dtype)
    if dtype == torch.float16 and not stored.isfinite().all():
        raise OverflowError(
            f"An activation reaches {features.abs().max():.3g}, more than float16 holds: give feature_dtype=bfloat16."
        )
    return stored.cpu()


def _features_of_batches(
    model: nn.Module,
    boundary: Boundary,
    loader: DataLoader[Any],
    transform: ImageTransform,
    device: torch.device,
    dtype: torch.dtype,
) -> Iterator[torch.Tensor]:
    """The features of each batch of pixels; the first one shows that the rest makes the model's logits of them."""
    model.eval()
    for number, inputs in enumerate(one_ahead(loader)):
        with torch.inference_mode(), _autocast(device, dtype):
            batch = transform.normalize(*(tensor.to(device, non_blocking=True) for tensor in inputs))
            batch = batch.contiguous(memory_format=torch.channels_last)
            features, logits = boundary.caught(batch, with_logits=number == 0)
            if logits is not None:
                _check_rest_gives_logits(boundary, features, logits)
        yield features


def _check_rest_gives_logits(boundary: Boundary, features: torch.Tensor, logits: torch.Tensor) -> None:
    try:
        alone = boundary.logits(features)
        fits = alone.shape == logits.shape and torch.allclose(alone, logits, rtol=1e-3, atol=1e-4)
    except (RuntimeError, ValueError, TypeError) as error:
        logger.info(f"The rest of the model does not run on features: {error}")
        fits = False
    if not fits:
        part = "its head alone" if boundary.skipped is None else f"what comes after the input of {boundary.name}"
        raise ValueError(
            f"{type(boundary.model).__name__} cannot be precomputed: {part} does not give its logits. "
            "Train with precompute=False."
        )


def _depends_on(
    model: PreTrainedModel, boundary: Boundary, images: ImageDataset, transform: ImageTransform, dtype: torch.dtype
) -> dict[str, Any]:
    config = {name: value for name, value in model.config.to_dict().items() if name not in _NOT_IN_KEY}
    return {
        "body": module_hash(model, leave_out=boundary.names_after()),
        "settings": _settings_hash(model, boundary),
        "model": type(model).__name__,
        "config": json.loads(json.dumps(config, default=str)),
        "transform": {**transform.to_dict(), "seed": images.seed if transform.is_random else None},
        "photos": images.content_hash(),
        "dtype": str(dtype).removeprefix("torch."),
        "cut": boundary.name,
        "versions": {
            "timm": timm.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            **pixel_versions(),
        },
    }


def _settings_hash(model: PreTrainedModel, boundary: Boundary) -> str:
    """SHA-256 of what a model's modules compute with beside tensors: classes, pooling, strides, functions.

    Those after the boundary may be in it too: at worst features are computed again.
    """
    digest = hashlib.sha256()
    after = set(boundary.module.modules())
    for name, module in model.named_modules():
        if module in after:
            continue
        settings = {
            key: _plain(value)
            for key, value in vars(module).items()
            if not key.startswith("_") and key not in _NOT_IN_KEY and key not in ("forward", "training")
        }
        digest.update(f"{name} {type(module).__qualname__} {sorted(settings.items())};".encode())
    return digest.hexdigest()


def _plain(value: Any) -> str:
    """A value as JSON; of a function or another object its name, for its text may be another in the next process."""
    try:
        return json.dumps(value)
    except TypeError:
        return str(getattr(value, "__qualname__", type(value).__qualname__))


def _stack(rows: list[dict[str, Any]]) -> list[torch.Tensor]:
    return [torch.stack([row[name] for row in rows]) for name in ("pixel_values", "views") if name in rows[0]]
