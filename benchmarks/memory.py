"""Peak memory of a gradient, in addition to states, translators and unembedding.

    python benchmarks/memory.py [--device cuda] [--kernel attention]

Every row is measured in a separate process. On a CPU, the peak of its resident memory is read from
the kernel, which works only on Linux. The last column is the memory of the logits of all layers in
float32.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import torch
from torch import nn

from tunedlens import TunedLens
from tunedlens.engine import accumulate_gradient
from tunedlens.engine.objective import LensKL
from tunedlens.model import ModelIdentity, Unembedding

D_MODEL = 128
SHAPES = [
    *((12, tokens, 50_257) for tokens in (512, 1024, 2048, 8192)),
    *((layers, 2048, 50_257) for layers in (1, 4, 24)),
    *((4, 1024, vocab) for vocab in (4096, 128_256, 256_000)),
]


def resident_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def measure(layers: int, tokens: int, vocab: int, device: torch.device, kernel: str) -> int:
    torch.manual_seed(0)
    unembedding = Unembedding(nn.LayerNorm(D_MODEL), torch.randn(vocab, D_MODEL), None).to(device)
    lens = TunedLens(unembedding, ModelIdentity("random", None, layers, D_MODEL, vocab, ""))
    states = torch.randn(layers + 1, tokens, D_MODEL, device=device)
    objective = LensKL(unembedding.centred(), dtype=torch.bfloat16, kernel=kernel)
    for parameter in lens.parameters():
        parameter.grad = torch.zeros_like(parameter)
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        accumulate_gradient(lens, states, objective)
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = resident_bytes("VmRSS")
    accumulate_gradient(lens, states, objective)
    return resident_bytes("VmHWM") - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--kernel", default="products")
    parser.add_argument("--shape", type=int, nargs=3, help="measure one shape in this process")
    flags = parser.parse_args()
    if flags.shape:
        print(measure(*flags.shape, torch.device(flags.device), flags.kernel))
        return
    print("| layers | tokens | vocabulary | peak, MB | all logits, MB |")
    print("|---:|---:|---:|---:|---:|")
    for shape in SHAPES:
        command = [sys.executable, __file__, "--device", flags.device]
        command += ["--kernel", flags.kernel, "--shape"]
        output = subprocess.run(
            [*command, *map(str, shape)], capture_output=True, text=True, check=True
        ).stdout
        layers, tokens, vocab = shape
        logits = layers * tokens * vocab * 4
        print(
            f"| {layers} | {tokens:,} | {vocab:,} | {int(output) / 1e6:,.0f} | "
            f"{logits / 1e6:,.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
