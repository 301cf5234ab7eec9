"""Photos as tensors: reading any picture as 8-bit RGB, and a torch dataset of transformed photos.

The pixels stay 8-bit until they are on the device, where a whole batch is normalised at once: workers hand over a
quarter of the bytes.
"""

import functools
import hashlib
import math
import os
import re
import stat
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from typing import Any, Protocol

import datasets
import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch.utils.data import Dataset, get_worker_info

from hf_sgdr.processors import usable_threads
from hf_sgdr.text import printable

_HASHED_AT_ONCE = 1024


class UnreadablePhotoError(ValueError):
    """A photo cannot be read.

    Args:
        name (`str`): the file, or "image"; without a reason, the whole message, as worker processes pass it on.
        reason (`str`, *optional*): why, in a few words.
    """

    def __init__(self, name: str, reason: str | None = None) -> None:
        super().__init__(
            name
            if reason is None
            else f"{printable(name)}: cannot be read as a picture ({reason}). Remove or replace it."
        )
        self.reason = reason


def read_photo(photo: Any, shorter_side: int | None = None) -> Image.Image:
    """A picture as a Pillow image in RGB, turned upright as its EXIF orientation says; a GIF gives its first frame.

    Args:
        photo: a path, encoded bytes, a `{"bytes", "path"}` of a `datasets.Image(decode=False)`, a Pillow image, a
            numpy array (height, width[, channels]) of uint8, or a uint8 tensor (3, height, width).
        shorter_side (`int`, *optional*): a JPEG may be decoded at a half, a quarter or an eighth of its size, as long
            as its shorter side keeps this many pixels.

    Raises:
        UnreadablePhotoError: a `ValueError`, if it cannot be read; the message names the file and the reason.
        TypeError: if it is none of these.
    """
    name, source = "image", photo
    if isinstance(photo, Mapping):
        name = photo.get("path") or name
        source = photo["bytes"] if photo.get("bytes") is not None else photo.get("path")
    if isinstance(source, torch.Tensor):
        source = source.permute(1, 2, 0).numpy()
    if isinstance(source, str | os.PathLike):
        name = os.fspath(source)
    elif not isinstance(source, bytes | bytearray | Image.Image | np.ndarray):
        raise TypeError(f"{type(photo).__name__} is no picture: give a path, bytes, a Pillow image or an array.")
    try:
        return _decoded(source, shorter_side)
    except Exception as error:  # hostile files bring a decoder to errors of any kind
        raise UnreadablePhotoError(name, _reason(error, source)) from error


def _decoded(source: Any, shorter_side: int | None) -> Image.Image:
    image: Image.Image
    if isinstance(source, Image.Image):
        image = source
    elif isinstance(source, np.ndarray):
        image = Image.fromarray(source)
    elif isinstance(source, bytes | bytearray):
        image = Image.open(BytesIO(source), formats=_formats())
    else:
        require_regular(source)
        image = Image.open(source, formats=_formats())
    if shorter_side is not None and image.format == "JPEG":
        scale = shorter_side / min(image.size)
        image.draft(None, (math.ceil(image.width * scale), math.ceil(image.height * scale)))
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:  # else Pillow would copy the picture
        image = ImageOps.exif_transpose(image)
    image.load()  # here, where an error still knows the file's name
    return _to_rgb(image)


@functools.cache
def _formats() -> tuple[str, ...]:
    """What Pillow reads by itself; EPS it hands to Ghostscript, which would run what a stranger's file says."""
    Image.init()
    return tuple(kind for kind in Image.ID if kind != "EPS")


def require_regular(path: str | os.PathLike[str]) -> None:
    """Raise an OSError unless a path is a file: reading from a pipe would wait, and a device may never end."""
    mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode):
        os.listdir(path)  # a folder that cannot be listed is passed on as a photo, so that this names it
    if not stat.S_ISREG(mode):
        raise OSError("a folder, not a file" if stat.S_ISDIR(mode) else "a pipe or a device, not a file")


# What is often saved under a picture's name, by how it begins.
_NO_PICTURES = {
    rb"\s*(<!--.*?-->\s*)*<(!doctype\s+html|html|head|body)": "an HTML page, not a picture",
    rb"\s*(<\?xml.*?\?>\s*)?(<!--.*?-->\s*|<!doctype.*?>\s*)*<svg": "an SVG drawing; convert it to PNG",
    rb"\s*<\?xml": "an XML file, not a picture",
    rb"\s*[\[{]": "a JSON or text file, not a picture",
    rb"%PDF": "a PDF, not a picture",
    rb"%!PS": "PostScript, not a picture",
    rb"PK\x03\x04": "a ZIP archive, not a picture",
    rb"....ftyp(hei|hev|mif1|msf1)": "HEIC, which Pillow does not read; convert it to JPEG",
    rb"....ftyp": "a video, not a picture",
    rb"version https://git-lfs": "a Git LFS pointer; fetch the file with `git lfs pull`",
}


def _reason(error: Exception, source: Any) -> str:
    """Why a photo cannot be read, in a few words for people."""
    if isinstance(error, Image.DecompressionBombError):
        most = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        return f"more than {most:,} pixels, the most that Pillow reads; make it smaller"
    if isinstance(error, UnidentifiedImageError):
        start = _start_of(source)
        if not start:
            return "an empty file, 0 bytes"
        for pattern, what in _NO_PICTURES.items():
            if re.match(pattern, start, re.IGNORECASE | re.DOTALL):
                return what
        return "of no picture format that Pillow reads"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = str(error).splitlines()
    return printable(lines[0]) if lines and lines[0] else type(error).__name__


def _start_of(source: Any) -> bytes:
    if isinstance(source, bytes | bytearray):
        return bytes(source[:512])
    with open(source, "rb") as file:
        return file.read(512)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":  # 16-bit and deeper: Pillow would clip, not scale
        pixels = np.asarray(image, dtype=np.float32)
        white = next((white for white in (255.0, 65535.0) if pixels.max() <= white), float(pixels.max()))
        return Image.fromarray((pixels * (255 / white)).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image if image.mode == "RGB" else image.convert("RGB")


def photo_hash(photo: Any) -> bytes:
    """SHA-256 of a photo's content: of the file's bytes where there is a file, of the pixels otherwise.

    Raises:
        UnreadablePhotoError: a `ValueError`, if it cannot be read.
    """
    if isinstance(photo, Mapping):
        photo = photo["bytes"] if photo.get("bytes") is not None else photo["path"]
    if isinstance(photo, bytes | bytearray):
        return hashlib.sha256(photo).digest()
    if isinstance(photo, str | os.PathLike):
        try:
            require_regular(photo)
            with open(photo, "rb") as file:
                return hashlib.file_digest(file, "sha256").digest()
        except OSError as error:
            raise UnreadablePhotoError(os.fspath(photo), _reason(error, photo)) from error
    pixels = np.asarray(read_photo(photo))
    return hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).digest()


class PixelTransform(Protocol):
    """What `hf_sgdr.transforms.PhotoTransform` is to a data set."""

    def pixels(self, photo: Any, seed: tuple[int, ...]) -> torch.Tensor:
        """A photo as a uint8 tensor (3, size, size), its random choices drawn from the seed."""

    def of_kept(self, pixels: torch.Tensor, seed: tuple[int, ...]) -> torch.Tensor:
        """The same from what a cache keeps of a photo."""


class Pictures(Protocol):
    """What a [`PhotoCache`] is to a data set: decoded pictures by their number."""

    def __getitem__(self, index: int) -> torch.Tensor: ...


class PhotoDataset(Dataset[dict[str, Any]]):
    """The photos of a `datasets.Dataset` as `{"pixel_values": uint8 (3, size, size), "labels": int}`.

    What is random depends on the seed, the epoch and the photo's index alone, so neither the number of workers nor the
    order of the photos changes it.

    Args:
        dataset (`datasets.Dataset`, or any sequence of dicts): rows with an image and, if labelled, a label.
        transform (`PixelTransform`): turns a photo into pixels.
        image_column, label_column (`str`, *optional*, default to "image" and "label"): where they are; rows without the
            label column, or with an unknown label (None or -1), give no "labels".
        seed (`int`, *optional*, defaults to 0): for the augmentation.
        cache ([`PhotoCache`], *optional*): what is kept of the same photos, so that none is decoded.
    """

    def __init__(
        self,
        dataset: Any,
        transform: PixelTransform,
        *,
        image_column: str = "image",
        label_column: str = "label",
        seed: int = 0,
        cache: Pictures | None = None,
    ) -> None:
        self.rows = undecoded(dataset, image_column)
        self.transform = transform
        self.image_column, self.label_column = image_column, label_column
        self.seed = seed
        self.cache = cache
        # In shared memory, so that persistent workers see a new epoch too.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Draw the augmentations of another epoch; [`DatasetEpoch`] calls it."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        seed = (self.seed, int(self._epoch), index)
        if self.cache is not None:
            pixels = self.transform.of_kept(self.cache[index], seed)
        else:
            pixels = self.transform.pixels(row[self.image_column], seed)
        label = row.get(self.label_column)
        return {"pixel_values": pixels} if label is None or label < 0 else {"pixel_values": pixels, "labels": label}

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        """A batch at once. Outside worker processes its photos are read by threads, one a processor.

        Where the processor also computes, that beats worker processes: decoding and resizing release the interpreter's
        lock, no batch is copied between processes, and no fork makes the parent's memory copy-on-write.
        """
        if get_worker_info() is not None or len(indices) < 2:
            return [self[index] for index in indices]
        return list(readers().map(self.__getitem__, indices))

    def labels(self) -> list[int]:
        """Every photo's class id.

        Raises:
            ValueError: if there is no column of labels, or a photo has none.
        """
        if isinstance(self.rows, datasets.Dataset) and self.label_column not in self.rows.column_names:
            raise ValueError(
                f"No label column {self.label_column!r}: the dataset has {self.rows.column_names}. "
                "Name it with label_column_name."
            )
        unknown = sum(label is None or label < 0 for label in self.rows[self.label_column])
        if unknown:
            raise ValueError(f"{unknown} of {len(self)} photos have no label: training and evaluation need them all.")
        return [int(label) for label in self.rows[self.label_column]]

    def content_hash(self) -> str:
        """SHA-256 over every photo's content, in order; labels do not count."""
        digest = hashlib.sha256()
        for start in range(0, len(self), _HASHED_AT_ONCE):  # a future a photo takes memory
            indices = range(start, min(start + _HASHED_AT_ONCE, len(self)))
            for one in readers().map(lambda index: photo_hash(self.rows[index][self.image_column]), indices):
                digest.update(one)
        return digest.hexdigest()


@functools.cache
def readers() -> ThreadPoolExecutor:
    """Threads that read photos, one for each processor that this process may use."""
    return ThreadPoolExecutor(usable_threads(), thread_name_prefix="photo-reader")


def undecoded(dataset: Any, image_column: str = "image") -> Any:
    """The same rows with the image column left encoded, as bytes or a path; other sequences stay as they are."""
    if not isinstance(dataset, datasets.Dataset):
        return dataset
    if image_column not in dataset.column_names:
        raise ValueError(
            f"No image column {image_column!r}: the dataset has {dataset.column_names}. Name it with image_column_name."
        )
    dataset = dataset.with_format(None)
    if isinstance(dataset.features[image_column], datasets.Image):
        dataset = dataset.cast_column(image_column, datasets.Image(decode=False))
    return dataset
