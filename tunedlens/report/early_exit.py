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
    """The rule of every lens and signal that saves most layers within a limit.

    All columns but the threshold are for the half of the text where it was not chosen.

    Args:
        agreement: the smallest agreement with the model, from 0 to 1; 0.95 without any limit.
        perplexity_ratio: instead, the largest perplexity, as a multiple of the model's.
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
