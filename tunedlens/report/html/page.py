"""`report.html`: one page that needs nothing but itself."""

import base64
import json
from html import escape
from typing import Any

from tunedlens.evaluation import Evaluation
from tunedlens.metrics import METRICS
from tunedlens.report import plots
from tunedlens.report.tables import (
    Rows,
    difference_rows,
    metric_rows,
    scored_text,
    summary,
)

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #5b6470; --line: #d9dee4;
  --paper: #fff; --head: #f4f6f8; --link: #0072b2; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ec; --soft: #9aa4af;
  --line: #39414a; --paper: #15191d; --head: #20262c; --link: #6bb8e6; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 1.5rem 1rem 4rem; background: var(--paper);
  color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .25rem; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .75rem; }
p.about, figcaption, dt { color: var(--soft); }
figure { margin: 0; }
figure img { max-width: 100%; height: auto; background: #fff; border: 1px solid var(--line);
  border-radius: 6px; padding: .5rem; }
figcaption { font-size: .875rem; margin-top: .35rem; }
.figures { display: grid; gap: 1.5rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 28rem), 1fr)); }
.wide { grid-column: 1 / -1; }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 6px; }
table { border-collapse: collapse; width: 100%; font-size: .875rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; text-align: right; white-space: nowrap; }
td { border-top: 1px solid var(--line); }
th { background: var(--head); font-weight: 600; }
th button { all: unset; cursor: pointer; width: 100%; }
th button:focus-visible { outline: 2px solid var(--link); }
th[aria-sort=ascending] button::after { content: " \\2191"; }
th[aria-sort=descending] button::after { content: " \\2193"; }
td span { color: var(--soft); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; font-size: .875rem; }
dd { margin: 0; overflow-wrap: anywhere; }
@media (max-width: 40rem) { dl { grid-template-columns: 1fr; } dd { margin-bottom: .4rem; } }
pre { overflow-x: auto; background: var(--head); border-radius: 6px; padding: .75rem 1rem;
  font-size: .875rem; }
"""

_SCRIPT = """
for (const table of document.querySelectorAll("table")) {
  const body = table.tBodies[0];
  table.tHead.addEventListener("click", (event) => {
    const head = event.target.closest("th");
    if (!head) return;
    const up = head.getAttribute("aria-sort") !== "ascending";
    for (const other of head.parentNode.children) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const key = (row) => row.cells[head.cellIndex].textContent;
    const compare = (a, b) => {
      const [x, y] = [parseFloat(key(a)), parseFloat(key(b))];
      if (isNaN(x) || isNaN(y)) return isNaN(x) - isNaN(y) || key(a).localeCompare(key(b));
      return x - y;
    };
    const rows = [...body.rows].sort((a, b) => (up ? 1 : -1) * compare(a, b));
    body.append(...rows);
  });
}
"""

_WIDE = ("overview", "agreement_by_layer", "by_position")


def page(evaluation: Evaluation, pictures: dict[str, bytes]) -> str:
    """A report as one HTML page: words, figures, tables that sort, how to run it again.

    Args:
        evaluation: the results.
        pictures: figures as SVG, by the names of `plots.DRAWINGS`.
    """
    about = evaluation.provenance
    title = f"Lenses on {about.get('model', 'a model')}"
    sentences = "".join(f"<li>{escape(sentence)}</li>" for sentence in summary(evaluation))
    figures = "".join(_figure(name, svg) for name, svg in pictures.items())
    used = [metric for metric in METRICS if metric in evaluation.metrics]
    meanings = "".join(
        f"<dt>{escape(METRICS[metric].title)}</dt><dd>{escape(METRICS[metric].meaning)}</dd>"
        for metric in used
    )
    differences = ""
    if evaluation.differences:
        differences = (
            "<h2>One lens less another: KL, nats</h2><p class=about>Paired: on the same tokens, "
            f"with the standard error of the difference.</p>{_table(difference_rows(evaluation))}"
        )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{escape(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{escape(title)}</h1>
<p class="about">{escape(scored_text(evaluation))}</p>
<ul>{sentences}</ul>
<div class="figures">{figures}</div>
<h2>Every figure</h2>
<p class="about">± is one standard error, clustered by block of text. A heading sorts.</p>
{_table(metric_rows(evaluation))}
{differences}
<h2>What the figures are</h2>
<dl>{meanings}</dl>
<h2>What was run</h2>
<pre>{escape(about.get("command", ""))}</pre>
<dl>{_facts(evaluation)}</dl>
<script>{_SCRIPT}</script>
</body>
</html>
"""


def _figure(name: str, svg: bytes) -> str:
    caption = escape(plots.DRAWINGS[name].caption)
    data = base64.b64encode(svg).decode()
    wide = " class=wide" if name in _WIDE else ""
    return (
        f'<figure{wide} id="{name}"><img alt="{caption}" src="data:image/svg+xml;base64,{data}">'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _table(rows: Rows) -> str:
    header, *body = rows
    heads = "".join(f"<th><button>{escape(cell)}</button></th>" for cell in header)
    lines = "".join("<tr>" + "".join(map(_cell, row)) + "</tr>" for row in body)
    return (
        f'<div class="scroll"><table><thead><tr>{heads}</tr></thead>'
        f"<tbody>{lines}</tbody></table></div>"
    )


def _cell(text: str) -> str:
    value, sign, error = text.partition(" ± ")
    return f"<td>{escape(value)}" + (f" <span>± {escape(error)}</span>" if sign else "") + "</td>"


def _facts(evaluation: Evaluation) -> str:
    about = evaluation.provenance
    facts = {
        "model": about.get("model"),
        "revision": about.get("revision"),
        "fingerprint of norm and unembedding": about.get("fingerprint"),
        "lenses": about.get("lenses"),
        "SHA-256 of the scored tokens": evaluation.tokens_sha256,
        "text": about.get("corpus"),
        "settings": about.get("config"),
        "dtype, device, threads": ", ".join(
            str(about[name]) for name in ("dtype", "device", "threads") if name in about
        ),
        "versions": about.get("versions"),
        "commit": about.get("commit"),
        "made": about.get("created"),
    }
    return "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(_said(value))}</dd>"
        for name, value in facts.items()
        if value
    )


def _said(value: Any) -> str:
    if isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False).replace('"', "")
