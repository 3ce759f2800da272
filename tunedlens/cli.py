"""The command line: `train` and `evaluate`, with flags made from the configs' fields."""

import argparse
import dataclasses
import itertools
import os
import sys
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn, TypeVar

import transformers

from tunedlens import checkpoint
from tunedlens.config import CorpusConfig, EvaluateConfig, TrainConfig, WandbMode
from tunedlens.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from tunedlens.frozen import FrozenModel

CHECKPOINTS = Path("checkpoints")
INTERRUPTED = 130

Config = TypeVar("Config", TrainConfig, EvaluateConfig)

TRAIN = """Train a tuned lens: one affine translator per layer of a frozen language model.

Without flags it trains on the GPT-2 and the text that ship with the package.

  python train.py --model gpt2 --dataset my-texts/ --tokens 5e6
  python train.py --resume                      the run that was interrupted last
  python train.py --resume RUN --tokens 2e6     extend a finished run
"""
EVALUATE = """Evaluate a tuned lens beside the logit lens on held-out text.

Without flags it takes the newest lens under checkpoints/ and the text it was trained on.

  python evaluate.py --lens checkpoints/RUN --tokens 1e6
  python evaluate.py --dataset other.txt        all of it, as none was trained on
"""


def train_command(arguments: Sequence[str] | None = None) -> int:
    """`python train.py` and `tunedlens train`. Returns the exit status."""
    return _guarded(_train, arguments)


def evaluate_command(arguments: Sequence[str] | None = None) -> int:
    """`python evaluate.py` and `tunedlens evaluate`. Returns the exit status."""
    return _guarded(_evaluate, arguments)


def main() -> int:
    """The console script `tunedlens`."""
    commands = {"train": train_command, "evaluate": evaluate_command}
    if len(sys.argv) > 1 and sys.argv[1] in commands:
        return commands[sys.argv[1]](sys.argv[2:])
    print("usage: tunedlens {train,evaluate} [--help | flags]", file=sys.stderr)
    return 0 if sys.argv[1:] in (["-h"], ["--help"]) else 2


def _train(arguments: Sequence[str] | None) -> int:
    parser = _parser("train.py", TRAIN, TrainConfig)
    group = parser.add_argument_group("the run")
    group.add_argument(
        "--output", type=Path, help="the run's folder; checkpoints/<model>-<time> by default"
    )
    group.add_argument(
        "--resume",
        nargs="?",
        type=Path,
        const=CHECKPOINTS,
        metavar="RUN",
        help="go on with an interrupted run (by default the last one), or extend a finished one",
    )
    group.add_argument(
        "--wandb",
        nargs="?",
        const="online",
        default="disabled",
        choices=typing.get_args(WandbMode),
        help="log to Weights & Biases; offline if it cannot be reached",
    )
    flags = _parse(parser, arguments)
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    from tunedlens import report
    from tunedlens.tracking import say
    from tunedlens.training import Interrupted, saved_config, train

    main = PartialState().is_main_process
    resume = flags.pop("resume", None)
    output, wandb = flags.pop("output", None), flags.pop("wandb")
    if resume is not None and output is not None:
        raise InputError("--resume names the run's folder itself; give no --output with it")
    if resume is None:
        config = _config(TrainConfig, TrainConfig(), flags)
        (name,) = broadcast_object_list([_run_name(config)])
        output = output or CHECKPOINTS / name
    else:
        output = checkpoint.newest_state(CHECKPOINTS) if resume == CHECKPOINTS else resume
        config = _config(TrainConfig, saved_config(output), flags)
    try:
        evaluation = train(config, output, resume=resume is not None, wandb=wandb)
    except Interrupted as interrupted:
        if main:
            say(f"{interrupted}; go on with: python train.py --resume {output}")
        return INTERRUPTED
    if main:
        say(f"\nheld-out KL(model ‖ lens) on {evaluation.tokens:,} tokens, ± one standard error\n")
        say(report.kl_table(evaluation))
        say(f"\nsaved to {output}; look closer with: python evaluate.py --lens {output}")
    return 0


def _evaluate(arguments: Sequence[str] | None) -> int:
    parser = _parser("evaluate.py", EVALUATE, EvaluateConfig)
    group = parser.add_argument_group("the run")
    group.add_argument("--lens", type=Path, help="folder of a saved lens; by default the newest")
    group.add_argument(
        "--output", type=Path, help="folder for the results; evaluation/ beside the lens by default"
    )
    flags = _parse(parser, arguments)
    from accelerate import Accelerator

    from tunedlens import plots, report
    from tunedlens.corpus import token_bytes, with_defaults
    from tunedlens.evaluation import evaluate
    from tunedlens.frozen import load_configured
    from tunedlens.lens import LogitLens, TunedLens
    from tunedlens.tracking import progress_bar, say
    from tunedlens.training import saved_config

    folder = flags.pop("lens", None) or checkpoint.newest_lens(CHECKPOINTS)
    output = flags.pop("output", None)
    manifest = checkpoint.read_manifest(folder)
    trained = saved_config(folder) if "config" in manifest else TrainConfig()
    same_text = flags.get("dataset") in (None, trained.corpus.dataset)
    config = _config(EvaluateConfig, _as_trained(trained, same_text, flags), flags)
    if output is None:
        output = folder / "evaluation"
        if not same_text:
            output = folder / f"evaluation-{Path(flags['dataset']).stem}"
    checkpoint.require_writable(output)
    accelerator = Accelerator()
    model = load_configured(config.model, accelerator.device)
    lenses = {"logit": LogitLens.from_model(model), "tuned": TunedLens.load(folder, model)}
    config = dataclasses.replace(
        config,
        corpus=with_defaults(config.corpus, model),
        split=config.split or ("validation" if same_text else "all"),
    )
    blocks, text = _text(config, model, manifest if same_text else {})
    main = accelerator.is_main_process
    with progress_bar(config.tokens, "evaluating", show=main) as bar:
        evaluation = evaluate(
            model,
            lenses,
            blocks,
            token_bytes(model.tokenizer),
            tokens=config.tokens,
            batch_size=config.batch_size,
            accelerator=accelerator,
            progress=bar.update,
        )
    if not main:
        return 0
    provenance = report.provenance(model) | {
        "lens": str(folder),
        "lens_sha256": manifest["lens_sha256"],
        "corpus": text,
        "config": dataclasses.asdict(config),
    }
    evaluation = dataclasses.replace(evaluation, provenance=provenance)
    report.write_evaluation(evaluation, output)
    plots.draw_evaluation(evaluation, output)
    say(report.full_table(evaluation))
    side = {"validation": "held out", "train": "trained on", "all": "all of it"}[
        config.split or "all"
    ]
    ran_out = f" (all there are; {config.tokens:,} were asked for)"
    say(
        f"\n{evaluation.tokens:,} tokens{ran_out if evaluation.tokens < config.tokens else ''}, "
        f"{evaluation.text_bytes:,} bytes of {config.corpus.dataset} ({side}), "
        f"{evaluation.blocks:,} blocks; ± one standard error, clustered by block"
    )
    say(f"figures and tables are in {output}")
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
    for field in dataclasses.fields(CorpusConfig):
        value = getattr(trained.corpus, field.name)
        if field.name in flags and trained.corpus.dataset and flags[field.name] != value:
            raise InputError(
                f"--{field.name.replace('_', '-')} must be {value} for {trained.corpus.dataset}, "
                f"as in training, so that what was held out is; got {flags[field.name]}"
            )
    return EvaluateConfig(model=model, corpus=trained.corpus)


def _text(
    config: EvaluateConfig, model: "FrozenModel", manifest: dict[str, Any]
) -> tuple[Iterator["Tensor"], dict[str, Any]]:
    """The blocks to score, and what they were made of.

    Raises:
        InputError: a local text has changed since the lens was trained on it, so that what
            is held out now need not have been held out then.
    """
    from tunedlens.corpus import EMBEDDED, load_corpora

    corpora = load_corpora(config.corpus, model.tokenizer)
    if config.split == "all":
        blocks = itertools.chain(corpora.validation.sample(), corpora.train.sample())
        return blocks, {"train": corpora.train.about, "validation": corpora.validation.about}
    side = corpora.validation if config.split == "validation" else corpora.train
    then = manifest.get("corpus", {}).get(config.split, side.about)
    # The embedded text differs between Pythons, but a file never changes sides.
    changed = then.get("tokens_sha256") != side.about.get("tokens_sha256")
    if changed and config.corpus.dataset != EMBEDDED:
        raise InputError(
            f"{config.corpus.dataset} has changed since the lens was trained on it, so what is "
            "held out now may have been trained on; give another --dataset, or --split all"
        )
    return side.sample(), side.about


def _run_name(config: TrainConfig) -> str:
    model = Path(config.model.model or "embedded").name
    return f"{model}-{datetime.now(UTC):%Y%m%d-%H%M%S-%f}"


def _guarded(
    command: Callable[[Sequence[str] | None], int], arguments: Sequence[str] | None
) -> int:
    """A user's mistake is one line on standard error and a status other than 0."""
    # Bars for what takes no time bury the lines that matter.
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("DATASETS_VERBOSITY", "critical")
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    try:
        return command(arguments)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (--help lists the flags)")


def _parser(name: str, description: str, config: type) -> argparse.ArgumentParser:
    """A parser with a flag for every field; what is not given is left out of the result."""
    parser = _Parser(
        prog=name,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="YAML with any of these; flags go before it"
    )
    own = []
    hints = typing.get_type_hints(config)
    for field in dataclasses.fields(config):
        if dataclasses.is_dataclass(hints[field.name]):
            group = parser.add_argument_group(f"the {field.name}")
            part_hints = typing.get_type_hints(hints[field.name])
            for part in dataclasses.fields(hints[field.name]):
                _add_flag(group, part, part_hints[part.name])
        else:
            own.append(field)
    group = parser.add_argument_group("the fit" if config is TrainConfig else "what is scored")
    for field in own:
        _add_flag(group, field, hints[field.name])
    return parser


def _add_flag(group: Any, field: dataclasses.Field[Any], hint: Any) -> None:
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    flag = "--" + field.name.replace("_", "-")
    default = "" if field.default in (None, False) else f" (default: {field.default})"
    text = field.metadata["help"].replace("%", "%%") + default
    if hint is bool:
        group.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
    elif typing.get_origin(hint) is Literal:
        group.add_argument(flag, choices=typing.get_args(hint), help=text)
    else:
        kind, metavar = {int: (_count, "N"), float: (float, "X"), str: (str, "NAME")}[hint]
        group.add_argument(flag, type=kind, metavar=metavar, help=text)


def _count(text: str) -> int:
    """A whole number, as 1000000, 1_000_000 or 1e6."""
    try:
        if float(text).is_integer():
            return int(float(text))
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}")


def _parse(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> dict[str, Any]:
    """What was given: in the YAML file, and over it on the command line."""
    given = vars(parser.parse_args(arguments))
    path = given.pop("config", None)
    if path is None:
        return given
    import yaml

    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"cannot read --config {path}: {' '.join(str(error).split())}") from error
    if not isinstance(settings, dict):
        raise InputError(f"--config {path}: expected lines like `tokens: 1000000`")
    arguments_of_file = []
    for name, value in settings.items():
        flag = "--" + str(name).replace("_", "-")
        if isinstance(value, bool):
            negative = "--no-" + flag[2:]
            known = negative in parser.format_usage()
            arguments_of_file += [flag] if value else [negative] * known
        elif value is not None:
            arguments_of_file += [flag, str(value)]
    return vars(parser.parse_args(arguments_of_file)) | given


def _config(kind: type[Config], base: Config, flags: dict[str, Any]) -> Config:
    """The base with the flags in place, validated."""
    parts: dict[str, Any] = {}
    for field in dataclasses.fields(kind):
        value = getattr(base, field.name)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            names = {part.name for part in dataclasses.fields(value)}
            parts[field.name] = dataclasses.replace(
                value, **{name: flags[name] for name in names & flags.keys()}
            )
        elif field.name in flags:
            parts[field.name] = flags[field.name]
    return dataclasses.replace(base, **parts)
