"""Results as tables, files and one page."""

from tunedlens.report.best_tokens import TopK, top_k
from tunedlens.report.card import card
from tunedlens.report.files import (
    pictures,
    read_evaluation,
    require_own,
    write_report,
)
from tunedlens.report.html.explorer import explorer
from tunedlens.report.html.page import page
from tunedlens.report.one_text import write_one_text
from tunedlens.report.tables import (
    aligned,
    kl_table,
    scored_text,
    summary,
    terminal_table,
)

__all__ = [
    "TopK",
    "aligned",
    "card",
    "explorer",
    "kl_table",
    "page",
    "pictures",
    "read_evaluation",
    "require_own",
    "scored_text",
    "summary",
    "terminal_table",
    "top_k",
    "write_one_text",
    "write_report",
]
