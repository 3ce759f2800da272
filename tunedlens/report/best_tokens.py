"""The best tokens at one position, as a table."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tunedlens.errors import InputError
from tunedlens.report.tables import Rows, code, markdown, padded
from tunedlens.trajectories import Row, Trajectory

if TYPE_CHECKING:
    from pandas import DataFrame

_COLORS = (
    (0.5, "16;48;5;45"),
    (0.25, "16;48;5;38"),
    (0.1, "231;48;5;31"),
    (0.05, "231;48;5;24"),
)
"""The least probability of every colour of a cell, as foreground and background."""


@dataclass(frozen=True)
class TopK:
    """The best tokens at one position; `print` shows a table in plain text."""

    rows: list[Row]
    row_names: list[str]
    words: list[list[str]]
    """The tokens of every row in descending order of probability."""
    shown: list[list[str]]
    """The same tokens with visible white space."""
    probs: list[list[float]]

    def to_dataframe(self) -> "DataFrame":
        """A line per site and layer; a token and its probability per rank."""
        import pandas as pd

        index = pd.MultiIndex.from_tuples(self.rows, names=["site", "layer"])
        ranks = range(1, len(self.words[0]) + 1)
        columns = pd.MultiIndex.from_product([ranks, ["token", "probability"]])
        cells = [
            [value for pair in zip(*line, strict=True) for value in pair]
            for line in zip(self.words, self.probs, strict=True)
        ]
        return pd.DataFrame(cells, index=index, columns=columns)

    def to_markdown(self) -> str:
        """A table in Markdown."""
        return markdown(self._cells(as_code=True))

    def to_text(self, *, is_coloured: bool = True) -> str:
        """A table for a terminal, coloured by probability."""
        header, *body = padded(self._cells())
        if is_coloured:
            body = [
                [name, *map(_coloured, cells, probs)]
                for (name, *cells), probs in zip(body, self.probs, strict=True)
            ]
        return "\n".join("  ".join(row) for row in [header, *body])

    def __str__(self) -> str:
        return self.to_text(is_coloured=False)

    def _cells(self, as_code: bool = False) -> Rows:
        """Layers down, the best tokens across, each with its probability."""
        words = [[code(word) for word in line] if as_code else line for line in self.shown]
        lines = zip(self.row_names, words, self.probs, strict=True)
        return [
            ["layer", *(str(rank + 1) for rank in range(len(self.probs[0])))],
            *(
                [name, *(f"{word} {p:.3f}" for word, p in zip(words, probs, strict=True))]
                for name, words, probs in lines
            ),
        ]


def top_k(
    trajectory: Trajectory, position: int = -1, k: int | None = None, lens: str | None = None
) -> TopK:
    """The best tokens of every row at one position.

    Args:
        trajectory: the trajectory.
        position: an index within the trajectory.
        k: the number of tokens; by default 5, or fewer if fewer were kept.
        lens: a name; by default the first.

    Raises:
        InputError: there is no such position or lens, or fewer tokens were kept.
    """
    one = trajectory.predictions[trajectory.lens_name(lens)]
    index, kept = trajectory.position_index(position), one.top_ids.shape[-1]
    k = min(5, kept) if k is None else k
    if not 1 <= k <= kept:
        raise InputError(f"k must be between 1 and {kept}, the number of kept tokens; got {k}")
    tokens = [
        [trajectory.vocabulary[i] for i in line] for line in one.top_ids[:, index, :k].tolist()
    ]
    return TopK(
        rows=trajectory.rows,
        row_names=trajectory.row_names,
        words=[[token.text for token in line] for line in tokens],
        shown=[[token.shown for token in line] for line in tokens],
        probs=one.top_log_probs[:, index, :k].exp().tolist(),
    )


def _coloured(cell: str, probability: float) -> str:
    """A cell in one of the 256 colours of a terminal."""
    color = next((color for least, color in _COLORS if probability >= least), None)
    return cell if color is None else f"\x1b[38;5;{color}m{cell}\x1b[0m"
