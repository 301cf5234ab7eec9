"""Reading any picture as 8-bit RGB, and the threads that read several at a time.

JPEGs whose pixels need not be a Pillow image are decoded by simplejpeg: the same pixels, as both are libjpeg-turbo's,
but without the way into Pillow's memory and out again.
"""

import functools
import math
import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from typing import Any, TypeVar

import datasets
import numpy as np
import PIL
import simplejpeg
import torch
import torchvision
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, TiffImagePlugin, UnidentifiedImageError

from hf_sgdr._utils.files import FileIdentity, file_identity
from hf_sgdr._utils.system import usable_threads
from hf_sgdr._utils.text import printable

# To be raised when `read_image` or a transform makes other pixels of a file: what was stored before counts no more.
PIXELS_VERSION = 4
# How many images are read, or looked up, at once.
CHUNK = 1024
# A JPEG that is decoded at a part of its size keeps so many times the pixels that are needed. Measured with
# tf_efficientnet_lite0: the cosine of features with those of the whole picture is .9998 so, .996 with once the pixels.
OVERSAMPLING = 2

T = TypeVar("T")


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
            as its shorter side keeps twice this many pixels.

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
        raise UnreadableImageError(name, failure_reason(error, source)) from error


def read_pixels(image: Any, shorter_side: int | None = None) -> torch.Tensor:
    """The pixels of [`read_image`], uint8 (3, height, width); of a JPEG in about half the time.

    Args:
        image: what [`read_image`] takes; a tensor is given back.
        shorter_side (`int`, *optional*): see there.

    Raises:
        UnreadableImageError, TypeError: see there.
    """
    if isinstance(image, torch.Tensor):
        return image
    content = image.get("bytes") or image.get("path") if isinstance(image, Mapping) else image
    if isinstance(content, str | os.PathLike):
        content = _jpeg_content(content)
    pixels = _jpeg_pixels(content, shorter_side) if isinstance(content, bytes) else None
    if pixels is None:
        pixels = np.array(read_image(image, shorter_side))
    return torch.from_numpy(pixels).permute(2, 0, 1)


_JPEG = b"\xff\xd8\xff"


def _jpeg_content(path: str | os.PathLike[str]) -> bytes | None:
    try:
        require_regular(path)
        with open(path, "rb") as file:
            start = file.read(len(_JPEG))
            return start + file.read() if start == _JPEG else None
    except OSError:  # whoever reads it next says why
        return None


def _jpeg_pixels(content: bytes, shorter_side: int | None) -> NDArray[np.uint8] | None:
    """The pixels (height, width, 3) of a JPEG; None of what Pillow is to decode, turn, or refuse with its reason."""
    if not content.startswith(_JPEG) or _is_turned(content):
        return None
    try:
        height, width, colors, _ = simplejpeg.decode_jpeg_header(content)
        if colors != "YCbCr" or height * width > (Image.MAX_IMAGE_PIXELS or math.inf):
            return None
        scale = 1
        if shorter_side is not None:
            scale = next((s for s in (8, 4, 2) if min(height, width) >= s * OVERSAMPLING * shorter_side), 1)
        return simplejpeg.decode_jpeg(content, min_height=-(-height // scale), min_width=-(-width // scale))
    except ValueError:
        return None


def _is_turned(content: bytes) -> bool:
    if b"Exif\0\0" not in content and b"tiff:Orientation" not in content:
        return False
    try:
        return Image.open(BytesIO(content), formats=("JPEG",)).getexif().get(ExifTags.Base.Orientation, 1) != 1
    except Exception:  # hostile files bring a decoder to errors of any kind
        return True


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
        with open(source, "rb") as file:  # of a path Pillow would map the file, and err where a TIFF's rows are turned
            return _decoded(Image.open(file, formats=_formats()), shorter_side)
    if shorter_side is not None and image.format == "JPEG":
        scale = OVERSAMPLING * shorter_side / min(image.size)
        image.draft(None, (math.ceil(image.width * scale), math.ceil(image.height * scale)))
    depth = _depth(image)
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:  # else Pillow would copy the picture
        image = ImageOps.exif_transpose(image)
    image.load()  # here, where an error still knows the file's name
    if 0 in image.size:
        raise ValueError(f"{image.width} x {image.height} pixels are no picture")
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


# What is often saved under an image's name, by what stands near its beginning.
_LOOKALIKES = {
    b"<html": "an HTML page",
    b"<!doctype html": "an HTML page",
    b"<svg": "an SVG drawing; convert it to PNG",
    b"ftyphei": "HEIC, which Pillow does not read; convert it to JPEG",
    b"ftypmif1": "HEIC, which Pillow does not read; convert it to JPEG",
    b"https://git-lfs": "a Git LFS pointer; fetch the file with `git lfs pull`",
}


def failure_reason(error: Exception, source: Any) -> str:
    """Why an image cannot be read, in a few words for people."""
    if isinstance(error, Image.DecompressionBombError):
        most = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        return f"more than {most:,} pixels, the most that Pillow reads; make it smaller"
    if isinstance(error, UnidentifiedImageError):
        start = _start_of(source).lower()
        unknown = "of no picture format that Pillow reads" if start else "an empty file, 0 bytes"
        return next((kind for mark, kind in _LOOKALIKES.items() if mark in start), unknown)
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


def file_of(source: Any) -> str | None:
    """The path of an image's file, None where it comes from no file."""
    path = source.get("path") if isinstance(source, Mapping) else source
    return os.fspath(path) if isinstance(path, str | os.PathLike) else None


def identity_of(image: Any) -> FileIdentity | None:
    """[`file_identity`] of an image that is all in a file; None of others, and where there is no file."""
    if isinstance(image, Mapping) and image.get("bytes") is not None:
        return None
    path = file_of(image)
    try:
        return file_identity(path) if path else None
    except OSError:  # whoever reads it says why
        return None


def pixel_versions() -> dict[str, Any]:
    """The versions of all that makes pixels of a file; part of the key of whatever is stored."""
    return {"pillow": PIL.__version__, "torchvision": torchvision.__version__, "pixels": PIXELS_VERSION}


def one_ahead(batches: Iterable[T]) -> Iterator[T]:
    """The same batches, each made by a thread while the one before it is worked on."""
    iterator = iter(batches)
    with ThreadPoolExecutor(1, thread_name_prefix="one-ahead") as thread:
        waiting = thread.submit(next, iterator, None)
        while (batch := waiting.result()) is not None:
            waiting = thread.submit(next, iterator, None)
            yield batch


def readers() -> ThreadPoolExecutor:
    """Threads of this process that read images, one for each processor that it may use."""
    return _readers_of(os.getpid())


@functools.cache
def _readers_of(process: int) -> ThreadPoolExecutor:
    """By process: a fork copies the pool but not its threads, and whoever waits for them waits for ever."""
    return ThreadPoolExecutor(usable_threads(), thread_name_prefix="image-reader")


class RowsAsGiven(Sequence[Any]):
    """Rows of a `datasets.Dataset` with a transform of its user's, as that gives them, one by one.

    Args:
        dataset (`datasets.Dataset`): the user's.
    """

    def __init__(self, dataset: datasets.Dataset) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: Any) -> Any:
        return self._dataset[int(index)]


def has_own_transform(dataset: Any) -> bool:
    """Whether rows go through a transform that their user set (`with_transform`, `set_transform`)."""
    return isinstance(dataset, datasets.Dataset) and dataset.format["type"] == "custom"


def undecoded(dataset: Any, image_column: str = "image") -> Any:
    """The same rows with the image column left encoded, as bytes or a path; other sequences stay as they are."""
    if has_own_transform(dataset):
        return RowsAsGiven(dataset)
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
