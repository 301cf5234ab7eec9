"""The audit of images: which of them cannot be read is found before anything is trained on the others."""

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import PIL
from transformers.utils import logging

from hf_sgdr._utils.file_index import file_index
from hf_sgdr._utils.system import followed
from hf_sgdr._utils.text import printable
from hf_sgdr.data.images import CHUNK, UnreadableImageError, identity_of, read_image, readers

logger = logging.get_logger(__name__)

OnError = Literal["raise", "skip"] | None


class UnreadableImagesError(ValueError):
    """Some images cannot be read.

    Args:
        reasons (`dict[str, str]`): why, for each file.
        of (`int`): how many images were looked at.
    """

    def __init__(self, reasons: dict[str, str], of: int) -> None:
        super().__init__(reasons, of)
        self.reasons, self.of = reasons, of

    def __str__(self) -> str:
        listing = "\n".join(f"{printable(file)}: {reason};" for file, reason in self.reasons.items())
        return (
            f"{len(self.reasons)} of {self.of} images cannot be read:\n{listing}\n"
            'Remove or replace them, or leave them out with on_error="skip".'
        )


def readable(images: Sequence[Any], names: Sequence[str], on_error: OnError) -> list[int]:
    """Decode every image, several at a time, and keep those that can be.

    Args:
        images (sequence): what [`read_image`] takes.
        names (sequence of `str`): what they are called.
        on_error (`"raise"`, `"skip"` or None): what an unreadable one does: "raise" is an error that names every one
            with its reason, "skip" leaves them out and logs the same, None looks at none.

    Returns:
        `list[int]`: the positions of those to keep.

    Raises:
        UnreadableImagesError: a `ValueError`, with "raise".
    """
    check_on_error(on_error)
    if on_error is None:
        return list(range(len(images)))
    outcomes = list(followed(_reasons(images), "Checking images", len(images), delay=1.0, leave=False))
    reasons = {names[i]: reason for i, reason in enumerate(outcomes) if reason is not None}
    if reasons and on_error == "raise":
        raise UnreadableImagesError(reasons, len(images))
    for name, reason in reasons.items():
        logger.warning(f"{printable(name)}: left out, it cannot be read as a picture ({reason}).")
    if reasons:
        logger.warning(f"{len(reasons)} of {len(images)} images are left out.")
    return [i for i, reason in enumerate(outcomes) if reason is None]


def unreadable_files(files: Sequence[str]) -> dict[str, str]:
    """Why files cannot be read, for those that cannot."""
    try:
        readable(files, files, "raise")
    except UnreadableImagesError as error:
        return error.reasons
    return {}


def check_on_error(on_error: Any) -> None:
    """Raise a ValueError unless it is one of the three."""
    if on_error not in ("raise", "skip", None):
        raise ValueError(f"on_error={on_error!r}: give 'raise', 'skip' or None.")


def _reasons(images: Sequence[Any]) -> Iterator[str | None]:
    """Why each cannot be read; a file that could be is decoded again only when it or Pillow has changed."""
    index, kind = file_index(), f"read by Pillow {PIL.__version__}"
    for start in range(0, len(images), CHUNK):
        chunk = images[start : start + CHUNK]
        files = list(map(identity_of, chunk))
        unknown = [i for i, known in enumerate(index.get(kind, files)) if known is None]
        found = dict(zip(unknown, readers().map(lambda i: _reason(chunk[i]), unknown), strict=True))  # noqa: B023
        index.put(kind, [(file, b"") for i in unknown if found[i] is None and (file := files[i]) is not None])
        yield from map(found.get, range(len(chunk)))


def _reason(image: Any) -> str | None:
    if image is None or (isinstance(image, dict) and not image.get("bytes") and not image.get("path")):
        return "no image in this row"
    if isinstance(image, str) and not image.isascii():
        try:
            image.encode()
        except UnicodeEncodeError:
            return "its name is not UTF-8; rename it"
    try:
        read_image(image, shorter_side=1)  # a JPEG at an eighth of its size: all its bytes are still read
    except UnreadableImageError as error:
        return error.reason
    return None
