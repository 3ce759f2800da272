"""Held-out KL and throughput of the same run on several processes.

    python benchmarks/processes.py [--threads 4] [--tokens 65536] [train.py's flags]

Every row is a run with `torchrun` on this machine's CPUs. All rows have the same total number of
threads. The difference is that of the layer that differs most from the run with one process. The
last row is a control: one process, with every state changed by about one unit in its last place.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from tunedlens.cli import train_command
from tunedlens.training.states import StateReader

ROWS = [  # processes, further flags
    (1, []),
    (1, ["--micro-batch-size", "1"]),
    (2, []),
    (2, ["--shard-layers"]),
    (4, []),
    (4, ["--shard-layers"]),
    (1, ["--perturb"]),
]


def perturb_states() -> None:
    read, generator = StateReader.read, torch.Generator().manual_seed(0)

    def perturbed(self, input_ids):
        for states in read(self, input_ids):
            yield [
                state * (1 + 2**-24 * torch.randn(state.shape, generator=generator))
                for state in states
            ]

    StateReader.read = perturbed


def worker(flags: list[str]) -> int:
    if "--perturb" in flags:
        flags.remove("--perturb")
        perturb_states()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    return train_command(flags)


def run(processes: int, threads: int, flags: list[str]) -> dict:
    """The manifest of a run."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "run"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc_per_node", str(processes), __file__, "--worker"]
        subprocess.run(
            [*command, *flags, "--device", "cpu", "--output", str(output)],
            env=os.environ | {"OMP_NUM_THREADS": str(max(1, threads // processes))},
            check=True,
            stdout=subprocess.DEVNULL,
        )
        return json.loads((output / "config.json").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--tokens", default="65536")
    options, flags = parser.parse_known_args()
    flags += ["--tokens", options.tokens]
    print(f"{options.threads} threads in total, torch {torch.__version__}\n")
    print("| processes | flags | mean held-out KL | largest difference | tokens/s | speedup |")
    print("|---:|---|---:|---:|---:|---:|")
    first = None
    for processes, further in ROWS:
        manifest = run(processes, options.threads, [*flags, *further])
        history = manifest["progress"]["history"]
        start, end = history[0], history[-1]
        speed = (end["tokens"] - start["tokens"]) / (end["seconds"] - start["seconds"])
        results = manifest["held_out"]["results"]
        kl = [r["value"] for r in results if r["lens"] != "logit" and r["metric"] == "kl_nats"]
        first = first or (kl, speed)
        difference = max(abs(a / b - 1) for a, b in zip(kl, first[0], strict=True))
        print(
            f"| {processes} | {' '.join(further)} | {sum(kl) / len(kl):.8f} | {difference:.1e} | "
            f"{speed:,.0f} | {speed / first[1]:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    if "--worker" in sys.argv:
        sys.argv.remove("--worker")
        sys.exit(worker(sys.argv[1:]))
    main()
