"""How a recipe ends: what the user can mend is one line, and a run that made nothing leaves nothing."""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from hf_sgdr.text import printable


def one_clear_line(main: Callable[[Sequence[str]], int | None]) -> int:
    """Run a recipe; what the user can mend ends in one line on stderr and exit status 2, without a traceback.

    `HF_SGDR_DEBUG=1` shows the traceback.
    """
    program = Path(sys.argv[0]).name
    try:
        return main(sys.argv[1:]) or 0
    except KeyboardInterrupt:
        more = "; the same command with --resume goes on" if program == "train.py" else ""
        print(f"{program}: interrupted{more}.", file=sys.stderr)
        return 130
    except Exception as error:
        if os.environ.get("HF_SGDR_DEBUG") == "1":
            raise
        # an error of a worker process carries that process's traceback; its last line says what is wrong
        lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        message = lines[-1].split(": ", 1)[-1] if lines[0].startswith("Caught ") else " ".join(lines)
        if not isinstance(error, ValueError | TypeError | OSError | ImportError | ArithmeticError | MemoryError):
            message += f" ({type(error).__name__}; HF_SGDR_DEBUG=1 shows where it came from)"
        print(f"{program}: error: {printable(message)}", file=sys.stderr)
        return 2


@contextmanager
def nothing_left_on_failure(folder: str | os.PathLike[str]) -> Iterator[None]:
    """If what is inside fails, a folder that it made and left empty is removed."""
    path = Path(folder)
    existed = path.exists()
    try:
        yield
    except BaseException:
        if not existed:
            with suppress(OSError):  # it holds something after all
                path.rmdir()
        raise
