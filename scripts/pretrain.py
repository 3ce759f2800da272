"""Train the GPT-2 that ships with the package.

    python scripts/pretrain.py --output DIR

The script reads the standard library of the running Python, trains a byte-level BPE tokenizer and
then the model, and writes a Hugging Face folder: config.json, model.safetensors (float16),
tokenizer.json, and a card with the measurements. The same command resumes an interrupted run.
Another --steps then changes the end of the run and the decay of the learning rate.
"""

import argparse
import copy
import json
import lzma
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from tunedlens import builtin
from tunedlens.config import CorpusConfig, ScoringConfig
from tunedlens.corpus import CorpusSplits, load_splits, resolve_corpus
from tunedlens.corpus.standard_library import standard_library
from tunedlens.evaluation import Evaluation, score_lenses
from tunedlens.model import FrozenModel, load_model

EOS = "<|endoftext|>"
VOCAB_SIZE = 4096
CONTEXT = 512
WARM_UP_STEPS = 100
DECAY_SHARE = 0.5
"""The learning rate decreases to 0 over this fraction of the steps, at their end."""

LINE_STEPS = 150
"""Additional steps with a tenth of the learning rate, on blocks that begin at a new line."""

PROMPTS = ("def __init__(self", "import os", "for i in range(", "if x is not", "raise ValueError(")


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE with GPT-2's pre-tokenizer and end-of-text token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=EOS,
        eos_token=EOS,
        unk_token=EOS,
        model_max_length=CONTEXT,
    )


def build_model(dropout: float) -> GPT2LMHeadModel:
    """A model with 8 layers of 224 dimensions: 5.9 million parameters, 12 MB in half precision."""
    config = GPT2Config(
        vocab_size=VOCAB_SIZE,
        n_positions=CONTEXT,
        n_embd=224,
        n_layer=8,
        n_head=4,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=0.0,
        activation_function="gelu_pytorch_tanh",  # GPT-2's own, in one kernel
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config)


def build_optimizers(
    model: GPT2LMHeadModel, lr: float, weight_decay: float
) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices, AdamW for embeddings, norms and biases."""
    matrices: list[Tensor] = []
    rest: list[Tensor] = []
    for name, parameter in model.named_parameters():
        (matrices if ".h." in name and parameter.ndim == 2 else rest).append(parameter)
    return [
        torch.optim.Muon(
            matrices,
            lr=lr,
            momentum=0.95,
            weight_decay=weight_decay,
            adjust_lr_fn="match_rms_adamw",
        ),
        torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def rate(step: int, steps: int) -> float:
    """The factor of the learning rate: warm-up, constant, linear decay; then a tenth, decaying."""
    if step >= steps:
        return 0.1 * (steps + LINE_STEPS - step) / LINE_STEPS
    return min(1.0, (step + 1) / WARM_UP_STEPS, (steps - step) / (DECAY_SHARE * steps))


def line_batches(
    splits: CorpusSplits, tokenizer: Any, batch_size: int, seed: int
) -> Iterator[Int[Tensor, "batch seq"]]:
    """Blocks that begin at a new line, as typed text does. Ordinary blocks begin anywhere."""
    stream = torch.cat(list(splits.train.blocks()))
    names = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    ends_line = torch.tensor([name.endswith("Ċ") or name == EOS for name in names])
    starts = ends_line[stream[:-CONTEXT]].nonzero()[:, 0] + 1
    generator = torch.Generator().manual_seed(seed)
    while True:
        chosen = starts[torch.randint(len(starts), (batch_size,), generator=generator)]
        yield stream[chosen[:, None] + torch.arange(CONTEXT)]


def mean_loss(model: GPT2LMHeadModel, input_ids: Int[Tensor, "batch seq"]) -> Float[Tensor, ""]:
    """Cross-entropy of the next token, in nats."""
    with torch.autocast(input_ids.device.type, torch.bfloat16):
        hidden = model.transformer(input_ids, use_cache=False).last_hidden_state
        logits = model.lm_head(hidden[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1).float(), input_ids[:, 1:].flatten())


def held_out(model: FrozenModel, splits: CorpusSplits) -> Evaluation:
    """The metrics of the model itself on all held-out files."""
    blocks = splits.validation.blocks()
    return score_lenses(model, {}, blocks, ScoringConfig(batch_size=16))


def pretrain(args: argparse.Namespace, tokenizer: Any, splits: CorpusSplits) -> dict[str, float]:
    """Train the model; returns the numbers for the card."""
    torch.manual_seed(args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model: Any = build_model(args.dropout)
    model.to(device).train()
    optimizers = build_optimizers(model, args.lr, args.weight_decay)
    loss_of = torch.compile(lambda input_ids: mean_loss(model, input_ids))

    state_file = args.output / "pretrain-state.pt"
    step, seconds = 0, 0.0
    if state_file.exists():
        state = torch.load(state_file, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        step, seconds = state["step"], state["seconds"]
        print(f"continuing from step {step}", flush=True)
    started = time.monotonic() - seconds

    batches = splits.train.batches(args.batch_size, args.seed, {"batch": step})
    lines = line_batches(splits, tokenizer, args.batch_size, args.seed)
    losses: list[Tensor] = []
    last_step = args.steps + LINE_STEPS
    while step < last_step:
        if step == args.steps:  # their momentum comes from other blocks
            optimizers = build_optimizers(model, args.lr, args.weight_decay)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = args.lr * rate(step, args.steps)
        input_ids = next(batches).input_ids if step < args.steps else next(lines)
        loss = loss_of(input_ids.to(device))
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.detach())
        step += 1
        if step % args.evaluate_every == 0 or step in (args.steps, last_step):
            frozen = FrozenModel(copy.deepcopy(model).eval(), tokenizer)
            bits = held_out(frozen, splits).of_model("bits_per_byte").value
            seconds = time.monotonic() - started
            mean = torch.stack(losses).mean().item()
            print(
                f"step {step}: loss {mean:.4f}, held-out {bits:.4f} bits per byte, {seconds:.0f} s",
                flush=True,
            )
            losses.clear()
            state = {"model": model.state_dict(), "step": step, "seconds": seconds}
            state["optimizers"] = [optimizer.state_dict() for optimizer in optimizers]
            torch.save(state, state_file.with_suffix(".partial"))
            state_file.with_suffix(".partial").replace(state_file)

    model.half().save_pretrained(args.output)
    return {"steps": step, "tokens": step * args.batch_size * CONTEXT, "hours": seconds / 3600}


def card(
    folder: Path, splits: CorpusSplits, run: dict[str, float], args: argparse.Namespace
) -> str:
    """The card, with measurements of the shipped float16 weights in float32."""
    model = load_model(folder)
    evaluation = held_out(model, splits)
    nats, bits = (evaluation.of_model(m) for m in ("cross_entropy_nats", "bits_per_byte"))
    text = "".join(file.text for file in standard_library("validation")).encode()
    xz = 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / len(text)
    about = {side: getattr(splits, side).about for side in ("train", "validation")}
    parameters = sum(parameter.numel() for parameter in model.model.parameters())
    on_gpu = torch.cuda.is_available()
    hardware = "a GPU" if on_gpu else f"{torch.get_num_threads()} CPU cores"
    completions = []
    for prompt in PROMPTS:
        final = model.residual_stream(prompt)[-1][0, -1]
        probabilities, ids = model.unembedding(final).softmax(-1).topk(4)
        words = (
            f"`{model.tokenizer.decode(i)!r}` {p:.2f}"
            for p, i in zip(probabilities, ids, strict=True)
        )
        completions.append(f"- `{prompt}` → {', '.join(words)}")
    return "\n".join([
        "# The built-in GPT-2",
        "",
        "A small GPT-2 (`GPT2LMHeadModel`, byte-level BPE) that ships with tunedlens, made by",
        "`python scripts/pretrain.py`.",
        "",
        f"- Text: the source of the standard library of Python {platform.python_version()}, "
        "without tests; files are split by a hash of their path.",
        *(
            f"- {side}: {a['documents']} files, {a['bytes']:,} bytes, {a['tokens']:,} tokens, "
            f"SHA-256 of the tokens `{a['tokens_sha256']}`."
            for side, a in about.items()
        ),
        f"- Model: {model.identity.n_layers} layers, d_model {model.identity.d_model}, "
        f"vocabulary {model.identity.vocab_size:,}, context {CONTEXT}; {parameters:,} parameters "
        "in float16 on disk.",
        f"- Training: {run['steps']:,.0f} steps of {args.batch_size * CONTEXT:,} tokens, "
        f"{run['tokens']:,.0f} tokens in all ({run['tokens'] / about['train']['tokens']:.1f} "
        f"passes), {run['hours']:.1f} hours on {hardware}; Muon and AdamW, "
        f"learning rate {args.lr}, weight decay {args.weight_decay}, dropout {args.dropout}, "
        f"bfloat16 autocast; warm-up over {WARM_UP_STEPS} steps, linear decay from the "
        f"middle to step {run['steps'] - LINE_STEPS:,.0f}; the last {LINE_STEPS} steps, at a tenth "
        "of the rate, on blocks that begin at a new line.",
        f"- Held out: {nats.value:.4f} ± {nats.standard_error:.4f} nats per token, "
        f"**{bits.value:.4f} ± {bits.standard_error:.4f} bits per byte**, on "
        f"{evaluation.tokens:,} tokens ({evaluation.text_bytes:,} bytes) in blocks of {CONTEXT}. "
        f"xz compresses the same files to {xz:.4f} bits per byte.",
        "",
        "The most probable next tokens, with probabilities:",
        "",
        *completions,
        "",
    ])  # fmt: skip


def main() -> None:
    """Parse, train, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--batch-size", type=int, default=16, help=f"blocks of {CONTEXT} tokens")
    parser.add_argument("--lr", type=float, default=0.006)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--evaluate-every", type=int, default=250, help="steps; also saves")
    args = parser.parse_args()

    args.output.mkdir(parents=True, exist_ok=True)
    tokenizer_file = args.output / "tokenizer.json"
    if not tokenizer_file.exists():
        train_tokenizer([file.text for file in standard_library("train")]).save_pretrained(
            args.output
        )
        # Without its indentation the file is a third smaller.
        compact = json.dumps(json.loads(tokenizer_file.read_text()), separators=(",", ":"))
        tokenizer_file.write_text(compact)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(args.output)
    corpus = CorpusConfig(dataset=builtin.NAME, seq_len=CONTEXT)
    splits = load_splits(resolve_corpus(corpus, builtin.NAME, CONTEXT), tokenizer)
    print(f"train {splits.train.about}\nvalidation {splits.validation.about}", flush=True)
    run = pretrain(args, tokenizer, splits)
    (args.output / "README.md").write_text(card(args.output, splits, run, args))
    (args.output / "pretrain-state.pt").unlink()


if __name__ == "__main__":
    main()
