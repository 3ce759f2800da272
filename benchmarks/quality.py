"""Held-out KL against tokens and seconds, for the default fit and for published baselines.

    python benchmarks/quality.py                         the embedded GPT-2
    python benchmarks/quality.py --model M --dataset D   another model and text

Only the fit differs: text, held-out text, objective and precision are the same. Seconds include
validation, and tokens include those of the closed form. The baselines get their best
hyperparameters: learning rates are swept with one seed, and then the best one runs with three
seeds. Runs that are already in the results are not repeated. The results are written to
quality-<name>.json, .md, .png and .svg in the folder of this file.
"""

import argparse
import dataclasses
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from tunedlens import CorpusConfig, ModelConfig, TrainConfig, checkpoint, files, train
from tunedlens.cli.guard import keep_freed_memory
from tunedlens.report.plots.style import (
    Ends,
    name_lines,
    new_figure,
    plain_log_ticks,
    rendered,
    short_count,
)

HERE = Path(__file__).parent
RATES = {
    "sgd": (0.1, 0.3, 1.0, 3.0),
    "muon": (0.01, 0.02, 0.04, 0.08),
}
LABELS = {
    "preconditioned": "ours, default",
    "sgd": "SGD (tuned-lens)",
    "muon": "Muon",
}

COLORS_OF = {"preconditioned": "#0072B2", "sgd": "#D55E00", "muon": "#009E73"}
DASHES = {"preconditioned": "-", "sgd": "--", "muon": "-."}


def run(config: TrainConfig) -> list[dict[str, Any]]:
    """The learning curve of one whole fit."""
    with tempfile.TemporaryDirectory() as folder:
        train(config, Path(folder) / "run")
        progress = checkpoint.read_manifest(Path(folder) / "run")["progress"]
    start = progress["init_tokens"]
    return [result | {"model_tokens": result["tokens"] + start} for result in progress["history"]]


def mean(result: dict[str, Any]) -> float:
    return statistics.fmean(result["kl_nats"])


def reached(curve: list[dict[str, Any]], goal: list[float] | float) -> dict[str, Any] | None:
    """The first result at or below a mean KL, or at or below a KL for every layer."""
    for result in curve:
        if isinstance(goal, float):
            if mean(result) <= goal:
                return result
        elif all(ours <= theirs for ours, theirs in zip(result["kl_nats"], goal, strict=True)):
            return result
    return None


class Results:
    """Curves by fit, tokens, rate and seed, saved after every run."""

    def __init__(self, path: Path, base: TrainConfig) -> None:
        self._path, self._base = path, base
        self.runs = json.loads(path.read_text()) if path.exists() else {}

    def curve(self, fit: str, tokens: int | None, rate: float | None, seed: int) -> Any:
        name = f"{fit} tokens={tokens} lr={rate} seed={seed}"
        if name not in self.runs:
            print(f"== {name}", flush=True)
            self.runs[name] = run(
                dataclasses.replace(self._base, fit=fit, tokens=tokens, lr=rate, seed=seed)
            )
            files.write_json(self._path, self.runs)
        return self.runs[name]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model")
    parser.add_argument("--dataset")
    parser.add_argument("--seq-len", type=int)
    parser.add_argument("--name", default="embedded")
    parser.add_argument("--tokens", type=int, default=512_000, help="budget of the baselines")
    parser.add_argument(
        "--max-tokens", type=int, help="budget of the default fit (default: that of train.py)"
    )
    parser.add_argument("--evaluate-tokens", type=int, default=16_384)
    parser.add_argument(
        "--validation-tokens", type=int, default=8192, help="positions of a validation, in all fits"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="sweep two rates instead of all")
    parser.add_argument("--fits", nargs="+", default=["sgd", "muon"])
    flags = parser.parse_args()
    keep_freed_memory()
    base = TrainConfig(
        model=ModelConfig(model=flags.model),
        corpus=CorpusConfig(dataset=flags.dataset, seq_len=flags.seq_len),
        evaluate_tokens=flags.evaluate_tokens,
        validation_tokens=flags.validation_tokens,
        max_tokens=flags.max_tokens,
    )
    results = Results(HERE / f"quality-{flags.name}.json", base)
    seeds, best = range(flags.seeds), {}
    for fit in flags.fits:
        rates = RATES[fit][1:3] if flags.quick else RATES[fit]
        sweep = {rate: results.curve(fit, flags.tokens, rate, 0) for rate in rates}
        best[fit] = min(sweep, key=lambda rate: mean(sweep[rate][-1]))
    curves = {"preconditioned": [results.curve("preconditioned", None, None, s) for s in seeds]}
    for fit, rate in best.items():
        curves[fit] = [results.curve(fit, flags.tokens, rate, seed) for seed in seeds]
    text = table(curves, best)
    print(text)
    files.write(HERE / f"quality-{flags.name}.md", text)
    draw(curves, HERE / f"quality-{flags.name}")


def table(curves: dict[str, list[Any]], best: dict[str, float]) -> str:
    ours = curves["preconditioned"]
    lines = [
        "| fit | tokens through the model | seconds | mean KL (nats) | by layer |",
        "|---|---:|---:|---:|---|",
    ]

    def row(name: str, results: list[Any]) -> str:
        means = [mean(result) for result in results]
        layers = [statistics.fmean(kl) for kl in zip(*(k["kl_nats"] for k in results), strict=True)]
        tokens = statistics.median(result["model_tokens"] for result in results)
        seconds = statistics.median(result["seconds"] for result in results)
        spread = max(means) - min(means)
        return (
            f"| {name} | {tokens:,.0f} | {seconds:.0f} | {statistics.fmean(means):.4f} "
            f"(spread {spread:.4f}) | {' '.join(f'{kl:.3f}' for kl in layers)} |"
        )

    lines.append(row("closed form", [curve[0] for curve in ours]))
    for fit, rate in best.items():
        lines.append(row(f"{LABELS[fit]}, lr {rate:g}", [curve[-1] for curve in curves[fit]]))
    budget = min((curves[fit][0][-1]["model_tokens"] for fit in best), default=0)
    within = [[result for result in curve if result["model_tokens"] <= budget] for curve in ours]
    if all(within):
        name = f"ours, at the last validation within {budget:,} tokens"
        lines.append(row(name, [results[-1] for results in within]))
    lines.append(row(LABELS["preconditioned"], [curve[-1] for curve in ours]))
    for fit in best:
        ends = [curve[-1] for curve in curves[fit]]
        layers = [statistics.fmean(kl) for kl in zip(*(k["kl_nats"] for k in ends), strict=True)]
        tokens = statistics.median(end["model_tokens"] for end in ends)
        seconds = statistics.median(end["seconds"] for end in ends)
        for goal, what in (
            (statistics.fmean(layers), f"mean KL of {LABELS[fit]}"),
            (layers, f"KL of {LABELS[fit]} at every layer"),
        ):
            results = [reached(curve, goal) for curve in ours]
            if None in results:
                lines.append(f"| ours does not reach the final {what} | | | | |")
                continue
            our_tokens = statistics.median(result["model_tokens"] for result in results)
            our_seconds = statistics.median(result["seconds"] for result in results)
            name = (
                f"ours, once it reaches the final {what}: 1/{tokens / our_tokens:.1f} "
                f"of its tokens, 1/{seconds / our_seconds:.1f} of its seconds"
            )
            lines.append(row(name, results))
    return "\n".join(lines) + "\n"


def draw(curves: dict[str, list[Any]], path: Path) -> None:
    """Draw a line for every seed, with the name of the fit at the mean of its ends."""
    columns = {"model_tokens": "tokens through the model", "seconds": "seconds"}
    with new_figure(8, 3.2) as figure:
        panels = figure.subplots(1, 2, sharey=True)
        ends: Ends = {}
        for axes, (key, label) in zip(panels, columns.items(), strict=True):
            for fit, runs in curves.items():
                for curve in runs:
                    results = [result for result in curve if result["model_tokens"]]
                    x, y = [result[key] for result in results], [mean(result) for result in results]
                    axes.plot(x, y, color=COLORS_OF[fit], linestyle=DASHES[fit])
                last = statistics.fmean(mean(curve[-1]) for curve in runs)
                ends[LABELS[fit]] = last, COLORS_OF[fit]
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.set_xlabel(label)
            plain_log_ticks(axes.xaxis, short_count)
            plain_log_ticks(axes.yaxis)
        panels[0].set_ylabel("held-out KL, mean over layers, nats")
        name_lines(panels[1], ends)
    for kind in ("png", "svg"):
        files.write(path.with_suffix(f".{kind}"), rendered(figure, kind))


if __name__ == "__main__":
    main()
