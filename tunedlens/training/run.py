"""One run: what it is made of, how far it is, and how it goes to disk and comes back."""

import dataclasses
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from accelerate import Accelerator

from tunedlens import checkpoint, files, report
from tunedlens.config import ONE_PASS, TrainConfig
from tunedlens.corpus import DEFAULT_HUB_DATASET, CorpusSplits
from tunedlens.engine.objective import LensKL
from tunedlens.errors import InputError
from tunedlens.evaluation import Evaluation
from tunedlens.fit import LearningCurve, LensOptimizer, Look, Preconditioned, TorchOptimizer
from tunedlens.lenses import AffineLens, LogitLens, TunedLens
from tunedlens.model import FrozenModel, require_same_model
from tunedlens.provenance import describe_run
from tunedlens.report import plots
from tunedlens.tracking import Tracker, say
from tunedlens.training.costs import Costs
from tunedlens.training.plan import budget
from tunedlens.training.states import StateReader
from tunedlens.training.validation import HeldOut


@dataclass
class Progress:
    """How far a run has come; JSON-able, and saved with it."""

    step: int = 0
    tokens: int = 0
    """Positions whose KL was a part of the gradient."""
    init_tokens: int = 0
    """Positions of the first pass, which only the model has seen."""
    position: dict[str, Any] | None = None
    """Where the corpus goes on."""
    seconds: float = 0.0
    curve: LearningCurve = field(default_factory=LearningCurve)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """The inverse of `dataclasses.asdict`."""
        looks = [Look(**look) for look in data["curve"]["looks"]]
        return cls(**data | {"curve": LearningCurve(looks)})


class Run:
    """A run between its beginning and its end.

    Args:
        config: with nothing left open.
        output: its folder.
        model: the frozen model.
        splits: what it is trained on, and what is held out.
        accelerator: how many processes share the work.
    """

    def __init__(
        self,
        config: TrainConfig,
        output: Path,
        model: FrozenModel,
        splits: CorpusSplits,
        accelerator: Accelerator,
    ) -> None:
        self.config = config
        self.output = output
        self.model = model
        self.splits = splits
        self.accelerator = accelerator
        self.reader = StateReader(model, config, accelerator)
        self.tokens_per_step = (config.batch_size or 1) * self.reader.positions
        self.costs = Costs.of(config, model)
        self.held_out = HeldOut(
            model,
            splits,
            config,
            self.reader,
            accelerator,
            table_tokens=self._table_tokens(budget(config)),
        )
        self.objective = LensKL(
            model.unembedding.centred(),
            dtype=self.reader.dtype,
            kernel=config.kernel or "products",
        )
        self.steps = _steps(TunedLens.from_model(model), config)
        self.progress = Progress()
        self.look_seconds = 0.0
        """Of the last look."""
        self._started = time.monotonic()

    def _table_tokens(self, tokens: int) -> int:
        return self.config.evaluate_tokens or self.costs.table_tokens(tokens)

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes and speaks."""
        return self.accelerator.is_main_process

    def look(self) -> Look:
        """Held-out KL of every layer, put on the learning curve."""
        start = time.monotonic()
        kl_nats, standard_error = self.held_out.kl(self.steps.result(), self.objective)
        self.look_seconds = time.monotonic() - start
        self.progress.seconds = time.monotonic() - self._started
        progress = self.progress
        look = Look(progress.step, progress.tokens, progress.seconds, kl_nats, standard_error)
        progress.curve.looks.append(look)
        return look

    def save(self) -> None:
        """Write what the run needs to go on."""
        self.progress.seconds = time.monotonic() - self._started
        if not self.is_main:
            return
        about = {
            "config": dataclasses.asdict(self.config),
            "model": dataclasses.asdict(self.model.identity),
            "text": self.splits.train.about.get("tokens_sha256"),
            "chunk": self.objective.chunk,
            "progress": dataclasses.asdict(self.progress),
        }
        checkpoint.save_state(self.output, checkpoint.State(self.steps.state(), about))

    def restore(self) -> None:
        """Go on from an interrupted run, or from the lens of a finished one.

        Raises:
            InputError: it was another model, text or config, or has no more to do.
        """
        saved, config = checkpoint.saved_config(self.output), self.config
        model = dataclasses.replace(saved.model, device=config.model.device)
        if saved.kernel is None:
            raise InputError(
                f"{self.output} was trained by an earlier version of tunedlens, whose runs cannot "
                "be resumed; its lens can be used as it is"
            )
        same = dataclasses.replace(
            saved,
            tokens=config.tokens,
            model=model,
            kernel=config.kernel,
            micro_batch_size=config.micro_batch_size,
        )
        if dataclasses.asdict(config) != dataclasses.asdict(same):
            raise InputError(
                f"{self.output} was trained with other settings; with --resume only --tokens, "
                "--device, --kernel and --micro-batch-size may change"
            )
        if (self.output / checkpoint.STATE).is_file():
            tensors, about = checkpoint.load_state(self.output)
            identity = dataclasses.asdict(self.model.identity)
            require_same_model(about["model"], identity, f"the lens in {self.output}")
            self.steps.load_state(tensors)
            self.objective.chunk = about["chunk"]
            self.progress = Progress.from_json(about["progress"])
            text = about["text"]
        else:
            manifest = checkpoint.read_manifest(self.output)
            self.progress = Progress.from_json(manifest["progress"])
            if (config.tokens or 0) <= self.progress.tokens or config.fit in ONE_PASS:
                raise InputError(
                    f"{self.output} is trained on {self.progress.tokens:,} tokens already; ask for "
                    "more with --tokens"
                )
            lens = TunedLens.from_model(self.model)
            checkpoint.fill_lens(lens, self.output)
            self.steps = _steps(lens, config)
            text = manifest["corpus"]["train"].get("tokens_sha256")
        if text != self.splits.train.about.get("tokens_sha256"):
            raise InputError(
                f"the text {config.corpus.dataset} is not the one that {self.output} was "
                "trained on: it has changed since (the embedded text changes with Python)"
            )
        self._started = time.monotonic() - self.progress.seconds

    def finish(self, tracker: Tracker, lens: AffineLens | None = None) -> Evaluation:
        """Score the lens, write it with all that made it, and forget how to resume.

        Args:
            tracker: is told the figures.
            lens: the one that was made without steps, if it was.
        """
        looks = self.progress.curve.looks
        if isinstance(self.steps, Preconditioned) and looks:
            for layer, (first, last) in enumerate(
                zip(looks[0].kl_nats, looks[-1].kl_nats, strict=True)
            ):
                if last > first:
                    self.steps.revert(layer)
        lens = lens or self.steps.result()
        kind = checkpoint.kind_of(lens)
        lenses = {"logit": LogitLens.from_model(self.model), kind: lens}
        tokens = self._table_tokens(self.progress.tokens)
        evaluation = self.held_out.score(lenses, tokens)
        self.progress.seconds = time.monotonic() - self._started
        final = evaluation.by_layer(kind, "kl_nats")
        tracker.summarise({f"held_out/kl_nats/{i}": e.value for i, e in enumerate(final)})
        if self.is_main:
            sides = {"train": self.splits.train, "validation": self.splits.validation}
            about = {
                "config": dataclasses.asdict(self.config),
                "corpus": {name: side.about for name, side in sides.items()},
                "progress": dataclasses.asdict(self.progress),
                "held_out": evaluation.to_json(),
                "provenance": describe_run(self.model),
            }
            checkpoint.save_lens(lens, self.output, about)
            text = report.card(self.output.name, about, evaluation)
            files.write(self.output / "README.md", text)
            plots.draw_learning_curve(self.progress.curve, self.output)
            checkpoint.remove_state(self.output)
        return evaluation

    def describe(self) -> None:
        """Say what is about to be done."""
        if not self.is_main:
            return
        config, identity, text = self.config, self.model.identity, self.splits.train.about
        say(
            f"model     {identity.name}: {identity.n_layers} layers, d_model {identity.d_model}, "
            f"vocabulary {identity.vocab_size:,}, {config.model.dtype} on {self.model.device}"
        )
        by_default = config.corpus.dataset == DEFAULT_HUB_DATASET
        say(f"text      {text['dataset']}{' (the default; see --dataset)' if by_default else ''}")
        blocks = f"blocks of {config.corpus.seq_len} tokens"
        if text.get("streamed"):
            say(f"          read as it streams by, in {blocks}")
        else:
            validation = self.splits.validation.about
            say(
                f"          {text['bytes']:,} bytes, {text['tokens']:,} tokens; {blocks}: "
                f"{text['blocks']:,} to train on, {validation['blocks']:,} held out; "
                f"{text['dropped_tokens']} tokens fill no block"
            )
        first = f"{config.init_tokens:,} tokens for the closed form"
        if config.fit in ONE_PASS:
            tokens = f"{config.init_tokens:,} tokens"
            say(f"fit       {config.fit}: {tokens}, {config.precision} products")
            return
        tokens = (
            f"at most {config.max_tokens:,} tokens, until held-out KL hardly falls"
            if config.tokens is None
            else f"{config.tokens:,} tokens"
        )
        start = f"{first}, then " if config.fit == "preconditioned" else ""
        say(f"fit       {config.fit}: {start}{tokens}; {self.tokens_per_step:,} a step")
        rows = (
            f"a sample of {config.vocab_sample:,} tokens of the vocabulary"
            if config.vocab_sample
            else "the whole vocabulary"
        )
        say(f"gradient  from {rows}; {config.precision}, kernel: {config.kernel}")
        most = self._table_tokens(budget(config))
        say(
            f"held out  {self.held_out.look_tokens:,} tokens for validation, "
            f"{'' if config.evaluate_tokens else 'at most '}{most:,} for the table at the end"
        )


def _steps(lens: TunedLens, config: TrainConfig) -> LensOptimizer:
    assert config.lr is not None  # they have been settled
    assert config.momentum is not None
    assert config.weight_decay is not None
    if config.fit in ("preconditioned", *ONE_PASS):
        return Preconditioned(lens, config.lr, config.momentum, config.weight_decay)
    return TorchOptimizer(lens, config.fit, config.lr, config.momentum, config.weight_decay)
