"""How a recipe ends: what the user can mend is one line, and a run that made nothing leaves nothing."""

import argparse
import difflib
import os
import select
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from hf_sgdr._utils.text import printable


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are a ValueError of one line.

    Dashes and underscores in a flag's name are the same; names are not completed, so that a flag never means another
    one than it says.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's, with underscores for the dashes in flags' names."""
        words = sys.argv[1:] if args is None else args
        return super().parse_known_args(list(map(_with_underscores, words)), namespace)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's.

        Raises:
            ValueError: for an unknown argument, with the flag that is spelled most like it.
        """
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flag = next((word for word in unknown if word.startswith("-")), unknown[0]).split("=")[0]
            near = difflib.get_close_matches(
                flag, [one for one in self._option_string_actions if "-" not in one[2:]], 1
            )
            hint = f"; did you mean {near[0]}?" if near and flag.startswith("--") else "."
            self.error(f"unrecognized arguments: {shlex.join(unknown)}{hint}")
        return found

    def error(self, message: str) -> Any:
        """Raise the message as a ValueError."""
        raise ValueError(f"{message} (--help lists all arguments)")


def _with_underscores(word: str) -> str:
    flag, equals, value = word.partition("=")
    return f"--{flag[2:].replace('-', '_')}{equals}{value}" if flag.startswith("--") else word


def run_cli(main: Callable[[Sequence[str]], int | None]) -> int:
    """Run a recipe; user errors end in one line on stderr and exit status 2, Ctrl-C in one line and exit status 130.

    `HF_SGDR_DEBUG=1` shows the traceback. Where nobody reads the output any more, as with `| head`, it ends in silence
    with the exit status of a program that SIGPIPE stopped.
    """
    program = Path(sys.argv[0]).name
    try:
        status = main(sys.argv[1:]) or 0
        sys.stdout.flush()  # here, where a closed pipe can still be told from an error
        return status
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":  # one line, not one a process
            print(f"\n{program}: interrupted{_how_to_resume(program)}", file=sys.stderr)
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


def _how_to_resume(program: str) -> str:
    if program != "train.py":
        return "."
    # the launcher's own flags are not known here; it sets this variable for its children
    launcher = "accelerate launch" if "ACCELERATE_MIXED_PRECISION" in os.environ else "python"
    words = [_with_underscores(word) for word in sys.argv[1:]]
    resume = [] if any(word.split("=")[0] == "--resume" for word in words) else ["--resume"]
    return f"; to go on: {launcher} {printable(shlex.join([*sys.argv, *resume]))}"


@contextmanager
def remove_empty_dir_on_error(folder: str | os.PathLike[str]) -> Iterator[None]:
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
