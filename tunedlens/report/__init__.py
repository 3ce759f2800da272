"""Results as tables, files and one page."""

from tunedlens.report.card import card
from tunedlens.report.explorer import explorer
from tunedlens.report.files import (
    figures,
    read_evaluation,
    require_own,
    write_report,
)
from tunedlens.report.one_text import write_one_text
from tunedlens.report.page import page
from tunedlens.report.provenance import provenance
from tunedlens.report.tables import (
    aligned,
    kl_table,
    scored_text,
    summary,
    terminal_table,
    top_k_markdown,
    top_k_text,
)

__all__ = [
    "aligned",
    "card",
    "explorer",
    "figures",
    "kl_table",
    "page",
    "provenance",
    "read_evaluation",
    "require_own",
    "scored_text",
    "summary",
    "terminal_table",
    "top_k_markdown",
    "top_k_text",
    "write_one_text",
    "write_report",
]
