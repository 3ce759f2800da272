"""Reports on disk: of an evaluation and of one text."""

import csv
import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import astuple
from pathlib import Path
from urllib.parse import quote

from tunedlens.errors import InputError
from tunedlens.escaping import code, code_block, for_csv, for_markdown
from tunedlens.evaluation import Evaluation
from tunedlens.evaluation.results import Grids
from tunedlens.files import read_json, write, write_json
from tunedlens.report import plots
from tunedlens.report.html.explorer import explorer
from tunedlens.report.html.page import page
from tunedlens.report.tables import (
    difference_rows,
    kl_rows,
    markdown,
    metric_rows,
    scored_text,
    summary,
    top_k,
)
from tunedlens.trajectories import Trajectory
from tunedlens.trajectories.frames import to_dataframe, words

METRICS_JSON = "metrics.json"
_GRIDS = {"by_position.csv": ("layer", "position"), "transfer.csv": ("translator", "layer")}
"""Tables of what is measured on request only, with the axes of each."""
_NAMES = {
    *(METRICS_JSON, "metrics.csv", "differences.csv", *_GRIDS, "report.md", "report.html"),
    *(f"{name}.{kind}" for name in plots.DRAWINGS for kind in plots.FORMATS),
}
"""All files that the report of an evaluation can have."""
_PER_PAGE = 24
_MAX_PAGES = 4
"""The heatmaps of a long text are of its end; `page.html` has all of it."""


def write_report(evaluation: Evaluation, folder: str | Path) -> None:
    """Write an evaluation as JSON, CSV, plots, Markdown and one HTML page.

    `metrics.json` holds everything and is enough to write the rest again. The CSV files have one
    row per value. `report.html` needs no other file. Files of an earlier report are replaced.

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
    svgs = {}
    for name, drawing in plots.DRAWINGS.items():
        if drawing.has_data(evaluation):
            drawn = plots.in_all_formats(drawing.draw(evaluation))
            contents |= {f"{name}.{kind}": content for kind, content in drawn.items()}
            svgs[name] = drawn["svg"]
    contents["report.md"] = _markdown_report(evaluation)
    contents["report.html"] = page(evaluation, svgs)
    for name in _NAMES - {METRICS_JSON} - contents.keys():
        (folder / name).unlink(missing_ok=True)
    for name, content in contents.items():
        write(folder / name, content)


def _csv(keys: tuple[str, ...], rows: Iterable[Sequence[object]]) -> str:
    """A table of estimates, each with its keys before it."""
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
        "\n".join(map(for_markdown, summary(evaluation))),
        f"{for_markdown(scored_text(evaluation))}. ± is one standard error, clustered by block.",
        "## KL(model ‖ lens), nats",
        markdown(kl_rows(evaluation)),
        "## All metrics",
        markdown(metric_rows(evaluation)),
    ]
    if evaluation.differences:
        parts += ["## Pairwise differences of KL, nats", markdown(difference_rows(evaluation))]
    if "command" in run:
        parts += ["## Command", code_block(run["command"], "sh")]
    for name, drawing in plots.DRAWINGS.items():
        if drawing.has_data(evaluation):
            parts.append(f"![{drawing.caption}]({name}.png)")
    return "\n\n".join(parts) + "\n"


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
        names = {path.name for path in folder.iterdir()} - _NAMES - {"wandb"}
    except OSError:
        return  # if something is wrong with it, writing says so
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
    """Whether a file is a temporary form of one of a report's, which a killed process left."""
    return name.startswith(".") and any(name.endswith(f".{own}") for own in _NAMES)


def write_one_text(
    trajectory: Trajectory, folder: str | Path, within_blocks: Trajectory | None = None
) -> None:
    """Write `report.md` of a text, and its `page.html`, tables, heatmaps and curves.

    Args:
        trajectory: the trajectory of a whole text.
        folder: created if needed; an earlier report in it is replaced.
        within_blocks: the same text read after attention and after the MLP, for its table.

    Raises:
        InputError: the folder cannot be written.
    """
    folder, lenses = Path(folder), list(trajectory.predictions)
    end = trajectory[:, -_MAX_PAGES * _PER_PAGE :]
    drawn = {lens: plots.heatmap_pages(end, lens=lens, per_page=_PER_PAGE) for lens in lenses}
    for metric in ("rank", "kl_nats"):
        drawn[metric] = plots.heatmap_pages(end, metric, lenses, token="final", per_page=_PER_PAGE)
    heatmaps = {
        f"heatmap-{name}-{number}": page
        for name, pages in drawn.items()
        for number, page in enumerate(pages, 1)
    }
    figures = heatmaps | {"curves": plots.curves(trajectory)}
    for earlier in (*folder.glob("heatmap-*"), *folder.glob("words-*")):
        earlier.unlink()
    for name, figure in figures.items():
        plots.save(figure, folder / name)
    write(folder / "page.html", explorer(trajectory))
    write(folder / "table.csv", to_dataframe(trajectory).map(for_csv).to_csv(index=False))
    for lens in lenses:
        table = words(trajectory, lens).rename(for_csv, axis=1).map(for_csv)
        write(folder / f"words-{lens}.csv", table.to_csv())
    write(folder / "report.md", _markdown_of_text(trajectory, within_blocks, list(heatmaps)))


def _markdown_of_text(
    trajectory: Trajectory, within_blocks: Trajectory | None, heatmaps: Sequence[str]
) -> str:
    lenses = list(trajectory.predictions)
    tables = {f"{lens} lens": top_k(trajectory, lens=lens) for lens in lenses}
    if within_blocks is not None:
        title = "logit lens, after attention (resid_mid) and after the MLP (resid_post)"
        tables[title] = top_k(within_blocks)
    last = code(trajectory.vocabulary[int(trajectory.input_ids[-1])].shown)
    shown = _MAX_PAGES * _PER_PAGE
    is_cut = len(trajectory.positions) > shown
    parts = [
        "# One text through the layers",
        code_block(trajectory.text),
        "[An interactive page](page.html), [all metrics as a table](table.csv), the best tokens of "
        + ", ".join(
            f"[the {for_markdown(lens)} lens]({quote(f'words-{lens}.csv')})" for lens in lenses
        )
        + ".",
        *([f"The plots show the last {shown} positions; the page has all."] if is_cut else []),
        *(f"![{for_markdown(name)}]({quote(name)}.png)" for name in heatmaps),
        f"## After {last}, the last token",
        "![The tracked tokens that the model finds most probable, through the layers](curves.png)",
        *(
            f"Best tokens: {for_markdown(title)}\n\n{table.to_markdown()}"
            for title, table in tables.items()
        ),
    ]
    return "\n\n".join(parts) + "\n"
