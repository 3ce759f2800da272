"""From a frozen model and a corpus to a saved lens."""

from tunedlens.training.checkpointing import new_folder
from tunedlens.training.interruption import Interrupted
from tunedlens.training.loop import train

__all__ = ["Interrupted", "new_folder", "train"]
