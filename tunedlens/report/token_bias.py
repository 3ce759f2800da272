"""The tokens that a lens predicts too often, as a table."""

from tunedlens.errors import InputError
from tunedlens.evaluation import TokenBias
from tunedlens.report.tables import aligned, markdown, plus_minus


def bias_table(bias: TokenBias, lens: str | None = None, *, is_markdown: bool = False) -> str:
    """The bias of a lens by layer, and the tokens that it predicts too often.

    Each token has its mean probability in the lens and in the model, in percent.

    Args:
        lens: a name; by default the first.
        is_markdown: whether the table is in Markdown.

    Raises:
        InputError: there is no such lens.
    """
    lens = next(iter(bias.lenses)) if lens is None else lens
    if lens not in bias.lenses:
        raise InputError(f"lens must be one of {', '.join(bias.lenses)}; got {lens!r}")
    rows = [["layer", "bias, nats", "excess, %", "tokens predicted too often: lens %, model %"]]
    for one in bias.lenses[lens]:
        tokens = ", ".join(
            f"{mean.token.shown} {100 * mean.lens:.2g} {100 * mean.model:.2g}" for mean in one.over
        )
        excess = f"{100 * one.excess:.1f}"
        rows.append([str(one.layer), plus_minus(one.bias_nats), excess, tokens])
    return markdown(rows) if is_markdown else aligned(rows)
