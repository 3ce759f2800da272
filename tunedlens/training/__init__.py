"""From a frozen model and a corpus to a saved lens."""

from tunedlens.training.checkpointing import Interrupted, new_folder
from tunedlens.training.loop import train

__all__ = ["Interrupted", "new_folder", "train"]
