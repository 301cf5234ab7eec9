"""Images as tensors: reading any picture as 8-bit RGB, and a torch dataset of transformed images.

The pixels stay 8-bit until they are on the device, where a whole batch is normalised at once: workers hand over a
quarter of the bytes.
"""

import functools
import hashlib
import math
import operator
import os
import re
import stat
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from itertools import islice
from typing import Any, Protocol

import datasets
import numpy as np
import PIL
import pyarrow as pa
import pyarrow.compute as pc
import torch
import torchvision
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, TiffImagePlugin, UnidentifiedImageError
from torch.utils.data import Dataset, get_worker_info

from hf_sgdr._utils.files import FileIdentity, file_identity
from hf_sgdr._utils.processors import usable_threads
from hf_sgdr._utils.text import printable

_HASHED_AT_ONCE = 1024
# To be raised when `read_image` or a transform makes other pixels of a file: what was stored before counts no more.
PIXELS_VERSION = 2


class UnreadableImageError(ValueError):
    """An image cannot be read.

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


def read_image(image: Any, shorter_side: int | None = None) -> Image.Image:
    """A picture as a Pillow image in RGB, turned upright as its EXIF orientation says; a GIF gives its first frame.

    Grey values of more than 8 bits are scaled to 0 to 255 by what the mode or the file says of their depth, so that
    all pictures of a set are scaled alike:

    - Integers of 16 bits (PNG, TIFF, PGM, JPEG 2000, Pillow's modes I;16): 65535 is white. A TIFF of 12 bits has its
      white at 4095, one of signed 16 bits at 32767; what is negative is black.
    - Integers of 32 bits (Pillow's mode I) are refused, because their white is not known.
    - Floats (TIFF, Pillow's mode F): 1 is white, as in scikit-image and Matplotlib; where a value exceeds 2, 255 is, as
      in Pillow: nothing of such a picture could be seen otherwise. NaN and what is negative are black; values above 510
      are refused.

    Args:
        image: a path, encoded bytes, a `{"bytes", "path"}` of a `datasets.Image(decode=False)`, a Pillow image, a
            numpy array (height, width[, channels]) of uint8, one (height, width) of uint16 or float, or a uint8 tensor
            (3, height, width).
        shorter_side (`int`, *optional*): a JPEG may be decoded at a half, a quarter or an eighth of its size, as long
            as its shorter side keeps this many pixels.

    Raises:
        UnreadableImageError: a `ValueError`, if it cannot be read; the message names the file and the reason.
        TypeError: if it is none of these.
    """
    name, source = "image", image
    if isinstance(image, Mapping):
        name = image.get("path") or name
        source = image["bytes"] if image.get("bytes") is not None else image.get("path")
    if isinstance(source, torch.Tensor):
        source = source.permute(1, 2, 0).numpy()
    if isinstance(source, str | os.PathLike):
        name = os.fspath(source)
    elif not isinstance(source, bytes | bytearray | Image.Image | np.ndarray):
        raise TypeError(f"{type(image).__name__} is no picture: give a path, bytes, a Pillow image or an array.")
    try:
        return _decoded(source, shorter_side)
    except Exception as error:  # hostile files bring a decoder to errors of any kind
        raise UnreadableImageError(name, _reason(error, source)) from error


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
    depth = _depth(image)
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:  # else Pillow would copy the picture
        image = ImageOps.exif_transpose(image)
    image.load()  # here, where an error still knows the file's name
    return _to_rgb(image, depth)


@functools.cache
def _formats() -> tuple[str, ...]:
    """What Pillow reads by itself; EPS it hands to Ghostscript, which would run what a stranger's file says."""
    Image.init()
    return tuple(kind for kind in Image.ID if kind != "EPS")


def require_regular(path: str | os.PathLike[str]) -> None:
    """Raise an OSError unless a path is a file: reading from a pipe would wait, and a device may never end."""
    mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode):
        os.listdir(path)  # a folder that cannot be listed is passed on as an image, so that this names it
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
    """Why an image cannot be read, in a few words for people."""
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


def _depth(image: Image.Image) -> int | None:
    """How many bits white has in a picture of integers, its sign left out; None where neither mode nor file says it.

    Ask before the picture is copied: a copy has no file and no tags.
    """
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        bits = int(image.tag_v2.get(TiffImagePlugin.BITSPERSAMPLE, (1,))[0])
        is_signed = image.tag_v2.get(TiffImagePlugin.SAMPLEFORMAT, (1,))[0] == 2
        return bits - is_signed
    # Pillow gives a PGM of more than 8 bits in mode I, scaled to 16 whatever maximum it states
    return 16 if image.mode.startswith("I;16") or image.format in ("PNG", "PPM") else None


def _to_rgb(image: Image.Image, depth: int | None) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):  # deeper than 8 bits: Pillow would clip, not scale
        pixels = np.asarray(image, dtype=np.float32)
        white = _white_of_floats(pixels) if image.mode == "F" else _white_of_integers(depth)
        pixels = np.nan_to_num(pixels, nan=0.0, posinf=white, neginf=0.0)
        return Image.fromarray(np.rint(pixels * (255 / white)).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image if image.mode == "RGB" else image.convert("RGB")


def _white_of_integers(depth: int | None) -> float:
    if depth is None or depth > 16:
        raise ValueError("integers of 32 bits, whose white is not known; convert it to 8 or 16 bits")
    return 2.0**depth - 1


def _white_of_floats(pixels: NDArray[np.float32]) -> float:
    """1 or 255; resizing overshoots the brightest value, hence twice as much is still taken."""
    brightest = float(pixels[np.isfinite(pixels)].max(initial=0.0))
    white = next((white for white in (1.0, 255.0) if brightest <= 2 * white), None)
    if white is None:
        raise ValueError(f"float values up to {brightest:g}; scale them to 0 to 1, or convert it to 8 or 16 bits")
    return white


def image_hash(image: Any) -> bytes:
    """SHA-256 of an image's content: of the file's bytes where there is a file, of the pixels otherwise.

    A process reads a file once; it is read again when its size or its time of modification has changed.

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
            identity = file_identity(image)
            if identity not in _hash_of_file:
                with open(image, "rb") as file:
                    _hash_of_file[identity] = hashlib.file_digest(file, "sha256").digest()
            return _hash_of_file[identity]
        except OSError as error:
            raise UnreadableImageError(os.fspath(image), _reason(error, image)) from error
    pixels = np.asarray(read_image(image))
    return hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).digest()


def pixel_versions() -> dict[str, Any]:
    """The versions of all that makes pixels of a file; part of the key of whatever is stored."""
    return {"pillow": PIL.__version__, "torchvision": torchvision.__version__, "pixels": PIXELS_VERSION}


# What was hashed by this process; a changed file has another identity, so nothing here can be out of date.
_hash_of_file: dict[FileIdentity, bytes] = {}


def _known_hash(path: str | None) -> bytes | None:
    try:
        return _hash_of_file.get(file_identity(path)) if path else None
    except OSError:  # whoever reads it says why
        return None


class PixelTransform(Protocol):
    """What `hf_sgdr.data.transforms.ImageTransform` is to a data set."""

    def pixels(self, image: Any, seed: tuple[int, ...]) -> torch.Tensor:
        """An image as a uint8 tensor (3, size, size), its random choices drawn from the seed."""

    def of_kept(self, pixels: torch.Tensor, seed: tuple[int, ...]) -> torch.Tensor:
        """The same from what a cache keeps of an image."""


class DecodedImages(Protocol):
    """What an [`ImageCache`] is to a data set: decoded pictures by their number."""

    def __getitem__(self, index: int) -> torch.Tensor: ...


class ImageDataset(Dataset[dict[str, Any]]):
    """The images of a `datasets.Dataset` as `{"pixel_values": uint8 (3, size, size), "labels": int}`.

    What is random depends on the seed, the epoch and the image's index alone, so neither the number of workers nor the
    order of the images changes it.

    Args:
        dataset (`datasets.Dataset`, or any sequence of dicts): rows with an image and, if labelled, a label.
        transform (`PixelTransform`): turns an image into pixels.
        image_column, label_column (`str`, *optional*, default to "image" and "label"): where they are; rows without the
            label column, or with an unknown label (None or -1), give no "labels".
        seed (`int`, *optional*, defaults to 0): for the augmentation.
        cache ([`ImageCache`], *optional*): what is kept of the same images, so that none is decoded.

    Raises:
        ValueError: if the dataset is of no use; see [`require_images`].
    """

    def __init__(
        self,
        dataset: Any,
        transform: PixelTransform,
        *,
        image_column: str = "image",
        label_column: str = "label",
        seed: int = 0,
        cache: DecodedImages | None = None,
    ) -> None:
        require_images("dataset", dataset, image_column, label_column)
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
        label = _class_id(row.get(self.label_column))
        return {"pixel_values": pixels} if label is None else {"pixel_values": pixels, "labels": label}

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        """A batch at once. Outside worker processes its images are read by threads, one a processor.

        Where the processor also computes, that beats worker processes: decoding and resizing release the interpreter's
        lock, no batch is copied between processes, and no fork makes the parent's memory copy-on-write.
        """
        if get_worker_info() is not None or len(indices) < 2:
            return [self[index] for index in indices]
        return list(readers().map(self.__getitem__, indices))

    def require_equal_labelling(self) -> None:
        """Raise a ValueError if some images of a `datasets.Dataset` have a label and some have none."""
        if not isinstance(self.rows, datasets.Dataset) or self.label_column not in self.rows.column_names:
            return
        unknown = self._class_ids().count(None)
        if 0 < unknown < len(self):
            raise ValueError(
                f"{unknown} of {len(self)} images have no label. Give each a label or leave those images out; to "
                f"predict only, give dataset.remove_columns({self.label_column!r})."
            )

    def labels(self) -> list[int]:
        """Every image's class id.

        Raises:
            ValueError: if there is no column of labels, or an image has none.
        """
        if isinstance(self.rows, datasets.Dataset) and self.label_column not in self.rows.column_names:
            raise ValueError(
                f"No label column {self.label_column!r}: the dataset has {self.rows.column_names}. "
                "Name it with label_column_name."
            )
        labels = self._class_ids()
        unknown = labels.count(None)
        if unknown:
            raise ValueError(f"{unknown} of {len(self)} images have no label: training and evaluation need them all.")
        return [label for label in labels if label is not None]

    def _class_ids(self) -> list[int | None]:
        if isinstance(self.rows, datasets.Dataset):
            return list(map(_class_id, _column(self.rows, self.label_column)))
        return [_class_id(self.rows[index].get(self.label_column)) for index in range(len(self))]

    def content_hash(self) -> str:
        """SHA-256 over every image's content, in order; labels do not count. See [`image_hash`]."""
        digest = hashlib.sha256()
        for one in image_hashes(self.rows, self.image_column):
            digest.update(one)
        return digest.hexdigest()


def image_hashes(rows: Any, image_column: str) -> Iterator[bytes]:
    """[`image_hash`] of every image of a data set, in order.

    Args:
        rows (`datasets.Dataset`, or any sequence of dicts): with the images still encoded; see [`undecoded`].
        image_column (`str`): where they are.

    Raises:
        UnreadableImageError: a `ValueError`, if one cannot be read.
    """
    paths = _paths(rows, image_column)
    for start in range(0, len(rows), _HASHED_AT_ONCE):  # a future an image takes memory
        indices = range(start, min(start + _HASHED_AT_ONCE, len(rows)))
        known = list(map(_known_hash, islice(paths, len(indices))))
        todo = [index for index, one in zip(indices, known, strict=True) if one is None]
        new = readers().map(lambda index: image_hash(rows[index][image_column]), todo)
        yield from (next(new) if one is None else one for one in known)


def _paths(rows: Any, image_column: str) -> Iterator[str | None]:
    """Every image's file, None for what is none; read by columns, as row by row takes ten times as long."""
    if not isinstance(rows, datasets.Dataset):
        yield from [None] * len(rows)
        return
    images = rows.select_columns(image_column).with_format("arrow")
    for start in range(0, len(rows), _HASHED_AT_ONCE):
        column = images[start : start + _HASHED_AT_ONCE][image_column]
        if pa.types.is_struct(column.type) and not column.chunk(0).field("bytes")[0].is_valid:
            both = column.combine_chunks()  # of a selection each chunk is one row; encoded bytes would be copied
            column = pc.if_else(pc.is_valid(both.field("bytes")), None, both.field("path"))
        is_text = pa.types.is_string(column.type) or pa.types.is_large_string(column.type)
        yield from column.to_pylist() if is_text else [None] * len(column)


def readers() -> ThreadPoolExecutor:
    """Threads of this process that read images, one for each processor that it may use."""
    return _readers_of(os.getpid())


@functools.cache
def _readers_of(process: int) -> ThreadPoolExecutor:
    """By process: a fork copies the pool but not its threads, and whoever waits for them waits for ever."""
    return ThreadPoolExecutor(usable_threads(), thread_name_prefix="image-reader")


def require_images(name: str, dataset: Any, image_column: str = "image", label_column: str = "label") -> None:
    """Raise a ValueError if a data set cannot be read as images and labels; what is of another kind passes.

    Args:
        name (`str`): the argument that holds the data set, for the message.
        dataset (`datasets.Dataset`, or any sequence of dicts): what was given.
        image_column, label_column (`str`, *optional*, default to "image" and "label"): where they are.

    Raises:
        ValueError: if it holds several splits or no row, has a transform that would not be applied, or labels that are
            no class ids.
    """
    if isinstance(dataset, datasets.DatasetDict | datasets.IterableDatasetDict):
        splits = list(dataset)
        example = f", such as {name}[{splits[0]!r}]" if splits else ""
        raise ValueError(f"{name} is a {type(dataset).__name__} of the splits {splits}: give one of them{example}.")
    if hasattr(dataset, "__len__") and len(dataset) == 0:
        raise ValueError(f"{name} is empty: it must have at least one image.")
    if not isinstance(dataset, datasets.Dataset) or image_column not in dataset.column_names:
        return
    if dataset.format["type"] == "custom":
        raise ValueError(
            f"{name} has a transform (with_transform or set_transform), which would not be applied: images are read "
            "from their files and transformed by train_transform and eval_transform. Give dataset.with_format(None), "
            "or write what it does into the dataset with dataset.map()."
        )
    feature = dataset.features.get(label_column)
    if feature is None or isinstance(feature, datasets.ClassLabel):
        pass
    elif isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string"):
        raise ValueError(
            f"{name}: the labels in {label_column!r} are strings; they must be class ids, numbered alike in all splits "
            f"as the model counts them: give dataset.cast_column({label_column!r}, datasets.ClassLabel(names=names))."
        )
    elif not (isinstance(feature, datasets.Value) and feature.dtype.startswith(("int", "uint", "bool", "null"))):
        raise ValueError(f"{name}: the labels in {label_column!r} are {feature}; they must be class ids (integers).")


def _column(dataset: datasets.Dataset, name: str) -> list[Any]:
    """A column of plain values at once; iterating over `dataset[name]` takes a hundred times as long."""
    values: list[Any] = dataset.select_columns(name).with_format("arrow")[:][name].combine_chunks().to_pylist()
    return values


def _class_id(label: Any) -> int | None:
    """A label as a class id; None for an unknown one, which is None or negative."""
    if label is None:
        return None
    try:
        id_ = operator.index(label)  # also of NumPy and of a tensor
    except TypeError as error:
        raise ValueError(
            f"The label {label!r} is a {type(label).__name__}; it must be a class id (integer)."
        ) from error
    return id_ if id_ >= 0 else None


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
