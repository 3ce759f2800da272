"""Train, evaluate and use lenses on the residual stream of a language model.

>>> from tunedlens import TunedLens, load_model
>>> model = load_model()
>>> lens = TunedLens.load("checkpoints/embedded", model)
"""

from tunedlens import anomaly as anomaly
from tunedlens.causal import (
    Block,
    CausalBasis,
    CausalEffects,
    Directions,
    Head,
    Neuron,
    ablated,
    causal_basis,
    causal_effects,
    invert,
    response_alignment,
)
from tunedlens.checkpoint import export_lens, load_lens, load_lens_of_kind, save_lens
from tunedlens.config import CorpusConfig, EvaluateConfig, ModelConfig, ScoringConfig, TrainConfig
from tunedlens.doctor import Diagnosis, doctor
from tunedlens.early_exit import EarlyExits, ExitRule, early_exits
from tunedlens.errors import InputError
from tunedlens.evaluation import (
    Evaluation,
    Quality,
    TokenBias,
    evaluate,
    measure_quality,
    score_lenses,
    token_bias,
)
from tunedlens.generation import ExitedText, generate
from tunedlens.lenses import (
    AffineLens,
    ConstantLens,
    JacobianLens,
    Lens,
    LogitLens,
    ResidualLens,
    TunedLens,
)
from tunedlens.mlp_neurons import neurons
from tunedlens.model import FrozenModel, load_model
from tunedlens.neighbours import as_transformer_lens
from tunedlens.report import notebook, read_evaluation, top_k, write_card, write_report
from tunedlens.report.early_exit import exit_table
from tunedlens.report.plots import curves, effects_scatter, exit_curves, heatmap
from tunedlens.report.tables import TopK
from tunedlens.report.token_bias import bias_table
from tunedlens.sharing import push_to_hub
from tunedlens.training import CacheSettings, train
from tunedlens.trajectories import Comparison, Trajectory, compare, difference, trajectory
from tunedlens.trajectories.frames import probabilities, scores, to_dataframe, words
from tunedlens.trajectories.storage import load_comparison, load_trajectory, save

# Methods whose code lives in a later module than their class. This is the one module that may
# import everything, so the modules themselves need no circle.
AffineLens.save = save_lens
AffineLens.load = classmethod(load_lens_of_kind)  # type: ignore[assignment]
AffineLens.push_to_hub = push_to_hub
AffineLens.as_transformer_lens = as_transformer_lens
ResidualLens.generate = generate
ResidualLens.invert = invert
Trajectory.save = save
Trajectory.load = staticmethod(load_trajectory)
Trajectory.to_dataframe = to_dataframe
Trajectory.words = words
Trajectory.scores = scores
Trajectory.probabilities = probabilities
Trajectory.top_k = top_k
Trajectory.heatmap = heatmap
Trajectory.curves = curves
Trajectory.to_html = notebook.to_html
CausalEffects.scatter = effects_scatter
Comparison.save = save
Comparison.load = staticmethod(load_comparison)
Comparison.scores = scores
Comparison.heatmap = heatmap
EarlyExits.table = exit_table
EarlyExits.plot = exit_curves
TokenBias.table = bias_table
Trajectory._repr_html_ = notebook.explorer_html
TopK._repr_html_ = notebook.top_k_html
Evaluation._repr_html_ = notebook.evaluation_html
Lens._repr_html_ = notebook.lens_html
FrozenModel._repr_html_ = notebook.model_html

__all__ = [
    "Block",
    "CacheSettings",
    "CausalBasis",
    "CausalEffects",
    "Comparison",
    "ConstantLens",
    "CorpusConfig",
    "Diagnosis",
    "Directions",
    "EarlyExits",
    "EvaluateConfig",
    "Evaluation",
    "ExitRule",
    "ExitedText",
    "FrozenModel",
    "Head",
    "InputError",
    "JacobianLens",
    "Lens",
    "LogitLens",
    "ModelConfig",
    "Neuron",
    "Quality",
    "ScoringConfig",
    "TokenBias",
    "TrainConfig",
    "Trajectory",
    "TunedLens",
    "ablated",
    "causal_basis",
    "causal_effects",
    "compare",
    "difference",
    "doctor",
    "early_exits",
    "evaluate",
    "export_lens",
    "load_lens",
    "load_model",
    "measure_quality",
    "neurons",
    "push_to_hub",
    "read_evaluation",
    "response_alignment",
    "score_lenses",
    "token_bias",
    "train",
    "trajectory",
    "write_card",
    "write_report",
]
