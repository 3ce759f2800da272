"""Reads and writes the report of an evaluation."""

import csv
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple
from pathlib import Path

from tunedlens.errors import InputError
from tunedlens.escaping import code_block, for_csv, for_markdown
from tunedlens.evaluation import Evaluation
from tunedlens.evaluation.results import Grids
from tunedlens.files import read_json, write, write_json
from tunedlens.report import glossary, plots
from tunedlens.report.html import values
from tunedlens.report.html.page import page
from tunedlens.report.origin import origin
from tunedlens.report.tables import (
    depth_rows,
    difference_rows,
    kl_rows,
    markdown,
    metric_rows,
    scored_text,
    summary,
)

METRICS_JSON = "metrics.json"
_GRIDS = {"by_position.csv": ("layer", "position"), "transfer.csv": ("translator", "layer")}
"""Tables of values that are measured only on request, with the axes of each."""
_NAMES = {
    *(METRICS_JSON, "metrics.csv", "differences.csv", *_GRIDS, "report.md", "report.html"),
    *(f"{name}.{kind}" for name in plots.DRAWINGS for kind in plots.FORMATS),
}
"""All files that the report of an evaluation can have."""


def write_report(evaluation: Evaluation, folder: str | Path) -> None:
    """Write an evaluation as JSON, CSV, plots, Markdown and one HTML page.

    `metrics.json` holds all results; the other files can be written again from it. The CSV files
    have one row per value. `report.html` needs no other file. Files of an earlier report are
    replaced.

    Raises:
        InputError: the folder cannot be written.
    """
    folder = Path(folder)
    write_json(folder / METRICS_JSON, evaluation.to_json())
    contents: dict[str, str | bytes] = {
        "metrics.csv": _csv(("lens", "layer"), map(astuple, evaluation.results)),
        "differences.csv": _csv(("lens", "other", "layer"), map(astuple, evaluation.differences)),
    }
    grids = (evaluation.by_position, evaluation.transfer)
    for (name, axes), measured in zip(_GRIDS.items(), grids, strict=True):
        if measured:
            contents[name] = _csv(("lens", *axes), _grid_rows(measured, evaluation))
    svgs, panels = {}, {}
    for name, drawing in plots.DRAWINGS.items():
        if drawing.has_data(evaluation):
            figure = drawing.draw(evaluation)
            drawn = plots.in_all_formats(figure)
            contents |= {f"{name}.{kind}": content for kind, content in drawn.items()}
            svgs[name] = drawn["svg"]
            panels[name] = values.panels(name, figure, evaluation)
    contents["report.md"] = _markdown_report(evaluation)
    contents["report.html"] = page(evaluation, svgs, panels)
    for name in _NAMES - {METRICS_JSON} - contents.keys():
        (folder / name).unlink(missing_ok=True)
    for name, content in contents.items():
        write(folder / name, content)


def _csv(keys: tuple[str, ...], rows: Iterable[Sequence[object]]) -> str:
    """A table of estimates, in which the keys of each come first."""
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow((*keys, "metric", "value", "standard_error"))
    lines.writerows(map(for_csv, row) for row in rows)
    return text.getvalue()


def _grid_rows(grids: Grids, evaluation: Evaluation) -> Iterator[list[object]]:
    """One row per value: lens, row, column, metric, value, standard error."""
    models, n_layers = evaluation.models, evaluation.n_layers
    for lens, metrics in grids.items():
        first = n_layers if lens in models else 0
        for metric, grid in metrics.items():
            for i, row in enumerate(zip(grid.values, grid.standard_errors, strict=True)):
                for j, (value, error) in enumerate(zip(*row, strict=True)):
                    yield [lens, first + i, j, metric, value, error]


def _markdown_report(evaluation: Evaluation) -> str:
    run = evaluation.provenance
    parts = [
        f"# Lenses on {for_markdown(run.get('model', 'a model'))}",
        f"{for_markdown(scored_text(evaluation))}. {glossary.HOW_TO_READ}",
        "\n".join(f"- {for_markdown(sentence)}" for sentence in summary(evaluation)),
        "## KL(model ‖ lens), nats",
        markdown(kl_rows(evaluation)),
        "## All metrics",
        markdown(metric_rows(evaluation)),
    ]
    if evaluation.differences:
        parts += ["## Pairwise differences of KL, nats", glossary.ABOUT_DIFFERENCES]
        parts.append(markdown(difference_rows(evaluation)))
    if "prediction_depth" in evaluation.metrics:
        parts += ["## Prediction depth", glossary.ABOUT_DEPTHS, markdown(depth_rows(evaluation))]
    parts += ["## What the terms mean", _list(glossary.terms(evaluation))]
    parts += ["## What the metrics mean", _list(glossary.metric_terms(evaluation))]
    parts.append("## How this report was made")
    if "command" in run:
        parts.append(code_block(run["command"], "sh"))
    about = origin(evaluation)
    parts.append(_list({name: for_markdown(line) for name, line in about.items()}))
    parts.append("## Plots")
    for name, drawing in plots.DRAWINGS.items():
        if drawing.has_data(evaluation):
            parts += [f"![{name.replace('_', ' ')}]({name}.png)", drawing.caption]
    return "\n\n".join(parts) + "\n"


def _list(terms: Mapping[str, str]) -> str:
    """Terms with their meanings, as a list in Markdown."""
    return "\n".join(f"- **{for_markdown(one)}:** {said}" for one, said in terms.items())


def read_evaluation(folder: str | Path) -> Evaluation:
    """Read results that were written by `write_report`.

    Raises:
        InputError: there is no evaluation in the folder, or it is damaged.
    """
    path = Path(folder) / METRICS_JSON
    data = read_json(
        path, f"{folder} holds no evaluation: expected {METRICS_JSON}, as evaluate.py writes it"
    )
    try:
        return Evaluation.from_json(data)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def pictures(folder: Path) -> dict[str, Path]:
    """The plots of a report as PNG files, by name."""
    paths = {name: folder / f"{name}.png" for name in plots.DRAWINGS}
    return {name: path for name, path in paths.items() if path.exists()}


def require_own(folder: Path) -> None:
    """Check that writing a report would replace only an earlier report.

    Raises:
        InputError: the folder holds other files.
    """
    try:
        names = {path.name for path in folder.iterdir()} - _NAMES - {"wandb"}
    except OSError:
        return  # if the folder cannot be used, writing raises the error
    other = sorted(name for name in names if not _is_abandoned(name))
    if not other and (folder / METRICS_JSON).exists():
        try:
            data = read_json(folder / METRICS_JSON)
        except InputError:
            data = None
        other = [] if isinstance(data, dict) and "results" in data else [METRICS_JSON]
    if other:
        raise InputError(
            f"{folder} holds files that do not belong to an evaluation ({other[0]}); choose a new "
            "or empty folder for --output"
        )


def _is_abandoned(name: str) -> bool:
    """Whether a file is a temporary file of a report that a killed process left behind."""
    return name.startswith(".") and any(name.endswith(f".{own}") for own in _NAMES)
