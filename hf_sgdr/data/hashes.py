"""What images are told apart by: the SHA-256 of each one's content, and those that a saved model was trained on.

An evaluation says by the latter how many of its images the model has seen before; they are never pushed.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hf_sgdr._utils.file_index import file_index
from hf_sgdr._utils.store import replace_file
from hf_sgdr.data.images import (
    CHUNK,
    UnreadableImageError,
    failure_reason,
    identity_of,
    read_image,
    readers,
    require_regular,
    undecoded,
)

IMAGE_HASHES = "training-images.txt"


def image_hash(image: Any) -> bytes:
    """SHA-256 of an image's content: of the file's bytes where there is a file, of the pixels otherwise.

    Raises:
        UnreadableImageError: a `ValueError`, if it cannot be read.
    """
    if isinstance(image, Mapping):
        image = image["bytes"] if image.get("bytes") is not None else image["path"]
    if isinstance(image, bytes | bytearray):
        return hashlib.sha256(image).digest()
    if isinstance(image, str | os.PathLike):
        try:
            require_regular(image)
            with open(image, "rb") as file:
                return hashlib.file_digest(file, "sha256").digest()
        except OSError as error:
            raise UnreadableImageError(os.fspath(image), failure_reason(error, image)) from error
    pixels = np.asarray(read_image(image))
    return hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).digest()


def image_hashes(rows: Any, image_column: str) -> Iterator[bytes]:
    """[`image_hash`] of every image of a data set, in order.

    A file is read once; it is read again when its size or its time of modification has changed.

    Args:
        rows (`datasets.Dataset`, or any sequence of dicts): with the images still encoded; see [`undecoded`].
        image_column (`str`): where they are.

    Raises:
        UnreadableImageError: a `ValueError`, if one cannot be read.
    """
    for start in range(0, len(rows), CHUNK):
        indices = range(start, min(start + CHUNK, len(rows)))
        yield from _hashes(_files(rows, image_column, indices), lambda i: rows[indices[i]][image_column])  # noqa: B023


def _hashes(images: Sequence[Any], image: Callable[[int], Any]) -> list[bytes]:
    """Of some images, or their files: those of unchanged files as they are known, the others are asked for and read."""
    index, files = file_index(), list(map(identity_of, images))
    known = index.get("sha256", files)
    unknown = [i for i, digest in enumerate(known) if digest is None]
    new = dict(zip(unknown, readers().map(lambda i: image_hash(image(i)), unknown), strict=True))
    index.put("sha256", [(file, digest) for i, digest in new.items() if (file := files[i]) is not None])
    return [new[i] if digest is None else digest for i, digest in enumerate(known)]


def _files(rows: Any, image_column: str, indices: range) -> list[Any]:
    """The files of some images, or something else; read by columns, as row by row takes ten times as long."""
    if isinstance(rows, datasets.Dataset):
        images = rows.select_columns(image_column).with_format("arrow")
        column = images[indices.start : indices.stop][image_column]
        if pa.types.is_struct(column.type) and not column.chunk(0).field("bytes")[0].is_valid:
            both = column.combine_chunks()  # of a selection each chunk is one row; encoded bytes would be copied
            column = pc.if_else(pc.is_valid(both.field("bytes")), None, both.field("path"))
        if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
            return list(column.to_pylist())
    if isinstance(rows, list):
        return [row[image_column] for row in rows[indices.start : indices.stop]]
    return [None] * len(indices)


def write_image_hashes(rows: Any, image_column: str, folder: Path) -> None:
    """Write the SHA-256 of every image of a data set, one a line, sorted, to `training-images.txt` in a folder."""
    hashes = sorted(digest.hex() for digest in image_hashes(undecoded(rows, image_column), image_column))
    replace_file(folder / IMAGE_HASHES, "".join(f"{digest}\n" for digest in hashes).encode())


def read_image_hashes(folder: Path) -> set[str] | None:
    """What [`write_image_hashes`] wrote to a folder; None if it did not."""
    path = folder / IMAGE_HASHES
    return set(path.read_text(encoding="ascii").split()) if path.exists() else None


def content_hashes(images: Iterable[Any]) -> list[str]:
    """[`image_hash`] of every image, in hexadecimal digits."""
    return [digest.hex() for digest in image_hashes([{"image": image} for image in images], "image")]
