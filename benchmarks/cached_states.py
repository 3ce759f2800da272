"""Compares our fit with published ones at some layers of a real model, with states computed once.

    python benchmarks/cached_states.py --dataset wikitext2-valid.txt

The model is SmolLM2-135M (`real_model.py`), at layers 2, 10, 18, 26 and 29. SGD and Muon use the
exact gradient of the KL, start from the logit lens and run with two learning rates each. The closed
form and our steps use their defaults, once with the exact gradient and once with a sample of the
vocabulary. All fits use the same tokens once, in the same order and in steps of 2,048. Seconds
include the model's side of the KL, the closed form, gradients and steps, but not validation or the
model's forward pass, which is the same for all. The KL is exact, on held-out text. The script
writes cached-states.json, .md, .png and .svg to its folder.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import torch
from real_model import real_model
from torch import Tensor

from tunedlens import CorpusConfig, FrozenModel, TunedLens, files, load_model
from tunedlens.cli.guard import keep_freed_memory
from tunedlens.corpus import load_splits, resolve_corpus
from tunedlens.engine import accumulate_gradient
from tunedlens.engine.backend import DTYPES, fastest_backend
from tunedlens.engine.objective import LensKL
from tunedlens.engine.vocab_sample import draw_sample
from tunedlens.fit import LeastSquares, LensOptimizer, PreconditionedMuon, TorchOptimizer
from tunedlens.model import ModelIdentity
from tunedlens.training.plan import next_validation_step

HERE = Path(__file__).parent
LAYERS = (2, 10, 18, 26, 29)
STEP, HELD_OUT, SAMPLE = 2048, 2048, 6144
RATES = {"sgd": (1.0, 3.0), "muon": (0.04, 0.08)}
LABELS = {"sgd": "SGD", "muon": "Muon"}
States = list[Tensor]


class Problem:
    """Cached states of some layers, for training and held out, and the objective."""

    def __init__(self, model: FrozenModel, dataset: str, tokens: int) -> None:
        config = resolve_corpus(
            CorpusConfig(dataset=dataset), model.name, model.context, model.bos_id is not None
        )
        splits = load_splits(config, model.tokenizer)
        backend = fastest_backend(model.unembedding)
        self.dtype = DTYPES[backend.precision]
        self.objective = LensKL(
            model.unembedding.centred(), dtype=self.dtype, kernel=backend.kernel
        )
        self.exact = LensKL(model.unembedding.centred())
        identity = model.identity
        self._unembedding = model.unembedding
        self._identity = ModelIdentity(
            "layers", None, len(LAYERS), identity.d_model, identity.vocab_size, ""
        )
        blocks = (batch.input_ids for batch in splits.train.batches(1, seed=0))
        self.train = self._states(model, islice(blocks, tokens // config.seq_len))
        held_out = (block[None] for block in splits.validation.shuffled())
        self.held_out = self._states(model, islice(held_out, HELD_OUT // config.seq_len))
        with torch.no_grad():
            self._held_out_side = self.exact.model_side(self.held_out[-1])

    def _states(self, model: FrozenModel, blocks: Iterator[Tensor]) -> States:
        found: list[States] = []
        for block in blocks:
            with torch.autocast("cpu", self.dtype, enabled=self.dtype != torch.float32):
                states = model.residual_stream(block)
            found.append([states[layer].flatten(0, 1).float() for layer in (*LAYERS, -1)])
        return [torch.cat(parts) for parts in zip(*found, strict=True)]

    @property
    def tokens(self) -> int:
        return len(self.train[-1])

    def lens(self) -> TunedLens:
        return TunedLens(self._unembedding, self._identity)

    @torch.no_grad()
    def kl(self, lens: TunedLens) -> list[float]:
        """Exact KL on held-out text, with float32 products."""
        return [
            self.exact.kl(lens.transform_hidden(hidden, layer), self._held_out_side).mean().item()
            for layer, hidden in enumerate(self.held_out[:-1])
        ]


def closed_form(problem: Problem, optimizer: PreconditionedMuon, tokens: int) -> None:
    sums, held_out = (LeastSquares(len(LAYERS), problem.train[-1].shape[1]) for _ in range(2))
    sums.add([state[:tokens] for state in problem.train[:-1]], problem.train[-1][:tokens])
    held_out.add(problem.held_out[:-1], problem.held_out[-1])
    optimizer.initialise(sums, sums.solve(sums.best_ridge(held_out)))


def fit(
    problem: Problem, make: Callable[[TunedLens], LensOptimizer], start: int, sample: int
) -> list:
    """The curve of one fit: tokens, seconds and KL by layer at every validation."""
    optimizer, curve, validations, seconds = make(problem.lens()), [], [0], 0.0
    since = time.perf_counter()

    def validate(tokens: int) -> None:
        nonlocal seconds, since
        seconds += time.perf_counter() - since
        curve.append(
            {"tokens": tokens, "seconds": seconds, "kl_nats": problem.kl(optimizer.result())}
        )
        since = time.perf_counter()

    if isinstance(optimizer, PreconditionedMuon):
        closed_form(problem, optimizer, start)
    validate(start)
    count = (problem.tokens - start) // STEP
    for step in range(count):
        first = start + step * STEP
        states = [state[first : first + STEP] for state in problem.train]
        usage = torch.zeros(len(problem.objective.keys())) if sample else None
        model = problem.objective.model_side(states[-1], usage)
        drawn = None if usage is None else draw_sample(usage, sample, seed=0, step=step)
        keys = problem.objective.keys(drawn)
        accumulate_gradient(optimizer.lens, states, problem.objective, model=model, keys=keys)
        optimizer.step([True] * len(LAYERS), step / count)
        if step + 1 == count or step + 1 == next_validation_step(validations):
            validations.append(step + 1)
            validate(first + STEP)
    return curve


def mean(result: dict) -> float:
    return sum(result["kl_nats"]) / len(result["kl_nats"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a model folder (default: SmolLM2-135M)")
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--tokens", type=int, default=110_592)
    flags = parser.parse_args()
    keep_freed_memory()
    model = load_model(flags.model or real_model(), device="cpu")
    problem = Problem(model, flags.dataset, flags.tokens)
    runs: dict[str, list] = {}

    def ours(lens: TunedLens) -> LensOptimizer:
        return PreconditionedMuon(lens, 0.035, 0.8, 0.0)

    twentieth, fifth = flags.tokens // 20, flags.tokens // 5 // STEP * STEP
    # The first run includes a warm-up, so it is repeated.
    for _ in range(2):
        runs["ours, closed form, 1/20 of the tokens"] = fit(problem, ours, twentieth, SAMPLE)[:1]
    runs["ours, sampled"] = fit(problem, ours, fifth, SAMPLE)
    runs["ours, exact"] = fit(problem, ours, fifth, 0)
    files.write(HERE / "cached-states.json", json.dumps(runs, indent=1) + "\n")
    for name, rates in RATES.items():
        for rate in rates:
            momentum = {"sgd": 0.9, "muon": 0.95}[name]
            decay = {"sgd": 1e-3, "muon": 0.0}[name]
            settings = (name, rate, momentum, decay)

            def make(lens: TunedLens, settings: tuple = settings) -> LensOptimizer:
                return TorchOptimizer(lens, *settings)

            runs[f"{LABELS[name]}, lr {rate:g}"] = fit(problem, make, 0, 0)
            files.write(HERE / "cached-states.json", json.dumps(runs, indent=1) + "\n")
    text = table(runs)
    print(text)
    files.write(HERE / "cached-states.md", text)
    draw(runs, HERE / "cached-states")


def table(runs: dict[str, list]) -> str:
    lines = ["| fit | tokens | seconds | mean KL, nats | by layer |", "|---|---:|---:|---:|---|"]
    for name, curve in runs.items():
        by_layer = " ".join(f"{kl:.3f}" for kl in curve[-1]["kl_nats"])
        lines.append(
            f"| {name} | {curve[-1]['tokens']:,} | {curve[-1]['seconds']:.1f} | "
            f"{mean(curve[-1]):.4f} | {by_layer} |"
        )
    return "\n".join(lines) + "\n"


def draw(runs: dict[str, list], path: Path) -> None:
    import matplotlib.pyplot as plt

    best = {
        label: min(
            (name for name in runs if name.startswith(label)), key=lambda name: mean(runs[name][-1])
        )
        for label in LABELS.values()
    }
    shown = {
        "ours, sampled": ("#0072B2", "-", "o"),
        "ours, exact": ("#56B4E9", "--", "s"),
        best["Muon"]: ("#009E73", "-.", "^"),
        best["SGD"]: ("#D55E00", ":", "v"),
    }
    figure, axes = plt.subplots(figsize=(5.2, 3.4), layout="constrained")
    for name, (color, line, marker) in shown.items():
        curve = [result for result in runs[name] if result["seconds"] > 0.05]
        axes.plot(
            [result["seconds"] for result in curve],
            [mean(result) for result in curve],
            color=color,
            linestyle=line,
            marker=marker,
            markersize=4,
            label=name,
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("seconds (forward pass not counted)")
    axes.set_ylabel("held-out KL(model ‖ lens), nats")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    for kind in ("png", "svg"):
        figure.savefig(path.with_suffix(f".{kind}"), dpi=200)


if __name__ == "__main__":
    main()
