"""Converts JSON to dataclasses. The annotations of their fields are the schema."""

import dataclasses
from collections.abc import Mapping, Sequence
from types import NoneType, UnionType
from typing import (
    Any,
    Literal,
    TypeVar,
    Union,
    cast,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

from tunedlens.errors import InputError

JsonObject = dict[str, Any]
"""An object as `json` reads it."""
T = TypeVar("T")

_NAMES = {str: "text", bool: "true or false", int: "a whole number", float: "a number"}


def as_type(kind: type[T], data: object, what: str) -> T:
    """Convert JSON to an instance of a type, and check every value.

    Args:
        kind: a dataclass, which allows no other keys than its fields; a TypedDict, which keeps
            further keys; or a list, tuple, dict, union, Literal or plain type.
        data: the data, as `json` reads it.
        what: the name of the data in the message.

    Raises:
        InputError: a value is missing, not known or of another type.
    """
    try:
        return cast(T, _build(kind, data, ""))
    except InputError as error:
        raise InputError(f"{what} is damaged: {error}") from error


def _build(kind: Any, value: object, where: str) -> object:
    """The value as this type; `where` is its path, for the message."""
    origin, parts = get_origin(kind) or kind, get_args(kind)
    if origin in (Union, UnionType):
        return _build_one_of(parts, value, where)
    if isinstance(value, dict):
        if dataclasses.is_dataclass(kind) or is_typeddict(kind):
            return _build_object(kind, value, where)
        if origin in (dict, Mapping):
            return {key: _build(parts[1], one, f"{where}.{key}") for key, one in value.items()}
    if isinstance(value, list) and origin in (list, tuple, Sequence):
        built = [_build(parts[0], one, f"{where}[{index}]") for index, one in enumerate(value)]
        return tuple(built) if origin is tuple else built
    if kind is float and type(value) is int:
        return float(value)
    if kind in (object, Any) or type(value) is kind or (origin is Literal and value in parts):
        return value
    if origin is Literal:
        expected = f"one of {', '.join(map(str, parts))}"
    else:
        expected = _NAMES.get(kind) or ("a list" if origin in (list, tuple) else "an object")
    raise InputError(f"{_title(where)} must be {expected}, got {value!r:.40}")


def _build_one_of(kinds: Sequence[Any], value: object, where: str) -> object:
    """The value as the first type that it fits; the message is that of the last type."""
    if value is None and NoneType in kinds:
        return None
    first, *others = [kind for kind in kinds if kind is not NoneType]
    try:
        return _build(first, value, where)
    except InputError:
        if not others:
            raise
    return _build_one_of(others, value, where)


def _build_object(kind: Any, value: Mapping[str, object], where: str) -> object:
    """An instance of a dataclass, or the dict of a TypedDict."""
    hints, is_dataclass = get_type_hints(kind), dataclasses.is_dataclass(kind)
    if is_dataclass:
        fields = dataclasses.fields(kind)
        optional = {f.name for f in fields if f.default is not f.default_factory}
        hints = {field.name: hints[field.name] for field in fields}
        if unknown := value.keys() - hints.keys():
            raise InputError(f"{min(unknown)!r:.40} in {_title(where)} is unknown")
    else:
        optional = kind.__optional_keys__
    if missing := hints.keys() - value.keys() - optional:
        raise InputError(f"{min(missing)} is missing from {_title(where)}")
    built = {
        key: _build(hints[key], one, f"{where}.{key}") if key in hints else one
        for key, one in value.items()
    }
    return kind(**built) if is_dataclass else built


def _title(where: str) -> str:
    return where.removeprefix(".") or "its content"
