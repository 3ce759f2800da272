"""What README and docs tell a newcomer to type works, and prints what they say."""

import contextlib
import io
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    *(
        ROOT / "docs" / f"{name}.md"
        for name in ("causal", "looking", "notebooks", "other-libraries")
    ),
]


def number(word):
    try:
        return float(word.strip("[],"))
    except ValueError:
        return None


def says_the_same(printed, expected):
    """Words alike, and numbers to the digits that another CPU may change."""
    if len(printed) != len(expected):
        return False
    for one, other in zip(printed, expected, strict=True):
        if number(one) is None or number(other) is None:
            if one != other:
                return False
        elif number(one) != pytest.approx(number(other), rel=0.02, abs=0.006):
            return False
    return True


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_runs_and_prints_what_the_page_says(page, tmp_path, monkeypatch):
    (tmp_path / "checkpoints").symlink_to(ROOT / "checkpoints")
    monkeypatch.chdir(tmp_path)
    names = {}
    found = re.findall(r"```python\n(.*?)```\n(?:\n+```text\n(.*?)```)?", page.read_text(), re.S)
    assert found
    for code, expected in found:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(code, names)
        assert says_the_same(printed.getvalue().split(), expected.split()), printed.getvalue()


def tracked_pages():
    """Markdown files of the project: no virtual environment that lies in its folder."""
    command = ["git", "ls-files", "*.md"]
    try:
        found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):  # no git, or not a checkout
        return sorted([*ROOT.glob("*.md"), *ROOT.glob("[!.]*/*.md")])
    return [ROOT / name for name in found.stdout.splitlines() if (ROOT / name).exists()]


@pytest.mark.parametrize("page", tracked_pages(), ids=str)
def test_paths_that_a_page_names_exist(page):
    for path in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
        assert (page.parent / path).exists(), path
