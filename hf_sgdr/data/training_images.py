"""Which images a saved model was trained on, as hashes in its folder that are never pushed.

An evaluation says by them how many of its images the model has seen before.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hf_sgdr._utils.store import replace_file
from hf_sgdr.data.images import ImageDataset, image_hash, image_hashes, readers, undecoded

IMAGE_HASHES = "training-images.txt"


def write_image_hashes(dataset: Any, image_column: str, folder: Path) -> None:
    """Write the SHA-256 of every image of a data set, one a line, sorted, to `training-images.txt` in a folder."""
    rows = undecoded(dataset.rows if isinstance(dataset, ImageDataset) else dataset, image_column)
    hashes = [one.hex() for one in image_hashes(rows, image_column)]
    replace_file(folder / IMAGE_HASHES, "".join(f"{one}\n" for one in sorted(hashes)).encode())


def read_image_hashes(folder: Path) -> set[str] | None:
    """What [`write_image_hashes`] wrote to a folder; None if it did not."""
    path = folder / IMAGE_HASHES
    return set(path.read_text(encoding="ascii").split()) if path.exists() else None


def content_hashes(images: Iterable[Any]) -> list[str]:
    """The SHA-256 of every image: of the file's bytes where there is a file, of the pixels otherwise."""
    return [one.hex() for one in readers().map(image_hash, images)]
