"""From a frozen model and a corpus to a saved lens."""

from tunedlens.training.checkpointing import new_folder
from tunedlens.training.loop import train
from tunedlens.training.stopping import Interrupted

__all__ = ["Interrupted", "new_folder", "train"]
