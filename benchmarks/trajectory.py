"""Seconds and memory of a trajectory of one long text, compared with tuned-lens.

    python benchmarks/trajectory.py [--tokens 1024]

The model is random, of GPT-2 small's shape. Every row is measured in a separate process. The peak
of its resident memory, minus the memory of the loaded model, is read from the kernel (Linux). If
tuned-lens 0.2.0 is installed, its `PredictionTrajectory` is measured too, with its logit lens; it
holds the log-probabilities of all layers and positions.
"""

import argparse
import importlib.util
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from tunedlens import FrozenModel, LogitLens, TunedLens, load_model, trajectory

RUNS = ("ours, logit lens", "ours, logit and tuned lens", "tuned-lens, logit lens")


def resident_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def measure(run: str, tokens: int) -> tuple[float, int]:
    torch.manual_seed(0)
    gpt2 = GPT2LMHeadModel(GPT2Config())
    model = FrozenModel(gpt2, load_model(device="cpu").tokenizer, "random")
    ids = torch.randint(0, 4096, (tokens,))
    lenses = {"logit": LogitLens.from_model(model)}
    if "tuned lens" in run:
        lenses["tuned"] = TunedLens.from_model(model)
    if run.startswith("tuned-lens"):
        from tuned_lens.nn.lenses import LogitLens as PeerLens
        from tuned_lens.plotting import PredictionTrajectory

        peer = PeerLens.from_model(gpt2)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before, start = resident_bytes("VmRSS"), time.perf_counter()
    if run.startswith("tuned-lens"):
        with torch.no_grad():
            PredictionTrajectory.from_lens_and_model(peer, gpt2, ids.tolist(), model.tokenizer)
    else:
        trajectory(model, lenses, ids)
    return time.perf_counter() - start, resident_bytes("VmHWM") - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--run", choices=RUNS, help="measure one row in this process")
    flags = parser.parse_args()
    if flags.run:
        print(*measure(flags.run, flags.tokens))
        return
    print("| trajectory | seconds | peak, MB |\n|---|---:|---:|")
    for run in RUNS:
        if run.startswith("tuned-lens") and importlib.util.find_spec("tuned_lens") is None:
            continue
        found = []
        for _ in range(flags.rounds):
            command = [sys.executable, __file__, "--tokens", str(flags.tokens), "--run", run]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            found.append([float(word) for word in output.split()[-2:]])
        seconds, peak = (statistics.median(column) for column in zip(*found, strict=True))
        print(f"| {run} | {seconds:.1f} | {peak / 1e6:,.0f} |")


if __name__ == "__main__":
    main()
