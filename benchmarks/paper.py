r"""Remakes the figures of the paper on tuned lenses for a model, as one report.

    python benchmarks/paper.py                                    the embedded GPT-2 and its lens
    python benchmarks/paper.py --model gpt2 --lens checkpoints/gpt2 --output paper
    python benchmarks/paper.py --model gpt2 --dataset wiki.txt    fits a lens first

Perplexity and KL by layer, bias, transfer of translators between layers, causal fidelity,
stimulus-response alignment and prediction depth go to report.html, report.md and pictures in
--output. The expected time is printed before the work. Causal figures leave out the first position
of each sequence.

Source: Belrose et al. 2023, "Eliciting Latent Predictions from Transformers with the Tuned Lens",
arXiv:2303.08112.
"""

import argparse
import dataclasses
import sys
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import torch
from jaxtyping import Int
from torch import Tensor

from tunedlens import (
    AffineLens,
    CorpusConfig,
    EvaluateConfig,
    Evaluation,
    FrozenModel,
    InputError,
    LogitLens,
    ModelConfig,
    TrainConfig,
    causal_basis,
    causal_effects,
    evaluate,
    load_lens,
    load_model,
    response_alignment,
    train,
)
from tunedlens.escaping import code, for_html, for_markdown
from tunedlens.evaluation.lens_specs import lens_specs
from tunedlens.evaluation.text import load_text
from tunedlens.files import write, write_json
from tunedlens.report import plots
from tunedlens.report.html.elements import document, figure, table
from tunedlens.report.tables import Rows, markdown, metric_rows, plus_minus, scored_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EMBEDDED = Path(__file__).parents[1] / "checkpoints" / "embedded"
LENS = "tuned"
"""The name of the lens in results, for any kind of lens."""
_STEPS = 60
"""The largest number of products with the unembedding per position to find one direction."""


@dataclasses.dataclass
class Section:
    """One figure of the paper for this model."""

    name: str
    """The name of its picture."""
    title: str
    caption: str
    paper: str
    """The result of the paper."""
    found: str
    """The numbers of this model."""
    figure: "Figure"
    rows: Rows
    is_wide: bool = False


def by_layer(evaluation: Evaluation) -> Section:
    """Perplexity and KL of both lenses."""
    drawn = plots.by_layer(evaluation, ["perplexity", "kl_nats"], size=(9.2, 3.2))
    means = {lens: plus_minus(evaluation.of_lens(lens, "kl_nats")) for lens in ("logit", LENS)}
    gap = evaluation.difference("logit", LENS, "kl_nats")
    clear = sum(one.value > 2 * (one.standard_error or 0.0) for one in gap)
    return Section(
        "by-layer",
        "Perplexity and KL by layer",
        "Perplexity of the true next token (the grey line is the model), and KL from the model.",
        "The tuned lens has a lower perplexity than the logit lens at every layer, and the gap is "
        "largest at early layers.",
        f"The mean KL over layers is {means[LENS]} nats for the tuned lens and {means['logit']} "
        f"for the logit lens. The tuned lens is closer by more than two standard errors at {clear} "
        f"of {len(gap)} layers. The model's own perplexity is "
        f"{plus_minus(evaluation.of_model('perplexity'))}.",
        drawn,
        metric_rows(evaluation, ["kl_nats", "perplexity", "top1_agreement"]),
        is_wide=True,
    )


def bias(evaluation: Evaluation) -> Section:
    """The KL between the mean distributions of the model and of each lens."""
    values = {lens: evaluation.by_layer(lens, "bias_nats") for lens in ("logit", LENS)}
    largest = {lens: max(column, key=lambda one: one.value) for lens, column in values.items()}
    return Section(
        "bias",
        "Bias",
        "KL from the mean of the model's distributions to the mean of the lens's.",
        "The KL from the model's mean distribution to that of the logit lens is 4 to 5 bits at "
        "most layers of GPT-Neo 2.7B. For the tuned lens, it is close to 0.",
        f"The bias is at most {plus_minus(largest['logit'])} nats for the logit lens and "
        f"{plus_minus(largest[LENS])} for the tuned lens.",
        plots.by_layer(evaluation, ["bias_nats"]),
        metric_rows(evaluation, ["bias_nats"]),
    )


def transfer(evaluation: Evaluation) -> Section:
    """The KL of every translator at every layer."""
    grid = evaluation.transfer[LENS]["kl_nats"].values
    layers = evaluation.layers_of(LENS)
    factors = {
        distance: median(grid[one][other] / grid[other][other] for one, other in pairs)
        for distance, pairs in _pairs_by_distance(layers).items()
    }
    nearest, farthest = min(factors), max(factors)
    return Section(
        "transfer",
        "Transfer of translators",
        "KL when the translator of one layer is applied at another.",
        "A translator works nearly as well at the layers next to its own, and less well at layers "
        "that are farther away.",
        f"If a layer's own translator is replaced by that of a layer at a distance of {nearest}, "
        f"the KL is multiplied by {factors[nearest]:.3g} (median); at a distance of {farthest}, by "
        f"{factors[farthest]:.3g}. {evaluation.tokens:,} positions are scored.",
        plots.transfer(evaluation),
        [
            ["translator", *(f"at layer {layer}" for layer in layers)],
            *([str(one), *(f"{grid[one][other]:.3g}" for other in layers)] for one in layers),
        ],
    )


def _pairs_by_distance(layers: Sequence[int]) -> dict[int, list[tuple[int, int]]]:
    pairs: dict[int, list[tuple[int, int]]] = {}
    for one in layers:
        for other in layers:
            if one != other:
                pairs.setdefault(abs(one - other), []).append((one, other))
    return pairs


def fidelity(
    model: FrozenModel, lens: AffineLens, ids: Int[Tensor, "batch seq"], layer: int, k: int
) -> Section:
    """Effects on the lens and on the model of the directions of a causal basis."""
    basis = causal_basis(model, lens, ids, layer, k, skip_first=1)
    effects = causal_effects(model, lens, ids, basis.directions(), skip_first=1)
    value, low, high = effects.spearman()
    pairs = zip(effects.targets, effects.lens_nats, effects.model_nats, strict=True)
    return Section(
        "fidelity",
        "Causal fidelity",
        "Effect of each direction on the lens and on the model.",
        "Directions with a large effect on the tuned lens have a large effect on the model: "
        "Spearman's ρ is 0.89 at a middle layer of Pythia 410m.",
        f"ρ is {value:.2f} (95 % interval {low:.2f} to {high:.2f}) over the first {k} directions "
        f"of the causal basis of layer {layer}. The coordinate of the state along each direction "
        f"is replaced by its mean ({basis.tokens:,} positions).",
        plots.effects_scatter(effects),
        [
            ["direction", "effect on the lens, nats", "effect on the model, nats"],
            *([name.split()[-1], plus_minus(a), plus_minus(b)] for name, a, b in pairs),
        ],
    )


def alignment(
    model: FrozenModel,
    lens: AffineLens,
    ids: Int[Tensor, "batch seq"],
    layers: Sequence[int],
    span: int,
) -> Section:
    """Stimulus-response alignment of both lenses by layer."""
    lenses = {"logit": LogitLens.from_model(model), LENS: lens}
    targets = [
        causal_basis(model, lens, ids, layer, span, skip_first=1).directions() for layer in layers
    ]
    found = response_alignment(model, lenses, ids, targets, skip_first=1)
    values = {(one.lens, one.layer): one.similarity for one in found}
    pairs = [(values[LENS, layer], values["logit", layer]) for layer in layers]
    higher = sum(tuned.value > logit.value for tuned, logit in pairs)
    clear = sum(
        tuned.value - logit.value > 2 * max(tuned.standard_error or 0, logit.standard_error or 0)
        for tuned, logit in pairs
    )
    last = layers[-1]
    return Section(
        "alignment",
        "Stimulus-response alignment",
        "Cosine similarity of the changes of the lens's and of the model's log-probabilities.",
        "When the states of a layer are resampled along important directions, the change of the "
        "model's output is more similar to that of the tuned lens than to that of the logit lens. "
        "The similarity is highest at late layers.",
        f"The tuned lens is more aligned than the logit lens at {higher} of {len(layers)} layers, "
        f"and by more than two standard errors at {clear}. At layer {last} the cosine similarity "
        f"is {plus_minus(values[LENS, last])} for the tuned lens and "
        f"{plus_minus(values['logit', last])} for the logit lens. The directions are the "
        f"first {span} of the tuned lens's causal basis.",
        plots.alignment_by_layer(found),
        [
            ["layer", "logit", LENS],
            *(
                [str(layer), *(plus_minus(values[name, layer]) for name in lenses)]
                for layer in layers
            ),
        ],
    )


def depth(evaluation: Evaluation) -> Section:
    """Prediction depth in both lenses."""
    means = {
        lens: plus_minus(evaluation.of_lens(lens, "mean_prediction_depth"))
        for lens in ("logit", LENS)
    }
    drawing = plots.DRAWINGS["prediction_depth"]
    depths = [*evaluation.layers_of(LENS), evaluation.n_layers]
    columns = [evaluation.by_layer(lens, "prediction_depth") for lens in means]
    return Section(
        "depth",
        "Prediction depth",
        "Fraction of tokens by the first layer from which the best token no longer changes.",
        "The layer from which the most probable token stays the same measures the difficulty of an "
        "example: in the tuned lens, it correlates with the training step at which a model learns "
        "the example.",
        f"The mean prediction depth, of {evaluation.n_layers} layers, is {means[LENS]} in the "
        f"tuned lens and {means['logit']} in the logit lens.",
        drawing.draw(evaluation),
        [
            ["depth", *means],
            *(
                [str(layer), *map(plus_minus, row)]
                for layer, *row in zip(depths, *columns, strict=True)
            ),
        ],
    )


def seconds(
    model: FrozenModel,
    lens: AffineLens,
    ids: Int[Tensor, "batch seq"],
    flags: argparse.Namespace,
) -> float:
    """The expected seconds, from the measured seconds of a forward pass and of a decoding."""
    started = time.perf_counter()
    states = model.residual_stream(ids[:2])
    forward = (time.perf_counter() - started) / ids[:2].numel()
    hidden = states[lens.layers[-1]].flatten(0, 1)
    started = time.perf_counter()
    with torch.no_grad():
        lens(hidden, lens.layers[-1]).log_softmax(-1)
    decoding = 2 * (time.perf_counter() - started) / len(hidden)  # with its statistics
    n_layers = len(lens.layers)
    directions = flags.k + flags.span * len(flags.layers)
    return (
        (flags.tokens + flags.transfer_tokens) * (forward + (2 * n_layers + 1) * decoding)
        + flags.transfer_tokens * n_layers**2 * decoding
        + ids.numel() * directions * _STEPS * decoding
        + ids.numel() * (flags.k + len(flags.layers)) * (forward + 4 * decoding)
    )


def fitted(flags: argparse.Namespace) -> Path:
    """Fit a lens for the model."""
    tokens = {"init_tokens" if flags.fit == "closed-form" else "tokens": flags.fit_tokens}
    config = TrainConfig(
        model=ModelConfig(flags.model, device=flags.device),
        corpus=CorpusConfig(flags.dataset, seq_len=flags.block),
        fit=flags.fit,
        **tokens,
    )
    train(config, flags.output / "lens")
    return flags.output / "lens"


def make_sections(flags: argparse.Namespace) -> tuple[list[Section], Evaluation]:
    """Compute all figures. Flags that were not given are filled in."""
    if flags.lens is None:
        flags.lens = EMBEDDED if flags.model is None and flags.dataset is None else fitted(flags)
    model = load_model(flags.model, device=flags.device)
    lens = load_lens(flags.lens, model)
    layers = lens.layers
    if flags.transfer_tokens is None:
        flags.transfer_tokens = max(1, flags.tokens // len(layers))
    if flags.layer is None:
        flags.layer = min(layers, key=lambda layer: abs(layer - model.identity.n_layers // 2))
    if flags.layers is None:
        count = min(8, len(layers))
        flags.layers = [layers[i * (len(layers) - 1) // max(1, count - 1)] for i in range(count)]
    config = EvaluateConfig(
        flags.tokens,
        lenses=(f"{LENS}={flags.lens}",),
        corpus=CorpusConfig(flags.dataset, seq_len=flags.block),
    )
    blocks = load_text(config, lens_specs(config.lenses), model).blocks
    starts = [block[: flags.seq_len] for block in islice(blocks, flags.sequences)]
    ids = torch.stack(starts).to(model.device)
    print(f"the figures take about {max(1, seconds(model, lens, ids, flags) / 60):.0f} minutes")
    scored = evaluate(config, model=model)
    part = dataclasses.replace(config, tokens=flags.transfer_tokens, transfer=True)
    sections = [
        by_layer(scored),
        bias(scored),
        transfer(evaluate(part, model=model)),
        fidelity(model, lens, ids, flags.layer, flags.k),
        alignment(model, lens, ids, flags.layers, flags.span),
        depth(scored),
    ]
    return sections, scored


def write_pages(sections: Sequence[Section], evaluation: Evaluation, folder: Path) -> None:
    """Write `report.html`, `report.md`, a picture of every section and `metrics.json`."""
    run = evaluation.provenance
    title = f"The figures of the tuned lens paper for {Path(run['model']).name}"
    intro = (
        f"{scored_text(evaluation)}. ± is one standard error, clustered by block of text; bands "
        "and bars show two. The paper is Belrose et al. 2023, arXiv:2303.08112."
    )
    parts = [f"# {for_markdown(title)}", for_markdown(intro)]
    html = [f'<p class="note">{for_html(intro)}</p>']
    for one in sections:
        drawn = plots.in_all_formats(one.figure)
        write(folder / f"{one.name}.png", drawn["png"])
        write(folder / f"{one.name}.svg", drawn["svg"])
        html += [
            f"<h2>{for_html(one.title)}</h2>",
            f"<p>{for_html(one.found)}</p>",
            f'<p class="note">In the paper: {for_html(one.paper)}</p>',
            figure(one.caption, drawn["svg"], name=one.name, is_wide=one.is_wide),
            f"<details><summary>Numbers</summary>{table(one.rows)}</details>",
        ]
        parts += [
            f"## {for_markdown(one.title)}",
            for_markdown(one.found),
            f"In the paper: {for_markdown(one.paper)}",
            f"![{for_markdown(one.caption)}]({one.name}.png)",
            markdown(one.rows),
        ]
    command = f"Made by {{}} on {run['device']}, tunedlens {run['versions']['tunedlens']}."
    parts.append(command.format(code(run["command"])))
    html.append(f"<h2>Command</h2><pre>{for_html(run['command'])}</pre>")
    write(folder / "report.md", "\n\n".join(parts) + "\n")
    write(folder / "report.html", document(title, "\n".join(html)))
    write_json(folder / "metrics.json", evaluation.to_json())


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="hub name or folder (default: the embedded GPT-2)")
    parser.add_argument("--lens", help="path or hub name (default: a lens is fitted)")
    parser.add_argument("--dataset", help="text (default: that of the lens)")
    parser.add_argument("--output", type=Path, default=Path("paper"), help="(default: %(default)s)")
    parser.add_argument("--device")
    parser.add_argument("--fit", choices=("closed-form", "preconditioned"), default="closed-form")
    parser.add_argument("--fit-tokens", type=int, help="tokens for a lens that is fitted first")
    parser.add_argument("--block", type=int, help="tokens in a block (default: as in training)")
    parser.add_argument(
        "--tokens", type=int, default=16_384, help="positions to score (default: %(default)s)"
    )
    parser.add_argument(
        "--transfer-tokens",
        type=int,
        help="positions for the transfer (default: --tokens / number of layers)",
    )
    parser.add_argument(
        "--sequences",
        type=int,
        default=16,
        help="sequences for the causal figures (default: %(default)s)",
    )
    parser.add_argument(
        "--seq-len", type=int, default=64, help="tokens of such a sequence (default: %(default)s)"
    )
    parser.add_argument("--layer", type=int, help="layer of the causal basis (default: the middle)")
    parser.add_argument(
        "--k", type=int, default=32, help="directions of that basis (default: %(default)s)"
    )
    parser.add_argument(
        "--layers", type=int, nargs="+", help="layers of the alignment (default: eight of them)"
    )
    parser.add_argument(
        "--span",
        type=int,
        default=10,
        help="directions that the alignment ablates (default: %(default)s)",
    )
    flags = parser.parse_args(arguments)
    try:
        sections, evaluation = make_sections(flags)
        write_pages(sections, evaluation, flags.output)
    except InputError as error:
        sys.exit(f"error: {error}")
    for one in sections:
        print(f"{one.title}: {one.found}")
    print(f"report.html and report.md are in {flags.output}")


if __name__ == "__main__":
    main()
