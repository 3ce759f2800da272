"""How values are displayed in a notebook."""

import base64
from collections.abc import Mapping
from html import escape
from pathlib import Path

from tunedlens.evaluation import Evaluation
from tunedlens.files import write
from tunedlens.lenses import AffineLens, Lens
from tunedlens.model import FrozenModel
from tunedlens.report import plots
from tunedlens.report.html.explorer import explorer, explorer_height
from tunedlens.report.html.frame import framed
from tunedlens.report.tables import Rows, TopK, kl_rows, scored_text, summary
from tunedlens.trajectories import Trajectory


class Page(str):
    """An HTML document as text, which a notebook shows in a frame."""

    height: int
    """The height of the frame in pixels."""

    def __repr__(self) -> str:
        return f"Page({len(self):,} characters of HTML)"

    def _repr_html_(self) -> str:
        return framed(self, self.height)


def to_html(trajectory: Trajectory, *others: Trajectory | str | Path) -> Page:
    """An interactive page of one text, or of several; see `report.explorer`.

    Args:
        trajectory: the first text.
        others: further texts, and optionally the path of a file to which the page is written.

    Raises:
        InputError: the texts were read with different lenses, or the file cannot be written.
    """
    texts = [trajectory, *(one for one in others if isinstance(one, Trajectory))]
    page = Page(explorer(*texts))
    page.height = explorer_height(trajectory)
    for path in others:
        if not isinstance(path, Trajectory):
            write(Path(path), page)
    return page


def explorer_html(trajectory: Trajectory) -> str:
    """The interactive page of a text, in a frame."""
    return to_html(trajectory)._repr_html_()


def top_k_html(table: TopK) -> str:
    """A table of the best tokens."""
    return _table(table.cells())


def evaluation_html(evaluation: Evaluation) -> str:
    """The summary of an evaluation, its overview and the KL of every lens by layer."""
    svg = plots.rendered(plots.DRAWINGS["overview"].draw(evaluation), "svg")
    data = base64.b64encode(svg).decode()
    sentences = "".join(f"<li>{escape(sentence)}</li>" for sentence in summary(evaluation))
    errors = "; ± one standard error, clustered by block" if evaluation.blocks > 1 else ""
    return (
        f"<p>{escape(scored_text(evaluation))}{errors}</p>"
        f"<ul>{sentences}</ul>"
        f'<img alt="overview" style="max-width: 100%" src="data:image/svg+xml;base64,{data}">'
        f"{_table(kl_rows(evaluation))}"
    )


def lens_html(lens: Lens) -> str:
    """The properties of a lens, as a table."""
    about: dict[str, object] = {
        "kind": type(lens).__name__,
        "model": lens.identity.name,
        "layers": f"{lens.n_layers} of width {lens.identity.d_model:,}",
    }
    if isinstance(lens, AffineLens):
        missing = len(lens.layers) < lens.n_layers
        about["translators at"] = ", ".join(lens.sites) + (
            f"; layers {', '.join(map(str, lens.layers))}" if missing else "; all layers"
        )
        about["parameters"] = f"{sum(one.numel() for one in lens.parameters()):,}"
    return _facts(about)


def model_html(model: FrozenModel) -> str:
    """The properties of a model, as a table."""
    return _facts(
        {
            "model": model.name,
            "class": type(model.model).__name__,
            "layers": f"{model.identity.n_layers} of width {model.identity.d_model:,}",
            "vocabulary": f"{model.identity.vocab_size:,} tokens",
            "weights": f"{model.model.dtype} on {model.device}".removeprefix("torch."),
        }
    )


def _facts(about: Mapping[str, object]) -> str:
    lines = (
        f'<tr><th style="text-align: left">{escape(name)}</th>'
        f'<td style="text-align: left">{escape(str(value))}</td></tr>'
        for name, value in about.items()
    )
    return f"<table>{''.join(lines)}</table>"


def _table(rows: Rows) -> str:
    header, *body = rows
    heads = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    lines = "".join(
        f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in body
    )
    return f"<table><thead><tr>{heads}</tr></thead><tbody>{lines}</tbody></table>"
