"""What there is to see of one text, as files in a folder."""

import itertools
from pathlib import Path
from urllib.parse import quote

from tunedlens.files import write
from tunedlens.report import plots
from tunedlens.report.best_tokens import top_k
from tunedlens.report.html.explorer import explorer
from tunedlens.report.tables import code, code_block
from tunedlens.trajectories import Trajectory

_PER_PAGE = 24
_MOST_PAGES = 4
"""Heatmaps of a long text; the page to explore has all of it."""


def write_one_text(
    trajectory: Trajectory, folder: str | Path, within_blocks: Trajectory | None = None
) -> None:
    """Write `report.md` of a text, and its `page.html`, tables, heatmaps and curves.

    Args:
        trajectory: of the text.
        folder: made if need be; what an earlier report of the text had is replaced.
        within_blocks: the same text read after attention and after the MLP, for its table.

    Raises:
        InputError: the folder cannot be written.
    """
    folder = Path(folder)
    lenses = list(trajectory.readings)
    # What every lens says, each by itself; how far it is from the model, one above the other.
    shown = [(lens, "probability", [lens]) for lens in lenses]
    shown += [(metric, metric, lenses) for metric in ("rank", "kl_nats")]
    drawn = {
        name: plots.heatmap_pages(trajectory, metric, several, per_page=_PER_PAGE)
        for name, metric, several in shown
    }
    figures = {
        f"heatmap-{name}-{number}": page
        for name, pages in drawn.items()
        for number, page in enumerate(itertools.islice(pages, _MOST_PAGES), 1)
    }
    figures["curves"] = plots.curves(trajectory)
    is_cut = len(trajectory.positions) > _MOST_PAGES * _PER_PAGE
    for earlier in itertools.chain(folder.glob("heatmap-*"), folder.glob("words-*")):
        earlier.unlink()
    for name, figure in figures.items():
        plots.save(figure, folder / name)
    write(folder / "page.html", explorer(trajectory))
    write(folder / "table.csv", trajectory.to_dataframe().to_csv(index=False))
    for lens in lenses:
        write(folder / f"words-{lens}.csv", trajectory.words(lens).to_csv())
    tables = {f"{lens} lens": top_k(trajectory, lens=lens) for lens in lenses}
    if within_blocks is not None:
        title = "logit lens, after attention (resid_mid) and after the MLP (resid_post)"
        tables[title] = top_k(within_blocks)
    last = code(trajectory.shown(int(trajectory.input_ids[-1])))
    text = str(trajectory.model.tokenizer.decode(trajectory.input_ids.tolist()))
    parts = [
        "# One text through the layers",
        code_block(text),
        "[A page to explore](page.html), [every figure as a table](table.csv), the best words of "
        + ", ".join(f"[the {lens} lens]({quote(f'words-{lens}.csv')})" for lens in lenses)
        + ".",
        *(["Drawn is the beginning; the page has the whole text."] if is_cut else []),
        *(f"![{name}]({quote(name)}.png)" for name in figures if name != "curves"),
        f"## After {last}, the last token",
        "![The model's best tokens through the layers](curves.png)",
        *(f"Best tokens: {title}\n\n{table.to_markdown()}" for title, table in tables.items()),
    ]
    write(folder / "report.md", "\n\n".join(parts) + "\n")
