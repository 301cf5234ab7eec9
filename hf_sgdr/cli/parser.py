"""The command line's parser: flags and YAML files into dataclasses, errors in one line."""

import argparse
import json
import shlex
import sys
from collections.abc import Container, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml
from transformers import HfArgumentParser

from hf_sgdr._utils.text import nearest
from hf_sgdr.cli.recipes import recipes_folder

# Where the recipes differ from transformers: --resume needs checkpoints.
_DEFAULTS = {"output_dir": "hf_sgdr_out", "save_strategy": "epoch", "save_total_limit": 2}
Groups = Mapping[str, Mapping[str, str | None]]


class Arguments(tuple[Any, ...]):
    """The dataclasses that a command line fills, in the order that [`parse`] was asked for them.

    Attributes:
        given (`set[str]`): names of the arguments that the command line or its YAML file sets, null ones left out.
        is_demo (`bool`): whether they come from the demo's YAML file.
    """

    given: set[str]
    is_demo: bool


def parse(
    kinds: Sequence[Any],
    argv: Sequence[str],
    description: str,
    *,
    demo: Path | None = None,
    refused: Mapping[str, str] | None = None,
    groups: Groups | None = None,
    left_out: Container[str] = (),
) -> Arguments:
    """Arguments from `[config.yaml] [folder] [--flag value ...]`; flags win over the file.

    A file that is not there may be one of the package's own: lesson.yaml, short.yaml, fast.yaml or demo.yaml.

    Args:
        kinds (sequence of dataclasses): what to fill.
        argv (sequence of `str`): the command line without the program's name.
        description (`str`): for `--help`.
        demo (`Path`, *optional*): a YAML file to begin with where the command line names neither another nor images.
        refused (mapping, *optional*): arguments that must not be given, each with the reason.
        groups (mapping, *optional*): what `--help` shows: by title the names of arguments, each with the words for it
            or None for its own; all arguments by default, as `--help_all` does.
        left_out (container of `str`, *optional*): arguments of another recipe that a YAML file may hold.

    Raises:
        FileNotFoundError: if there is no such YAML file.
        ValueError: for an argument that is unknown or refused, or a value that does not fit, in one line.
    """
    refused = refused or {}
    if groups is not None:
        groups = {title: {k: v for k, v in names.items() if k not in refused} for title, names in groups.items()}
    parser = OneLineParser(kinds, groups=groups, description=description)
    parser.set_defaults(**{name: value for name, value in _DEFAULTS.items() if name in parser.types})  # for the help
    config = _config(argv[0]) if argv and argv[0].endswith((".yaml", ".yml")) else None
    values = parser.given_values(argv if config is None else argv[1:], config, left_out)
    given = {name for name, value in values.items() if value is not None}
    for name, reason in refused.items():
        if name in given:
            raise ValueError(f"--{name}: {reason}")
    is_demo = demo is not None and config is None and not given & {"data_dir", "dataset_name", "labels_file"}
    values = {**_DEFAULTS, **(parser.given_values([], demo) if is_demo else {}), **values}
    arguments = Arguments(
        kind(**{item.name: values[item.name] for item in fields(kind) if item.init and item.name in values})
        for kind in kinds
    )
    arguments.given, arguments.is_demo = given, is_demo
    return arguments


def _config(word: str) -> Path:
    """The YAML file of that name, or one that the package brings, such as fast.yaml."""
    brought = recipes_folder() / "configs" / word
    return brought if "/" not in word and not Path(word).exists() and brought.exists() else Path(word)


class OneLineParser(HfArgumentParser):
    """An argument parser whose errors are a ValueError of one line; it reads YAML files, too.

    Dashes and underscores in a flag's name are the same; names are not completed, so that a flag never means another
    one than it says. A `data_dir` may also stand without its flag.

    Args:
        kinds (sequence of dataclasses, *optional*): whose fields are arguments.
        groups (mapping, *optional*): see [`parse`].
        **kwargs: of [`~transformers.HfArgumentParser`].
    """

    def __init__(self, kinds: Sequence[Any] = (), groups: Groups | None = None, **kwargs: Any) -> None:
        # before HfArgumentParser writes simpler types into the dataclasses' fields
        self.types = {name: hint for kind in kinds for name, hint in get_type_hints(kind).items()}
        self.groups = groups
        super().__init__(list(kinds), **{"formatter_class": _HelpFormatter, "allow_abbrev": False, **kwargs})
        if "data_dir" in self.types:
            self.add_argument("folder", nargs="?", default=argparse.SUPPRESS, metavar="FOLDER", help="as --data_dir")
        if groups is not None:
            self.add_argument("--help_all", action=_HelpAll, nargs=0, help="show all arguments and exit")

    def format_help(self) -> str:
        """The help of argparse, or that of the groups alone."""
        if self.groups is None:
            return super().format_help()
        formatter = self._get_formatter()
        formatter.add_usage("%(prog)s [CONFIG.yaml] [FOLDER] [--argument VALUE ...]", [], [])
        formatter.add_text(self.description)
        first = {action.dest: action for action in reversed(self._actions) if action.option_strings}
        for title, names in self.groups.items():
            formatter.start_section(title)
            for name in names.keys() & first.keys():
                first[name].help = names[name] or first[name].help
            formatter.add_arguments([first[name] for name in names if name in first])
            formatter.end_section()
        formatter.add_text("--help_all shows all arguments. A YAML file has the same names: `image_size: 224`.")
        return formatter.format_help()

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's, with underscores for the dashes in flags' names."""
        argv = sys.argv[1:] if args is None else args
        return super().parse_known_args(list(map(_with_underscores, argv)), namespace)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's.

        Raises:
            ValueError: for an unknown argument, with the flag that is spelled most like it.
        """
        result, unknown = self.parse_known_intermixed_args(args, namespace)
        if unknown:
            flag = next((name for name in unknown if name.startswith("-")), unknown[0]).split("=")[0]
            flags = [name for name in self._option_string_actions if "-" not in name[2:]]
            hint = nearest(flag, flags) if flag.startswith("--") else ""
            self.error(f"unrecognized arguments: {shlex.join(unknown)}{hint}")
        return result

    def error(self, message: str) -> Any:
        """Raise the message as a ValueError."""
        raise ValueError(f"{message} (--help lists all arguments)")

    def given_values(
        self, flags: Sequence[str], config: Path | None = None, left_out: Container[str] = ()
    ) -> dict[str, Any]:
        """Values of the arguments that flags and a YAML file set, whatever the defaults; flags win.

        What is `left_out` may be in the file and is no argument.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is not valid YAML, holds no arguments, or a value is of another type than its argument.
        """
        nulls: dict[str, Any] = {}  # a command line cannot say null
        argv: list[str] = []
        for name, value in (_yaml_values(config) if config is not None else {}).items():
            dest = name.replace("-", "_")
            if dest in left_out:
                continue
            if f"--{dest}" not in self._option_string_actions:
                raise ValueError(f"{config}: {name}: no such argument{nearest(dest, self.types)}.")
            action = self._option_string_actions[f"--{dest}"]
            dest = action.dest  # the name may be an alias
            if isinstance(value, list) and action.nargs not in ("*", "+"):
                raise ValueError(f"{config}: {name}: {json.dumps(value)} is a list; it takes one value.")
            for item in value if isinstance(value, list) else [value]:
                self._check_type(f"{config}: {name}", dest, item)
            if value is None and dest in self.types:
                nulls[dest] = None
            elif isinstance(value, list):
                argv += [f"--{name}", *map(_text, value)]
            else:
                argv.append(f"--{name}={_text(value)}")
        not_given = object()
        namespace = argparse.Namespace(**dict.fromkeys(self.types, not_given))
        # words before the first flag are no more values of the file's last list
        count = next((i for i, word in enumerate(flags) if word.startswith("-")), len(flags))
        values = vars(self.parse_args([*flags[:count], *argv, *flags[count:]], namespace))
        given = {name: value for name, value in values.items() if value is not not_given}
        if "folder" in given:
            if any(_with_underscores(word).split("=")[0] == "--data_dir" for word in flags):
                self.error(f"{given['folder']} and --data_dir: give the folder once")
            given["data_dir"] = given.pop("folder")
        return nulls | given

    def _check_type(self, place: str, dest: str, value: Any) -> None:
        """Refuse null and booleans, which would become text, where the argument takes none."""
        if not isinstance(value, bool | None) or type(value) in _types_in(self.types.get(dest, type(value))):
            return
        hint = "" if value is None else " (unquoted, YAML reads yes, no, on and off as true and false)"
        raise ValueError(
            f"{place}: {json.dumps(value)} is no value of it{hint}: give another one, or leave {dest} out."
        )


class _HelpAll(argparse.Action):
    """Prints the help of all arguments."""

    def __call__(self, parser: Any, *args: Any) -> None:
        parser.groups = None
        parser.print_help()
        parser.exit()


class _HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """The lines of a recipe's docstring; of each argument a line with its default, if that says something."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=36, width=118)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False, []) else super()._get_help_string(action)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return super()._format_action_invocation(action)
        names = [name for name in action.option_strings if "-" not in name[2:]]
        value = "" if action.nargs in (0, "?") else f" {self._format_args(action, _VALUES.get(action.type, 'TEXT'))}"
        return ", ".join(names) + value


_VALUES: dict[Any, str] = {int: "N", float: "X"}


def _yaml_values(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file.")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid YAML ({' '.join(str(error).split())}).") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: give `argument: value` lines, not a {type(values).__name__}.")
    return {str(name): value for name, value in values.items()}


def _text(value: Any) -> str:
    return json.dumps(value, default=str) if isinstance(value, dict) else str(value)


def _with_underscores(argument: str) -> str:
    flag, equals, value = argument.partition("=")
    return f"--{flag[2:].replace('-', '_')}{equals}{value}" if flag.startswith("--") else argument


def _types_in(hint: Any) -> set[Any]:
    """The types that a type hint is made of."""
    return {hint}.union(*map(_types_in, get_args(hint)))
