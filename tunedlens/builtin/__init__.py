"""The GPT-2 that ships with the package."""

from pathlib import Path

NAME = "embedded"
"""As the name of a model, and of its text."""

FOLDER = Path(__file__).parent / "model"
"""The model in Hugging Face format."""
