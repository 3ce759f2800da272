"""Results as tables and sentences: rows of text, plain or in Markdown."""

import math
import re

from tunedlens.evaluation import MODEL, Estimate, Evaluation
from tunedlens.metrics import METRICS
from tunedlens.tokenizer import display_width

_TERMINAL = (
    "kl_nats",
    "cross_entropy_nats",
    "perplexity",
    "bits_per_byte",
    "top1_agreement",
    "bias_nats",
)
"""The metrics that fit into a terminal."""
_SHORT = {
    "kl_nats": "KL, nats",
    "cross_entropy_nats": "CE, nats",
    "bits_per_byte": "bits/byte",
    "top1_agreement": "top-1",
    "top10_agreement": "top-10",
}

Rows = list[list[str]]
"""Cells by row and column; the first row is the header."""


def kl_rows(evaluation: Evaluation) -> Rows:
    """The KL of every lens by layer, and its mean over layers."""
    columns = {
        f"{lens} KL, nats": [
            *evaluation.by_layer(lens, "kl_nats"),
            evaluation.of_lens(lens, "kl_nats"),
        ]
        for lens in evaluation.lenses
    }
    return _by_layer(columns)


def difference_rows(evaluation: Evaluation, metric: str = "kl_nats") -> Rows:
    """The paired differences of all pairs of lenses by layer, and their means over layers."""
    pairs = dict.fromkeys((d.lens, d.other) for d in evaluation.differences)
    columns = {
        f"{lens} − {other}": [
            *evaluation.difference(lens, other, metric),
            evaluation.mean_difference(lens, other, metric),
        ]
        for lens, other in pairs
    }
    return _by_layer(columns)


def _by_layer(columns: dict[str, list[Estimate]]) -> Rows:
    """One row per layer and a last one for the mean."""
    *layers, mean = zip(*columns.values(), strict=True)
    names = [*map(str, range(len(layers))), "mean"]
    return [
        ["layer", *columns],
        *([name, *map(plus_minus, row)] for name, row in zip(names, [*layers, mean], strict=True)),
    ]


def metric_rows(evaluation: Evaluation, metrics: list[str] | None = None) -> Rows:
    """All metrics of every lens by layer; a constant lens has one row for all layers.

    Args:
        evaluation: the results.
        metrics: names of the metrics; by default all.
    """
    metrics = metrics or evaluation.metrics
    columns = {
        (lens, metric): evaluation.by_layer(lens, metric)
        for lens in evaluation.lenses
        for metric in metrics
    }

    def row(name: str, lens: str, layer: int) -> list[str]:
        return [name, lens, *(plus_minus(columns[lens, metric][layer]) for metric in metrics)]

    varied = [lens for lens in evaluation.lenses if lens not in evaluation.constant]
    return [
        ["layer", "lens", *(_SHORT.get(metric, METRICS[metric].title) for metric in metrics)],
        *(row(str(layer), lens, layer) for layer in range(evaluation.n_layers) for lens in varied),
        *(row("any", lens, 0) for lens in evaluation.constant),
        [str(evaluation.n_layers), MODEL, *(_model_cell(evaluation, m) for m in metrics)],
    ]


def _model_cell(evaluation: Evaluation, metric: str) -> str:
    """The model's value, or that of a lens which agrees with it everywhere."""
    if any((r.lens, r.metric) == (MODEL, metric) for r in evaluation.results):
        return plus_minus(evaluation.of_model(metric))
    known = METRICS[metric].where_lens_is_model
    return "" if known is None else f"{known:g}"


def kl_table(evaluation: Evaluation) -> str:
    """The KL of every lens by layer, as plain text."""
    return aligned(kl_rows(evaluation))


def terminal_table(evaluation: Evaluation) -> str:
    """The metrics that fit into a terminal, and the summary."""
    table = aligned(metric_rows(evaluation, list(_TERMINAL)))
    return "\n".join([table, "", *summary(evaluation)])


def summary(evaluation: Evaluation) -> list[str]:
    """The results in a few sentences."""
    means = {lens: evaluation.of_lens(lens, "kl_nats") for lens in evaluation.lenses}
    ranked = sorted(means, key=lambda lens: means[lens].value)
    varied = [lens for lens in ranked if lens not in evaluation.constant]
    listed = ", ".join(f"{lens} {plus_minus(means[lens])}" for lens in ranked)
    sentences = [f"Mean KL(model ‖ lens) over layers, in nats: {listed}."]
    sentences += [_comparison(evaluation, varied[0], other) for other in varied[1:]]
    depths = ", ".join(
        f"{lens} {plus_minus(evaluation.of_lens(lens, 'mean_prediction_depth'))}" for lens in varied
    )
    perplexity, bits = (plus_minus(evaluation.of_model(m)) for m in ("perplexity", "bits_per_byte"))
    return [
        *sentences,
        f"Mean prediction depth (of {evaluation.n_layers} layers): {depths}.",
        f"The model itself has a perplexity of {perplexity} and {bits} bits per byte.",
    ]


def _comparison(evaluation: Evaluation, best: str, other: str) -> str:
    layers = evaluation.difference(other, best, "kl_nats")
    clear = sum(e.value > 2 * (e.standard_error or math.inf) for e in layers)
    where = "every layer" if clear == len(layers) else f"{clear} of {len(layers)} layers"
    mean = plus_minus(evaluation.mean_difference(other, best, "kl_nats"))
    return (
        f"The mean KL of {best} is {mean} nats lower than that of {other}; it is lower by more "
        f"than two standard errors at {where}."
    )


def scored_text(evaluation: Evaluation) -> str:
    """Which text was scored, and how much."""
    config = evaluation.provenance.get("config", {})
    dataset = config.get("corpus", {}).get("dataset", "text")
    sides = {"validation": " (held out)", "train": " (trained on)"}
    side = sides.get(config.get("split", ""), "")
    return (
        f"{evaluation.tokens:,} positions, {evaluation.text_bytes:,} bytes of {dataset}{side}, "
        f"{evaluation.blocks:,} blocks"
    )


def plus_minus(estimate: Estimate) -> str:
    """A value with its standard error, both to the error's second significant digit."""
    value, error = estimate
    if not error:
        return f"{value:.5g}"
    if abs(value) >= 1e6:
        return f"{value:.2e} ± {error:.0e}"
    digits = min(max(0, 1 - math.floor(math.log10(error))), 8)
    return f"{value:,.{digits}f} ± {error:,.{digits}f}"


def code(word: str) -> str:
    """A verbatim text in a line of Markdown."""
    fence = _fence(word, 1)
    space = " " if len(fence) > 1 else ""
    return f"{fence}{space}{word}{space}{fence}"


def code_block(text: str) -> str:
    """A verbatim text of several lines in Markdown."""
    fence = _fence(text, 3)
    return f"{fence}text\n{text}\n{fence}"


def _fence(text: str, shortest: int) -> str:
    """A run of backticks that is longer than any in the text."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    return "`" * max(longest + 1, shortest)


def aligned(rows: Rows) -> str:
    """A table in plain text with right-aligned columns."""
    return "\n".join("  ".join(row) for row in padded(rows))


def padded(rows: Rows) -> Rows:
    """Cells padded on the left to the width of their column."""
    widths = [max(map(display_width, column)) for column in zip(*rows, strict=True)]
    return [
        [
            " " * (width - display_width(cell)) + cell
            for cell, width in zip(row, widths, strict=True)
        ]
        for row in rows
    ]


def markdown(rows: Rows) -> str:
    """A table in Markdown with right-aligned columns."""
    header, *body = rows
    lines = (header, ["---:"] * len(header), *body)
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in lines
    )
