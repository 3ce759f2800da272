"""Results as tables, files and one page."""

from tunedlens.report.card import card
from tunedlens.report.files import (
    pictures,
    read_evaluation,
    require_own,
    write_report,
)
from tunedlens.report.html.explorer import explorer
from tunedlens.report.quality_card import write_card
from tunedlens.report.tables import kl_table, scored_text, terminal_table, top_k
from tunedlens.report.texts import require_no_evaluation, write_texts

__all__ = [
    "card",
    "explorer",
    "kl_table",
    "pictures",
    "read_evaluation",
    "require_no_evaluation",
    "require_own",
    "scored_text",
    "terminal_table",
    "top_k",
    "write_card",
    "write_report",
    "write_texts",
]
