"""Files and folders, as several rooms know them: their identity, where runs and stores lie, and full disks."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import constants

# Below an output folder: what a run keeps for itself, and what an unfinished one left.
RUNS_FOLDER, UNFINISHED_RUNS_FOLDER = "_runs", "_runs-unfinished"
# Its picture: rates, losses and metrics by epoch.
RUN_PICTURE = "run.png"
# And those of its stages.
STAGE_PLOTS = ("*-range-test.png", "*-learning-rate.png")

FileIdentity = tuple[str, int, int]  # absolute path, size in bytes, time of modification in nanoseconds


def cache_folder() -> Path:
    """Where stores and measurements live: `HF_SGDR_CACHE`, by default `hf_sgdr` below `HF_HOME`."""
    return Path(os.environ.get("HF_SGDR_CACHE") or Path(constants.HF_HOME, "hf_sgdr"))


def file_identity(path: str | os.PathLike[str]) -> FileIdentity:
    """What tells a file from others and from itself before a change, without reading it.

    Raises:
        OSError: if there is none, or it may not be looked at.
    """
    status, name = os.stat(path), os.fspath(path)
    # abspath takes longer than the stat; most paths are absolute
    return name if name.startswith("/") else os.path.abspath(name), status.st_size, status.st_mtime_ns


_CANNOT_WRITE = {number: os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)}


def disk_failure(error: BaseException) -> str | None:
    """Why a disk took no more of a file, in the system's words; None for an error of another kind."""
    if isinstance(error, OSError):
        return _CANNOT_WRITE.get(error.errno or 0)  # ours, which say more, have no number
    text = str(error)
    if "inline_container.cc" in text and "PytorchStreamReader" not in text:  # torch.save keeps the reason to itself
        return "the disk took no more of a file"
    reasons = (reason for number, reason in _CANNOT_WRITE.items() if f"(os error {number})" in text)  # safetensors
    return next(reasons, None)


@contextmanager
def clear_disk_errors(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Inside, an error of a full or read-only disk is an OSError in one line that names the folder and the mend.

    Args:
        folder (`str` or `os.PathLike`): an output folder.
    """
    try:
        yield
    except Exception as error:  # the libraries that write have errors of their own
        reason = disk_failure(error)
        if reason is None:
            raise
        path = getattr(error, "filename", None) or os.fspath(folder)
        raise OSError(f"{path} cannot be written ({reason}): make room, and resume; what was saved stays.") from error
