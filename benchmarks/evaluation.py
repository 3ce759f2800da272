"""Seconds of an evaluation: ours, a lower bound, and tuned-lens' loop on the same text.

    python benchmarks/evaluation.py                 the embedded GPT-2
    python benchmarks/evaluation.py --gpt2          a random model of GPT-2 small's shape
    python benchmarks/evaluation.py --model M       a model folder, such as real_model.py writes

Two lenses, logit and tuned, are evaluated at every layer, in float32. The lower bound is the
model's forward pass and the matrix products of 2 · d_model · vocab FLOPs per token, layer and lens,
into memory that is allocated once. tuned-lens' loop follows its version 0.2.0: whole batches,
log-softmax, cross-entropy, entropy and KL of every layer, without compilation. Ours also measures
top-1 and top-10 agreement, accuracy, bias, prediction depth and all standard errors. The three take
turns, and the table shows medians.
"""

import argparse
from collections.abc import Callable
from itertools import islice

import torch
import torch.nn.functional as F
from timing import medians
from transformers import GPT2Config, GPT2LMHeadModel

from tunedlens import CorpusConfig, FrozenModel, LogitLens, TunedLens, load_model
from tunedlens.cli.guard import keep_freed_memory
from tunedlens.corpus import load_splits, resolve_corpus
from tunedlens.engine.objective import chunk_tokens
from tunedlens.evaluation import score_lenses

BLOCKS_AT_A_TIME = 8
BOUND, PEER = "lower bound", "tuned-lens' loop"


def gpt2_shaped() -> FrozenModel:
    torch.manual_seed(0)
    return FrozenModel(GPT2LMHeadModel(GPT2Config()), load_model(device="cpu").tokenizer, "random")


def make_runs(
    model: FrozenModel, blocks: list[torch.Tensor], device: torch.device
) -> dict[str, Callable[[], object]]:
    """The three functions that are timed, on the same blocks."""
    batches = torch.stack(blocks).to(device).split(BLOCKS_AT_A_TIME)
    lenses = {"logit": LogitLens.from_model(model), "tuned": TunedLens.from_model(model)}
    vocab = model.identity.vocab_size
    chunk = chunk_tokens(vocab, device)
    logits = torch.empty(chunk, vocab, device=device)

    def ours() -> None:
        score_lenses(model, lenses, blocks)

    @torch.no_grad()
    def peer() -> None:
        for ids in batches:
            *states, final = model.residual_stream(ids)
            final_log_probs = model.unembedding(final).log_softmax(-1)
            final_probs, labels = final_log_probs.exp(), ids[:, 1:].flatten()
            for lens in lenses.values():
                for layer, hidden in enumerate(states):
                    log_probs = lens(hidden, layer).log_softmax(-1)
                    probs = log_probs.exp()
                    F.cross_entropy(log_probs[:, :-1].flatten(0, 1), labels, reduction="none")
                    (-probs * log_probs).sum(-1)
                    (final_probs * (final_log_probs - log_probs)).sum(-1)

    @torch.no_grad()
    def floor() -> None:
        for ids in batches:
            states = [s[:, :-1].flatten(0, 1) for s in model.residual_stream(ids)]
            for _ in lenses:
                for hidden in states[:-1]:
                    for part in hidden.split(chunk):
                        torch.mm(part, model.unembedding.weight.T, out=logits[: len(part)])

    return {BOUND: floor, "ours": ours, PEER: peer}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpt2", action="store_true")
    parser.add_argument("--model")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    flags = parser.parse_args()
    keep_freed_memory()
    device = torch.device(flags.device)
    model = gpt2_shaped() if flags.gpt2 else load_model(flags.model, device="cpu")
    model.to(device)
    model.unembedding.to(device)
    config = resolve_corpus(
        CorpusConfig(dataset="embedded", seq_len=flags.seq_len),
        model.name,
        model.context,
        model.bos_id is not None,
    )
    count = flags.tokens // (flags.seq_len - 1)
    blocks = list(islice(load_splits(config, model.tokenizer).validation.shuffled(), count))
    seconds = medians(make_runs(model, blocks, device), flags.rounds, device)
    identity, tokens = model.identity, count * (flags.seq_len - 1)
    print(
        f"{identity.n_layers} layers, d_model {identity.d_model}, vocabulary "
        f"{identity.vocab_size:,}, {tokens:,} tokens, two lenses, {device}\n"
    )
    print("| evaluation | seconds | relative to the lower bound |")
    print("|---|---:|---:|")
    for name, value in seconds.items():
        print(f"| {name} | {value:.2f} | {value / seconds[BOUND]:.2f} |")


if __name__ == "__main__":
    main()
