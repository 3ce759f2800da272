"""Flags made from the fields of a config, and a config made from flags."""

import argparse
import dataclasses
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

import yaml

from tunedlens.config import EvaluateConfig, TrainConfig, WandbMode
from tunedlens.errors import InputError

Config = TypeVar("Config", TrainConfig, EvaluateConfig)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (--help lists the flags)")


def make_parser(name: str, description: str, config: type) -> argparse.ArgumentParser:
    """A parser with a flag for every documented field of a config and of its parts.

    Flags that are not given are missing from the result.
    """
    parser = _Parser(
        prog=name,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="YAML file with any of these; flags override it"
    )
    hints = typing.get_type_hints(config)
    parts = [name for name, hint in hints.items() if dataclasses.is_dataclass(hint)]
    for part in parts:
        _add_flags(parser.add_argument_group(f"the {part}"), hints[part])
    _add_flags(
        parser.add_argument_group("the fit" if config is TrainConfig else "what is scored"), config
    )
    return parser


def add_wandb_flag(group: argparse._ArgumentGroup) -> None:
    """`--wandb`, with a mode or without."""
    group.add_argument(
        "--wandb",
        nargs="?",
        const="online",
        choices=typing.get_args(WandbMode),
        help="log to Weights & Biases; offline if it cannot be reached",
    )


def _add_flags(group: argparse._ArgumentGroup, config: type) -> None:
    hints = typing.get_type_hints(config)
    for field in dataclasses.fields(config):
        if "help" in field.metadata:
            _add_flag(group, field, hints[field.name])


def _add_flag(
    group: argparse._ArgumentGroup, field: dataclasses.Field[object], hint: object
) -> None:
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    flag = "--" + field.name.replace("_", "-")
    default = "" if field.default in (None, False) else f" (default: {field.default})"
    text = field.metadata["help"].replace("%", "%%") + default
    if hint is bool:
        group.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
    elif typing.get_origin(hint) is Literal:
        group.add_argument(flag, choices=typing.get_args(hint), help=text)
    elif hint is int:
        group.add_argument(flag, type=_count, metavar="N", help=text)
    elif hint is float:
        group.add_argument(flag, type=float, metavar="X", help=text)
    else:
        group.add_argument(flag, metavar="NAME", help=text)


def _count(text: str) -> int:
    """A whole number, written as 1000000, 1_000_000 or 1e6."""
    try:
        if float(text).is_integer():
            return int(float(text))
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}")


def parse(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> dict[str, Any]:
    """The flags of the YAML file, if one is named, overridden by those of the command line."""
    given = vars(parser.parse_args(arguments))
    path = given.pop("config", None)
    if path is None:
        return given
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
            has_negative = negative in parser.format_usage()
            arguments_of_file += [flag] if value else [negative] * has_negative
        else:
            values = value if isinstance(value, list) else [value]
            arguments_of_file += [text for one in values if one is not None
                                  for text in (flag, str(one))]  # fmt: skip
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
