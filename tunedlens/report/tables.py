"""Results as tables: rows of text, plain or in Markdown, and sentences."""

from tunedlens.evaluation import MODEL, Evaluation
from tunedlens.metrics import METRICS, Estimate

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
    columns = [evaluation.by_layer(lens, "kl_nats") for lens in evaluation.lenses]
    rows = [
        [str(layer), *(plus_minus(column[layer]) for column in columns)]
        for layer in range(evaluation.n_layers)
    ]
    means = [sum(e.value for e in column) / len(column) for column in columns]
    header = ["layer", *(f"{lens} KL (nats)" for lens in evaluation.lenses)]
    return [header, *rows, ["mean", *(f"{mean:.4f}" for mean in means)]]


def metric_rows(evaluation: Evaluation, metrics: list[str] | None = None) -> Rows:
    """Layers and lenses down, metrics across; a lens that is the same at every layer once.

    Args:
        evaluation: the results.
        metrics: names; all that there are by default.
    """
    metrics = [m for m in metrics or evaluation.metrics if m != "prediction_depth"]
    columns = {
        (lens, metric): evaluation.by_layer(lens, metric)
        for lens in evaluation.lenses
        for metric in metrics
    }
    rows = [["layer", "lens", *(_SHORT.get(metric, METRICS[metric].title) for metric in metrics)]]

    def row(layer: int, lens: str, name: str) -> list[str]:
        return [name, lens, *(plus_minus(columns[lens, metric][layer]) for metric in metrics)]

    constant = [lens for lens in evaluation.lenses if evaluation.is_constant(lens)]
    for layer in range(evaluation.n_layers):
        rows += [row(layer, lens, str(layer)) for lens in evaluation.lenses if lens not in constant]
    rows += [row(0, lens, "any") for lens in constant]
    agrees = {"kl_nats": "0", "bias_nats": "0", "top1_agreement": "1", "top10_agreement": "1"}
    own = [agrees.get(metric, "") for metric in metrics]
    for index, metric in enumerate(metrics):
        if any((r.lens, r.metric) == (MODEL, metric) for r in evaluation.results):
            own[index] = plus_minus(evaluation.of_model(metric))
    return [*rows, [str(evaluation.n_layers), MODEL, *own]]


def difference_rows(evaluation: Evaluation, metric: str = "kl_nats") -> Rows:
    """Layers down, pairs of lenses across: one less the other, with the error of that."""
    pairs = list(dict.fromkeys((d.lens, d.other) for d in evaluation.differences))
    columns = [evaluation.difference(*pair, metric) for pair in pairs]
    return [
        ["layer", *(f"{lens} − {other}" for lens, other in pairs)],
        *(
            [str(layer), *(plus_minus(column[layer]) for column in columns)]
            for layer in range(evaluation.n_layers)
        ),
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
    lenses = [lens for lens in evaluation.lenses if not evaluation.is_constant(lens)]
    means = {
        lens: sum(e.value for e in evaluation.by_layer(lens, "kl_nats")) / evaluation.n_layers
        for lens in evaluation.lenses
    }
    ranked = sorted(means, key=lambda lens: means[lens])
    sentences = [
        "Mean KL(model ‖ lens) over layers, in nats: "
        + ", ".join(f"{lens} {means[lens]:.3f}" for lens in ranked)
        + "."
    ]
    best = next(lens for lens in ranked if lens in lenses)
    middle = evaluation.n_layers // 2
    for other in [lens for lens in lenses if lens != best]:
        column = evaluation.difference(other, best, "kl_nats")
        below = [e.value > 2 * (e.standard_error or 0.0) for e in column]
        where = (
            "at every layer"
            if all(below)
            else f"at {sum(below)} of {evaluation.n_layers} layers (by two standard errors)"
        )
        sentences.append(
            f"{best} beats {other} {where}; at layer {middle} by {plus_minus(column[middle])} nats."
        )
    depth = evaluation.of_lens(best, "mean_prediction_depth")
    sentences.append(
        f"Read with {best}, the best token stays as it is from layer {plus_minus(depth, 2)} of "
        f"{evaluation.n_layers} on, on average."
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
    side = {"validation": "held out", "train": "trained on", "all": "all of it"}
    kept = f" ({side[config['split']]})" if config.get("split") in side else ""
    return (
        f"{evaluation.tokens:,} positions, {evaluation.text_bytes:,} bytes of {dataset}{kept}, "
        f"{evaluation.blocks:,} blocks"
    )


def plus_minus(estimate: Estimate, digits: int | None = None) -> str:
    """A figure with its standard error, to the digits that the error leaves."""
    value, error = estimate
    if error is None or abs(value) > 1e5:
        return f"{value:.4g}"
    if digits is None:
        digits = 4 if abs(value) < 10 else 2 if abs(value) < 1000 else 0
    return f"{value:.{digits}f} ± {error:.{digits}f}"


def aligned(rows: Rows) -> str:
    """Columns of plain text, to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    )


def markdown(rows: Rows) -> str:
    """A table in Markdown, its columns to the right."""
    header, *body = rows
    lines = (header, ["---:"] * len(header), *body)
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in lines
    )
