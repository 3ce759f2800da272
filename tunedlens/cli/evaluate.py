"""`evaluate.py`: saved lenses and a text in, a report out."""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tunedlens import checkpoint
from tunedlens.cli.flags import add_wandb_flag, configured, make_parser, parse
from tunedlens.config import CorpusConfig, EvaluateConfig, TrainConfig
from tunedlens.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from tunedlens.corpus import Corpora
    from tunedlens.frozen import FrozenModel
    from tunedlens.lens import Lens

EVALUATE = """Evaluate lenses side by side on held-out text; the logit lens is always there.

Without flags it takes the newest lens under checkpoints/ and the text it was trained on.

  python evaluate.py --lens checkpoints/RUN --tokens 1e6
  python evaluate.py --lens unigram --lens mean --lens checkpoints/A --lens mine=checkpoints/B
  python evaluate.py --dataset other.txt        all of it, as none was trained on
  python evaluate.py --redraw DIR               all tables and figures again, without a model
"""

DEFAULT_TOKENS = 65_536
BASELINE_TOKENS = {"unigram": 10_000_000, "mean": 65_536}
"""Positions of the training text that a baseline is made from, fewer if it has fewer."""

_WORTH_COMPILING = 1e10
"""Logits, over all rows and tokens, from which fusing saves more seconds than it takes."""


class LensSpec(NamedTuple):
    """What `--lens` names."""

    name: str
    kind: str
    """logit, unigram or mean; else the folder says."""
    folder: Path | None = None
    manifest: dict[str, Any] = {}  # noqa: RUF012 - never changed


def evaluate_lenses(arguments: Sequence[str] | None) -> int:
    """Evaluate lenses as the flags say. Returns the exit status."""
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
    add_wandb_flag(group)
    flags = parse(parser, arguments)
    asked, output = flags.pop("lens", None), flags.pop("output", None)
    redraw, wandb = flags.pop("redraw", None), flags.pop("wandb")
    if redraw is not None:
        return _redraw(redraw, others=[*flags, *(["lens"] if asked else [])])

    from accelerate import Accelerator

    from tunedlens import report
    from tunedlens.corpus import load_corpora, token_bytes, with_defaults
    from tunedlens.evaluation import evaluate
    from tunedlens.frozen import load_configured
    from tunedlens.tracking import Tracker, progress_bar, say

    specs = _specs(asked)
    saved = [spec for spec in specs if spec.folder is not None]
    trained = _trained(saved)
    same_text = flags.get("dataset") in (None, trained.corpus.dataset)
    config = configured(EvaluateConfig, _as_trained(trained, same_text, flags), flags)
    output = output or _output(saved, flags.get("dataset") if not same_text else None)
    report.require_own(output)
    checkpoint.require_writable(output)

    accelerator = Accelerator()
    model = load_configured(config.model, accelerator.device)
    loaded = {spec.name: checkpoint.load_lens(spec.folder, model) for spec in saved if spec.folder}
    config = dataclasses.replace(
        config,
        corpus=with_defaults(config.corpus, model),
        split=config.split or ("validation" if same_text and saved else "all"),
    )
    corpora = load_corpora(config.corpus, model.tokenizer)
    if same_text:
        _require_held_out(config, corpora, saved)
    blocks, about = _text(config, corpora)
    tokens = _tokens(config, about)
    lenses = {
        spec.name: loaded.get(spec.name) or _unsaved(spec.kind, model, corpora) for spec in specs
    }
    with progress_bar(tokens, "evaluating", show=accelerator.is_main_process) as bar:
        evaluation = evaluate(
            model,
            lenses,
            blocks,
            token_bytes(model.tokenizer),
            tokens=tokens,
            batch_size=config.batch_size,
            extended=config.metrics == "all",
            by_position=config.by_position,
            transfer=config.transfer,
            compiled=_compiled(config, model, tokens, len(lenses)),
            accelerator=accelerator,
            progress=bar.update,
        )
    if not accelerator.is_main_process:
        return 0
    provenance = report.provenance(model) | {
        "lenses": {
            spec.name: {"folder": str(spec.folder), "sha256": spec.manifest["lens_sha256"]}
            for spec in saved
        },
        "corpus": about,
        "config": dataclasses.asdict(config),
    }
    evaluation = dataclasses.replace(evaluation, provenance=provenance)
    report.write_report(evaluation, output)
    with Tracker(wandb, f"evaluate {output}", provenance["config"], output) as tracker:
        tracker.report(evaluation, report.figures(output))
    say(report.terminal_table(evaluation))
    say(f"\n{report.scored_text(evaluation)}; ± one standard error, clustered by block")
    say(f"tables, figures and report.html are in {output}")
    if config.tokens is not None and evaluation.tokens < config.tokens:
        raise InputError(
            f"the text ran out after {evaluation.tokens:,} positions, --tokens asked for "
            f"{config.tokens:,}; what was scored is in {output}"
        )
    return 0


def _redraw(folder: Path, others: list[str]) -> int:
    from tunedlens import report
    from tunedlens.tracking import say

    if others:
        raise InputError(
            f"--redraw needs no --{others[0].replace('_', '-')}: it reads {folder} and no model"
        )
    report.write_report(report.read_evaluation(folder), folder)
    say(f"tables, figures and report.html in {folder} are made again")
    return 0


def _specs(asked: list[str] | None) -> list[LensSpec]:
    """What is to be evaluated, each with a name of its own.

    Raises:
        InputError: there is no such lens, or two have one name.
    """
    if asked is None:
        folder = checkpoint.newest_lens(checkpoint.ROOT)
        asked = [str(folder)]
    specs = [LensSpec("logit", "logit")]
    for text in asked:
        name, _, rest = text.rpartition("=")
        if rest in ("logit", *BASELINE_TOKENS):
            if rest != "logit":
                specs.append(LensSpec(name or rest, rest))
            continue
        folder = Path(rest)
        manifest = checkpoint.read_manifest(folder)
        fit = manifest.get("config", {}).get("fit")
        kind = fit if fit == "closed-form" else manifest["lens"]
        specs.append(LensSpec(name or kind, kind, folder, manifest))
    names = [spec.name for spec in specs]
    specs = [
        spec._replace(name=spec.folder.resolve().name)
        if spec.folder and names.count(spec.name) > 1
        else spec
        for spec in specs
    ]
    for spec in specs:
        if [other.name for other in specs].count(spec.name) > 1 or spec.name == "model":
            raise InputError(
                f"two lenses are called {spec.name}; name them apart: --lens NAME={spec.folder}"
            )
    return specs


def _trained(saved: list[LensSpec]) -> TrainConfig:
    """How the first of the saved lenses was made, which says what model and text are meant."""
    from tunedlens.training import saved_config

    for spec in saved:
        assert spec.folder is not None
        if "config" in spec.manifest:
            return saved_config(spec.folder)
    return TrainConfig()


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


def _output(saved: list[LensSpec], other_dataset: str | None) -> Path:
    beside = saved[0].folder if saved else None
    name = "evaluation" if other_dataset is None else f"evaluation-{Path(other_dataset).stem}"
    return Path(name) if beside is None else beside / name


def _require_held_out(config: EvaluateConfig, corpora: "Corpora", saved: list[LensSpec]) -> None:
    """Make sure that what is held out now was held out from every lens.

    Raises:
        InputError: a lens was trained on another text, or the text has changed since.
    """
    from tunedlens.corpus import EMBEDDED

    if config.split != "validation":
        return
    now = dataclasses.asdict(config.corpus)
    for spec in saved:
        then = spec.manifest.get("config", {}).get("corpus", now)
        if then != now:
            raise InputError(
                f"{spec.folder} was trained on other blocks than {saved[0].folder}, which may hold "
                "what is held out of those; give another --dataset, or --split all"
            )
        # The embedded text differs between Pythons, but a file never changes sides.
        if config.corpus.dataset == EMBEDDED:
            continue
        about = corpora.validation.about
        digest = spec.manifest.get("corpus", {}).get("validation", about).get("tokens_sha256")
        if digest != about.get("tokens_sha256"):
            raise InputError(
                f"{config.corpus.dataset} has changed since {spec.folder} was trained on it, so "
                "what is held out now may have been trained on; give another --dataset, or "
                "--split all"
            )


def _text(config: EvaluateConfig, corpora: "Corpora") -> tuple[Iterator["Tensor"], dict[str, Any]]:
    """The blocks to score, and what they were made of."""
    if config.split == "all":
        blocks = itertools.chain(corpora.validation.sample(), corpora.train.sample())
        sides = {"train": corpora.train.about, "validation": corpora.validation.about}
        return blocks, sides
    side = corpora.validation if config.split == "validation" else corpora.train
    return side.sample(), side.about


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


def _unsaved(kind: str, model: "FrozenModel", corpora: "Corpora") -> "Lens":
    """The logit lens, or a baseline from the training text."""
    from tunedlens.fit import mean_lens, unigram_lens
    from tunedlens.lens import LogitLens

    if kind == "logit":
        return LogitLens.from_model(model)
    make = {"unigram": unigram_lens, "mean": mean_lens}[kind]
    return make(model, corpora.train.sample(), BASELINE_TOKENS[kind])


def _compiled(config: EvaluateConfig, model: "FrozenModel", tokens: int, lenses: int) -> bool:
    from tunedlens.fused import can_compile

    if config.compile is not None:
        return config.compile
    logits = tokens * model.identity.vocab_size * model.identity.n_layers * lenses
    return can_compile(model.device) and logits > _WORTH_COMPILING
