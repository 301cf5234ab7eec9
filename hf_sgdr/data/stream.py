"""Streams of images (`datasets.IterableDataset`): read once, from the beginning, a chunk of encoded rows at a time."""

import hashlib
from collections.abc import Iterator
from typing import Any

import datasets
from datasets.distributed import split_dataset_by_node

from hf_sgdr.data.images import CHUNK
from hf_sgdr.data.labels import is_multi_label, label_names

MATERIALISE = (
    "only precomputed features can be: give every stage precompute=True (hf-sgdr train fast.yaml, or "
    "--stages precomputed augmented), or materialise the stream: no --streaming, or Dataset.from_list(list(stream))."
)


def is_stream(rows: Any) -> bool:
    """Whether rows come one after the other, with no length and no index."""
    return isinstance(rows, datasets.IterableDataset)


def check_stream(name: str, stream: Any, image_column: str, label_column: str) -> None:
    """Raise a ValueError unless a stream says what its columns hold, which must be images and named labels."""
    features = stream.features or {}
    if not isinstance(features.get(image_column), datasets.Image) or label_names(features.get(label_column)) is None:
        raise ValueError(
            f"{name} is a stream with the columns {features or 'unknown'}: {image_column!r} must hold images and "
            f"{label_column!r} a ClassLabel, or a list of it; give stream.cast_column(name, feature)."
        )


def stream_chunks(
    stream: Any, image_column: str, label_column: str, *, rank: int = 0, world_size: int = 1
) -> Iterator[list[dict[str, Any]]]:
    """Lists of rows, with encoded images and the names of their labels: this process's part of a stream.

    Args:
        stream (`datasets.IterableDataset`): see [`check_stream`].
        image_column, label_column (`str`): its columns.
        rank, world_size (`int`, *optional*): this process, and how many share the stream.

    Raises:
        ValueError: if the stream breaks off, or a row has no label; what was read before is whole.
    """
    feature = stream.features[label_column]
    names, several = label_names(feature) or [], is_multi_label(feature)
    rows: list[dict[str, Any]] = []
    count = 0
    part = stream.cast_column(image_column, datasets.Image(decode=False))
    iterator = iter(split_dataset_by_node(part, rank, world_size) if world_size > 1 else part)
    while True:
        try:
            row = next(iterator, None)
        except Exception as error:  # whatever a connection or a reader raises
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(
                f"The stream broke off after {count} images ({reason}). The features of {count - len(rows)} of them "
                "are stored; the same command goes on from there."
            ) from error
        if row is None or len(rows) == CHUNK:
            if rows:
                yield rows
            rows = []
        if row is None:
            break
        label = row[label_column]
        if label is None or (not several and label < 0):
            raise ValueError(f"Image {count} of the stream has no label: every training image needs one.")
        named = [names[one] for one in label] if several else names[label]
        rows.append({image_column: row[image_column], label_column: named})
        count += 1
    if not count:
        raise ValueError(
            "The stream has no image for this process: it is empty, or has fewer than there are processes."
        )


def stream_identity(stream: Any) -> str:
    """SHA-256 of what a stream says of itself before it is read: builder, configuration, version, split, columns."""
    info = stream.info
    said = (info.builder_name, info.dataset_name, info.config_name, info.version, stream.split, info.features)
    return hashlib.sha256(repr(list(map(str, said))).encode()).hexdigest()
