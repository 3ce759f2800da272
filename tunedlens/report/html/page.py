"""`report.html`: one page that needs no other file."""

import base64
from collections.abc import Mapping
from importlib import resources

from tunedlens.escaping import for_html
from tunedlens.evaluation import Evaluation
from tunedlens.metrics import METRICS
from tunedlens.report import plots
from tunedlens.report.tables import Rows, difference_rows, metric_rows, scored_text, summary

_WIDE = ("overview", "agreement_by_layer", "transfer", "by_position")
"""Plots that take the width of the page."""
_IN_OVERVIEW = ("kl_by_layer", "perplexity_by_layer", "prediction_depth")
"""Plots that the overview contains."""


def page(evaluation: Evaluation, svgs: Mapping[str, bytes]) -> str:
    """A report as one HTML page: summary, plots, sortable tables, glossary, provenance.

    The plots have the names of `plots.DRAWINGS`.
    """
    run = evaluation.provenance
    if "overview" in svgs:
        svgs = {name: svg for name, svg in svgs.items() if name not in _IN_OVERVIEW}
    title = f"Lenses on {run.get('model', 'a model')}"
    sentences = "".join(f"<li>{for_html(sentence)}</li>" for sentence in summary(evaluation))
    differences = ""
    if evaluation.differences:
        differences = f"""<h2>Pairwise differences: KL, nats</h2>
<p class="note">Both lenses of a pair are scored on the same tokens. ± is the standard error of
the difference.</p>
{table(difference_rows(evaluation))}"""
    return document(
        title,
        f"""<p class="note">{for_html(scored_text(evaluation))}</p>
<ul>{sentences}</ul>
<div class="plots">{"".join(_plot(name, svg) for name, svg in svgs.items())}</div>
<h2>All metrics</h2>
<p class="note">± is one standard error, clustered by block of text. Click a heading to sort.</p>
{table(metric_rows(evaluation))}
{differences}
<h2>What the metrics mean</h2>
{_definitions({m.title: m.meaning for name, m in METRICS.items() if name in evaluation.metrics})}
<h2>How this report was made</h2>
<pre>{for_html(run.get("command", ""))}</pre>
{_provenance(evaluation)}""",
    )


def document(title: str, body: str) -> str:
    """A whole page in the style of a report, with sortable tables.

    Args:
        title: plain text.
        body: HTML that follows the title.
    """
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{for_html(title)}</title>
<style>
{_asset("report.css")}</style>
</head>
<body>
<h1>{for_html(title)}</h1>
{body}
<script>
{_asset("report.js")}</script>
</body>
</html>
"""


def _asset(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _plot(name: str, svg: bytes) -> str:
    return figure(name, svg, plots.DRAWINGS[name].caption, is_wide=name in _WIDE)


def figure(name: str, svg: bytes, caption: str, *, is_wide: bool = False) -> str:
    """A picture with its caption."""
    caption = for_html(caption)
    data = base64.b64encode(svg).decode()
    wide = ' class="wide"' if is_wide else ""
    return (
        f'<figure{wide} id="{name}"><img alt="{caption}" src="data:image/svg+xml;base64,{data}">'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def table(rows: Rows) -> str:
    """A table whose columns can be sorted."""
    header, *body = rows
    heads = "".join(f"<th><button>{for_html(cell)}</button></th>" for cell in header)
    lines = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in body)
    return (
        f'<div class="scroll"><table><thead><tr>{heads}</tr></thead>'
        f"<tbody>{lines}</tbody></table></div>"
    )


def _cell(text: str) -> str:
    value, sign, error = text.partition(" ± ")
    return (
        f"<td>{for_html(value)}" + (f" <span>± {for_html(error)}</span>" if sign else "") + "</td>"
    )


def _provenance(evaluation: Evaluation) -> str:
    run = evaluation.provenance
    device = [run.get("dtype"), run.get("device"), run.get("threads")]
    return _definitions(
        {
            "model": run.get("model"),
            "revision": run.get("revision"),
            "fingerprint of final norm and unembedding": run.get("fingerprint"),
            "lenses": run.get("lenses"),
            "SHA-256 of the scored tokens": evaluation.tokens_sha256,
            "text": run.get("corpus"),
            "settings": run.get("config"),
            "dtype, device, threads": ", ".join(str(part) for part in device if part is not None),
            "versions": run.get("versions"),
            "commit": run.get("commit"),
            "created": run.get("created"),
        }
    )


def _definitions(terms: Mapping[str, object]) -> str:
    """A definition list of the terms that have a value."""
    lines = (
        f"<dt>{for_html(term)}</dt><dd>{for_html(_plain(value))}</dd>"
        for term, value in terms.items()
        if value
    )
    return f"<dl>{''.join(lines)}</dl>"


def _plain(value: object) -> str:
    """Values with their names; lists and what is inside others separated by commas."""
    if isinstance(value, Mapping):
        return "; ".join(f"{name}: {_plain(one)}" for name, one in value.items() if one is not None)
    if isinstance(value, list | tuple):
        return ", ".join(map(_plain, value))
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)
