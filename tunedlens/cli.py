"""The command line: `train` and `evaluate`, with flags made from the configs' fields."""

import argparse
import dataclasses
import os
import sys
import types
import typing
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

import transformers

from tunedlens import checkpoint
from tunedlens.config import CorpusConfig, EvaluateConfig, ModelConfig, TrainConfig, WandbMode
from tunedlens.errors import InputError

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
  python evaluate.py --dataset other.txt
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
    from tunedlens import report
    from tunedlens.tracking import Tracker, say
    from tunedlens.training import Interrupted, saved_config, train

    resume = flags.pop("resume", None)
    output, wandb_mode = flags.pop("output", None), flags.pop("wandb")
    if resume is not None and output is not None:
        raise InputError("--resume names the run's folder itself; give no --output with it")
    if resume is None:
        config = _config(TrainConfig, TrainConfig(), flags)
        output = output or CHECKPOINTS / _run_name(config)
    else:
        output = checkpoint.newest_state(CHECKPOINTS) if resume == CHECKPOINTS else resume
        config = _config(TrainConfig, saved_config(output), flags)
    tracker = Tracker(wandb_mode, output.name, dataclasses.asdict(config), output)
    try:
        evaluation = train(config, output, resume=resume is not None, tracker=tracker)
    except Interrupted as interrupted:
        say(f"{interrupted}; go on with: python train.py --resume {output}")
        return INTERRUPTED
    finally:
        tracker.finish()
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
    from tunedlens.corpus import load_corpora, token_bytes, with_defaults
    from tunedlens.evaluation import evaluate
    from tunedlens.frozen import load_model
    from tunedlens.lens import LogitLens, TunedLens
    from tunedlens.tracking import progress_bar, say

    folder = flags.pop("lens", None) or checkpoint.newest_lens(CHECKPOINTS)
    output = flags.pop("output", None) or folder / "evaluation"
    config = _config(EvaluateConfig, _as_trained(folder, flags), flags)
    checkpoint.require_writable(output)
    accelerator = Accelerator()
    model = load_model(
        config.model.model,
        revision=config.model.revision,
        dtype=config.model.dtype,
        device=config.model.device or accelerator.device,
    )
    lenses = {"logit": LogitLens.from_model(model), "tuned": TunedLens.load(folder, model)}
    corpus = with_defaults(config.corpus, model)
    side = getattr(load_corpora(corpus, model.tokenizer), config.split)
    main = accelerator.is_main_process
    with progress_bar(config.tokens, "evaluating", show=main) as bar:
        evaluation = evaluate(
            model,
            lenses,
            side.blocks(),
            token_bytes(model.tokenizer),
            tokens=config.tokens,
            batch_size=config.batch_size,
            accelerator=accelerator,
            progress=bar.update,
        )
    provenance = report.provenance(model) | {
        "lens": str(folder),
        "corpus": side.about,
        "split": config.split,
        "config": dataclasses.asdict(dataclasses.replace(config, corpus=corpus)),
    }
    evaluation = dataclasses.replace(evaluation, provenance=provenance)
    if not main:
        return 0
    report.write_evaluation(evaluation, output)
    plots.draw_evaluation(evaluation, output)
    say(report.full_table(evaluation))
    short = f" (the text has no more than that of {config.tokens:,})"
    say(
        f"\n{evaluation.tokens:,} tokens{short if evaluation.tokens < config.tokens else ''}, "
        f"{evaluation.text_bytes:,} bytes of {corpus.dataset} ({config.split}), "
        f"{evaluation.blocks:,} blocks; ± one standard error, clustered by block"
    )
    say(f"figures and tables are in {output}")
    return 0


def _as_trained(folder: Path, flags: dict[str, Any]) -> EvaluateConfig:
    """The model and text of the lens's own training, where the flags say nothing else."""
    trained = checkpoint.read_manifest(folder).get("config")
    if trained is None:
        return EvaluateConfig()
    corpus = CorpusConfig(**trained["corpus"])
    if "dataset" in flags:  # another text: its columns and splits are its own
        corpus = CorpusConfig(seq_len=corpus.seq_len)
    model = ModelConfig(**trained["model"] | {"device": None})
    return EvaluateConfig(model=model, corpus=corpus)


def _run_name(config: TrainConfig) -> str:
    model = Path(config.model.model or "embedded").name
    return f"{model}-{datetime.now(UTC):%Y%m%d-%H%M%S-%f}"


def _guarded(
    command: Callable[[Sequence[str] | None], int], arguments: Sequence[str] | None
) -> int:
    """A user's mistake is one line on standard error and a status other than 0."""
    # Bars for what takes no time bury the lines that matter.
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    try:
        return command(arguments)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted before anything was trained", file=sys.stderr)
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
    if isinstance(hint, types.UnionType):
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
        settings = yaml.safe_load(path.read_text()) or {}
    except (OSError, yaml.YAMLError) as error:
        raise InputError(f"cannot read --config {path}: {' '.join(str(error).split())}") from error
    if not isinstance(settings, dict):
        raise InputError(f"--config {path}: expected lines like `tokens: 1000000`")
    arguments_of_file = []
    for name, value in settings.items():
        flag = "--" + str(name).replace("_", "-")
        if isinstance(value, bool):
            arguments_of_file.append(flag if value else "--no-" + flag[2:])
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
