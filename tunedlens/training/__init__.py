"""A frozen model and a corpus in, a saved tuned lens out."""

from tunedlens.training.loop import Interrupted, train

__all__ = ["Interrupted", "train"]
