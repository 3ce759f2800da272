"""Trains a small GPT-2 with GPT-2's full vocabulary for a short time, for `quality.py`.

    python benchmarks/small_gpt2.py --tokenizer FOLDER --text FILE --output FOLDER

The model has 50,257 tokens, 4 layers, d_model 128 and context 256. A model with random weights
would be enough to measure speed, but its layers contain no information about its predictions.
"""

import argparse
import math
import time
from pathlib import Path

import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

CONTEXT, BATCH, PEAK_RATE = 256, 8, 2e-3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=300)
    flags = parser.parse_args()
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(flags.tokenizer)
    ids = torch.tensor(tokenizer(flags.text.read_text(), verbose=False)["input_ids"])
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=CONTEXT,
        n_embd=128,
        n_layer=4,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        activation_function="gelu_pytorch_tanh",
    )
    model = GPT2LMHeadModel(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), PEAK_RATE, (0.9, 0.98), weight_decay=0.1)
    start = time.monotonic()
    for step in range(flags.steps):
        begins = torch.randint(len(ids) - CONTEXT, (BATCH,))
        batch = torch.stack([ids[begin : begin + CONTEXT] for begin in begins])
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        share = step / flags.steps
        rate = PEAK_RATE * min(1.0, step / 30) * 0.5 * (1 + math.cos(math.pi * share))
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0 or step == flags.steps - 1:
            print(f"{step:>5} {loss.item():.3f} nats {time.monotonic() - start:.0f} s", flush=True)
    model.save_pretrained(flags.output)
    tokenizer.save_pretrained(flags.output)


if __name__ == "__main__":
    main()
