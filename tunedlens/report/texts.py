"""Reports of texts on disk: a folder of files for every text, and one page with all."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

from tunedlens.errors import InputError
from tunedlens.escaping import for_csv
from tunedlens.files import write
from tunedlens.provenance import Provenance
from tunedlens.report import plots
from tunedlens.report.files import METRICS_JSON
from tunedlens.report.html.explorer import explorer
from tunedlens.report.html.texts import Figure, TextReport, texts_page, words_file
from tunedlens.report.plots.curves import MAX_LENSES, most_probable
from tunedlens.trajectories import Trajectory
from tunedlens.trajectories.frames import to_dataframe, words

_MAX_POSITIONS = 44
"""Heatmaps show only the end of a longer text; the interactive page shows all of it."""
_WIDTH = 12.0
"""The width of heatmaps of more than `_NARROW` positions, in inches."""
_NARROW = 16


def write_texts(
    trajectories: Sequence[Trajectory],
    folder: str | Path,
    run: Provenance,
    lenses: Mapping[str, str],
    *,
    k: int = 5,
) -> Path:
    """Write a folder for every text, and `report.html` with all of them.

    A folder has the figures `heatmap.svg`, `kl.svg` and `curves.svg`, the interactive page
    `page.html`, all metrics in `table.csv` and the best tokens of each lens in `words-<lens>.csv`.
    `report.html` needs none of these files, and replaces that of an earlier call.

    Args:
        trajectories: the trajectories of whole texts, read with the same lenses.
        folder: created if needed.
        run: the model, the command and the date, which the page shows.
        lenses: a description of each lens by name, which the page shows.
        k: the number of best tokens in the tables of the page.

    Returns:
        The path of `report.html`.

    Raises:
        InputError: the folder cannot be written, or holds the report of an evaluation.
    """
    folder = Path(folder)
    require_no_evaluation(folder)
    texts = []
    for trajectory in trajectories:
        text = _report(trajectory)
        _write_files(text, folder / text.folder)
        texts.append(text)
    path = folder / "report.html"
    write(path, texts_page(texts, run, lenses, k))
    return path


def require_no_evaluation(folder: Path) -> None:
    """Check that a report of texts does not replace that of an evaluation.

    Raises:
        InputError: it would.
    """
    if (folder / METRICS_JSON).exists():
        raise InputError(f"{folder} holds an evaluation; choose another folder for --output")


def _report(trajectory: Trajectory) -> TextReport:
    name = _folder_name(trajectory.text)
    return TextReport(trajectory, name, explorer(trajectory), _figures(trajectory))


def _folder_name(text: str) -> str:
    """The first words of the text and a hash."""
    first = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:24].strip("-")
    digest = hashlib.sha256(text.encode()).hexdigest()[:6]
    return f"{first}-{digest}" if first else digest


def _figures(trajectory: Trajectory) -> dict[str, Figure]:
    """Heatmaps of all lenses, and the curves of up to four, by the names of their files."""
    lenses, count = list(trajectory.predictions), len(trajectory.positions)
    end = trajectory[:, -_MAX_POSITIONS:]
    part = ""
    if count > _MAX_POSITIONS:
        part = f" Only the last {_MAX_POSITIONS} of {count:,} positions are drawn here."
    width = _WIDTH if min(count, _MAX_POSITIONS) > _NARROW else None
    heatmap = plots.heatmap(end, "probability", lenses, width=width)
    kl = plots.heatmap(end, "kl_nats", lenses, width=width)
    first = dict(islice(trajectory.predictions.items(), MAX_LENSES))
    followed = replace(trajectory, predictions=first)
    shown = {i: token.shown for i, token in trajectory.vocabulary.items()}
    tokens = ", ".join(f"“{shown[token]}”" for token in most_probable(followed, -1))
    last = shown[int(trajectory.input_ids[-1])]
    about_curves = (
        f"Probabilities of {tokens} after “{last}”, the last token (position "
        f"{trajectory.positions[-1]}), by layer, for the lenses {', '.join(first)}. Of the tokens "
        "that are the best one at some layer, these have the highest probability in the model."
    )
    return {
        "heatmap": Figure(
            f"The best token at every layer and position, coloured by its probability.{part}",
            plots.in_svg(heatmap),
        ),
        "kl": Figure(
            "The same tokens, coloured by KL(model ‖ lens): how far the lens's prediction is from "
            f"the model's. 0 means that both are equal.{part}",
            plots.in_svg(kl),
        ),
        "curves": Figure(about_curves, plots.in_svg(plots.curves(followed))),
    }


def _write_files(text: TextReport, folder: Path) -> None:
    for earlier in folder.glob("words-*.csv"):
        earlier.unlink()
    for name, figure in text.figures.items():
        write(folder / f"{name}.svg", figure.svg)
    write(folder / "page.html", text.page)
    read = text.trajectory
    write(folder / "table.csv", to_dataframe(read).map(for_csv).to_csv(index=False))
    for lens in read.predictions:
        table = words(read, lens).rename(for_csv, axis=1).map(for_csv)
        write(folder / words_file(lens), table.to_csv())
