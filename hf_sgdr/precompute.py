"""Precomputing: what the trained part of a model receives, computed once for every photo.

Correct by construction: the features are caught in the model's own forward pass, and extraction stops if the rest of
the model does not make the whole model's logits of them.
"""

import json
import math
import platform
import time
from collections.abc import Iterator
from typing import Any

import timm
import torch
import transformers
from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.utils import logging

from hf_sgdr.cut import Cut
from hf_sgdr.features import FeatureStore, cache_folder, module_hash
from hf_sgdr.folding import batch_norms_folded
from hf_sgdr.photos import PhotoDataset
from hf_sgdr.processors import use_all_processors
from hf_sgdr.shards import replace_file
from hf_sgdr.transforms import PhotoTransform

logger = logging.get_logger(__name__)

# Below this many photos extraction takes seconds in any precision, so it is done in full precision.
FEW_PHOTOS = 256
# What the model's configuration says about labels and provenance does not change its features.
_NOT_IN_KEY = {
    "_name_or_path", "dtype", "hf_sgdr", "id2label", "label2id", "label_names", "num_classes", "num_labels",
    "pretrained_cfg", "problem_type", "transformers_version",
}  # fmt: skip


def extract_features(
    model: PreTrainedModel,
    at: nn.Module | Cut,
    photos: PhotoDataset,
    *,
    dtype: torch.dtype,
    batch_size: int = 32,
    num_workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    progress: str | None = None,
    max_gb: float = math.inf,
) -> FeatureStore:
    """Compute, where they are not stored yet, the inputs of the head, or of another place, for every photo.

    This is the lesson's step 1, `precompute=True`. Every process writes its own shards and returns when those are done;
    read the store after all have.

    Args:
        model (`PreTrainedModel`): the whole classifier, on the device that computes.
        at (`nn.Module` or [`Cut`]): the head, whose input is stored as it is computed; or a cut, whose activations are
            stored in 16 bits: bfloat16 if that is the `dtype`, else float16.
        photos ([`PhotoDataset`]): a random transform gives the views of its seed and epoch 0.
        dtype (`torch.dtype`): precision of the forward pass: float32, or bfloat16 by autocast.
        batch_size (`int`, *optional*, defaults to 32): photos a forward pass.
        num_workers (`int`, *optional*, defaults to 0): processes that read photos.
        rank, world_size (`int`, *optional*): this process, and how many share the work.
        progress (`str`, *optional*): the progress bar's text; None shows none.
        max_gb (`float`, *optional*): refuse if the store would take more GB than this.

    Returns:
        [`FeatureStore`]: rows in the order of the photos.

    Raises:
        ValueError: if the rest of the model does not give its logits, or the store would be larger than `max_gb`.
        TypeError: if the transform is not a [`PhotoTransform`].
        OSError: if the store cannot be written, or the disk has not enough room.
        OverflowError: if an activation exceeds float16; bfloat16 would hold it.
    """
    transform = photos.transform
    if not isinstance(transform, PhotoTransform):
        raise TypeError(f"The transform is {type(transform).__name__}: give one of image_transforms(model).")
    cut = at if isinstance(at, Cut) else Cut.at_head(model, at)
    store = FeatureStore(_depends_on(model, cut, photos, transform, dtype), len(photos))
    todo = [shard for shard in store.missing() if shard % world_size == rank]
    if not todo:
        logger.info(f"Features of {len(photos)} photos are read from {store.folder}.")
        return store
    device = next(model.parameters()).device
    if device.type == "cpu":
        use_all_processors()
    row = _one_row(model, cut, transform.spec.size, device, dtype)
    size = len(photos) * row.numel() * row.element_size()
    shape = " x ".join(map(str, row.shape))
    (logger.info if cut.skipped is None else logger.warning)(
        f"Features before {cut.name}: {shape} of {str(row.dtype).removeprefix('torch.')}, {size / 1e6:,.1f} MB in all."
    )
    store.check_space(size, f"Features before {cut.name} of {len(photos)} photos", max_gb, "cache_disk_gb")
    batches = [
        list(store.shard_rows(shard)[start : start + batch_size])
        for shard in todo
        for start in range(0, len(store.shard_rows(shard)), batch_size)
    ]
    loader = DataLoader(
        photos,
        batch_sampler=batches,
        num_workers=num_workers,
        pin_memory=device.type == "cuda",
        collate_fn=_stack,
        generator=torch.Generator(),  # of its own: a warm store must leave the global one just as a cold one does
    )
    features = _features_of_batches(model, cut, loader, transform, device, dtype)
    with (
        batch_norms_folded(model, transform.spec.size),
        tqdm(total=sum(map(len, batches)), desc=progress, unit="photo", disable=progress is None) as bar,
    ):
        for shard in todo:
            rows: list[torch.Tensor] = []
            while sum(map(len, rows)) < len(store.shard_rows(shard)):
                rows.append(_as_stored(next(features), row.dtype))
                bar.update(len(rows[-1]))
            store.write(shard, torch.cat(rows))
    return store


# Processors that torch has no bfloat16 kernels for: one photo would take seconds, and so would finding that out.
_NO_BFLOAT16 = ("AVX2", "DEFAULT", "NO AVX")


def inference_dtype(model: PreTrainedModel, size: int, num_photos: int, wanted: str = "auto") -> torch.dtype:
    """The precision to extract features in: "float32", "bfloat16", or by "auto" the faster one on this machine.

    The two are timed once for a model and machine; the answer is kept in the cache folder, so that a second run asks
    for the same features.

    Args:
        model (`PreTrainedModel`): the classifier, on the device that computes.
        size (`int`): side of its square input in pixels.
        num_photos (`int`): with only a few, "auto" takes float32.
        wanted (`str`, *optional*, defaults to "auto"): one of the three.
    """
    if wanted != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[wanted]
    device = next(model.parameters()).device
    no_gain = device.type == "cpu" and torch.backends.cpu.get_cpu_capability() in _NO_BFLOAT16
    if num_photos < FEW_PHOTOS or no_gain:
        return torch.float32
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    architecture = getattr(model.config, "architecture", None) or type(model).__name__
    question = f"{platform.machine()} {name} torch {torch.__version__} {architecture} {size} px"
    path = cache_folder() / "inference_dtype.json"
    answers: dict[str, str] = json.loads(path.read_text()) if path.exists() else {}
    if question not in answers:
        seconds = {dtype: _forward_seconds(model, size, dtype) for dtype in (torch.float32, torch.bfloat16)}
        answers[question] = "bfloat16" if seconds[torch.bfloat16] < 0.8 * seconds[torch.float32] else "float32"
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, json.dumps(answers, indent=1).encode())
    return torch.bfloat16 if answers[question] == "bfloat16" else torch.float32


def _forward_seconds(model: PreTrainedModel, size: int, dtype: torch.dtype) -> float:
    device = next(model.parameters()).device
    pixels = torch.zeros(8, 3, size, size, device=device).contiguous(memory_format=torch.channels_last)
    seconds = []
    with torch.inference_mode(), _autocast(device, dtype):
        for _ in range(3):
            start = time.perf_counter()
            model.eval()(pixels).logits.float().sum().item()  # .item() waits for the device
            seconds.append(time.perf_counter() - start)
    return min(seconds)


def _autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)


def _one_row(model: nn.Module, cut: Cut, size: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """An empty row as it will be stored."""
    model.eval()
    with torch.inference_mode(), _autocast(device, dtype):
        features, _ = cut.caught(torch.zeros(1, 3, size, size, device=device))
    if cut.skipped is None:
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
    cut: Cut,
    loader: DataLoader[Any],
    transform: PhotoTransform,
    device: torch.device,
    dtype: torch.dtype,
) -> Iterator[torch.Tensor]:
    """The features of each batch of pixels; the first one shows that the rest makes the model's logits of them."""
    model.eval()
    for number, pixels in enumerate(loader):
        with torch.inference_mode(), _autocast(device, dtype):
            batch = transform.normalize(pixels.to(device, non_blocking=True))
            batch = batch.contiguous(memory_format=torch.channels_last)
            features, logits = cut.caught(batch, with_logits=number == 0)
            if logits is not None:
                _check_rest_gives_logits(cut, features, logits)
        yield features


def _check_rest_gives_logits(cut: Cut, features: torch.Tensor, logits: torch.Tensor) -> None:
    try:
        alone = cut.logits(features)
        fits = alone.shape == logits.shape and torch.allclose(alone, logits, rtol=1e-3, atol=1e-4)
    except (RuntimeError, ValueError, TypeError) as error:
        logger.info(f"The rest of the model does not run on features: {error}")
        fits = False
    if not fits:
        part = "its head alone" if cut.skipped is None else f"what comes after the input of {cut.name}"
        raise ValueError(
            f"{type(cut.model).__name__} cannot be precomputed: {part} does not give its logits. "
            "Train with precompute=False."
        )


def _depends_on(
    model: PreTrainedModel, cut: Cut, photos: PhotoDataset, transform: PhotoTransform, dtype: torch.dtype
) -> dict[str, Any]:
    config = {name: value for name, value in model.config.to_dict().items() if name not in _NOT_IN_KEY}
    return {
        "body": module_hash(model, leave_out=cut.names_after()),
        "model": type(model).__name__,
        "config": json.loads(json.dumps(config, default=str)),
        "transform": {**transform.to_dict(), "seed": photos.seed if transform.is_random else None},
        "photos": photos.content_hash(),
        "dtype": str(dtype).removeprefix("torch."),
        "cut": cut.name,
        "versions": {"timm": timm.__version__, "torch": torch.__version__, "transformers": transformers.__version__},
    }


def _stack(rows: list[dict[str, Any]]) -> torch.Tensor:
    return torch.stack([row["pixel_values"] for row in rows])
