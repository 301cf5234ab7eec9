"""What an error leaves: one line on the terminal, and no empty folder."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from hf_sgdr._utils.files import disk_failure
from hf_sgdr._utils.text import printable

USER_ERRORS = (ValueError, TypeError, OSError, ImportError, ArithmeticError, MemoryError)


def error_line(error: Exception) -> str:
    """An exception as one line; of one that is no user error with its type and how to see the traceback."""
    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    # an error of a worker process carries that process's traceback; its last line says what is wrong
    message = lines[-1].split(": ", 1)[-1] if lines[0].startswith("Caught ") else " ".join(lines)
    if _is_lost_connection(error):
        message = f"another process of this run has ended, which says why itself; resume the run ({message})"
    elif disk_failure(error):  # in the words of the system or a library alone
        message += ": make room, or write elsewhere, and run the command again; what was saved stays"
    elif not isinstance(error, USER_ERRORS):
        message += f" ({type(error).__name__}; HF_SGDR_DEBUG=1 shows where it came from)"
    return printable(message)


def _is_lost_connection(error: Exception) -> bool:
    """Whether processes of a run no longer reach each other: one was killed, or its machine is gone."""
    return type(error).__name__ in ("DistBackendError", "DistNetworkError") or (
        isinstance(error, RuntimeError) and "gloo" in str(error)
    )


@contextmanager
def remove_empty_dir_on_error(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Remove the folder if the body fails, provided that the body made it and it is empty."""
    path = Path(folder)
    existed = path.exists()
    try:
        yield
    except BaseException:
        if not existed:
            with suppress(OSError):  # it holds something after all
                path.rmdir()
        raise
