"""Flags made from the fields of a config, and a config made from flags."""

import argparse
import dataclasses
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

from tunedlens.config import EvaluateConfig, TrainConfig, WandbMode
from tunedlens.errors import InputError

Config = TypeVar("Config", TrainConfig, EvaluateConfig)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (--help lists the flags)")


def make_parser(name: str, description: str, config: type) -> argparse.ArgumentParser:
    """A parser with a flag for every field; what is not given is left out of the result."""
    parser = _Parser(
        prog=name,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="YAML with any of these; flags go before it"
    )
    own = []
    hints = typing.get_type_hints(config)
    for field in dataclasses.fields(config):
        if dataclasses.is_dataclass(hints[field.name]):
            group = parser.add_argument_group(f"the {field.name}")
            part_hints = typing.get_type_hints(hints[field.name])
            for part in dataclasses.fields(hints[field.name]):
                _add_flag(group, part, part_hints[part.name])
        else:
            own.append(field)
    group = parser.add_argument_group("the fit" if config is TrainConfig else "what is scored")
    for field in own:
        _add_flag(group, field, hints[field.name])
    return parser


def add_wandb_flag(group: Any) -> None:
    """`--wandb`, with a mode or without."""
    group.add_argument(
        "--wandb",
        nargs="?",
        const="online",
        choices=typing.get_args(WandbMode),
        help="log to Weights & Biases; offline if it cannot be reached",
    )


def _add_flag(group: Any, field: dataclasses.Field[Any], hint: Any) -> None:
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    flag = "--" + field.name.replace("_", "-")
    default = "" if field.default in (None, False) else f" (default: {field.default})"
    text = field.metadata["help"].replace("%", "%%") + default
    if hint is bool:
        group.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
    elif typing.get_origin(hint) is Literal:
        group.add_argument(flag, choices=typing.get_args(hint), help=text)
    else:
        kind, metavar = {int: (_count, "N"), float: (float, "X"), str: (str, "NAME")}[hint]
        group.add_argument(flag, type=kind, metavar=metavar, help=text)


def _count(text: str) -> int:
    """A whole number, as 1000000, 1_000_000 or 1e6."""
    try:
        if float(text).is_integer():
            return int(float(text))
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}")


def parse(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> dict[str, Any]:
    """What was given: in the YAML file, and over it on the command line."""
    given = vars(parser.parse_args(arguments))
    path = given.pop("config", None)
    if path is None:
        return given
    import yaml

    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"cannot read --config {path}: {' '.join(str(error).split())}") from error
    if not isinstance(settings, dict):
        raise InputError(f"--config {path}: expected lines like `tokens: 1000000`")
    arguments_of_file = []
    for name, value in settings.items():
        flag = "--" + str(name).replace("_", "-")
        if isinstance(value, bool):
            negative = "--no-" + flag[2:]
            known = negative in parser.format_usage()
            arguments_of_file += [flag] if value else [negative] * known
        elif value is not None:
            arguments_of_file += [flag, str(value)]
    return vars(parser.parse_args(arguments_of_file)) | given


def configured(kind: type[Config], base: Config, flags: dict[str, Any]) -> Config:
    """The base with the flags in place, validated."""
    parts: dict[str, Any] = {}
    for field in dataclasses.fields(kind):
        value = getattr(base, field.name)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            names = {part.name for part in dataclasses.fields(value)}
            parts[field.name] = dataclasses.replace(
                value, **{name: flags[name] for name in names & flags.keys()}
            )
        elif field.name in flags:
            parts[field.name] = flags[field.name]
    return dataclasses.replace(base, **parts)
