"""Draws the pictures in docs/gallery/ by running the code on the pages that show them.

python scripts/gallery.py
"""

import contextlib
import re
import tempfile
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parents[1]
PAGES = ("gallery.md", "paper-figure.md")
WIDTH = 1200
"""The largest width of a picture in pixels."""


def main() -> None:
    """Run the code of every page in an empty folder, and keep the pictures that the page shows."""
    folder = ROOT / "docs" / "gallery"
    folder.mkdir(exist_ok=True)
    for page in PAGES:
        text = (ROOT / "docs" / page).read_text(encoding="utf-8")
        with tempfile.TemporaryDirectory() as drawn, contextlib.chdir(drawn):
            Path("checkpoints").symlink_to(ROOT / "checkpoints")
            exec("\n".join(re.findall(r"```python\n(.*?)```", text, re.S)), {})
            for name in re.findall(r"\]\(gallery/([^)]+)\)", text):
                keep(Path(name), folder / name)


def keep(drawn: Path, kept: Path) -> None:
    """Store a picture in 256 colours, at most `WIDTH` pixels wide."""
    picture = Image.open(drawn).convert("RGB")
    if picture.width > WIDTH:
        height = round(picture.height * WIDTH / picture.width)
        picture = picture.resize((WIDTH, height), Image.Resampling.LANCZOS)
    picture.quantize(256, dither=Image.Dither.NONE).save(kept, optimize=True)


if __name__ == "__main__":
    main()
