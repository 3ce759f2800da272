"""What the pages share: the document, figures, tables, definition lists."""

import base64
import json
from collections.abc import Mapping, Sequence
from importlib import resources

from tunedlens.escaping import for_html
from tunedlens.report.tables import Rows


def document(title: str, body: str) -> str:
    """A whole page in the common style, which needs no other file.

    Args:
        title: plain text.
        body: HTML.
    """
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{for_html(title)}</title>
<style>
{asset("report.css")}</style>
</head>
<body>
<h1>{for_html(title)}</h1>
{body}
<script>
{asset("report.js")}{asset("values.js")}</script>
</body>
</html>
"""


def asset(name: str) -> str:
    """The text of a file beside this module."""
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def figure(
    caption: str,
    svg: bytes,
    *,
    name: str = "",
    is_wide: bool = False,
    panels: Sequence[Mapping[str, object]] = (),
) -> str:
    """A figure with its caption.

    Args:
        caption: plain text.
        svg: the picture.
        name: what an address on the page calls it.
        is_wide: whether it takes the width of the page, and is scrolled on a narrow screen.
        panels: where its values are; see `values.panels`.
    """
    data, caption = base64.b64encode(svg).decode(), for_html(caption)
    identity = f' id="{for_html(name)}"' if name else ""
    wide = ' class="wide"' if is_wide else ""
    values = f' data-panels="{for_html(json.dumps(panels))}"' if panels else ""
    return (
        f'<figure{identity}{wide}><div class="frame"><div class="plot"{values}>'
        f'<img alt="{caption}" src="data:image/svg+xml;base64,{data}"></div></div>'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def table(rows: Rows, meanings: Mapping[str, str] | None = None) -> str:
    """A table whose headings sort it.

    Args:
        rows: the cells.
        meanings: the tooltips of the headings.
    """
    header, *body = rows
    names = ' class="lenses"' if "lens" in header else ""
    said = {cell: f' title="{for_html(one)}"' for cell, one in (meanings or {}).items()}
    heads = "".join(
        f"<th><button{said.get(cell, '')}>{for_html(cell)}</button></th>" for cell in header
    )
    lines = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in body)
    return (
        f'<div class="scroll"><table{names}><thead><tr>{heads}</tr></thead>'
        f"<tbody>{lines}</tbody></table></div>"
    )


def _cell(text: str) -> str:
    value, sign, error = text.partition(" ± ")
    return (
        f"<td>{for_html(value)}" + (f" <span>± {for_html(error)}</span>" if sign else "") + "</td>"
    )


def definitions(terms: Mapping[str, str | None]) -> str:
    """A definition list of the terms that have a value."""
    lines = (
        f"<dt>{for_html(term)}</dt><dd>{for_html(value)}</dd>"
        for term, value in terms.items()
        if value
    )
    return f"<dl>{''.join(lines)}</dl>"
