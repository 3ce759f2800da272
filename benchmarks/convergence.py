"""How far from its end the fit stands, on the embedded GPT-2.

    python benchmarks/convergence.py

Two figures for every layer, at the closed form and at the lens that the default leaves.
The gradient norm is in the preconditioner's metric: the gradient in the evened-out inputs,
times the error that the closed form leaves, so that it is in nats for a step as large as
that error. Its square is the inner product of the gradients of two halves of fresh text,
which noise does not raise. And the mean KL after the default and after several times its
tokens says what is left to gain.
"""

import argparse
import dataclasses
import tempfile
from pathlib import Path

import torch
from accelerate import Accelerator

from tunedlens import TrainConfig, TunedLens, checkpoint, load_model, train
from tunedlens.corpus import load_corpora
from tunedlens.fit import LeastSquares, accumulate_gradient, evening
from tunedlens.objective import LensKL
from tunedlens.training.settings import settled
from tunedlens.training.states import StateReader

BLOCKS = 64


def gradient_norms(lens: TunedLens, first: LeastSquares, halves: list, kl: LensKL) -> list[float]:
    evened = evening(first.second_moment).float()
    error = first.mean_square_error(first.solve(1e-4)).sqrt().float()
    found = []
    for half in halves:
        lens.zero_grad()
        for states in half:
            accumulate_gradient(lens, states, kl, share=1 / len(half))
        columns = [torch.cat([t.weight.grad, t.bias.grad[:, None]], 1) for t in lens.translators]
        found.append(torch.stack(columns) @ evened * error[:, None, None])
    square = (found[0] * found[1]).sum((1, 2))
    return square.clamp(min=0).sqrt().tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=3, help="tokens of the longer run")
    flags = parser.parse_args()
    model, accelerator = load_model(device="cpu"), Accelerator(cpu=True)
    config = settled(TrainConfig(), model, accelerator)
    train_side = load_corpora(config.corpus, model.tokenizer).train
    reader = StateReader(model, config, accelerator)
    # Other blocks than the first ones of the runs below: another seed orders them.
    batches = train_side.batches(8, seed=1)
    states = [part for _ in range(BLOCKS // 8) for part in reader.read(next(batches).input_ids)]
    halves = [states[::2], states[1::2]]
    first = LeastSquares(model.identity.n_layers, model.identity.d_model)
    for part in states:
        first.add(part[:-1], part[-1])
    kl = LensKL(model.unembedding.centred(), dtype=reader.dtype)

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        ends = {}
        for name, fit in (("closed form", "closed-form"), ("default", "preconditioned")):
            train(dataclasses.replace(TrainConfig(), fit=fit), path / name)
            lens = TunedLens.load(path / name, model)
            ends[name] = gradient_norms(lens, first, halves, kl)
        progress = checkpoint.read_manifest(path / "default")["progress"]
        more = TrainConfig(tokens=flags.times * progress["tokens"])
        train(more, path / "more")
        further = checkpoint.read_manifest(path / "more")["progress"]["curve"]["looks"]
    print("\n| layer | gradient norm, closed form | default | ratio |\n|---:|---:|---:|---:|")
    for layer, (start, end) in enumerate(zip(*ends.values(), strict=True)):
        print(f"| {layer} | {start:.4f} | {end:.4f} | {end / start:.1%} |")
    now = progress["curve"]["looks"][-1]
    then = further[-1]
    before, after = (sum(look["kl_nats"]) / len(look["kl_nats"]) for look in (now, then))
    print(
        f"\n{now['tokens']:,} tokens: {before:.4f} nats; {then['tokens']:,} tokens: {after:.4f} "
        f"nats, {1 - after / before:.2%} less"
    )


if __name__ == "__main__":
    main()
