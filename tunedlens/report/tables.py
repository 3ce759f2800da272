"""Results as tables and sentences, plain or in Markdown."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from tunedlens.errors import InputError
from tunedlens.escaping import code, for_markdown
from tunedlens.evaluation import Estimate, Evaluation
from tunedlens.metrics import METRICS
from tunedlens.tokenizer import TokenText, display_width
from tunedlens.trajectories import Row, Trajectory

if TYPE_CHECKING:
    from pandas import DataFrame

_TERMINAL = (
    *("kl_nats", "cross_entropy_nats", "perplexity"),
    *("bits_per_byte", "top1_agreement", "bias_nats"),
)
"""The metrics that fit into a terminal."""
_COLORS = {0.5: "16;48;5;45", 0.25: "16;48;5;38", 0.1: "231;48;5;31", 0.05: "231;48;5;24"}
"""The colours of a cell, as foreground and background, by their smallest probability."""

Rows = list[list[str]]
"""Cells by row and column; the first row is the header."""


def kl_rows(evaluation: Evaluation) -> Rows:
    """The KL of every lens by layer, and its mean over layers."""
    columns = {}
    for lens in evaluation.lenses:
        own = zip(evaluation.layers_of(lens), evaluation.by_layer(lens, "kl_nats"), strict=True)
        columns[f"{lens} KL, nats"] = dict(own) | {None: evaluation.of_lens(lens, "kl_nats")}
    return rows_by_layer(columns)


def difference_rows(evaluation: Evaluation) -> Rows:
    """The paired differences in KL of all pairs of lenses by layer, and their means."""
    columns = {}
    for lens, other in dict.fromkeys((d.lens, d.other) for d in evaluation.differences):
        shared = zip(
            evaluation.shared_layers(lens, other),
            evaluation.difference(lens, other, "kl_nats"),
            strict=True,
        )
        mean = evaluation.mean_difference(lens, other, "kl_nats")
        columns[f"{lens} − {other}"] = dict(shared) | {None: mean}
    return rows_by_layer(columns)


def depth_rows(evaluation: Evaluation) -> Rows:
    """The fraction of tokens of every prediction depth up to n, and the mean depth."""
    columns = {}
    for lens in evaluation.lenses:
        if lens not in evaluation.constant:
            depths = [*evaluation.layers_of(lens), evaluation.n_layers]
            fractions = evaluation.by_layer(lens, "prediction_depth")
            mean = evaluation.of_lens(lens, "mean_prediction_depth")
            columns[lens] = dict(zip(depths, fractions, strict=True)) | {None: mean}
    return rows_by_layer(columns)


def rows_by_layer(columns: dict[str, dict[int | None, Estimate]]) -> Rows:
    """One row per layer and a last one, None, for the mean; a dash where there is no value."""
    layers = sorted({layer for column in columns.values() for layer in column if layer is not None})
    return [
        ["layer", *columns],
        *(
            [
                "mean" if layer is None else str(layer),
                *(plus_minus(c[layer]) if layer in c else "–" for c in columns.values()),
            ]
            for layer in (*layers, None)
        ),
    ]


def metric_rows(evaluation: Evaluation, metrics: list[str] | None = None) -> Rows:
    """Metrics of every lens by layer; a constant lens has one row for all layers.

    By default these are all but the prediction depth, which `depth_rows` has.
    """
    metrics = metrics or [m for m in evaluation.metrics if m != "prediction_depth"]
    columns = {
        lens: [evaluation.by_layer(lens, metric) for metric in metrics]
        for lens in evaluation.lenses
    }
    layers = {lens: evaluation.layers_of(lens) for lens in evaluation.lenses}

    def row(name: str, lens: str, index: int) -> list[str]:
        return [name, lens, *(plus_minus(column[index]) for column in columns[lens])]

    varied = [lens for lens in evaluation.lenses if lens not in evaluation.constant]
    return [
        ["layer", "lens", *(METRICS[metric].column or METRICS[metric].title for metric in metrics)],
        *(
            row(str(layer), lens, layers[lens].index(layer))
            for layer in evaluation.layers
            for lens in varied
            if layer in layers[lens]
        ),
        *(row("any", lens, 0) for lens in evaluation.constant),
        *(
            [str(evaluation.n_layers), model, *(_model_cell(evaluation, m, model) for m in metrics)]
            for model in evaluation.models
        ),
    ]


def _model_cell(evaluation: Evaluation, metric: str, model: str) -> str:
    """The model's value, or that of a lens which agrees with it everywhere."""
    if any((r.lens, r.metric) == (model, metric) for r in evaluation.results):
        return plus_minus(evaluation.of_model(metric, model))
    known = METRICS[metric].where_lens_is_model
    return "" if known is None else f"{known:g}"


def kl_table(evaluation: Evaluation) -> str:
    """The KL of every lens by layer, as plain text."""
    return aligned(kl_rows(evaluation))


def terminal_table(evaluation: Evaluation) -> str:
    """The metrics that fit into a terminal, and the summary."""
    table = aligned(metric_rows(evaluation, [m for m in _TERMINAL if m in evaluation.metrics]))
    return "\n".join([table, "", *summary(evaluation)])


def summary(evaluation: Evaluation) -> list[str]:
    """The results in a few sentences."""
    means = {lens: evaluation.of_lens(lens, "kl_nats") for lens in evaluation.lenses}
    ranked = sorted(means, key=lambda lens: means[lens].value)
    varied = [lens for lens in ranked if lens not in evaluation.constant]
    listed = ", ".join(
        f"{lens} {plus_minus(means[lens])}{_layers_note(evaluation, lens)}" for lens in ranked
    )
    depths = ", ".join(
        f"{lens} {plus_minus(evaluation.of_lens(lens, 'mean_prediction_depth'))}" for lens in varied
    )
    comparisons = []
    for title in evaluation.models.values():
        on_model = evaluation.lenses_on(title)
        stream = [one for one in varied if one in on_model and one not in evaluation.sites]
        comparisons += [
            _comparison(evaluation, stream[0], other)
            for other in stream[1:]
            if evaluation.shared_layers(stream[0], other)
        ]
    return [
        *_about_second_model(evaluation),
        f"Mean KL(model ‖ lens) over layers, in nats: {listed}.",
        *comparisons,
        f"Mean prediction depth (of {evaluation.n_layers} layers): {depths}.",
        *(_of_model(evaluation, name, title) for name, title in evaluation.models.items()),
    ]


def _about_second_model(evaluation: Evaluation) -> list[str]:
    """Which model's parts decode the lenses, if there is a second model."""
    run = evaluation.provenance
    if "beside" not in run:
        return []
    second = run["beside"]
    is_same = second["fingerprint"] == run["fingerprint"]
    return [
        f"{second['title']} is {second['name']}. On it, the translators of the lenses for "
        f"{run['model']} are followed by the final norm and unembedding of {second['title']}, "
        f"which have {'the same' if is_same else 'other'} values. Each lens is compared with the "
        "distribution of the model that it reads."
    ]


def _of_model(evaluation: Evaluation, name: str, title: str | None) -> str:
    own = f"a perplexity of {plus_minus(evaluation.of_model('perplexity', name))}"
    if evaluation.text_bytes:
        own += f" and {plus_minus(evaluation.of_model('bits_per_byte', name))} bits per byte"
    else:
        own += "; the bytes of its tokens are not known, so bits per byte are left out"
    return f"{title or 'The model'} itself has {own}."


def _layers_note(evaluation: Evaluation, lens: str) -> str:
    """The layers of a lens, if other lenses were scored at more."""
    layers = evaluation.layers_of(lens)
    return "" if layers == evaluation.layers else f" (at {', '.join(map(str, layers))})"


def _comparison(evaluation: Evaluation, best: str, other: str) -> str:
    layers = evaluation.difference(other, best, "kl_nats")
    clear = sum(e.value > 2 * (e.standard_error or math.inf) for e in layers)
    is_everywhere = clear == len(layers) == evaluation.n_layers
    where = "every layer" if is_everywhere else f"{clear} of {len(layers)} layers"
    mean = plus_minus(evaluation.mean_difference(other, best, "kl_nats"))
    sentence = f"The mean KL of {best} is {mean} nats lower than that of {other}"
    if evaluation.blocks == 1:  # which has no standard error
        return f"{sentence}."
    return f"{sentence}; it is lower by more than two standard errors at {where}."


def scored_text(evaluation: Evaluation) -> str:
    """Which text was scored, and how much."""
    config = evaluation.provenance.get("config", {})
    dataset = config.get("corpus", {}).get("dataset", "text")
    amount = f"{evaluation.text_bytes:,} bytes of " if evaluation.text_bytes else ""
    sides = {"validation": " (held out)", "train": " (trained on)"}
    blocks = "1 block" if evaluation.blocks == 1 else f"{evaluation.blocks:,} blocks"
    return (
        f"{evaluation.tokens:,} positions, {amount}{dataset}"
        f"{sides.get(config.get('split', ''), '')}, {blocks}"
    )


@dataclass(frozen=True)
class TopK:
    """The best tokens at one position; `print` writes them as a table in plain text."""

    rows: list[Row]
    row_names: list[str]
    tokens: list[list[TokenText]]
    """The tokens of every row in descending order of probability."""
    probs: list[list[float]]

    _repr_html_: ClassVar[Callable[..., str]]
    """See `tunedlens.report.notebook`."""

    def __repr__(self) -> str:
        return f"TopK({len(self.probs[0])} tokens in each of {len(self.rows)} rows)"

    def to_dataframe(self) -> "DataFrame":
        """One row per site and layer, with a token and its probability for each rank."""
        import pandas as pd

        ranks = range(1, len(self.probs[0]) + 1)
        cells = [
            [value for token, prob in zip(*line, strict=True) for value in (token.text, prob)]
            for line in zip(self.tokens, self.probs, strict=True)
        ]
        return pd.DataFrame(
            cells,
            index=pd.MultiIndex.from_tuples(self.rows, names=["site", "layer"]),
            columns=pd.MultiIndex.from_product([ranks, ["token", "probability"]]),
        )

    def to_markdown(self) -> str:
        """A table in Markdown."""
        return _markdown_table(self.cells(is_code=True))

    def to_text(self, *, is_coloured: bool = True) -> str:
        """A table for a terminal, coloured by probability."""
        header, *body = padded(self.cells())
        if is_coloured:
            body = [
                [name, *map(_coloured, cells, probs)]
                for (name, *cells), probs in zip(body, self.probs, strict=True)
            ]
        return "\n".join("  ".join(row) for row in [header, *body])

    def __str__(self) -> str:
        return self.to_text(is_coloured=False)

    def cells(self, is_code: bool = False) -> Rows:
        """One row per layer, with the best tokens and their probabilities."""
        rows = [["layer", *(str(rank + 1) for rank in range(len(self.probs[0])))]]
        for name, *line in zip(self.row_names, self.tokens, self.probs, strict=True):
            cells = zip(*line, strict=True)
            # GitHub ends a cell at a bar even within code.
            words = (
                (code(token.shown).replace("|", "\\|") if is_code else token.shown, p)
                for token, p in cells
            )
            rows.append([name, *(f"{word} {p:.3f}" for word, p in words)])
        return rows


def top_k(
    trajectory: Trajectory, position: int = -1, k: int | None = None, lens: str | None = None
) -> TopK:
    """The best tokens of every row at one position.

    Args:
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
    ids = one.top_ids[:, index, :k].tolist()
    return TopK(
        rows=trajectory.rows,
        row_names=trajectory.row_names,
        tokens=[[trajectory.vocabulary[i] for i in line] for line in ids],
        probs=one.top_log_probs[:, index, :k].exp().tolist(),
    )


def _coloured(cell: str, probability: float) -> str:
    """A cell in one of the 256 colours of a terminal."""
    color = next((color for least, color in _COLORS.items() if probability >= least), None)
    return cell if color is None else f"\x1b[38;5;{color}m{cell}\x1b[0m"


def plus_minus(estimate: Estimate) -> str:
    """A value with its standard error, both to the error's second significant digit."""
    value, error = estimate
    if not error:
        return f"{value:.5g}"
    if abs(value) >= 1e6:
        return f"{value:.2e} ± {error:.0e}"
    digits = min(max(0, 1 - math.floor(math.log10(error))), 8)
    return f"{value:,.{digits}f} ± {error:,.{digits}f}"


def aligned(rows: Rows) -> str:
    """A table in plain text with right-aligned columns."""
    return "\n".join("  ".join(row) for row in padded(rows))


def padded(rows: Rows) -> Rows:
    """Cells padded on the left to the width of their column."""
    columns = []
    for column in zip(*rows, strict=True):
        width = max(map(display_width, column))
        columns.append([" " * (width - display_width(cell)) + cell for cell in column])
    return [list(row) for row in zip(*columns, strict=True)]


def markdown(rows: Rows) -> str:
    """A table of plain text in Markdown, with right-aligned columns."""
    return _markdown_table([list(map(for_markdown, row)) for row in rows])


def _markdown_table(rows: Rows) -> str:
    """A table whose cells are Markdown already."""
    header, *body = rows
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---:"] * len(header), *body))
