"""The base of all configs: documented fields, and checks of their values."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from pathlib import PurePath
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from tunedlens.errors import InputError

Dtype = Literal["float32", "bfloat16", "float16"]
Precision = Literal["fp32", "bf16"]
Kernel = Literal["products", "attention"]
FitName = Literal["preconditioned", "closed-form", "jacobian", "sgd", "muon"]
ONE_PASS: tuple[FitName, ...] = ("closed-form", "jacobian")
"""Fits that take no steps."""
BASELINES: tuple[FitName, ...] = ("sgd", "muon")
"""Published fits, which do not start from the closed form."""
JacobianTargets = Literal["later", "same"]
MetricSet = Literal["standard", "all"]
Split = Literal["train", "validation", "all"]
WandbMode = Literal["online", "offline", "disabled"]


def option(default: Any, meaning: str, metavar: str = "NAME") -> Any:
    """A documented field; `metavar` is the placeholder for a text value in the help."""
    return dataclasses.field(default=default, metadata={"help": meaning, "metavar": metavar})


class _Range(NamedTuple):
    description: str
    contains: Callable[[float], bool]


_AT_LEAST_1 = _Range("at least 1", lambda value: value >= 1)
_MAX_BLOCKS = 2**20
_BLOCKS = _Range(f"from 1 to {_MAX_BLOCKS:,}", lambda value: 1 <= value <= _MAX_BLOCKS)
_ABOVE_0 = _Range("above 0", lambda value: 0 < value < math.inf)
_0_OR_MORE = _Range("0 or more", lambda value: 0 <= value < math.inf)
_ACCEPTED = {
    "seq_len": _Range("at least 2", lambda value: value >= 2),
    "tokens": _AT_LEAST_1,
    "self_tokens": _AT_LEAST_1,
    "max_tokens": _AT_LEAST_1,
    "init_tokens": _AT_LEAST_1,
    "batch_size": _BLOCKS,
    "micro_batch_size": _BLOCKS,
    "validation_tokens": _AT_LEAST_1,
    "evaluate_tokens": _AT_LEAST_1,
    "skip_first": _0_OR_MORE,
    "vocab_sample": _Range("0 (all of it) or at least 64", lambda value: value == 0 or value >= 64),
    "low_rank": _AT_LEAST_1,
    "ridge": _ABOVE_0,
    "lr": _ABOVE_0,
    "momentum": _Range("in [0, 1)", lambda value: 0 <= value < 1),
    "weight_decay": _0_OR_MORE,
    "shuffle_window": _Range(f"from 0 to {_MAX_BLOCKS:,}", lambda value: 0 <= value <= _MAX_BLOCKS),
    "seed": _Range("in [0, 2^32)", lambda value: 0 <= value < 2**32),
}
"""The values that a field of this name accepts, in any config."""


@dataclass(frozen=True)
class Config:
    """Checks every field against the choices of its type and the range of its name."""

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for field in dataclasses.fields(self):
            flag, value = "--" + field.name.replace("_", "-"), getattr(self, field.name)
            hint = hints[field.name]
            kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
            if value is None and NoneType in kinds:
                continue
            if get_origin(kinds[0]) is Literal:
                choices = get_args(kinds[0])
                if value not in choices:
                    raise InputError(f"{flag} must be one of {', '.join(choices)}; got {value!r}")
            elif isinstance(kinds[0], type):
                value = _converted(value, kinds[0], flag)
                object.__setattr__(self, field.name, value)
            accepted = _ACCEPTED.get(field.name)
            if accepted and not accepted.contains(value):
                raise InputError(f"{flag} must be {accepted.description}, got {value}")


_DESCRIPTIONS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


def _converted(value: object, kind: type, flag: str) -> object:
    """The value as the type of its field: a path as text, 1e6 as a whole number.

    A name stands for the part of a config that begins with it, as in `TrainConfig(model="gpt2")`.

    Raises:
        InputError: the value has another type.
    """
    if isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    if isinstance(value, str | PurePath) and issubclass(kind, str | Config):
        return kind(str(value))  # type: ignore[call-arg]  # the first field is the name
    if isinstance(value, Real) and not isinstance(value, bool):
        number = float(value)
        if kind is float or (kind is int and number.is_integer()):
            return kind(number)
    expected = _DESCRIPTIONS.get(kind, f"a {kind.__name__}")
    raise InputError(f"{flag} must be {expected}, got {value!r:.40}")
