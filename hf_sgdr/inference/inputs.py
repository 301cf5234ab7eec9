"""What a pipeline is asked about: images by path, address, text or pixels, in lists, data sets and generators.

They are read by threads. Decoding and resizing release the interpreter's lock, so several images are read at once.
"""

import base64
import binascii
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from itertools import islice
from types import GeneratorType
from typing import Any

import datasets
import httpx
import numpy as np
import torch
from PIL import Image
from transformers.image_transforms import to_pil_image
from transformers.pipelines.pt_utils import KeyDataset

from hf_sgdr._utils.text import printable
from hf_sgdr.data.images import UnreadableImageError, read_image, readers, undecoded

# An image that was opened but not read yet may be given more than once; two threads must not read it together.
_LOCKS = [threading.Lock() for _ in range(64)]
_LONGEST_NAME = 100


def as_image(image: Any, timeout: float | None = None, read: Callable[..., Any] = read_image) -> Any:
    """An image in RGB, upright: a Pillow image, or what else `read` makes of it.

    Args:
        image: a path, an address (http or https), base64 text or a data URI, encoded bytes, a `{"bytes", "path"}` of
            `datasets`, a Pillow image, or an array or tensor of pixels (height and width before or after channels;
            floats from 0 to 1).
        timeout (`float`, *optional*): seconds to wait for an address.
        read (callable, *optional*): [`read_image`], or one that takes the same.

    Raises:
        UnreadableImageError: a `ValueError`, if it cannot be read; it names the file or address.
        TypeError: if it is none of these.
    """
    if isinstance(image, Image.Image):
        with _LOCKS[id(image) // 16 % len(_LOCKS)]:
            return read(image)
    if isinstance(image, torch.Tensor):
        image = image.detach().cpu()
        image = image.float() if image.is_floating_point() else image
    if isinstance(image, np.ndarray | torch.Tensor):
        try:
            return read(to_pil_image(image))
        except (ValueError, TypeError, RuntimeError, ZeroDivisionError) as error:
            raise UnreadableImageError(f"{type(image).__name__} {tuple(image.shape)}", str(error)) from error
    if not isinstance(image, str):
        return read(image)
    if image.startswith(("http://", "https://")):
        source = _fetched(image, timeout)
    elif os.path.exists(image):
        return read(image)
    else:
        source = _from_base64(image)
    try:
        return read(source)
    except UnreadableImageError as error:
        raise UnreadableImageError(_short(image), error.reason) from error


def _fetched(address: str, timeout: float | None) -> bytes:
    try:
        answer = httpx.get(address, timeout=timeout, follow_redirects=True)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise UnreadableImageError(_short(address), printable(error) or type(error).__name__) from error
    if not answer.is_success:
        raise UnreadableImageError(_short(address), f"{answer.status_code} {answer.reason_phrase}")
    return answer.content


def _from_base64(text: str) -> bytes:
    encoded = text.partition(",")[2] if text.startswith("data:image/") else text
    try:
        content = base64.b64decode("".join(encoded.split()), validate=True)
    except (binascii.Error, ValueError):
        content = b""
    if not content:
        raise UnreadableImageError(_short(text), "no such file, and neither an address nor base64")
    return content


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST_NAME else text[: _LONGEST_NAME - 3] + "..."


def as_inputs(images: Any) -> Any:
    """Images as transformers' pipelines know them: one image, a list, a data set of torch, or a generator.

    The rows of a `datasets.Dataset`, or a column of it, become their images, left encoded for the threads to decode.

    Raises:
        ValueError: if several columns may hold the images, or there are several splits.
    """
    if isinstance(images, datasets.DatasetDict | datasets.IterableDatasetDict):
        raise ValueError(
            f"A data set of several splits: give one of {list(images)}, such as images[{next(iter(images))!r}]."
        )
    if isinstance(images, datasets.IterableDataset):
        column = _image_column(images)
        return (row[column] for row in images)
    if isinstance(images, datasets.Dataset):
        images = KeyDataset(images, _image_column(images))
    if isinstance(images, datasets.Column):
        images = KeyDataset(images.source, images.column_name)
    if isinstance(images, KeyDataset):
        rows = images.dataset
        # a format or a transform of the user's makes something else of the column: that is kept
        if isinstance(rows, datasets.Dataset) and rows.format["type"] is None:
            images = KeyDataset(undecoded(rows.select_columns([images.key]), images.key), images.key)
        return images if len(images) else []
    if isinstance(images, tuple):
        return list(images)
    if isinstance(images, Iterator) and not isinstance(images, GeneratorType):
        return (image for image in images)
    return images


def _image_column(dataset: datasets.Dataset | datasets.IterableDataset) -> str:
    features: Mapping[str, Any] = dataset.features or {}
    columns = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    if len(columns) == 1:
        return columns[0]
    if "image" in features or not features:
        return "image"
    raise ValueError(
        f"Which column holds the pictures? The data set has {list(features)}: give KeyDataset(dataset, column) of "
        "transformers.pipelines.pt_utils, or dataset[column]."
    )


def read_in_threads(
    images: Iterator[Any], read: Callable[[Any], Any], batch_size: int, ahead: int
) -> Iterator[list[Future[Any]]]:
    """Batches of images that are being read, in order.

    Args:
        images (iterator): what to read; asked from the calling thread, never for more than it says here.
        read (callable): reads one.
        batch_size (`int`): images a batch.
        ahead (`int`): how many batches are read beside the one that is given.
    """
    waiting: deque[list[Future[Any]]] = deque()
    while True:
        while len(waiting) <= ahead and (
            batch := [readers().submit(read, item) for item in islice(images, batch_size)]
        ):
            waiting.append(batch)
        if not waiting:
            return
        yield waiting.popleft()


class SizedIterator(Iterator[Any]):
    """An iterator whose length is known, as progress bars like it."""

    def __init__(self, items: Iterator[Any], length: int) -> None:
        self._items, self._length = items, length

    def __next__(self) -> Any:
        return next(self._items)

    def __len__(self) -> int:
        return self._length
