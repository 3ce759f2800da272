"""Data flows one way, and so do imports."""

import ast
from pathlib import Path

import pytest

import tunedlens

PACKAGE = Path(tunedlens.__file__).parent
ORDER = (
    "errors",
    "memory",
    "config",
    "embedded",
    "tokens",
    "sites",
    "frozen",
    "corpus",
    "lens",
    "checkpoint",
    "generation",
    "neurons",
    "metrics",
    "vocab_sample",
    "objective",
    "backend",
    "fit",
    "trajectory",
    "evaluation",
    "tracking",
    "plots",
    "report",
    "training",
    "cli",
)
HOMES = {"wandb": "tracking", "matplotlib": "plots", "datasets": "corpus"}
CONVENIENCES = {
    ("lens", "checkpoint"),
    ("lens", "generation"),
    ("trajectory", "plots"),
    ("trajectory", "report"),
}
"""A method for the user's comfort that imports a later module inside itself."""

SCRIPTS = {PACKAGE / "embedded" / "pretrain.py"}
"""Run by hand and imported by nothing."""


def module_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path):
    """Every imported module, with whether it is imported when this one is."""
    tree = ast.parse(path.read_text())
    top = set(ast.walk(ast.Module([n for n in tree.body if not isinstance(n, ast.If)], [])))
    inside = {
        inner
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef)
        for inner in ast.walk(function)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module]
            if node.module == "tunedlens":
                names = [f"tunedlens.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            yield name, node in top and node not in inside


FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def test_every_module_has_its_place_in_the_order():
    assert {module_of(path) for path in FILES} == set(ORDER)


@pytest.mark.parametrize("path", [path for path in FILES if path not in SCRIPTS], ids=str)
def test_module_imports_only_what_comes_before_it(path):
    home = module_of(path)
    for name, _ in imports(path):
        other = name.split(".")[1] if name.startswith("tunedlens.") else home
        if other != home and (home, other) not in CONVENIENCES:
            assert ORDER.index(other) < ORDER.index(home), f"{home} imports {other}"


@pytest.mark.parametrize(("package", "home"), HOMES.items())
def test_package_has_one_home_and_is_imported_only_when_used(package, home):
    for path in FILES:
        for name, at_import in imports(path):
            if name.split(".")[0] == package:
                assert module_of(path) == home
                assert not at_import
