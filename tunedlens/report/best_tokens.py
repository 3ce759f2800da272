"""The best tokens at one position, row by row of the model's depth."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tunedlens.errors import InputError
from tunedlens.report.tables import Rows, code, markdown, padded
from tunedlens.trajectories import Row, Trajectory

if TYPE_CHECKING:
    from pandas import DataFrame

_GROUNDS = (
    (0.5, "16;48;5;45"),
    (0.25, "16;48;5;38"),
    (0.1, "231;48;5;31"),
    (0.05, "231;48;5;24"),
)
"""Ink and ground of a cell, from this probability on."""


@dataclass(frozen=True)
class TopK:
    """The best tokens at one position; printed, a table in plain text."""

    rows: list[Row]
    row_names: list[str]
    words: list[list[str]]
    """By row, the best one first."""
    shown: list[list[str]]
    """The same, with their white space visible."""
    probs: list[list[float]]

    def to_dataframe(self) -> "DataFrame":
        """A line for every site and layer; a token and its probability for every place."""
        import pandas as pd

        index = pd.MultiIndex.from_tuples(self.rows, names=["site", "layer"])
        places = range(1, len(self.words[0]) + 1)
        columns = pd.MultiIndex.from_product([places, ["token", "probability"]])
        cells = [
            [value for pair in zip(*line, strict=True) for value in pair]
            for line in zip(self.words, self.probs, strict=True)
        ]
        return pd.DataFrame(cells, index=index, columns=columns)

    def to_markdown(self) -> str:
        """A table in Markdown."""
        return markdown(_top_k_rows(self, as_code=True))

    def to_text(self, *, is_coloured: bool = True) -> str:
        """A table for a terminal, with probabilities as colours if it has them."""
        header, *body = padded(_top_k_rows(self))
        if is_coloured:
            body = [
                [name, *map(_on_its_ground, cells, probs)]
                for (name, *cells), probs in zip(body, self.probs, strict=True)
            ]
        return "\n".join("  ".join(row) for row in [header, *body])

    def __str__(self) -> str:
        return self.to_text(is_coloured=False)


def top_k(
    trajectory: Trajectory, position: int = -1, k: int | None = None, lens: str | None = None
) -> TopK:
    """The best tokens at one position, row by row: a table to print.

    Args:
        trajectory: of one text.
        position: among those that are read.
        k: how many; by default 5, or fewer if fewer were kept.
        lens: by name; by default the first.

    Raises:
        InputError: there is no such position or lens, or fewer tokens were kept.
    """
    reading, place = trajectory.reading(lens), trajectory.place(position)
    kept = reading.top_ids.shape[-1]
    k = min(5, kept) if k is None else k
    if not 1 <= k <= kept:
        raise InputError(f"k must be between 1 and {kept}, which were kept; got {k}")
    ids = reading.top_ids[:, place, :k].tolist()
    return TopK(
        rows=trajectory.rows,
        row_names=trajectory.row_names,
        words=[[trajectory._word(i) for i in line] for line in ids],
        shown=[[trajectory.shown(i) for i in line] for line in ids],
        probs=reading.top_log_probs[:, place, :k].exp().tolist(),
    )


def _top_k_rows(table: TopK, as_code: bool = False) -> Rows:
    """Layers down, the best tokens across, each with its probability."""
    words = [[code(word) for word in line] if as_code else line for line in table.shown]
    lines = zip(table.row_names, words, table.probs, strict=True)
    return [
        ["layer", *(str(place + 1) for place in range(len(table.probs[0])))],
        *(
            [name, *(f"{word} {p:.3f}" for word, p in zip(words, probs, strict=True))]
            for name, words, probs in lines
        ),
    ]


def _on_its_ground(cell: str, probability: float) -> str:
    """Coloured by a code of 256-colour terminals."""
    ground = next((code for least, code in _GROUNDS if probability >= least), None)
    return cell if ground is None else f"\x1b[38;5;{ground}m{cell}\x1b[0m"
