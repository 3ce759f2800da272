"""How far the default run is from convergence, on the embedded GPT-2.

    python benchmarks/convergence.py [--times 3]

The gradient norm is computed for the preconditioned inputs and multiplied by the error of the
closed form, so it is in nats for a step as large as that error. Its square is the inner product of
the gradients on two halves of fresh text, which is not biased by noise. With --times, the script
also trains with several times the tokens and prints by how much this lowers the mean KL.
"""

import argparse
import tempfile
from pathlib import Path

from accelerate import Accelerator

from tunedlens import TrainConfig, TunedLens, checkpoint, load_model, train
from tunedlens.corpus import load_splits
from tunedlens.engine import accumulate_gradient
from tunedlens.engine.objective import LensKL
from tunedlens.fit import LeastSquares, preconditioner
from tunedlens.fit.optimizer import translator_gradients
from tunedlens.training.resolving import resolve
from tunedlens.training.states import StateReader

LENS = Path(__file__).parents[1] / "checkpoints" / "embedded"
BLOCKS = 64


def gradient_norms(lens: TunedLens, first: LeastSquares, halves: list, kl: LensKL) -> list[float]:
    inverse_root = preconditioner(first.second_moment).float()
    error = first.mean_square_error(first.solve(1e-4)).sqrt().float()
    found = []
    for half in halves:
        lens.zero_grad()
        for states in half:
            accumulate_gradient(lens, states, kl, fraction=1 / len(half))
        found.append(translator_gradients(lens) @ inverse_root * error[:, None, None])
    square = (found[0] * found[1]).sum((1, 2))
    return square.clamp(min=0).sqrt().tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--lens", type=Path, default=LENS, help="a lens that the default fit has made"
    )
    parser.add_argument("--times", type=int, help="also train with this many times its tokens")
    flags = parser.parse_args()
    model, accelerator = load_model(device="cpu"), Accelerator(cpu=True)
    plan = resolve(TrainConfig(), model, accelerator)
    train_side = load_splits(plan.corpus, model.tokenizer).train
    reader = StateReader(model, plan, accelerator)
    # Another seed, so that these blocks are not the first ones of the runs below.
    batches = train_side.batches(8, seed=1)
    states = [part for _ in range(BLOCKS // 8) for part in reader.read(next(batches).input_ids)]
    halves = [states[::2], states[1::2]]
    first = LeastSquares(model.identity.n_layers, model.identity.d_model)
    for part in states:
        first.add(part[:-1], part[-1])
    kl = LensKL(model.unembedding.centred(), dtype=reader.dtype)

    with tempfile.TemporaryDirectory() as folder:
        train(TrainConfig(fit="closed-form"), Path(folder) / "closed-form")
        start = TunedLens.load(Path(folder) / "closed-form", model)
        end = TunedLens.load(flags.lens, model)
        norms = [gradient_norms(lens, first, halves, kl) for lens in (start, end)]
        print("\n| layer | gradient norm, closed form | lens | ratio |\n|---:|---:|---:|---:|")
        for layer, (before, after) in enumerate(zip(*norms, strict=True)):
            print(f"| {layer} | {before:.4f} | {after:.4f} | {after / before:.1%} |")
        if not flags.times:
            return
        now = checkpoint.read_manifest(flags.lens)
        train(TrainConfig(tokens=flags.times * now["progress"]["tokens"]), Path(folder) / "more")
        then = checkpoint.read_manifest(Path(folder) / "more")
    means = []
    for manifest in (now, then):
        end = checkpoint.validations(manifest)[-1]
        means.append(end.mean_kl_nats)
        print(f"{end.tokens:,} tokens: {means[-1]:.4f} nats")
    print(f"the mean KL is {1 - means[1] / means[0]:.2%} lower")


if __name__ == "__main__":
    main()
