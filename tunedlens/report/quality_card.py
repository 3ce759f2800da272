"""The card of a lens with its measured quality and warnings."""

from itertools import pairwise
from pathlib import Path

from tunedlens.config import ONE_PASS
from tunedlens.escaping import code, for_markdown
from tunedlens.evaluation import Estimate, Evaluation, Quality
from tunedlens.evaluation.quality import names_at_sites, percent, text_title
from tunedlens.files import read_text, write
from tunedlens.report import plots
from tunedlens.report.card import about, with_front_matter, with_generated
from tunedlens.report.origin import package
from tunedlens.report.tables import Rows, markdown, plus_minus, rows_by_layer

CARD = "README.md"
PICTURES = "card"
"""The folder of the pictures, next to the card."""
_Columns = dict[str, dict[int | None, Estimate]]


def write_card(quality: Quality, folder: str | Path) -> Path:
    """Write the card of a lens, and its pictures; returns the path of the card.

    The card is `README.md`. If there is an earlier card, its front matter and the text around its
    generated part are kept.

    Raises:
        InputError: the folder cannot be written.
    """
    path = Path(folder) / CARD
    earlier = read_text(path) if path.exists() else f"# {for_markdown(quality.title)}\n"
    pictures = {
        "overview": (quality.own, "KL, perplexity, agreement and prediction depth by layer"),
        "transfer": (quality.transfer, "KL of the translator of one layer at another one"),
    }
    links = []
    for name, (evaluation, caption) in pictures.items():
        if plots.DRAWINGS[name].has_data(evaluation):
            figure = plots.DRAWINGS[name].draw(evaluation)
            write(path.parent / PICTURES / f"{name}.png", plots.rendered(figure, "png"))
            links.append(f"![{caption}]({PICTURES}/{name}.png)")
    text = "\n\n".join([_body(quality), *links, _provenance(quality)])
    write(path, with_front_matter(with_generated(earlier, text), quality.manifest))
    return path


def _body(quality: Quality) -> str:
    """The generated part of the card, without pictures."""
    warnings = [f"> **Warning.** {for_markdown(one.message)}" for one in quality.warnings]
    return "\n\n".join([
        about(quality.manifest),
        *warnings,
        "## Quality",
        "Mean KL(model ‖ lens) over layers, in nats. ± is one standard error, clustered by block "
        "of text.",
        markdown(_summary_rows(quality)),
        "\n".join([_convergence(quality), _bias(quality), _transfer(quality)]),
        "KL by layer, in nats:",
        markdown(rows_by_layer(_kl_columns(quality))),
        "Bias, transfer and convergence by layer:",
        markdown(rows_by_layer(_further_columns(quality))[:-1]),
    ])  # fmt: skip


def _summary_rows(quality: Quality) -> Rows:
    """One row per text."""
    evaluations = [quality.own, *quality.others]
    rows = [["text", "positions", *quality.own.lenses]]
    for evaluation in evaluations:
        means = [plus_minus(evaluation.of_lens(lens, "kl_nats")) for lens in quality.own.lenses]
        rows.append([_text(quality, evaluation), f"{evaluation.tokens:,}", *means])
    return rows


def _text(quality: Quality, evaluation: Evaluation) -> str:
    title = text_title(evaluation)
    return f"{title} (held out)" if evaluation is quality.own and quality.is_held_out else title


def _convergence(quality: Quality) -> str:
    doubling, fit = quality.doubling, quality.manifest.get("config", {}).get("fit")
    if doubling is None:
        reason = "not known"
        if fit in ONE_PASS:
            reason = "there is no learning curve, because the lens was made in one pass"
        return f"- *Convergence*: {reason}."
    before, after = doubling
    mean = 1 - after.mean_kl_nats / before.mean_kl_nats
    return (
        f"- *Convergence*: from {before.tokens:,} to {after.tokens:,} tokens of the steps, the "
        f"mean KL on held-out text fell by {percent(mean)}. At the layer with the largest gain, it "
        f"fell by {percent(max(doubling.gains))}."
    )


def _bias(quality: Quality) -> str:
    largest = []
    for lens in quality.own.lenses:
        biases = quality.own.by_layer(lens, "bias_nats")
        largest.append(f"{lens} {plus_minus(max(biases, key=lambda bias: bias.value))}")
    return (
        "- *Bias*: the largest KL at a layer from the model's mean distribution over the text to "
        f"the lens's, in nats: {for_markdown(', '.join(largest))}."
    )


def _transfer(quality: Quality) -> str:
    column = _from_layer_before(quality)
    if not column:
        return "- *Transfer*: not measured, because the lens has only one translator."
    own: dict[int | None, Estimate] = dict(_by_layer(quality.transfer, quality.lens, "kl_nats"))
    factors = sorted(column[layer].value / own[layer].value for layer in column)
    return (
        "- *Transfer*: if the translator of a layer is replaced by that of the layer before, its "
        f"KL is multiplied by {factors[0]:.3g} to {factors[-1]:.3g} "
        f"({quality.transfer.tokens:,} positions)."
    )


def _kl_columns(quality: Quality) -> _Columns:
    columns: _Columns = {}
    for evaluation in (quality.own, *quality.others):
        on = "" if evaluation is quality.own else f" on {text_title(evaluation)}"
        for lens in evaluation.lenses:
            column = dict(_by_layer(evaluation, lens, "kl_nats"))
            columns[f"{lens}{on}"] = column | {None: evaluation.of_lens(lens, "kl_nats")}
    return columns


def _further_columns(quality: Quality) -> _Columns:
    own = quality.own
    columns: _Columns = {
        f"bias of {lens}, nats": dict(_by_layer(own, lens, "bias_nats")) for lens in own.lenses
    }
    columns["KL with the translator of the layer before"] = _from_layer_before(quality)
    for name in names_at_sites(own, quality.lens):
        site = own.sites.get(name, "resid_pre")
        gains = {point.layer: gain for point, gain in quality.gains.items() if point.site == site}
        if gains:
            title = "gain of the last doubling, %" + name.removeprefix(quality.lens)
            columns[title] = {
                layer: Estimate(round(100 * gain, 1), None) for layer, gain in gains.items()
            }
    return columns


def _by_layer(evaluation: Evaluation, lens: str, metric: str) -> list[tuple[int, Estimate]]:
    values = evaluation.by_layer(lens, metric)
    return list(zip(evaluation.layers_of(lens), values, strict=True))


def _from_layer_before(quality: Quality) -> dict[int | None, Estimate]:
    """The KL at every layer, after the first, of the translator of the layer before it."""
    evaluation = quality.transfer
    grid = evaluation.transfer.get(quality.lens, {}).get("kl_nats")
    layers = evaluation.layers_of(quality.lens)
    found: dict[int | None, Estimate] = {}
    for before, layer in pairwise(layers):
        value = None if grid is None else grid.values[before][layer]
        if grid is not None and value is not None:
            found[layer] = Estimate(value, grid.standard_errors[before][layer])
    return found


def _provenance(quality: Quality) -> str:
    run = quality.own.provenance
    return (
        f"Measured by {code(run['command'])} with {package(run)}, on {run['device']} in "
        f"{run['dtype']}. SHA-256 of the scored tokens: {code(quality.own.tokens_sha256[:16])}…; "
        f"of the lens: {code(quality.manifest['lens_sha256'][:16])}…"
    )
