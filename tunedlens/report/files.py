"""A report on disk: written, read back and recognised."""

import csv
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from tunedlens.errors import InputError
from tunedlens.evaluation import MODEL, Evaluation
from tunedlens.evaluation.results import Grids
from tunedlens.files import read_json, write, write_json
from tunedlens.report import plots
from tunedlens.report.html.page import page
from tunedlens.report.tables import (
    difference_rows,
    kl_rows,
    markdown,
    metric_rows,
    scored_text,
    summary,
)

METRICS_JSON = "metrics.json"
METRICS_CSV = "metrics.csv"
DIFFERENCES_CSV = "differences.csv"
POSITIONS_CSV = "by_position.csv"
TRANSFER_CSV = "transfer.csv"
REPORT_MD = "report.md"
REPORT_HTML = "report.html"
_ESTIMATE = ("metric", "value", "standard_error")


def write_report(evaluation: Evaluation, folder: str | Path) -> None:
    """Write an evaluation as JSON, CSV, plots, Markdown and one HTML page.

    `metrics.json` holds everything and is enough to write the rest again. The CSV files have one
    row per value. `report.html` needs no other file. Files of an earlier report are replaced.

    Raises:
        InputError: the folder cannot be written.
    """
    folder = Path(folder)
    write_json(folder / METRICS_JSON, evaluation.to_json())
    results = ([r.lens, r.layer, r.metric, r.value, r.standard_error] for r in evaluation.results)
    _write_csv(folder / METRICS_CSV, ("lens", "layer", *_ESTIMATE), results)
    differences = (
        [d.lens, d.other, d.layer, d.metric, d.value, d.standard_error]
        for d in evaluation.differences
    )
    _write_csv(folder / DIFFERENCES_CSV, ("lens", "other", "layer", *_ESTIMATE), differences)
    for name, axes, grids in (
        (POSITIONS_CSV, ("layer", "position"), evaluation.by_position),
        (TRANSFER_CSV, ("translator", "layer"), evaluation.transfer),
    ):
        if grids:
            rows = _grid_rows(grids, evaluation.n_layers)
            _write_csv(folder / name, ("lens", *axes, *_ESTIMATE), rows)
        else:
            (folder / name).unlink(missing_ok=True)
    svgs = _write_plots(evaluation, folder)
    write(folder / REPORT_MD, _markdown_report(evaluation))
    write(folder / REPORT_HTML, page(evaluation, svgs))


def _write_plots(evaluation: Evaluation, folder: Path) -> dict[str, bytes]:
    """Write every plot that has data, remove the others, and return the SVGs by name."""
    svgs = {}
    for name, drawing in plots.DRAWINGS.items():
        figure = drawing.draw(evaluation) if drawing.has_data(evaluation) else None
        for kind in plots.KINDS:
            path = folder / f"{name}.{kind}"
            if figure is None:
                path.unlink(missing_ok=True)
                continue
            content = plots.rendered(figure, kind)
            write(path, content)
            if kind == "svg":
                svgs[name] = content
    return svgs


def read_evaluation(folder: str | Path) -> Evaluation:
    """Read the results that `write_report` wrote.

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
    """Check that writing a report replaces nothing but an earlier report.

    Raises:
        InputError: the folder holds other files.
    """
    try:
        names = {path.name for path in folder.iterdir()}
        known = {METRICS_JSON, METRICS_CSV, DIFFERENCES_CSV, POSITIONS_CSV, TRANSFER_CSV}
        known |= {REPORT_MD, REPORT_HTML}
        known |= {f"{name}.{kind}" for name in plots.DRAWINGS for kind in plots.KINDS}
        other = sorted(names - known - {"wandb"})
        if names and not other:
            data = json.loads((folder / METRICS_JSON).read_text(encoding="utf-8"))
            other = [] if isinstance(data, dict) and "results" in data else [METRICS_JSON]
    except (FileNotFoundError, NotADirectoryError):
        return  # if something is wrong with it, writing says so
    except (OSError, ValueError):
        other = [METRICS_JSON]
    if other:
        raise InputError(
            f"{folder} holds files that are no part of an evaluation ({other[0]}); choose a new "
            "or empty folder for --output"
        )


def _grid_rows(grids: Grids, n_layers: int) -> Iterator[list[object]]:
    """One row per value: lens, row, column, metric, value, standard error."""
    for lens, metrics in grids.items():
        first = n_layers if lens == MODEL else 0
        for metric, grid in metrics.items():
            for i, row in enumerate(zip(grid.values, grid.standard_errors, strict=True)):
                for j, (value, error) in enumerate(zip(*row, strict=True)):
                    yield [lens, first + i, j, metric, value, error]


def _write_csv(path: Path, header: tuple[str, ...], rows: Iterable[Sequence[object]]) -> None:
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(header)
    lines.writerows(rows)
    write(path, text.getvalue())


def _markdown_report(evaluation: Evaluation) -> str:
    run = evaluation.provenance
    parts = [
        f"# Lenses on {run.get('model', 'a model')}",
        "\n".join(summary(evaluation)),
        f"{scored_text(evaluation)}. ± is one standard error, clustered by block.",
        "## KL(model ‖ lens), nats",
        markdown(kl_rows(evaluation)),
        "## All metrics",
        markdown(metric_rows(evaluation)),
    ]
    if evaluation.differences:
        parts += ["## Pairwise differences of KL, nats", markdown(difference_rows(evaluation))]
    if run:
        parts += ["## Command", f"```sh\n{run['command']}\n```"]
    for name, drawing in plots.DRAWINGS.items():
        if drawing.has_data(evaluation):
            parts += [f"![{drawing.caption}]({name}.png)"]
    return "\n\n".join(parts) + "\n"
