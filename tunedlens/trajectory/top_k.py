"""The best tokens at one position, row by row of the model's depth."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tunedlens.trajectory.states import Row

if TYPE_CHECKING:
    from pandas import DataFrame


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
        from tunedlens.report import top_k_markdown

        return top_k_markdown(self)

    def to_text(self, *, is_coloured: bool = True) -> str:
        """A table for a terminal, with probabilities as colours if it has them."""
        from tunedlens.report import top_k_text

        return top_k_text(self, is_coloured=is_coloured)

    def __str__(self) -> str:
        return self.to_text(is_coloured=False)
