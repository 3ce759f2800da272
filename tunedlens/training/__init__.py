"""From a frozen model and a corpus to a saved lens."""

from tunedlens.training.checkpointing import Interrupted, new_folder
from tunedlens.training.loop import train
from tunedlens.training.state_cache import CacheSettings

__all__ = ["CacheSettings", "Interrupted", "new_folder", "train"]
