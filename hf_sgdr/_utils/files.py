"""Files and folders, as several rooms know them: what tells a file from another, and where runs lie."""

import os

# Below an output folder: what a run keeps for itself, and what an unfinished one left.
RUNS_FOLDER, UNFINISHED_RUNS_FOLDER = "_runs", "_runs-unfinished"
# Its picture: rates, losses and metrics by epoch.
RUN_PICTURE = "run.png"

FileIdentity = tuple[str, int, int]  # absolute path, size in bytes, time of modification in nanoseconds


def file_identity(path: str | os.PathLike[str]) -> FileIdentity:
    """What tells a file from others and from itself before a change, without reading it.

    Raises:
        OSError: if there is none, or it may not be looked at.
    """
    status, name = os.stat(path), os.fspath(path)
    # abspath takes longer than the stat; most paths are absolute
    return name if name.startswith("/") else os.path.abspath(name), status.st_size, status.st_mtime_ns
