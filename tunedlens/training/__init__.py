"""A frozen model and a corpus in, a saved tuned lens out."""

from tunedlens.training.loop import Interrupted, train
from tunedlens.training.run import saved_config

__all__ = ["Interrupted", "saved_config", "train"]
