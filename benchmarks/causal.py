r"""Draws the figures of docs/causal.md, and prints their numbers.

    python benchmarks/causal.py --output docs
    python benchmarks/causal.py --model FOLDER --lens FOLDER --dataset FILE --name smollm2 \
                                --layer 15 --layers 5 10 15 20 25 --k 16 --output docs

The sequences are the starts of held-out blocks of the lens's training text. The first position of
each sequence is left out.
"""

import argparse
from pathlib import Path

import torch
from jaxtyping import Float, Int
from matplotlib.figure import Figure
from torch import Tensor

from tunedlens import (
    CorpusConfig,
    FrozenModel,
    Head,
    LogitLens,
    ResidualLens,
    TunedLens,
    causal_basis,
    causal_effects,
    load_model,
    response_alignment,
)
from tunedlens.causal import alignment_table
from tunedlens.corpus import load_splits, resolve_corpus
from tunedlens.engine.distributions import log_probs
from tunedlens.report.plots import alignment_by_layer, effects_scatter, influences, rendered
from tunedlens.report.plots.style import new_figure, plain_log_ticks, styles, ticks_of


def held_out(model: FrozenModel, options: argparse.Namespace) -> Int[Tensor, "batch seq"]:
    """The starts of held-out blocks."""
    config = CorpusConfig(dataset=options.dataset, seq_len=options.block)
    resolved = resolve_corpus(config, model.name, model.context, model.bos_id is not None)
    blocks = load_splits(resolved, model.tokenizer).validation.shuffled()
    starts = [next(blocks)[: options.seq_len] for _ in range(options.sequences)]
    return torch.stack(starts).to(model.device)


def heads(model: FrozenModel, lens: ResidualLens, ids: Tensor, layers: range, save) -> None:
    """KL(model ‖ model without a head) of every head."""
    count = model.model.config.num_attention_heads
    targets = [Head(layer, head) for layer in layers for head in range(count)]
    effects = causal_effects(model, lens, ids, targets, "mean", skip_first=1)
    print(effects.to_dataframe().to_string(), effects.spearman())
    values = torch.tensor([estimate.value for estimate in effects.model_nats])
    save("heads", draw_heads(values.view(-1, count)))


def draw_heads(nats: Float[Tensor, "blocks heads"]) -> Figure:
    """The effect of every head on the model."""
    blocks, count = nats.shape
    with new_figure(3.8, 3.0) as figure:
        axes = figure.subplots()
        image = axes.imshow(nats, cmap="cividis", origin="lower", aspect="auto")
        axes.set_xlabel("head")
        axes.set_ylabel("block")
        axes.set_xticks(range(count))
        axes.set_yticks(ticks_of(blocks))
        figure.colorbar(image).set_label("KL(model ‖ model under ablation), nats", fontsize=8)
    return figure


def bases(model: FrozenModel, lens: ResidualLens, ids: Tensor, options, save) -> None:
    """Causal bases of some lenses, and the effects of their directions."""
    lenses = {"tuned": lens, "logit": LogitLens.from_model(model)}
    found = {
        name: causal_basis(model, lenses[name], ids, options.layer, options.k, skip_first=1)
        for name in options.bases
    }
    for name, basis in found.items():
        print(name, basis.influence_nats.tolist(), basis.standard_errors.tolist())
        print("steps", basis.steps.tolist(), "tokens", basis.tokens)
    save("influence", influences(found))
    for name, basis in found.items():
        effects = causal_effects(model, lenses[name], ids, basis.directions(), skip_first=1)
        print(name, effects.to_dataframe().to_string(), effects.spearman())
        if name == "tuned":
            save("effects", effects_scatter(effects))


def alignment(model: FrozenModel, lens: ResidualLens, ids: Tensor, options, save) -> None:
    """Alignment of both lenses if the first directions of the tuned lens's basis are ablated."""
    lenses = {"tuned": lens, "logit": LogitLens.from_model(model)}
    targets = [
        causal_basis(model, lens, ids, layer, options.span, skip_first=1).directions()
        for layer in options.layers
    ]
    found = response_alignment(model, lenses, ids, targets, skip_first=1)
    print(alignment_table(found).to_string())
    save("alignment", alignment_by_layer(found))


def inversion(model: FrozenModel, lens: ResidualLens, ids: Tensor, options, save) -> None:
    """KL of the best state at every layer for the model's distributions at some positions."""
    final = model.residual_stream(ids[:1])[-1][0, -options.inverted :]
    wanted = log_probs(model.unembedding(final))
    lenses = {"tuned": lens, "logit": LogitLens.from_model(model)}
    shown = styles(list(lenses), {})
    with new_figure(4.6, 3.0) as figure:
        axes = figure.subplots()
        axes.set_yscale("log")
        for name, one in lenses.items():
            means = []
            for layer in options.layers:
                found = one.invert(wanted, layer, max_steps=options.max_steps)
                print(name, layer, found.kl_nats.tolist(), found.steps.tolist())
                means.append(found.kl_nats.mean().item())
            axes.plot(options.layers, means, label=name, **shown[name])
        axes.set_xticks(options.layers)
        plain_log_ticks(axes.yaxis)
        axes.set_xlabel("layer")
        axes.set_ylabel("KL(wanted ‖ lens), nats")
        axes.legend(frameon=False)
    save("inversion", figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model")
    parser.add_argument("--lens", default="checkpoints/embedded")
    parser.add_argument("--dataset")
    parser.add_argument("--name", default="embedded")
    parser.add_argument("--block", type=int, default=512, help="tokens in a block, as in training")
    parser.add_argument("--seq-len", type=int, default=64)
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--layer", type=int, default=4)
    parser.add_argument("--layers", type=int, nargs="+", default=list(range(8)))
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--bases", nargs="+", default=["tuned", "logit"])
    parser.add_argument("--span", type=int, default=10)
    parser.add_argument("--inverted", type=int, default=8, help="positions to invert")
    parser.add_argument("--max-steps", type=int, default=500)
    parser.add_argument("--parts", nargs="+", default=["heads", "bases", "alignment", "inversion"])
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    model = load_model(options.model)
    lens = TunedLens.load(options.lens, model)
    ids = held_out(model, options)

    def save(what, figure) -> None:
        path = options.output / f"causal-{what}-{options.name}.png"
        path.write_bytes(rendered(figure, "png"))

    for part in options.parts:
        if part == "heads":
            heads(model, lens, ids, range(model.identity.n_layers), save)
        else:
            {"bases": bases, "alignment": alignment, "inversion": inversion}[part](
                model, lens, ids, options, save
            )


if __name__ == "__main__":
    main()
