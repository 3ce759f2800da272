"""The site of the documentation: `sphinx-build -W -b html docs FOLDER`."""

import dataclasses
import os
import re
from importlib import metadata
from pathlib import Path

from sphinx.application import Sphinx

DOCS = Path(__file__).parent.resolve()
ROOT = DOCS.parent
OF_THE_REPOSITORY = {
    "index": ROOT / "README.md",
    "benchmarks": ROOT / "benchmarks" / "README.md",
    "changelog": ROOT / "CHANGELOG.md",
    "contributing": ROOT / "CONTRIBUTING.md",
    "security": ROOT / "SECURITY.md",
}
"""Pages whose text lies elsewhere in the repository. Their files here hold a link for readers on
GitHub, and below the line `<!-- site -->` what the site adds."""

project = "tunedlens"
author = "The tunedlens authors"
release = metadata.version("residual-lens")

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = f"tunedlens {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_copy_source = False

myst_heading_anchors = 4
myst_enable_extensions = ["colon_fence"]
nb_execution_mode = "off"

default_role = "code"  # `x` in a docstring
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
python_maximum_signature_line_length = 80
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_custom_sections = ["Source"]


def read_page(_app: Sphinx, name: str, source: list[str]) -> None:
    """Put the texts of the repository in their place, and make their links lead to pages."""
    text, folder = source[0], DOCS
    if name in OF_THE_REPOSITORY:
        path = OF_THE_REPOSITORY[name]
        added = text.partition("<!-- site -->")[2]
        text, folder = path.read_text(encoding="utf-8"), path.parent
        source[0] = relinked(text, folder) + relinked(added, DOCS)
    else:
        source[0] = relinked(text, folder)


def relinked(text: str, folder: Path) -> str:
    """Links and pictures of a file in `folder`, relative to this folder."""
    pages = {path: DOCS / f"{name}.md" for name, path in OF_THE_REPOSITORY.items()}

    def link(found: re.Match[str]) -> str:
        target = (folder / found["path"]).resolve()
        if target.is_dir():
            target /= "README.md"
        if not target.exists():
            return found[0]
        page = pages.get(target, target)
        is_file = page.suffix == ".md" and page.parent != DOCS  # not a page: a file to download
        path = os.path.relpath(page, DOCS) + (found["anchor"] or "")
        return f"]({'path:' * is_file}{path})"

    return re.sub(r"\]\((?P<path>[^)#:\s]+)(?P<anchor>#[^)\s]*)?\)", link, text)


def describe_option(
    _app: Sphinx, what: str, name: str, _value: object, _options: object, lines: list[str]
) -> None:
    """A setting of a config is described by the help of its flag."""
    if what != "attribute" or lines:
        return
    import tunedlens

    owner, _, field = name.rpartition(".")
    config = getattr(tunedlens, owner.rpartition(".")[2], None)
    if dataclasses.is_dataclass(config):
        helps = {one.name: one.metadata.get("help") for one in dataclasses.fields(config)}
        if text := helps.get(field):
            lines.append(f"{text[0].upper()}{text[1:]}.")


def short_signature(_app: Sphinx, what: str, name: str, *_rest: object) -> tuple[str, None] | None:
    """The settings of a config are listed below it, so its signature does not repeat them."""
    return ("(...)", None) if what == "class" and name.endswith("Config") else None


def setup(app: Sphinx) -> None:
    app.connect("source-read", read_page)
    app.connect("autodoc-process-docstring", describe_option)
    app.connect("autodoc-process-signature", short_signature)
