"""How a recipe starts and ends: exit codes, user errors in one line, Ctrl-C, SIGTERM and closed pipes."""

import os
import select
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TextIO

from hf_sgdr._utils.termination import TERMINATED, Terminated, catch_sigterm
from hf_sgdr._utils.text import printable
from hf_sgdr.cli.errors import error_line

INTERRUPTED = 130  # 128 + SIGINT
PIPE_CLOSED = 141  # 128 + SIGPIPE


def run_cli(main: Callable[[Sequence[str]], int | None]) -> int:
    """Run a recipe on the words of the command line.

    User errors are reported in one line, with exit code 2 (`HF_SGDR_DEBUG=1` shows the traceback); Ctrl-C in one line,
    with exit code 130, SIGTERM likewise with 143, training after it saved a checkpoint. A closed stdout, as with
    `| head`, ends it silently with exit code 141, that of SIGPIPE.

    Args:
        main (callable): takes the command line without the program's name, returns the exit code, or None for 0.

    Returns:
        `int`: the exit code.
    """
    program = Path(sys.argv[0]).name
    catch_sigterm()
    try:
        status = main(sys.argv[1:]) or 0
        sys.stdout.flush()  # here, where a closed pipe can still be told from an error
        return status
    except (KeyboardInterrupt, Terminated) as end:
        word, status = ("terminated", TERMINATED) if isinstance(end, Terminated) else ("interrupted", INTERRUPTED)
        if os.environ.get("RANK", "0") == "0":  # one line, not one a process
            print(f"\n{program}: {word}{_resume_hint(program)}", file=sys.stderr)
        return status
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _silence_closed_pipes():
            return PIPE_CLOSED
        if os.environ.get("HF_SGDR_DEBUG") == "1":
            raise
        print(f"{program}: error: {error_line(error)}", file=sys.stderr)
        return 2


def _resume_hint(program: str) -> str:
    if program != "train.py":
        return "."
    # the launcher's own flags are not known here; it sets this variable for its children
    launcher = "accelerate launch" if "ACCELERATE_MIXED_PRECISION" in os.environ else "python"
    resume = [] if any(word.split("=")[0] == "--resume" for word in sys.argv) else ["--resume"]
    return f"; to go on: {launcher} {printable(shlex.join([*sys.argv, *resume]))}"


def _silence_closed_pipes() -> bool:
    """Redirect closed output streams to the null device, so that the flush at exit succeeds; whether one was closed.

    The streams are asked, because another pipe may have broken: a worker's, or a connection.
    """
    closed = [stream.fileno() for stream in (sys.stdout, sys.stderr) if _is_closed_pipe(stream)]
    for file in closed:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, file)
        os.close(null)
    return bool(closed)


def _is_closed_pipe(stream: TextIO) -> bool:
    try:
        poll = select.poll()
        poll.register(stream.fileno(), 0)  # errors are always reported
    except (AttributeError, OSError):  # Windows has no poll; a stream of a test or a notebook is no file
        return False
    return any(event & select.POLLERR for _, event in poll.poll(0))
