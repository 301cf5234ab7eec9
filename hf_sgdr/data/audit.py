"""The audit of photos: which of them cannot be read is found before anything is trained on the others."""

from collections.abc import Sequence
from typing import Any, Literal

from tqdm.auto import tqdm
from transformers.utils import logging

from hf_sgdr._utils.text import printable
from hf_sgdr.data.images import UnreadablePhotoError, read_photo, readers

logger = logging.get_logger(__name__)

OnError = Literal["raise", "skip"] | None
_AT_ONCE = 1024


class UnreadablePhotosError(ValueError):
    """Some photos cannot be read.

    Args:
        reasons (`dict[str, str]`): why, for each file.
        of (`int`): how many photos were looked at.
    """

    def __init__(self, reasons: dict[str, str], of: int) -> None:
        super().__init__(reasons, of)
        self.reasons, self.of = reasons, of

    def __str__(self) -> str:
        listing = "\n".join(f"{printable(file)}: {reason};" for file, reason in self.reasons.items())
        return (
            f"{len(self.reasons)} of {self.of} photos cannot be read:\n{listing}\n"
            'Remove or replace them, or leave them out with on_error="skip".'
        )


def readable(photos: Sequence[Any], names: Sequence[str], on_error: OnError) -> list[int]:
    """Decode every photo, several at a time, and keep those that can be.

    Args:
        photos (sequence): what [`read_photo`] takes.
        names (sequence of `str`): what they are called.
        on_error (`"raise"`, `"skip"` or None): what an unreadable one does: "raise" is an error that names every one
            with its reason, "skip" leaves them out and logs the same, None looks at none.

    Returns:
        `list[int]`: the positions of those to keep.

    Raises:
        UnreadablePhotosError: a `ValueError`, with "raise".
    """
    check_on_error(on_error)
    if on_error is None:
        return list(range(len(photos)))
    keep: list[int] = []
    reasons: dict[str, str] = {}
    with tqdm(total=len(photos), desc="Checking photos", unit="photo", delay=1.0, leave=False) as bar:
        for start in range(0, len(photos), _AT_ONCE):
            some = range(start, min(start + _AT_ONCE, len(photos)))
            for position, reason in zip(some, readers().map(lambda i: _reason(photos[i]), some), strict=True):
                if reason is None:
                    keep.append(position)
                else:
                    reasons[names[position]] = reason
                bar.update()
    if reasons and on_error == "raise":
        raise UnreadablePhotosError(reasons, len(photos))
    for name, reason in reasons.items():
        logger.warning(f"{printable(name)}: left out, it cannot be read as a picture ({reason}).")
    if reasons:
        logger.warning(f"{len(reasons)} of {len(photos)} photos are left out.")
    return keep


def check_on_error(on_error: Any) -> None:
    """Raise a ValueError unless it is one of the three."""
    if on_error not in ("raise", "skip", None):
        raise ValueError(f"on_error={on_error!r}: give 'raise', 'skip' or None.")


def _reason(photo: Any) -> str | None:
    if isinstance(photo, str) and not photo.isascii():
        try:
            photo.encode()
        except UnicodeEncodeError:
            return "its name is not UTF-8; rename it"
    try:
        read_photo(photo, shorter_side=1)  # a JPEG at an eighth of its size: all its bytes are still read
    except UnreadablePhotoError as error:
        return error.reason
    return None
