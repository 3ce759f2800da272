"""Lenses on the residual stream of a language model: train, evaluate, look.

>>> from tunedlens import TunedLens, load_model
>>> model = load_model()
>>> lens = TunedLens.load("checkpoints/embedded", model)
"""

from tunedlens.checkpoint import load_lens
from tunedlens.config import CorpusConfig, EvaluateConfig, ModelConfig, TrainConfig
from tunedlens.errors import InputError
from tunedlens.evaluation import Evaluation, evaluate
from tunedlens.frozen import FrozenModel, load_model
from tunedlens.lens import ConstantLens, JacobianLens, Lens, LogitLens, TunedLens
from tunedlens.neurons import neurons
from tunedlens.training import train
from tunedlens.trajectory import Trajectory, trajectory

__all__ = [
    "ConstantLens",
    "CorpusConfig",
    "EvaluateConfig",
    "Evaluation",
    "FrozenModel",
    "InputError",
    "JacobianLens",
    "Lens",
    "LogitLens",
    "ModelConfig",
    "TrainConfig",
    "Trajectory",
    "TunedLens",
    "evaluate",
    "load_lens",
    "load_model",
    "neurons",
    "train",
    "trajectory",
]
