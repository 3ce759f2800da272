"""The GPT-2 that ships with the package, and the text that every Python has."""

from pathlib import Path

from tunedlens.embedded.text import (
    HELD_OUT_SHARE,
    SourceFile,
    hash_fraction,
    standard_library,
)

__all__ = ["FOLDER", "HELD_OUT_SHARE", "SourceFile", "hash_fraction", "standard_library"]

FOLDER = Path(__file__).parent / "model"
"""The model in Hugging Face format."""
