"""Early exits as a table."""

from tunedlens.early_exit import EarlyExits
from tunedlens.report.tables import aligned, markdown, plus_minus


def exit_table(
    exits: EarlyExits,
    *,
    agreement: float | None = None,
    perplexity_ratio: float | None = None,
    is_markdown: bool = False,
) -> str:
    """The rule that saves the most layers within a limit, for every lens and signal.

    Thresholds are chosen on the first half of the text. All other columns are measured on the
    second half.

    Args:
        agreement: the lowest agreement with the model that is allowed, from 0 to 1; 0.95 if
            neither limit is given.
        perplexity_ratio: the highest perplexity that is allowed, as a multiple of the model's.
        is_markdown: whether the table is in Markdown.

    Raises:
        InputError: both limits are given, or one is out of range.
    """
    agreement = 0.95 if agreement is None and perplexity_ratio is None else agreement
    saved = f"layers saved of {exits.n_layers}"
    rows = [
        ["lens", "signal", "threshold", saved, "agreement", "perplexity", "relative to the model's"]
    ]
    for lens, signals in exits.curves.items():
        for signal in signals:
            rule, _, found = exits.choose(
                lens, signal, agreement=agreement, perplexity_ratio=perplexity_ratio
            )
            shown = (found.layers_saved, found.agreement, found.perplexity, found.perplexity_ratio)
            rows.append([lens, signal, f"{rule.threshold:.4g}", *map(plus_minus, shown)])
    rows.append(["model", "", "", "0", "1", plus_minus(exits.model_perplexity), "1"])
    return markdown(rows) if is_markdown else aligned(rows)
