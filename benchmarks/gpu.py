"""On a GPU: one training step, compared with tuned-lens' loop, and seconds to a lens.

    python benchmarks/gpu.py                 a random model of GPT-2 small's shape
    python benchmarks/gpu.py --model M       a model folder or a name on the hub

A step consists of the model's forward pass, the terms of the model, the gradient of every layer and
the optimizer, on the same token ids. tuned-lens' loop follows its version 0.2.0, with the same
forward pass: autograd through the logits of all tokens, one backward pass and one `.item()` per
layer, then SGD with Nesterov momentum. The steps take turns. The table shows the median time,
measured with synchronisation after a first round that warms up, and the peak of the memory that
torch allocates in one step.

The FLOPs are those of the matrix products: per token, 2 for each parameter of the blocks,
4 · d_model · vocabulary for the model's side, and per layer 4 · d_model · rows (the vocabulary or a
sample of it) and 4 · d_model² for the translator. Their rate is given relative to that of a
bfloat16 product of 8,192 × 8,192 matrices in the same run. The FLOPs of attention, norms, softmaxes
and the optimizer are not counted, although they take time.
"""

import argparse
import dataclasses
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from timing import medians
from transformers import GPT2Config, GPT2LMHeadModel

from tunedlens import CorpusConfig, ModelConfig, TrainConfig, TunedLens, checkpoint, load_model
from tunedlens.cli.guard import keep_freed_memory
from tunedlens.corpus import load_splits
from tunedlens.engine import accumulate_gradient, make_objective
from tunedlens.engine.vocab_sample import draw_sample
from tunedlens.model import FrozenModel
from tunedlens.training import train
from tunedlens.training.plan import TrainPlan
from tunedlens.training.resolving import resolve
from tunedlens.training.run import make_optimizer
from tunedlens.training.states import StateReader

PRECISIONS = {"bf16": "bf16", "tf32": "fp32", "fp32": "fp32"}
"""The precision of the products in the plan, by the name of a row."""
EXACT, SAMPLED, PEER = "ours, exact", "ours, sampled", "tuned-lens' loop"
Step = Callable[[], None]


@contextmanager
def allowing_tf32(allowed: bool) -> Iterator[None]:
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")


def product_rate(size: int, dtype: torch.dtype, device: torch.device) -> float:
    """FLOPs per second of a product of two square matrices."""
    one, other = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / medians({"mm": lambda: one @ other}, 10, device)["mm"]


def our_step(model: FrozenModel, plan: TrainPlan, input_ids: torch.Tensor) -> Step:
    """A step of the default fit."""
    reader = StateReader(model, plan, Accelerator())
    objective = make_objective(model.unembedding.centred(), dtype=reader.dtype)
    optimizer = make_optimizer(TunedLens.from_model(model), plan)
    active, vocab = [True] * model.identity.n_layers, model.identity.vocab_size

    def step() -> None:
        usage = torch.zeros(vocab, device=model.device) if plan.vocab_sample else None
        for states in reader.read(input_ids):
            side, keys = objective.model_side(states[-1], usage), objective.keys()
            if usage is not None:
                keys = objective.keys(draw_sample(usage, plan.vocab_sample, seed=0, step=0))
            accumulate_gradient(optimizer.lens, states, objective, model=side, keys=keys)
        optimizer.step(active, 0.0)

    return step


def peer_step(model: FrozenModel, plan: TrainPlan, input_ids: torch.Tensor) -> Step:
    """A step of tuned-lens' loop."""
    lens, reader = TunedLens.from_model(model), StateReader(model, plan, Accelerator())
    optimizer = torch.optim.SGD(lens.parameters(), 0.1, momentum=0.9, nesterov=True)

    def step() -> None:
        for *states, final in reader.read(input_ids):
            with torch.no_grad(), reader.autocast():
                labels = model.unembedding(final).log_softmax(-1)
            for layer, hidden in enumerate(states):
                with reader.autocast():
                    log_probs = lens(hidden, layer).log_softmax(-1)
                    loss = (labels.exp() * (labels - log_probs)).sum(-1).mean()
                loss.item()
                loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def step_flops(model: FrozenModel, tokens: int, rows: int) -> float:
    """The FLOPs that the matrix products of a step need."""
    identity = model.identity
    blocks = sum(parameter.numel() for parameter in model.blocks.parameters())
    layer = 4 * identity.d_model * rows + 4 * identity.d_model**2
    side = 4 * identity.d_model * identity.vocab_size
    return tokens * (2 * blocks + side + identity.n_layers * layer)


def peak_megabytes(make: Callable[[], Step], device: torch.device) -> float:
    """The peak in the second of two steps, with no other kind of step in memory."""
    if device.type != "cuda":
        return float("nan")
    step = make()
    step()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    step()
    return torch.cuda.max_memory_allocated() / 1e6


def print_steps(model: FrozenModel, plan: TrainPlan, rounds: int) -> None:
    """Print the table of steps, one precision after the other."""
    device, vocab = model.device, model.identity.vocab_size
    input_ids = next(load_splits(plan.corpus, model.tokenizer).train.batches(plan.batch_size, 0))
    input_ids = input_ids.input_ids
    tokens, size = plan.step_tokens, 8192 if device.type == "cuda" else 512
    limit = product_rate(size, torch.bfloat16, device)
    rates = [f"bf16 {limit / 1e12:.0f}"]
    for name, allowed in (("tf32", True), ("fp32", False)):
        with allowing_tf32(allowed):
            rate = product_rate(size // 2, torch.float32, device)
        rates.append(f"{name} {rate / 1e12:.1f}")
    print(f"products, TFLOP/s: {', '.join(rates)}\n")
    print("| step | precision | ms | tokens per second | share of the bf16 rate | peak, MB |")
    print("|---|---|---:|---:|---:|---:|")
    for precision, products in PRECISIONS.items():
        exact = dataclasses.replace(plan, precision=products, vocab_sample=0)
        sampled = dataclasses.replace(exact, vocab_sample=plan.vocab_sample)
        makers = {
            EXACT: partial(our_step, model, exact, input_ids),
            SAMPLED: partial(our_step, model, sampled, input_ids),
            PEER: partial(peer_step, model, exact, input_ids),
        }
        if not plan.vocab_sample:
            del makers[SAMPLED]
        with allowing_tf32(precision == "tf32"):
            steps = {name: make() for name, make in makers.items()}
            seconds = medians(steps, rounds, device)
            steps.clear()
            peaks = {name: peak_megabytes(make, device) for name, make in makers.items()}
        for name, value in seconds.items():
            rows = plan.vocab_sample if name == SAMPLED else vocab
            share = step_flops(model, tokens, rows) / value / limit
            print(
                f"| {name} | {precision} | {value * 1000:.1f} | {tokens / value:,.0f} | "
                f"{share:.0%} | {peaks[name]:,.0f} |",
                flush=True,
            )


def print_lenses(config: TrainConfig, tokens: int) -> None:
    """Print the table of whole runs."""
    print(
        "\n| run | tokens | seconds from the first pass to the last step | "
        "seconds of the whole run |\n|---|---:|---:|---:|"
    )
    closed = dataclasses.replace(config, fit="closed-form")
    default = dataclasses.replace(config, tokens=tokens)
    exact = dataclasses.replace(default, vocab_sample=0)
    for name, one in (("closed form", closed), ("default", default), ("exact gradient", exact)):
        with tempfile.TemporaryDirectory() as folder:
            start = time.monotonic()
            with redirect_stdout(sys.stderr):
                train(one, Path(folder) / "run")
            whole = time.monotonic() - start
            progress = checkpoint.read_manifest(Path(folder) / "run")["progress"]
        count = progress["init_tokens"] + progress["tokens"]
        last = progress["history"][-1]["seconds"] if progress["history"] else progress["seconds"]
        print(f"| {name} | {count:,} | {last:.1f} | {whole:.1f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="(default: random weights of GPT-2 small's shape)")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=400_000, help="tokens of the steps of a run")
    parser.add_argument("--layers", type=int, default=12, help="layers of the random model")
    parser.add_argument("--d-model", type=int, default=768, help="width of the random model")
    flags = parser.parse_args()
    keep_freed_memory()
    device = torch.device(flags.device)
    with tempfile.TemporaryDirectory() as folder:
        name = flags.model or folder
        if flags.model is None:
            torch.manual_seed(0)
            shape = GPT2Config(n_layer=flags.layers, n_embd=flags.d_model)
            GPT2LMHeadModel(shape).save_pretrained(folder)
            load_model(device="cpu").tokenizer.save_pretrained(folder)
        config = TrainConfig(
            model=ModelConfig(name, device=flags.device), corpus=CorpusConfig(dataset="embedded")
        )
        model = load_model(name, device=device)
        plan = resolve(config, model, Accelerator())
        gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else flags.device
        identity = model.identity
        print(
            f"{gpu}, torch {torch.__version__}: {identity.n_layers} layers, d_model "
            f"{identity.d_model}, vocabulary {identity.vocab_size:,}, {plan.step_tokens:,} tokens "
            f"per step, samples of {plan.vocab_sample:,}; chosen: {plan.precision}, {plan.kernel}"
        )
        print_steps(model, plan, flags.rounds)
        del model
        print_lenses(config, flags.tokens)


if __name__ == "__main__":
    main()
