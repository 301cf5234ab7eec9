"""How a recipe ends: what the user can mend is one line, and a run that made nothing leaves nothing."""

import os
import select
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from hf_sgdr.text import printable


def one_clear_line(main: Callable[[Sequence[str]], int | None]) -> int:
    """Run a recipe; what the user can mend ends in one line on stderr and exit status 2, without a traceback.

    `HF_SGDR_DEBUG=1` shows the traceback. Where nobody reads the output any more, as with `| head`, it ends in silence
    with the exit status of a program that SIGPIPE stopped.
    """
    program = Path(sys.argv[0]).name
    try:
        status = main(sys.argv[1:]) or 0
        sys.stdout.flush()  # here, where a closed pipe can still be told from an error
        return status
    except KeyboardInterrupt:
        more = "; the same command with --resume goes on" if program == "train.py" else ""
        print(f"{program}: interrupted{more}.", file=sys.stderr)
        return 130
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _silence_closed_pipes():
            return 128 + 13  # SIGPIPE
        if os.environ.get("HF_SGDR_DEBUG") == "1":
            raise
        # an error of a worker process carries that process's traceback; its last line says what is wrong
        lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        message = lines[-1].split(": ", 1)[-1] if lines[0].startswith("Caught ") else " ".join(lines)
        if not isinstance(error, ValueError | TypeError | OSError | ImportError | ArithmeticError | MemoryError):
            message += f" ({type(error).__name__}; HF_SGDR_DEBUG=1 shows where it came from)"
        print(f"{program}: error: {printable(message)}", file=sys.stderr)
        return 2


def _silence_closed_pipes() -> bool:
    """Let what is still to be written to a closed pipe go nowhere, also at the exit; whether there was such a pipe.

    A stream is asked, because another pipe may have broken: a worker's, or a connection.
    """
    closed = [stream.fileno() for stream in (sys.stdout, sys.stderr) if _nobody_reads(stream)]
    for file in closed:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, file)
        os.close(nowhere)
    return bool(closed)


def _nobody_reads(stream: TextIO) -> bool:
    try:
        poll = select.poll()
        poll.register(stream.fileno(), 0)  # errors are always told
    except (AttributeError, OSError):  # Windows has no poll; a stream of a test or a notebook is no file
        return False
    return any(event & select.POLLERR for _, event in poll.poll(0))


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
