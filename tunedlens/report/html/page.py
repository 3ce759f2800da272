"""`report.html`: one page that needs no other file."""

from collections.abc import Mapping, Sequence

from tunedlens.escaping import for_html
from tunedlens.evaluation import Evaluation
from tunedlens.metrics import METRICS
from tunedlens.report import glossary, plots
from tunedlens.report.html.elements import definitions, document, figure, table
from tunedlens.report.origin import origin
from tunedlens.report.tables import (
    depth_rows,
    difference_rows,
    metric_rows,
    scored_text,
    summary,
)

_WIDE = ("overview", "agreement_by_layer", "transfer", "by_position")
"""Plots that take the width of the page; that of a single matrix does not."""
_IN_OVERVIEW = ("kl_by_layer", "perplexity_by_layer", "prediction_depth")
"""Plots that the overview contains."""


def page(
    evaluation: Evaluation,
    svgs: Mapping[str, bytes],
    panels: Mapping[str, Sequence[Mapping[str, object]]],
) -> str:
    """A report as one HTML page: summary, plots, sortable tables, glossary, provenance.

    Args:
        evaluation: the results.
        svgs: the plots by their names in `plots.DRAWINGS`.
        panels: where their values are; see `values.panels`.
    """
    run = evaluation.provenance
    if "overview" in svgs:
        svgs = {name: svg for name, svg in svgs.items() if name not in _IN_OVERVIEW}
    title = f"Lenses on {run.get('model', 'a model')}"
    sentences = "".join(f"<li>{for_html(sentence)}</li>" for sentence in summary(evaluation))
    differences = ""
    if evaluation.differences:
        differences = f"""<h2>Pairwise differences: KL, nats</h2>
<p class="note">{glossary.ABOUT_DIFFERENCES}</p>
{table(difference_rows(evaluation))}"""
    depths = ""
    if "prediction_depth" in evaluation.metrics:
        depths = f"""<h2>Prediction depth</h2>
<p class="note">{glossary.ABOUT_DEPTHS}</p>
{table(depth_rows(evaluation))}"""
    wide = {*_WIDE} - ({"transfer"} if len(evaluation.transfer) == 1 else set())
    figures = "".join(
        figure(
            plots.DRAWINGS[name].caption,
            svg,
            name=name,
            is_wide=name in wide,
            panels=panels[name],
        )
        for name, svg in svgs.items()
    )
    body = f"""<p class="note">{for_html(scored_text(evaluation))}</p>
<p>{glossary.HOW_TO_READ} <a href="#terms">All terms and metrics</a> are explained below.</p>
<ul>{sentences}</ul>
<p class="note">Point at a figure to see its values, or select a panel with Tab and move with the
arrow keys.</p>
<div class="plots">{figures}</div>
<h2>All metrics</h2>
<p class="note">Click a heading to sort, or point at it to see its meaning. Wide tables scroll
sideways.</p>
{table(metric_rows(evaluation), _meanings())}
{differences}
{depths}
<h2 id="terms">What the terms mean</h2>
{definitions(glossary.terms(evaluation))}
<h2>What the metrics mean</h2>
{definitions(glossary.metric_terms(evaluation))}
<h2>How this report was made</h2>
<pre>{for_html(run.get("command", ""))}</pre>
{definitions(origin(evaluation))}"""
    return document(title, body)


def _meanings() -> dict[str, str]:
    """What the columns of metrics mean, by their headings."""
    return {metric.column or metric.title: metric.meaning for metric in METRICS.values()}
