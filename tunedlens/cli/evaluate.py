"""`evaluate.py`: saved lenses and a text in, a report out."""

import argparse
import dataclasses
import itertools
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import Tensor

from tunedlens import builtin, checkpoint, files, report
from tunedlens.cli.flags import add_wandb_flag, configured, make_parser, parse
from tunedlens.cli.prompt import show_prompts
from tunedlens.config import CorpusConfig, EvaluateConfig, TrainConfig
from tunedlens.corpus import CorpusSplits, load_splits, resolve_corpus
from tunedlens.errors import InputError
from tunedlens.evaluation import score_lenses
from tunedlens.evaluation.lens_specs import BASELINE_TOKENS, LensSpec, lens_specs, of_same_text
from tunedlens.fit import mean_lens, unigram_lens
from tunedlens.lenses import Lens, LogitLens
from tunedlens.model import FrozenModel, load_configured
from tunedlens.provenance import provenance as provenance_of
from tunedlens.tokenizer import token_bytes
from tunedlens.tracking import Tracker, progress_bar, say

EVALUATE = """Evaluate lenses side by side on held-out text; the logit lens is always there.

Without flags it takes the newest lens under checkpoints/ and the text it was trained on.

  python evaluate.py --lens checkpoints/RUN --tokens 1e6
  python evaluate.py --lens unigram --lens mean --lens checkpoints/A --lens mine=checkpoints/B
  python evaluate.py --dataset other.txt        all of it, as none was trained on
  python evaluate.py --prompt "The Eiffel Tower is in the city of"
  python evaluate.py --redraw DIR               all tables and figures again, without a model
"""

DEFAULT_TOKENS = 65_536


def evaluate_lenses(arguments: Sequence[str] | None) -> int:
    """Evaluate lenses as the flags say. Returns the exit status."""
    flags = parse(_parser(), arguments)
    if "redraw" in flags:
        return _redraw(flags.pop("redraw"), others=list(flags))
    if "prompt" in flags or "prompt_file" in flags:
        return show_prompts(flags)
    if "stride" in flags:
        raise InputError("--stride is of the windows of a long --prompt; a corpus needs none")
    asked, output = flags.pop("lens", None), flags.pop("output", None)
    wandb = flags.pop("wandb", "disabled")

    specs = lens_specs(asked)
    saved = [spec for spec in specs if spec.folder is not None]
    own, same_text = of_same_text(saved, flags.get("dataset"))
    trained = own[0].trained if own else saved[0].trained if saved else TrainConfig()
    config = configured(EvaluateConfig, _as_trained(trained, same_text, flags), flags)
    output = output or _output(saved, None if same_text else flags["dataset"], config.tokens)
    report.require_own(output)
    files.require_writable(output)

    accelerator = Accelerator()
    is_main = accelerator.is_main_process
    model = load_configured(config.model, accelerator.device)
    loaded = {spec.name: checkpoint.load_lens(spec.folder, model) for spec in saved if spec.folder}
    # Baselines are made from a training side, so without a lens they need one as well.
    baselines = [spec for spec in specs if spec.kind in BASELINE_TOKENS]
    held_out = own or (baselines and not saved)
    config = dataclasses.replace(
        config,
        corpus=resolve_corpus(config.corpus, model.name, model.context),
        split=config.split or ("validation" if held_out else "all"),
    )
    corpus = resolve_corpus(config.corpus, model.name, model.context)
    splits = load_splits(corpus, model.tokenizer)
    if config.split == "validation":
        _require_held_out(config, splits, own)
    elif own and is_main:
        say(f"note: --split {config.split} scores what {own[0].folder} was trained on")
    blocks, about = _text(config, splits)
    tokens = _tokens(config, about)
    training = splits
    if baselines and saved and not own:
        training = load_splits(
            resolve_corpus(trained.corpus, model.name, model.context), model.tokenizer
        )
    lenses = {
        spec.name: loaded.get(spec.name) or _unsaved(spec.kind, model, training) for spec in specs
    }
    with progress_bar(tokens, "evaluating", show=is_main) as bar:
        evaluation = score_lenses(
            model,
            lenses,
            blocks,
            token_bytes(model.tokenizer),
            tokens=tokens,
            batch_size=config.batch_size,
            extended=config.metrics == "all",
            by_position=config.by_position,
            transfer=config.transfer,
            accelerator=accelerator,
            progress=bar.update,
        )
    if not is_main:
        return 0
    sources = {spec.name: _source(spec, training) for spec in specs if spec.kind != "logit"}
    arguments = [*(sys.argv[1:] if arguments is None else arguments)]
    if asked is None:
        arguments += ["--lens", str(saved[0].folder)]
    provenance = provenance_of(model, ["python", "evaluate.py", *arguments]) | {
        "lenses": sources,
        "corpus": about,
        "config": dataclasses.asdict(config),
        "processes": accelerator.num_processes,
    }
    evaluation = dataclasses.replace(evaluation, provenance=provenance)
    report.write_report(evaluation, output)
    with Tracker(wandb, f"evaluate {output}", provenance["config"], output) as tracker:
        tracker.report(evaluation, report.figures(output))
    say(report.terminal_table(evaluation))
    say(f"\n{report.scored_text(evaluation)}; ± one standard error, clustered by block")
    say(f"tables, figures and report.html are in {output}")
    if evaluation.tokens < tokens:
        ended = f"the text ran out after {evaluation.tokens:,} of {tokens:,} positions"
        if config.tokens is not None:
            raise InputError(f"{ended}; what was scored is in {output}")
        say(ended)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = make_parser("evaluate.py", EVALUATE, EvaluateConfig)
    group = parser.add_argument_group("the run")
    group.add_argument(
        "--lens",
        action="append",
        metavar="[NAME=]LENS",
        help="folder of a saved lens, or unigram or mean; several times for several lenses; "
        "without it the newest saved one",
    )
    group.add_argument(
        "--output", type=Path, help="folder for the results; evaluation/ beside the lens by default"
    )
    group.add_argument(
        "--redraw",
        type=Path,
        metavar="DIR",
        help="make tables and figures again from saved results",
    )
    group.add_argument(
        "--prompt",
        action="append",
        metavar="TEXT",
        help="instead of scoring a corpus, show one text through the layers; several times for "
        "several texts",
    )
    group.add_argument(
        "--prompt-file",
        type=Path,
        metavar="FILE",
        help=r"prompts, one a line; \n in a line is a new line",
    )
    group.add_argument(
        "--stride",
        type=int,
        metavar="TOKENS",
        help="read a prompt beyond the context in windows that begin so many tokens apart",
    )
    add_wandb_flag(group)
    return parser


def _redraw(folder: Path, others: list[str]) -> int:

    if others:
        raise InputError(
            f"--redraw needs no --{others[0].replace('_', '-')}: it reads {folder} and no model"
        )
    report.write_report(report.read_evaluation(folder), folder)
    say(f"tables, figures and report.html in {folder} are made again")
    return 0


def _as_trained(trained: TrainConfig, same_text: bool, flags: dict[str, Any]) -> EvaluateConfig:
    """The model of the lens's own training, and its text unless another is asked for.

    Raises:
        InputError: the text is to be cut or split in another way than it was for training,
            which would score blocks that were trained on.
    """
    model = dataclasses.replace(trained.model, device=None)
    if not same_text:
        return EvaluateConfig(model=model, corpus=CorpusConfig(seq_len=trained.corpus.seq_len))
    flags.pop("dataset", None)  # perhaps spelled in another way
    for field in dataclasses.fields(CorpusConfig):
        value = getattr(trained.corpus, field.name)
        if field.name in flags and trained.corpus.dataset and flags[field.name] != value:
            raise InputError(
                f"--{field.name.replace('_', '-')} must be {value} for {trained.corpus.dataset}, "
                f"as in training, so that what was held out is; got {flags[field.name]}"
            )
    return EvaluateConfig(model=model, corpus=trained.corpus)


def _output(saved: list[LensSpec], other_dataset: str | None, tokens: int | None) -> Path:
    """Beside the first lens, where no evaluation of more tokens is lost."""
    name = "evaluation" if other_dataset is None else f"evaluation-{Path(other_dataset).stem}"
    folder = Path(name) if not saved or saved[0].folder is None else saved[0].folder / name
    with suppress(InputError):
        if tokens is not None and tokens < report.read_evaluation(folder).tokens:
            return folder.with_name(f"{name}-{tokens}-tokens")
    return folder


def _require_held_out(config: EvaluateConfig, splits: "CorpusSplits", own: list[LensSpec]) -> None:
    """Make sure that what is held out now was held out from every lens trained on this text.

    Raises:
        InputError: it was cut in another way, or has changed since.
    """
    now = dataclasses.asdict(dataclasses.replace(config.corpus, dataset=None))
    about = splits.validation.about
    for spec in own:
        corpus = spec.trained.corpus
        if dataclasses.asdict(dataclasses.replace(corpus, dataset=None)) != now:
            raise InputError(
                f"{spec.folder} was trained on other blocks than {own[0].folder}, which may hold "
                "what is held out of those; give another --dataset, or --split all"
            )
        # The embedded text differs between Pythons, but a file never changes sides.
        if corpus.dataset == builtin.NAME:
            continue
        then = spec.manifest.get("corpus", {}).get("validation", about)
        if then.get("tokens_sha256") != about.get("tokens_sha256"):
            raise InputError(
                f"{config.corpus.dataset} has changed since {spec.folder} was trained on it, so "
                "what is held out now may have been trained on; give another --dataset, or "
                "--split all"
            )


def _text(
    config: EvaluateConfig, splits: "CorpusSplits"
) -> tuple[Iterator["Tensor"], dict[str, Any]]:
    """The blocks to score, and what they were made of."""
    if config.split == "all":
        sides = {"validation": splits.validation, "train": splits.train}
        # The smaller side is a fair sample of the documents; of a stream it is slow to find.
        order = list(sides.values())
        if splits.train.about.get("streamed"):
            order.reverse()
        blocks = itertools.chain.from_iterable(side.shuffled() for side in order)
        return blocks, {name: side.about for name, side in sides.items()}
    side = splits.validation if config.split == "validation" else splits.train
    return side.shuffled(), side.about


def _tokens(config: EvaluateConfig, about: dict[str, Any]) -> int:
    """How many positions are to be scored.

    Raises:
        InputError: more are asked for than the text has, as far as that is known beforehand.
    """
    sides = [about] if "dataset" in about else list(about.values())
    if not all("blocks" in side for side in sides):
        return config.tokens or DEFAULT_TOKENS
    there = sum(side["blocks"] for side in sides) * ((config.corpus.seq_len or 2) - 1)
    if config.tokens is not None and config.tokens > there:
        raise InputError(
            f"--tokens asks for {config.tokens:,} positions, but {config.corpus.dataset} "
            f"(--split {config.split}) has {there:,}; ask for fewer or give more text"
        )
    return config.tokens or min(DEFAULT_TOKENS, there)


def _unsaved(kind: str, model: "FrozenModel", training: "CorpusSplits") -> "Lens":
    """The logit lens, or a baseline from a training text."""
    if kind == "logit":
        return LogitLens.from_model(model)
    make = {"unigram": unigram_lens, "mean": mean_lens}[kind]
    return make(model, training.train.shuffled(), BASELINE_TOKENS[kind])


def _source(spec: LensSpec, training: "CorpusSplits") -> dict[str, Any]:
    """Where a lens comes from, for the record."""
    if spec.folder is not None:
        return {"folder": str(spec.folder), "sha256": spec.manifest["lens_sha256"]}
    most = BASELINE_TOKENS[spec.kind]
    return {"kind": spec.kind, "text": training.train.about, "tokens_at_most": most}
