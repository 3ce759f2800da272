"""Flags made from the fields of a config, and their values."""

import argparse
import dataclasses
import datetime
import re
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn

from tunedlens import files
from tunedlens.config import EvaluateConfig, ModelConfig, TrainConfig, WandbMode
from tunedlens.errors import InputError, did_you_mean
from tunedlens.provenance import own_version


class Parser(argparse.ArgumentParser):
    """A parser whose errors are raised."""

    def error(self, message: str) -> NoReturn:
        unknown = re.match("unrecognized arguments: (--[^ =]+)", message)
        hint = did_you_mean(unknown[1], self._option_string_actions) if unknown else ""
        raise InputError(f"{message}{hint} (--help lists the flags)")


def make_parser(name: str, description: str, config: type) -> argparse.ArgumentParser:
    """A parser with a flag for every documented field of a config and of its parts.

    Flags that are not given are missing from the result.
    """
    parser = Parser(
        prog=name,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--version", action="version", version=f"tunedlens {own_version()}")
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="YAML file of settings; flags override it"
    )
    hints = typing.get_type_hints(config)
    parts = [name for name, hint in hints.items() if dataclasses.is_dataclass(hint)]
    for part in parts:
        _add_flags(parser.add_argument_group(f"the {part}"), hints[part])
    titles = {TrainConfig: "the fit", EvaluateConfig: "what is scored", ModelConfig: "the model"}
    _add_flags(parser.add_argument_group(titles[config]), config)
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
        if "help" not in field.metadata:
            continue
        hint = hints[field.name]
        if typing.get_origin(hint) in (types.UnionType, typing.Union):
            hint = next(part for part in typing.get_args(hint) if part is not type(None))
        default = "" if field.default in (None, False) else f" (default: {field.default})"
        settings: dict[str, Any] = {"metavar": field.metadata["metavar"]}
        if hint is bool:
            settings = {"action": argparse.BooleanOptionalAction}
        elif typing.get_origin(hint) is Literal:
            settings = {"choices": typing.get_args(hint)}
        elif hint is int:
            settings = {"type": count, "metavar": "N"}
        elif hint is float:
            settings = {"type": float, "metavar": "X"}
        text = field.metadata["help"].replace("%", "%%") + default
        group.add_argument("--" + field.name.replace("_", "-"), help=text, **settings)


def count(text: str) -> int:
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
    content = files.read_text(path, f"there is no --config {path}", files.MAX_YAML_BYTES)
    settings = files.parse_yaml(content, f"--config {path}") or {}
    if not isinstance(settings, dict):
        raise InputError(f"--config {path}: expected lines like `tokens: 1000000`")
    try:
        arguments_of_file = [
            argument
            for name, value in settings.items()
            for argument in _arguments(parser, str(name).replace("_", "-"), value)
        ]
        return vars(parser.parse_args(arguments_of_file)) | given
    except InputError as error:
        raise InputError(f"--config {path}: {error}") from error


def _arguments(parser: argparse.ArgumentParser, name: str, value: object) -> list[str]:
    """A setting of a YAML file as arguments of the command line; none if it is null.

    Raises:
        InputError: there is no such flag, or it takes no such value.
    """
    flag, negative = f"--{name}", f"--no-{name}"
    known = parser._option_string_actions
    if flag not in known or name in ("help", "config", "version"):
        hint = did_you_mean(name, (one.removeprefix("--") for one in known))
        raise InputError(f"{name} is not a setting{hint} (--help lists the flags)")
    if name == "trust-remote-code" and value:
        raise InputError(f"{flag} runs code, so it can only be given on the command line")
    if isinstance(value, bool) and negative in known:
        return [flag if value else negative]
    if value is None or (value is False and known[flag].nargs == "?"):
        return []
    if value is True:
        return [flag]
    values = value if isinstance(value, list) else [value]
    is_plain = (isinstance(one, str | int | float | datetime.date) for one in values)
    if isinstance(value, bool) or not all(is_plain):
        raise InputError(f"{name} must be text, a number or a list of these; got {value!r:.40}")
    return [f"{flag}={one}" for one in values]
