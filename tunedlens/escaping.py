"""Escapes text for a terminal, HTML, Markdown and spreadsheets.

Names of models, lenses and files may come from a stranger. Text that is written with these
functions is only shown: it does not move the cursor, run a script or start a formula.
"""

import html
import re

_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")
_MARKDOWN = re.compile(r"([\\`*\[\]<>|&])")


def printable(text: str, keep: str = "") -> str:
    """A text of visible characters only: control characters are written as hexadecimal numbers.

    Args:
        keep: characters that are not changed.
    """
    return "".join(
        letter
        if letter.isprintable() or letter in keep
        else f"⟨{letter.encode(errors='surrogatepass').hex(' ')}⟩"
        for letter in text
    )


def for_terminal(text: str) -> str:
    """Lines of text for a terminal."""
    return printable(text, keep="\n\t")


def for_html(text: str) -> str:
    """Text within an element or an attribute of HTML."""
    return html.escape(printable(text, keep="\n\t"))


def for_markdown(text: str) -> str:
    """Text within a line or a cell of Markdown."""
    return _MARKDOWN.sub(r"\\\1", printable(text))


def for_csv(cell: object) -> object:
    """A cell that no spreadsheet reads as a formula: such a text gets an apostrophe before it."""
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(_FORMULA) else cell


def code(word: str) -> str:
    """A verbatim text in a line of Markdown."""
    word = printable(word)
    fence = _fence(word, 1)
    space = " " if len(fence) > 1 else ""
    return f"{fence}{space}{word}{space}{fence}"


def code_block(text: str, language: str = "text") -> str:
    """A verbatim text of several lines in Markdown."""
    text = printable(text, keep="\n\t")
    fence = _fence(text, 3)
    return f"{fence}{language}\n{text}\n{fence}"


def _fence(text: str, shortest: int) -> str:
    """A run of backticks that is longer than any in the text."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    return "`" * max(longest + 1, shortest)
