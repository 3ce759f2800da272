"""The report of one text: files in a folder."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from tunedlens.files import write
from tunedlens.report import plots
from tunedlens.report.best_tokens import top_k
from tunedlens.report.html.explorer import explorer
from tunedlens.report.tables import code, code_block
from tunedlens.trajectories import Trajectory
from tunedlens.trajectories.frames import to_dataframe, words

_PER_PAGE = 24
_MAX_PAGES = 4
"""The heatmaps of a long text; `page.html` has all of it."""


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
    folder = Path(folder)
    lenses = list(trajectory.predictions)
    drawn = {
        lens: plots.heatmap_pages(trajectory, lens=lens, per_page=_PER_PAGE) for lens in lenses
    }
    for metric in ("rank", "kl_nats"):
        drawn[metric] = plots.heatmap_pages(
            trajectory, metric, lenses, token="final", per_page=_PER_PAGE
        )
    figures = {
        f"heatmap-{name}-{number}": page
        for name, pages in drawn.items()
        for number, page in enumerate(itertools.islice(pages, _MAX_PAGES), 1)
    }
    figures["curves"] = plots.curves(trajectory)
    for earlier in itertools.chain(folder.glob("heatmap-*"), folder.glob("words-*")):
        earlier.unlink()
    for name, figure in figures.items():
        plots.save(figure, folder / name)
    write(folder / "page.html", explorer(trajectory))
    write(folder / "table.csv", to_dataframe(trajectory).to_csv(index=False))
    for lens in lenses:
        write(folder / f"words-{lens}.csv", words(trajectory, lens).to_csv())
    write(folder / "report.md", _markdown(trajectory, within_blocks, list(figures)))


def _markdown(
    trajectory: Trajectory, within_blocks: Trajectory | None, figures: Sequence[str]
) -> str:
    lenses = list(trajectory.predictions)
    tables = {f"{lens} lens": top_k(trajectory, lens=lens) for lens in lenses}
    if within_blocks is not None:
        title = "logit lens, after attention (resid_mid) and after the MLP (resid_post)"
        tables[title] = top_k(within_blocks)
    last = code(trajectory.vocabulary[int(trajectory.input_ids[-1])].shown)
    is_cut = len(trajectory.positions) > _MAX_PAGES * _PER_PAGE
    parts = [
        "# One text through the layers",
        code_block(trajectory.text),
        "[An interactive page](page.html), [all metrics as a table](table.csv), the best tokens of "
        + ", ".join(f"[the {lens} lens]({quote(f'words-{lens}.csv')})" for lens in lenses)
        + ".",
        *(["The plots show the beginning; the page has the whole text."] if is_cut else []),
        *(f"![{name}]({quote(name)}.png)" for name in figures if name != "curves"),
        f"## After {last}, the last token",
        "![The model's best tokens through the layers](curves.png)",
        *(f"Best tokens: {title}\n\n{table.to_markdown()}" for title, table in tables.items()),
    ]
    return "\n\n".join(parts) + "\n"
