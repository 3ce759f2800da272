"""What README and docs tell a newcomer to type works, and prints what they say."""

import contextlib
import io
import re
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import tunedlens
from tunedlens.provenance import DISTRIBUTION

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
NAMES = ("causal", "coming-from-tuned-lens", "gallery", "looking", "notebooks", "other-libraries")
SLOW_NAMES = ("compare-lenses", "paper-figure", "read-a-published-lens", "train-on-your-corpus")
PAGES = [
    README,
    *(ROOT / "docs" / f"{name}.md" for name in NAMES),
    *(pytest.param(ROOT / "docs" / f"{name}.md", marks=pytest.mark.slow) for name in SLOW_NAMES),
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
    for picture in re.findall(r"\]\(gallery/([^)]+)\)", page.read_text()):
        assert Path(picture).exists(), f"no code of the page makes {picture}"


def test_readme_has_the_results_of_the_default_run():
    run = (ROOT / "docs" / "evaluation.md").read_text()
    printed = re.findall(r"^ *(?:\d|mean)  +(\S+) ± \S+  +(\S+) ± \S+$", run, re.M)
    results = README.read_text().partition("## Results")[2]
    for lens, values in zip(("logit", "tuned"), zip(*printed, strict=True), strict=True):
        row = re.search(rf"\| {lens} lens \| (.*) ± \S+ \|", results)[1]
        assert row.split(" | ") == list(values)


def test_reference_has_every_name_of_the_public_interface_once():
    page = (ROOT / "docs" / "api.md").read_text()
    named = re.findall(r"^\.\. auto(?:class|function):: (\w+)", page, re.M)
    assert sorted(named) == sorted(tunedlens.__all__)


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


def test_distribution_has_one_name_in_its_extras_provenance_and_readme():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["name"] == DISTRIBUTION
    extras = [need for needs in project["optional-dependencies"].values() for need in needs]
    own = {need.partition("[")[0] for need in extras if "[" in need}
    assert own == {DISTRIBUTION}
    assert f"pip install {DISTRIBUTION}" in README.read_text()


def test_package_runs_as_a_module(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["tunedlens", "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("tunedlens", run_name="__main__")
    assert ended.value.code == 0
    assert "usage: tunedlens COMMAND" in capsys.readouterr().out
