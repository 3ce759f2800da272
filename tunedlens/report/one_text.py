"""What there is to see of one text, as files beside each other."""

from pathlib import Path
from urllib.parse import quote

from tunedlens import plots
from tunedlens.checkpoint import write
from tunedlens.report.explorer import explorer
from tunedlens.report.tables import code, top_k_markdown
from tunedlens.trajectory import Trajectory


def write_one_text(
    trajectory: Trajectory, folder: Path, name: str, within_blocks: Trajectory | None = None
) -> None:
    """Write a text's page, table, figures, and a report of them, all named alike.

    Args:
        trajectory: of the text.
        folder: made if need be.
        name: of the files; `<name>.md` is the report, `<name>.html` the page to explore.
        within_blocks: the same text read after attention and after the MLP, for its table.

    Raises:
        InputError: the folder cannot be written.
    """
    figures = {"curves": trajectory.curves()}
    for lens in trajectory.readings:
        for number, figure in enumerate(plots.heatmap_pages(trajectory, lens=lens), 1):
            figures[f"{lens}-{number}"] = figure
    for stem, figure in figures.items():
        plots.save(figure, folder / f"{name}-{stem}")
    write(folder / f"{name}.html", explorer(trajectory))
    write(folder / f"{name}.csv", trajectory.to_dataframe().to_csv(index=False))
    tables = {f"{lens} lens": trajectory.top_k(lens=lens) for lens in trajectory.readings}
    if within_blocks is not None:
        title = "logit lens, after attention (resid_mid) and after the MLP (resid_post)"
        tables[title] = within_blocks.top_k()
    text = str(trajectory.model.tokenizer.decode(trajectory.input_ids.tolist()))
    drawn = [stem for stem in figures if stem != "curves"]
    parts = [
        f"# {name}",
        code(repr(text)),
        f"[To explore]({name}.html), [every figure as a table]({name}.csv).",
        *(
            f"![{stem}: best tokens by layer and position]({quote(f'{name}-{stem}.png')})"
            for stem in drawn
        ),
        f"## After {code(trajectory.shown(int(trajectory.input_ids[-1])))}",
        f"![The model's best tokens through the layers]({name}-curves.png)",
        *(f"Best tokens: {title}\n\n{top_k_markdown(table)}" for title, table in tables.items()),
    ]
    write(folder / f"{name}.md", "\n\n".join(parts) + "\n")
