"""The command `hf-sgdr`, and how a recipe starts and ends: exit codes, errors in one line, signals, closed pipes.

Nothing here takes long to import: a command imports what it needs.
"""

import argparse
import ast
import importlib
import os
import select
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TextIO

from hf_sgdr._utils.termination import TERMINATED, Terminated, catch_sigterm
from hf_sgdr._utils.text import nearest, printable
from hf_sgdr.cli.errors import error_line
from hf_sgdr.cli.recipes import FILES, copy_recipe, recipes_folder
from hf_sgdr.version import __version__

INTERRUPTED = 130  # 128 + SIGINT
PIPE_CLOSED = 141  # 128 + SIGPIPE
COMMANDS = {
    "train": "train a classifier on a folder of images by the lesson's recipe",
    "find-lr": "the learning rate range test alone",
    "predict": "labels and probabilities of images, on the terminal or as CSV and JSON",
    "report": "how good a model is on images of known classes, as HTML, Markdown or JSON",
    "push": "push a trained model to the Hub, and a page to try it",
    "features": "list (ls) and remove (prune) what is stored to make runs fast",
    "demo": "train on the embedded digits, without a network; takes the flags of train",
    "copy-recipe": "copy a recipe's script and its YAML file, to change them",
}
EXAMPLES = """\
  hf-sgdr train photos/ --model timm/resnet34.a1_in1k --output_dir out
  hf-sgdr predict --model out more_photos/ --output predictions.csv

Several processes: accelerate launch -m hf_sgdr.recipes.train photos/
hf-sgdr COMMAND --help says what a command takes."""


def main() -> int:
    """Run `hf-sgdr`; returns the exit code."""
    return run_cli(_command)


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
    catch_sigterm()
    try:
        status = main(sys.argv[1:]) or 0
        sys.stdout.flush()  # here, where a closed pipe can still be told from an error
        return status
    except (KeyboardInterrupt, Terminated) as end:
        word, status = ("terminated", TERMINATED) if isinstance(end, Terminated) else ("interrupted", INTERRUPTED)
        if os.environ.get("RANK", "0") == "0":  # one line, not one a process
            print(f"\n{_program()}: {word}{_resume_hint()}", file=sys.stderr)
        return status
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _silence_closed_pipes():
            return PIPE_CLOSED
        if os.environ.get("HF_SGDR_DEBUG") == "1":
            raise
        print(f"{_program()}: error: {error_line(error)}", file=sys.stderr)
        return 2


def _command(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        "hf-sgdr", description="Image classifiers by fast.ai's first lesson.", epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"hf-sgdr {__version__}")
    commands = parser.add_subparsers(dest="command", title="commands", metavar="COMMAND")
    for name, text in COMMANDS.items():
        commands.add_parser(name, help=text, add_help=False)
    if argv and argv[0] not in (*COMMANDS, "-h", "--help", "--version"):
        raise ValueError(f"{argv[0]}: no such command{nearest(argv[0], COMMANDS)} (hf-sgdr --help lists all of them)")
    command, rest = parser.parse_args(argv[:1] or ["--help"]).command, list(argv[1:])
    sys.argv = [f"hf-sgdr {command}", *rest]  # so that usage and errors call it
    if command == "features":
        importlib.import_module("hf_sgdr.features.__main__").main(rest)
        return 0
    if command == "copy-recipe":
        return _copy_recipe(rest)
    name = "train" if command == "demo" else command
    if name == "train" and not _HELP_FLAGS.isdisjoint(rest):
        return _train_help(rest)
    if command == "demo" and _names_images(rest):
        raise ValueError("the demo has images and stages of its own; hf-sgdr train takes yours.")
    return int(importlib.import_module(f"hf_sgdr.recipes.{name.replace('-', '_')}").main(rest) or 0)


_HELP_FLAGS = {"-h", "--help", "--help_all", "--help-all"}


def _names_images(argv: Sequence[str]) -> bool:
    """Whether `train` would read images of the user's, or a YAML file, which parses as their folder."""
    from hf_sgdr.cli import arguments, parser

    given = parser.OneLineParser(arguments.TRAINING).given_values(argv)
    return not given.keys().isdisjoint({"data_dir", "dataset_name", "labels_file"})


def _train_help(argv: Sequence[str]) -> int:
    """The help of `train`, without all that only training needs."""
    from hf_sgdr.cli import arguments, parser

    source = (recipes_folder() / "train.py").read_text(encoding="utf-8")
    description, refused = ast.get_docstring(ast.parse(source)) or "", arguments.DECIDED_BY_STAGES
    parser.parse(arguments.TRAINING, argv, description, refused=refused, groups=arguments.GROUPS)
    return 0


def _copy_recipe(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        sys.argv[0], description="Copy a recipe's script and its YAML file, to change them."
    )
    parser.add_argument("name", metavar="NAME", help=", ".join(FILES))
    parser.add_argument(
        "folder", nargs="?", type=Path, default=Path(), metavar="FOLDER", help="where to; here by default"
    )
    args = parser.parse_args(argv)
    if args.name not in FILES:
        raise ValueError(f"{args.name}: no such recipe{nearest(args.name, FILES)}; there are {', '.join(FILES)}.")
    copies = copy_recipe(args.name, args.folder)
    words = printable(shlex.join(["python", *map(str, copies)]))
    print(f"Change it, and run it with the arguments of hf-sgdr {args.name}: {words}")
    return 0


def _program() -> str:
    return Path(sys.argv[0]).name


def _resume_hint() -> str:
    if _program() not in ("train.py", "hf-sgdr train", "hf-sgdr demo"):
        return "."
    resume = [] if any(word.split("=")[0] == "--resume" for word in sys.argv) else ["--resume"]
    return f"; to go on: {printable(shlex.join([*_this_program(), *sys.argv[1:], *resume]))}"


def _this_program() -> list[str]:
    """The words that start this program: the installed command, or a script or module with or without the launcher."""
    if sys.argv[0].startswith("hf-sgdr "):
        return sys.argv[0].split()
    # the launcher's own flags are not known here; it sets this variable for its children
    launcher = ["accelerate", "launch"] if "ACCELERATE_MIXED_PRECISION" in os.environ else ["python"]
    module = sys.modules["__main__"].__spec__  # of `-m`
    return [*launcher, *(["-m", module.name] if module is not None else [sys.argv[0]])]


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
