"""Trains a lens on a frozen model and a corpus, and saves it."""

from tunedlens.training.calls import train
from tunedlens.training.checkpointing import new_folder
from tunedlens.training.state_cache import CacheSettings
from tunedlens.training.stopping import Interrupted

__all__ = ["CacheSettings", "Interrupted", "new_folder", "train"]
