"""Compares our KL and cross-entropy with those computed from tuned-lens' own lens objects.

    pip install tuned-lens==0.2.0      (in a separate environment)
    python benchmarks/tuned_lens_values.py [--tokens 8176]

The model is the embedded one, and the translators of checkpoints/embedded are copied into
tuned-lens' `TunedLens`. From its log-probabilities, the KL and the cross-entropy of the next token
are computed directly in float64 at the same positions, summed and divided once. The last column is
the KL that its `eval` command would print: the mean over blocks, including the last position of
each block (which has no cross-entropy), multiplied by the factor from nats to bits per byte.
"""

import argparse
import math
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from tuned_lens.nn.lenses import LogitLens as PeerLogitLens
from tuned_lens.nn.lenses import TunedLens as PeerTunedLens

from tunedlens import CorpusConfig, LogitLens, TunedLens, load_model
from tunedlens.corpus import load_splits, resolve_corpus
from tunedlens.evaluation import score_lenses

LENS = Path(__file__).parents[1] / "checkpoints" / "embedded"


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=8176)
    flags = parser.parse_args()
    model = load_model(device="cpu")
    ours = {"logit": LogitLens.from_model(model), "tuned": TunedLens.load(LENS, model)}
    peer = {
        "logit": PeerLogitLens.from_model(model.model),
        "tuned": PeerTunedLens.from_model(model.model),
    }
    for theirs, translator in zip(peer["tuned"], ours["tuned"].all_translators(), strict=True):
        theirs.weight.copy_(translator.weight)
        theirs.bias.copy_(translator.bias)

    splits = load_splits(
        resolve_corpus(CorpusConfig(), model.name, model.context, model.bos_id is not None),
        model.tokenizer,
    )
    blocks = list(islice(splits.validation.shuffled(), flags.tokens // 511))
    evaluation = score_lenses(model, ours, blocks)
    n_layers = model.identity.n_layers
    shape = (2, n_layers)
    kl, cross_entropy, their_kl = (torch.zeros(shape, dtype=torch.float64) for _ in range(3))
    for block in blocks:
        output = model.model(block[None], output_hidden_states=True)
        final = output.logits[0].double().log_softmax(-1)
        for row, lens in enumerate(peer.values()):
            for layer, hidden in enumerate(output.hidden_states[:-1]):
                log_probs = lens(hidden, layer)[0].double().log_softmax(-1)
                nats = (final.exp() * (final - log_probs)).sum(-1)
                kl[row, layer] += nats[:-1].sum()
                their_kl[row, layer] += nats.mean()
                cross_entropy[row, layer] += F.nll_loss(log_probs[:-1], block[1:], reduction="sum")
    kl, cross_entropy = kl / evaluation.tokens, cross_entropy / evaluation.tokens
    bits_per_nat_of_text = evaluation.tokens / evaluation.text_bytes / math.log(2)
    their_kl *= bits_per_nat_of_text / len(blocks)
    print(
        "| lens | layer | KL, ours | KL, theirs | CE, ours | CE, theirs | KL in their command |\n"
        "|---|---:|---:|---:|---:|---:|---:|"
    )
    largest = 0.0
    for row, name in enumerate(peer):
        for layer in range(n_layers):
            found = [
                evaluation.by_layer(name, metric)[layer].value
                for metric in ("kl_nats", "cross_entropy_nats")
            ]
            expected = [float(kl[row, layer]), float(cross_entropy[row, layer])]
            largest = max(largest, *(abs(a / b - 1) for a, b in zip(found, expected, strict=True)))
            print(
                f"| {name} | {layer} | {found[0]:.5f} | {expected[0]:.5f} | {found[1]:.5f} | "
                f"{expected[1]:.5f} | {their_kl[row, layer]:.5f} |"
            )
    print(f"\nlargest relative difference {largest:.1e} over {evaluation.tokens:,} positions")


if __name__ == "__main__":
    main()
