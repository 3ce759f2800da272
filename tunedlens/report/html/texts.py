"""`report.html` of texts: each as an interactive heatmap, figures and tables."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import quote

from tunedlens.escaping import for_html
from tunedlens.provenance import Provenance
from tunedlens.report.html.elements import definitions, document, figure, table
from tunedlens.report.html.explorer import explorer_height
from tunedlens.report.html.frame import framed
from tunedlens.report.origin import minute, software
from tunedlens.report.tables import top_k
from tunedlens.trajectories import Trajectory

_HOW_TO_READ = (
    "A lens predicts the next token from the hidden state at one layer. Layer 0 is the embeddings, "
    "and the row “model” is the model's own prediction. The logit lens applies the model's final "
    "norm and unembedding; a tuned lens first applies a map that is trained for each layer. ␣ is a "
    "space and ↵ a line break."
)


@dataclass(frozen=True)
class Figure:
    """A drawn figure."""

    caption: str
    svg: bytes


@dataclass(frozen=True)
class TextReport:
    """What the page shows of one text."""

    trajectory: Trajectory
    folder: str
    """The folder of its files, relative to the page."""
    page: str
    """The interactive page."""
    figures: Mapping[str, Figure]
    """By the names of their files."""


def texts_page(
    texts: Sequence[TextReport], run: Provenance, lenses: Mapping[str, str], k: int
) -> str:
    """One page with all texts of a call.

    Args:
        texts: in the order in which they are shown.
        run: the model, command and date.
        lenses: what each lens is, by name.
        k: the number of best tokens in a table.
    """
    about = {"model": run.get("model"), "revision": run.get("revision")}
    about["lenses"] = "; ".join(f"{name}: {what}" for name, what in lenses.items())
    made = {"command": run.get("command"), "software": software(run), "created": minute(run)}
    links = "".join(
        f'<li><a href="#text-{number}">{for_html(_start(text.trajectory))}</a></li>'
        for number, text in enumerate(texts, 1)
    )
    parts = [f"<p>{_HOW_TO_READ}</p>", definitions(about)]
    if len(texts) > 1:
        parts.append(f"<nav><ol>{links}</ol></nav>")
    parts += [_section(number, text, k) for number, text in enumerate(texts, 1)]
    parts.append(f"<section><h2>How this page was made</h2>{definitions(made)}</section>")
    return document(f"Texts through the layers of {run.get('model', 'a model')}", "\n".join(parts))


def _start(trajectory: Trajectory, length: int = 60) -> str:
    """The first words of a text in one line."""
    line = " ".join(trajectory.text.split()) or repr(trajectory.text)
    return line if len(line) <= length else line[: length - 1] + "…"


def _section(number: int, text: TextReport, k: int) -> str:
    read = text.trajectory
    last = read.vocabulary[int(read.input_ids[-1])].shown
    best = top_k(read, k=1)
    said = (
        f"{len(read.positions):,} tokens. The last token is “{last}”. The model's most probable "
        f"next token is “{best.tokens[-1][0].shown}”, with probability {best.probs[-1][0]:.3f}."
    )
    tables = "".join(
        f"<h4>{for_html(lens)} lens</h4>{table(top_k(read, k=k, lens=lens).cells())}"
        for lens in read.predictions
    )
    figures = "".join(
        figure(one.caption, one.svg, is_wide=name != "curves") for name, one in text.figures.items()
    )
    folder = quote(text.folder)
    files = {"the interactive page alone": "page.html", "all metrics as a table": "table.csv"}
    files |= {f"the best tokens of the {lens} lens": words_file(lens) for lens in read.predictions}
    links = ", ".join(
        f'<a href="{folder}/{quote(name)}">{for_html(what)}</a>' for what, name in files.items()
    )
    return f"""<section id="text-{number}">
<h2>{for_html(_start(read))}</h2>
<pre class="text">{for_html(read.text)}</pre>
<p>{for_html(said)}</p>
<h3>All layers and positions</h3>
{framed(text.page, explorer_height(read))}
<h3>Figures</h3>
{figures}
<h3>Best tokens after “{for_html(last)}”, the last token</h3>
<p class="note">Columns are ranks. Each cell shows a token and its probability.</p>
{tables}
<p class="note">Files: {links}.</p>
</section>"""


def words_file(lens: str) -> str:
    """The name of the file with the best tokens of a lens at every layer and position."""
    return f"words-{lens}.csv"
