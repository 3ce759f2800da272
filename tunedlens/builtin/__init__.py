"""The GPT-2 that ships with the package."""

from pathlib import Path

NAME = "embedded"
"""The name of the model, and of its text, in flags and files."""

FOLDER = Path(__file__).parent / "model"
"""The model in Hugging Face format."""
