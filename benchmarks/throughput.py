"""One training step at GPT-2 small's shape: ours, tuned-lens' inner loop, the products alone.

    python benchmarks/throughput.py [--device cuda] [--tokens 1024]
    python benchmarks/throughput.py --model M       at the shape of a model folder

All steps use the same tensors in one process and take turns; the table shows medians. tuned-lens'
loop follows its version 0.2.0: autocast, autograd through the logits, one backward pass and one
`.item()` per layer. The limit is the time of the matrix products of 4 · d_model · vocab FLOPs per
token and layer alone, into memory that is already allocated.
"""

import argparse
from collections.abc import Callable

import torch
from timing import medians
from torch import nn
from transformers import AutoConfig

from tunedlens import TunedLens
from tunedlens.cli.guard import keep_freed_memory
from tunedlens.engine import accumulate_gradient
from tunedlens.engine.objective import LensKL
from tunedlens.engine.vocab_sample import draw_sample
from tunedlens.model import ModelIdentity, Unembedding

PRODUCTS, PEER = "the products alone", "tuned-lens' loop"


def make_steps(
    lens: TunedLens, unembedding: Unembedding, states: torch.Tensor, sample: int
) -> dict[str, Callable[[], object]]:
    """The steps that are timed, on the same states."""
    device, (vocab, d_model) = states.device, unembedding.weight.shape
    objective = LensKL(unembedding.centred(), dtype=torch.bfloat16)
    weight, chunk = unembedding.weight.bfloat16(), min(states.shape[1], objective.chunk)
    logits = torch.empty(chunk, vocab, dtype=torch.bfloat16, device=device)
    gradient = torch.empty(chunk, d_model, dtype=torch.bfloat16, device=device)

    def products() -> None:
        for part in states.bfloat16().split(chunk, 1):
            for hidden in part[:-1]:
                count = len(hidden)
                torch.mm(hidden, weight.T, out=logits[:count])
                torch.mm(logits[:count], weight, out=gradient[:count])

    def exact() -> None:
        lens.zero_grad()
        accumulate_gradient(lens, states, objective)

    def sampled() -> None:
        lens.zero_grad()
        usage = torch.zeros(vocab, device=device)
        model = objective.model_side(states[-1], usage)
        keys = objective.keys(draw_sample(usage, sample, seed=0, step=0))
        accumulate_gradient(lens, states, objective, model=model, keys=keys)

    def peer() -> None:
        lens.zero_grad()
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
            labels = unembedding(states[-1]).log_softmax(-1)
        for layer in range(lens.n_layers):
            with torch.autocast(device.type, torch.bfloat16):
                log_probs = lens(states[layer], layer).log_softmax(-1)
                loss = (labels.exp() * (labels - log_probs)).sum(-1).mean()
            loss.item()
            loss.backward()

    return {
        PRODUCTS: products,
        "ours, exact": exact,
        f"ours, {sample:,} tokens of the vocabulary": sampled,
        PEER: peer,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--model", help="a model folder whose shape is used")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--d-model", type=int, default=768)
    parser.add_argument("--vocab", type=int, default=50257)
    parser.add_argument("--sample", type=int, default=6144)
    parser.add_argument("--rounds", type=int, default=5)
    flags = parser.parse_args()
    device = torch.device(flags.device)
    layers, tokens, d_model, vocab = flags.layers, flags.tokens, flags.d_model, flags.vocab
    if flags.model:
        config = AutoConfig.from_pretrained(flags.model)
        layers, d_model, vocab = config.num_hidden_layers, config.hidden_size, config.vocab_size
    keep_freed_memory()
    torch.manual_seed(0)
    norm = nn.LayerNorm(d_model)
    unembedding = Unembedding(norm, torch.randn(vocab, d_model) * 0.1, None).to(device)
    lens = TunedLens(unembedding, ModelIdentity("random", None, layers, d_model, vocab, ""))
    states = torch.randn(layers + 1, tokens, d_model, device=device)
    steps = make_steps(lens, unembedding, states, flags.sample)
    seconds = medians(steps, flags.rounds, device)
    limit, slow = seconds[PRODUCTS], seconds[PEER]
    flops = 4 * d_model * vocab * tokens * layers
    print(f"{layers} layers, d_model {d_model}, vocabulary {vocab:,}, {tokens:,} tokens, {device}")
    print(f"products: {flops / limit / 1e12:.2f} TFLOP/s in bfloat16\n")
    print("| step | seconds | fraction of the limit | speedup over tuned-lens' loop |")
    print("|---|---:|---:|---:|")
    for name, value in seconds.items():
        print(f"| {name} | {value:.2f} | {limit / value:.0%} | {slow / value:.2f} |")


if __name__ == "__main__":
    main()
