"""Layers saved by early exits and their cost, and the tokens that lenses predict too often.

    python benchmarks/early_exit.py                            the built-in model and text
    python benchmarks/early_exit.py --model FOLDER --lens tuned=LENS --dataset FILE

The logit lens is always included. The text is held out.
"""

import argparse
import dataclasses
import json
from itertools import islice
from pathlib import Path

from tunedlens import (
    CorpusConfig,
    LogitLens,
    ScoringConfig,
    early_exits,
    load_lens,
    load_model,
    token_bias,
)
from tunedlens.corpus import load_splits, resolve_corpus
from tunedlens.report.plots import save


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="hub name or folder (default: the built-in model)")
    parser.add_argument("--lens", action="append", help="NAME=LENS (default: the built-in lens)")
    parser.add_argument("--dataset", help="text (default: the default text of the model)")
    parser.add_argument("--tokens", type=int, default=16_000, help="(default: %(default)s)")
    parser.add_argument("--seq-len", type=int, default=256, help="(default: %(default)s)")
    parser.add_argument("--first-layer", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--output", type=Path, help="file for the figure; the results are JSON")
    args = parser.parse_args()
    model = load_model(args.model) if args.model else load_model()
    named = [one.partition("=") for one in args.lens or ["tuned=checkpoints/embedded"]]
    lenses = {name: load_lens(folder, model) for name, _, folder in named}
    lenses["logit"] = LogitLens.from_model(model)
    corpus = resolve_corpus(CorpusConfig(dataset=args.dataset, seq_len=args.seq_len), model.name,
                            model.context, model.bos_id is not None)  # fmt: skip
    held_out = load_splits(corpus, model.tokenizer).validation.shuffled()
    blocks = list(islice(held_out, -(-args.tokens // (args.seq_len - 1))))
    config = ScoringConfig(tokens=args.tokens)
    exits = early_exits(model, lenses, blocks, config, first_layer=args.first_layer)
    print(f"{model.name}: {exits}\n")
    for limit in ({"agreement": 0.95}, {"agreement": 0.9}, {"perplexity_ratio": 1.05}):
        print(f"{limit}\n\n{exits.table(**limit, is_markdown=True)}\n")
    bias = token_bias(model, lenses, blocks, config)
    for lens in lenses:
        print(f"{lens}\n\n{bias.table(lens, is_markdown=True)}\n")
    if args.output:
        save(exits.plot(), args.output)
        args.output.with_suffix(".json").write_text(json.dumps(dataclasses.asdict(exits)))


if __name__ == "__main__":
    main()
