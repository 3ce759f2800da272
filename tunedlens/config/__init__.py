"""The configs of runs: frozen dataclasses that are validated when they are created.

A field's `help` is its documentation: the command line shows it, and a YAML file given
as `--config` uses the same names.
"""

from tunedlens.config.base import (
    BASELINES,
    ONE_PASS,
    Dtype,
    FitName,
    JacobianTargets,
    Kernel,
    MetricSet,
    Precision,
    Split,
    WandbMode,
)
from tunedlens.config.evaluate import EvaluateConfig, ScoringConfig
from tunedlens.config.inputs import CorpusConfig, ModelConfig
from tunedlens.config.settings import (
    EvaluateSettings,
    TrainSettings,
    configured,
    lists_settings,
    with_settings,
)
from tunedlens.config.train import TrainConfig

__all__ = [
    "BASELINES",
    "ONE_PASS",
    "CorpusConfig",
    "Dtype",
    "EvaluateConfig",
    "EvaluateSettings",
    "FitName",
    "JacobianTargets",
    "Kernel",
    "MetricSet",
    "ModelConfig",
    "Precision",
    "ScoringConfig",
    "Split",
    "TrainConfig",
    "TrainSettings",
    "WandbMode",
    "configured",
    "lists_settings",
    "with_settings",
]
