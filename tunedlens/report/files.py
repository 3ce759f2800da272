"""A report on disk: written whole, read back, recognised as ours."""

import csv
import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tunedlens.errors import InputError
from tunedlens.evaluation import MODEL, Evaluation
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
GRIDS_CSV = ("by_position.csv", "transfer.csv")
_FIGURE: tuple[str, ...] = ("lens", "layer", "metric", "value", "standard_error")
_DIFFERENCE: tuple[str, ...] = ("lens", "other", "layer", "metric", "value", "standard_error")
REPORT_MD = "report.md"
REPORT_HTML = "report.html"


def write_report(evaluation: Evaluation, folder: Path) -> None:
    """Write everything that there is to see of an evaluation.

    `metrics.json` holds all of it and is enough to make the rest again; the CSV files have
    one row per figure; `report.html` needs no other file.

    Raises:
        InputError: the folder cannot be written.
    """
    write_json(folder / METRICS_JSON, evaluation.to_json())
    _write_csv(folder / METRICS_CSV, _FIGURE, map(_row(_FIGURE), evaluation.results))
    _write_csv(
        folder / DIFFERENCES_CSV, _DIFFERENCE, map(_row(_DIFFERENCE), evaluation.differences)
    )
    for name, first, grids in zip(
        GRIDS_CSV,
        (("layer", "position"), ("translator", "layer")),
        (evaluation.by_position, evaluation.transfer),
        strict=True,
    ):
        if grids:
            header = ("lens", *first, "metric", "value", "standard_error")
            _write_csv(folder / name, header, _grid_rows(grids, evaluation.n_layers))
        else:
            (folder / name).unlink(missing_ok=True)
    pictures = {}
    for name, drawing in plots.DRAWINGS.items():
        is_there = drawing.is_there(evaluation)
        figure = drawing.draw(evaluation) if is_there else None
        for kind in plots.KINDS:
            path = folder / f"{name}.{kind}"
            if figure is None:
                path.unlink(missing_ok=True)  # of an earlier report
                continue
            content = plots.rendered(figure, kind)
            write(path, content)
            if kind == "svg":
                pictures[name] = content
    write(folder / REPORT_MD, _markdown_report(evaluation))
    write(folder / REPORT_HTML, page(evaluation, pictures))


def read_evaluation(folder: str | Path) -> Evaluation:
    """What `write_report` wrote.

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
    """Make sure that writing a report overwrites nothing but an earlier one.

    Raises:
        InputError: the folder holds something else.
    """
    try:
        names = {path.name for path in folder.iterdir()}
        known = {METRICS_JSON, METRICS_CSV, DIFFERENCES_CSV, *GRIDS_CSV, REPORT_MD, REPORT_HTML}
        known |= {f"{name}.{kind}" for name in plots.DRAWINGS for kind in plots.KINDS}
        other = sorted(names - known - {"wandb"})
        if names and not other:
            data = json.loads((folder / METRICS_JSON).read_text(encoding="utf-8"))
            other = [] if isinstance(data, dict) and "results" in data else [METRICS_JSON]
    except (FileNotFoundError, NotADirectoryError):
        return  # writing says what is wrong, if anything is
    except (OSError, ValueError):
        other = [METRICS_JSON]
    if other:
        raise InputError(
            f"{folder} holds something else than an evaluation ({other[0]}); give --output an "
            "empty or new folder"
        )


def _row(columns: tuple[str, ...]) -> Any:
    return lambda figure: [getattr(figure, column) for column in columns]


def _grid_rows(grids: dict[str, Any], n_layers: int) -> Iterable[list[Any]]:
    for lens, metrics in grids.items():
        first = n_layers if lens == MODEL else 0
        for metric, grid in metrics.items():
            for i, (values, errors) in enumerate(
                zip(grid.values, grid.standard_errors, strict=True)
            ):
                for j, (value, error) in enumerate(zip(values, errors, strict=True)):
                    yield [lens, first + i, j, metric, value, error]


def _write_csv(path: Path, header: tuple[str, ...], rows: Iterable[list[Any]]) -> None:
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(header)
    lines.writerows(rows)
    write(path, text.getvalue())


def _markdown_report(evaluation: Evaluation) -> str:
    about = evaluation.provenance
    parts = [
        f"# Lenses on {about.get('model', 'a model')}",
        "\n".join(summary(evaluation)),
        f"{scored_text(evaluation)}. ± is one standard error, clustered by block.",
        "## KL(model ‖ lens), nats",
        markdown(kl_rows(evaluation)),
        "## Every figure",
        markdown(metric_rows(evaluation)),
    ]
    if evaluation.differences:
        parts += ["## Paired differences of KL, nats", markdown(difference_rows(evaluation))]
    if about:
        parts += ["## Made again with", f"```sh\n{about['command']}\n```"]
    for name, drawing in plots.DRAWINGS.items():
        if drawing.is_there(evaluation):
            parts += [f"![{drawing.caption}]({name}.png)"]
    return "\n\n".join(parts) + "\n"
