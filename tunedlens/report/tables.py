"""Results as tables: rows of text, plain, coloured or in Markdown, and sentences."""

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
_SHORT = {
    "kl_nats": "KL, nats",
    "cross_entropy_nats": "CE, nats",
    "bits_per_byte": "bits/byte",
    "top1_agreement": "top-1",
    "top10_agreement": "top-10",
}

Rows = list[list[str]]


def kl_rows(evaluation: Evaluation) -> Rows:
    """Layers down, lenses across: the KL, and its mean over layers."""
    lenses = evaluation.lenses
    columns = [evaluation.by_layer(lens, "kl_nats") for lens in lenses]
    rows = [
        [str(layer), *(plus_minus(column[layer]) for column in columns)]
        for layer in range(evaluation.n_layers)
    ]
    means = [plus_minus(evaluation.of_lens(lens, "kl_nats")) for lens in lenses]
    return [["layer", *(f"{lens} KL, nats" for lens in lenses)], *rows, ["mean", *means]]


def metric_rows(evaluation: Evaluation, metrics: list[str] | None = None) -> Rows:
    """Layers and lenses down, metrics across; a lens that is the same at every layer once.

    Args:
        evaluation: the results.
        metrics: names; all that there are by default.
    """
    metrics = metrics or evaluation.metrics
    columns = {
        (lens, metric): evaluation.by_layer(lens, metric)
        for lens in evaluation.lenses
        for metric in metrics
    }
    rows = [["layer", "lens", *(_SHORT.get(metric, METRICS[metric].title) for metric in metrics)]]

    def row(layer: int, lens: str, name: str) -> list[str]:
        return [name, lens, *(plus_minus(columns[lens, metric][layer]) for metric in metrics)]

    varied = [lens for lens in evaluation.lenses if lens not in evaluation.constant]
    for layer in range(evaluation.n_layers):
        rows += [row(layer, lens, str(layer)) for lens in varied]
    rows += [row(0, lens, "any") for lens in evaluation.constant]
    own = {r.metric for r in evaluation.results if r.lens == MODEL}
    last = [str(evaluation.n_layers), MODEL]
    for metric in metrics:
        known = METRICS[metric].where_lens_is_model
        if metric in own:
            last.append(plus_minus(evaluation.of_model(metric)))
        else:
            last.append("" if known is None else f"{known:g}")
    return [*rows, last]


def difference_rows(evaluation: Evaluation, metric: str = "kl_nats") -> Rows:
    """Layers down, pairs of lenses across: one less the other, with the error of that."""
    pairs = list(dict.fromkeys((d.lens, d.other) for d in evaluation.differences))
    columns = [evaluation.difference(*pair, metric) for pair in pairs]
    means = [plus_minus(evaluation.mean_difference(*pair, metric)) for pair in pairs]
    return [
        ["layer", *(f"{lens} − {other}" for lens, other in pairs)],
        *(
            [str(layer), *(plus_minus(column[layer]) for column in columns)]
            for layer in range(evaluation.n_layers)
        ),
        ["mean", *means],
    ]


def kl_table(evaluation: Evaluation) -> str:
    """Layer, and the KL of every lens, as plain text."""
    return aligned(kl_rows(evaluation))


def terminal_table(evaluation: Evaluation) -> str:
    """What fits a terminal, and what it comes to in words."""
    table = aligned(metric_rows(evaluation, list(_TERMINAL)))
    return "\n".join([table, "", *summary(evaluation)])


def summary(evaluation: Evaluation) -> list[str]:
    """The results in a few sentences."""
    means = {lens: evaluation.of_lens(lens, "kl_nats") for lens in evaluation.lenses}
    ranked = sorted(means, key=lambda lens: means[lens].value)
    varied = [lens for lens in ranked if lens not in evaluation.constant]
    every = ", ".join(f"{lens} {plus_minus(means[lens])}" for lens in ranked)
    sentences = [f"Mean KL(model ‖ lens) over layers, in nats: {every}."]
    for other in varied[1:]:
        best = varied[0]
        column = evaluation.difference(other, best, "kl_nats")
        sure = sum(e.value > 2 * (e.standard_error or math.inf) for e in column)
        where = "every layer" if sure == len(column) else f"{sure} of {len(column)} layers"
        mean = plus_minus(evaluation.mean_difference(other, best, "kl_nats"))
        sentences.append(
            f"{best} beats {other} by {mean} nats on average, and by more than two standard "
            f"errors at {where}."
        )
    depths = ", ".join(
        f"{lens} {plus_minus(evaluation.of_lens(lens, 'mean_prediction_depth'))}" for lens in varied
    )
    sentences.append(
        f"The best token stays as it is from a layer on, on average (of {evaluation.n_layers}): "
        f"{depths}."
    )
    perplexity, bits = (evaluation.of_model(m) for m in ("perplexity", "bits_per_byte"))
    sentences.append(
        f"The model itself: perplexity {plus_minus(perplexity)}, {plus_minus(bits)} bits per byte."
    )
    return sentences


def scored_text(evaluation: Evaluation) -> str:
    """How much of what text was scored."""
    config = evaluation.provenance.get("config", {})
    dataset = config.get("corpus", {}).get("dataset", "text")
    side = {"validation": "held out", "train": "trained on"}
    kept = f" ({side[config['split']]})" if config.get("split") in side else ""
    return (
        f"{evaluation.tokens:,} positions, {evaluation.text_bytes:,} bytes of {dataset}{kept}, "
        f"{evaluation.blocks:,} blocks"
    )


def plus_minus(estimate: Estimate) -> str:
    """A figure with its standard error, to the two digits of the error that mean something."""
    value, error = estimate
    if not error:
        return f"{value:.5g}"
    if abs(value) >= 1e6:
        return f"{value:.2e} ± {error:.0e}"
    digits = min(max(0, 1 - math.floor(math.log10(error))), 8)
    return f"{value:,.{digits}f} ± {error:,.{digits}f}"


def code(word: str) -> str:
    """A text as it is, in Markdown."""
    fence = _fence(word, 1)
    space = " " if len(fence) > 1 else ""
    return f"{fence}{space}{word}{space}{fence}"


def code_block(text: str) -> str:
    """A text of several lines as it is, in Markdown."""
    fence = _fence(text, 3)
    return f"{fence}text\n{text}\n{fence}"


def _fence(text: str, shortest: int) -> str:
    """Backticks that end nothing within the text."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    return "`" * max(longest + 1, shortest)


def aligned(rows: Rows) -> str:
    """Columns of plain text, to the right."""
    return "\n".join("  ".join(row) for row in padded(rows))


def padded(rows: Rows) -> Rows:
    """Cells as wide as the widest of their column."""
    widths = [max(map(display_width, column)) for column in zip(*rows, strict=True)]
    return [
        [
            " " * (width - display_width(cell)) + cell
            for cell, width in zip(row, widths, strict=True)
        ]
        for row in rows
    ]


def markdown(rows: Rows) -> str:
    """A table in Markdown, its columns to the right."""
    header, *body = rows
    lines = (header, ["---:"] * len(header), *body)
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in lines
    )
