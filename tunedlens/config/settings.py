"""Settings by name: a config with some of its fields changed, and the keywords of a call."""

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypedDict, TypeVar

from tunedlens.config.base import (
    Config,
    Dtype,
    FitName,
    JacobianTargets,
    Kernel,
    MetricSet,
    Precision,
    Split,
)
from tunedlens.errors import InputError, did_you_mean

AnyConfig = TypeVar("AnyConfig", bound=Config)
Call = TypeVar("Call", bound=Callable[..., object])


class InputSettings(TypedDict, total=False):
    """The fields of `CorpusConfig` and, apart from the model's name, of `ModelConfig`."""

    revision: str | None
    dtype: Dtype
    device: str | None
    device_map: str | None
    fsdp: bool
    adapter: str | Path | None
    gguf_file: str | None
    trust_remote_code: bool
    blocks: str | None
    final_norm: str | None
    dataset: str | Path | None
    dataset_config: str | None
    dataset_split: str
    dataset_revision: str | None
    validation_split: str | None
    text_column: str | None
    chat: bool
    self_tokens: int | None
    streaming: bool
    seq_len: int | None
    bos: bool | None


class TrainSettings(InputSettings, total=False):
    """The fields of `TrainConfig`, with those of the model and the text."""

    fit: FitName
    tokens: int | None
    max_tokens: int | None
    init_tokens: int | None
    sites: str | None
    layers: str | None
    low_rank: int | None
    shard_layers: bool | None
    bias_only: bool
    init: str | Path | None
    jacobian_targets: JacobianTargets
    ridge: float | None
    batch_size: int | None
    micro_batch_size: int | None
    skip_first: int
    precision: Precision | None
    kernel: Kernel | None
    vocab_sample: int | None
    lr: float | None
    momentum: float | None
    weight_decay: float | None
    seed: int
    shuffle_window: int
    validation_tokens: int | None
    evaluate_tokens: int | None


class EvaluateSettings(InputSettings, total=False):
    """The fields of `EvaluateConfig`, with those of the model and the text."""

    tokens: int | None
    metrics: MetricSet
    by_position: bool
    transfer: bool
    batch_size: int
    split: Split | None


def configured(base: AnyConfig, settings: Mapping[str, object]) -> AnyConfig:
    """The base config and its parts with new values for their fields; other names are ignored."""
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(base):
        value = getattr(base, field.name)
        if isinstance(value, Config):
            changes[field.name] = configured(value, settings)
        elif field.name in settings:
            changes[field.name] = settings[field.name]
    return dataclasses.replace(base, **changes)


def with_settings(base: AnyConfig, settings: Mapping[str, object]) -> AnyConfig:
    """As `configured`, but every name must be that of a field.

    Raises:
        InputError: there is no such setting, or its value is invalid.
    """
    known = [field.name for field in _documented(base)]
    for name in settings:
        if name not in known:
            raise InputError(f"there is no setting {name!r}{did_you_mean(name, known)}")
    return configured(base, settings)


def lists_settings(base: Config) -> Callable[[Call], Call]:
    """Show the settings of a config in the signature of a function that takes `**settings`.

    `help` and the completion of a notebook read it. Type checkers read the TypedDict.
    """

    def with_signature(call: Call) -> Call:
        signature = inspect.signature(call)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        names = {parameter.name for parameter in own}
        own += [
            inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default)
            for field in _documented(base)
            if field.name not in names
        ]
        call.__signature__ = signature.replace(parameters=own)  # type: ignore[attr-defined]
        return call

    return with_signature


def _documented(config: Config) -> Iterator[dataclasses.Field[object]]:
    """The fields of a config and its parts that a caller can set by name."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, Config):
            yield from _documented(value)
        elif "help" in field.metadata:
            yield field
