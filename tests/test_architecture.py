"""Data flows one way, and so do imports, those inside functions too."""

import ast
from pathlib import Path

import pytest

import tunedlens

PACKAGE = Path(tunedlens.__file__).parent
ORDER = (
    "errors",
    "escaping",
    "hub",
    "progress",
    "files",
    "config",
    "devices",
    "distributed",
    "builtin",
    "tokenizer",
    "corpus",
    "model",
    "sampling",
    "provenance",
    "lenses",
    "engine",
    "fit",
    "checkpoint",
    "doctor",
    "metrics",
    "evaluation",
    "early_exit",
    "trajectories",
    "anomaly",
    "generation",
    "mlp_neurons",
    "causal",
    "neighbours",
    "tracking",
    "report",
    "sharing",
    "training",
    "cli",
    "__main__",
)
"""The rooms of the package. A module imports from its own room and from those before it.
`tunedlens/__init__.py` imports everything and is imported by nothing inside."""

HOMES = {"wandb": "tracking", "matplotlib": "report", "datasets": "corpus", "peft": "model"}
HOMES["sklearn"] = "anomaly"
"""Packages that are slow to import, and the one room that imports each, inside functions."""


def room_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path):
    """Every imported name of a file, with when: on import, in a function, or for types only."""
    tree = ast.parse(path.read_text())
    when = {}
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            when |= dict.fromkeys(ast.walk(node), "in a function")
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            when |= dict.fromkeys(ast.walk(node), "for types")
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} has a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            yield name, when.get(node, "on import")


FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def test_every_room_has_its_place_in_the_order():
    assert {room_of(path) for path in FILES} == set(ORDER)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_module_imports_only_from_rooms_before_its_own(path):
    room = room_of(path)
    for name, _ in imports(path):
        package, *parts = name.split(".")
        if package == "tunedlens":
            other = parts[0]
            assert ORDER.index(other) <= ORDER.index(room), f"{room} imports {other}"


def modules(name):
    """The file that an import names, if it is one of the package."""
    path = PACKAGE.parent.joinpath(*name.split("."))
    for found in (path.with_suffix(".py"), path / "__init__.py"):
        if found.exists() and found != PACKAGE / "__init__.py":
            return found
    return modules(name.rpartition(".")[0]) if "." in name else None


def test_no_modules_import_each_other_in_a_circle():
    graph = {
        path: {modules(name) for name, _ in imports(path) if name.startswith("tunedlens")}
        - {None, path}
        for path in FILES
    }
    while leaves := {path for path, needed in graph.items() if not needed & graph.keys()}:
        graph = {path: needed for path, needed in graph.items() if path not in leaves}
    assert not graph, f"in a circle, or importing one: {sorted(map(str, graph))}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_own_modules_are_never_imported_inside_functions(path):
    own = {when for name, when in imports(path) if name.startswith("tunedlens")}
    assert own <= {"on import"}


@pytest.mark.parametrize(("package", "home"), HOMES.items())
def test_slow_package_has_one_home_and_is_imported_only_when_used(package, home):
    for path in FILES:
        for name, when in imports(path):
            if name.split(".")[0] == package and when != "for types":
                assert (room_of(path), when) == (home, "in a function")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_modules_and_functions_stay_short_enough_to_read(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 350
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno - node.lineno < 60, node.name


def test_any_is_rare():
    names = [
        node.id
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Name)
    ]
    assert names.count("Any") < 30
