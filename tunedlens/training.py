"""The training loop: a frozen model and a corpus in, a saved tuned lens out."""

import dataclasses
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from jaxtyping import Float, Int
from torch import Tensor

from tunedlens import checkpoint, report
from tunedlens.config import Precision, TrainConfig, WandbMode
from tunedlens.corpus import DEFAULT_HUB_DATASET, Corpora, load_corpora, token_bytes, with_defaults
from tunedlens.errors import InputError
from tunedlens.evaluation import Evaluation, evaluate
from tunedlens.fit import LeastSquares, MuonFit
from tunedlens.frozen import FrozenModel, Unembedding, load_configured
from tunedlens.lens import Lens, LogitLens, TunedLens
from tunedlens.objective import lens_kl
from tunedlens.tracking import Tracker, progress_bar, say


@dataclass
class Progress:
    """How far a run has come; JSON-able, and saved with it."""

    step: int = 0
    tokens: int = 0
    """Positions trained on."""
    position: dict[str, Any] | None = None
    """Where the corpus goes on."""
    seconds: float = 0.0
    curve: list[dict[str, Any]] = field(default_factory=list)
    """Held-out KL per layer in nats, against step, tokens and seconds."""


_STEPS_PER_FIGURE = 8
"""Reading a figure waits for the device, so it is not done at every step."""


class Interrupted(Exception):  # noqa: N818 - not an error
    """The run was asked to stop; it is saved and can go on."""


def train(
    config: TrainConfig, output: Path, *, resume: bool = False, wandb: WandbMode = "disabled"
) -> Evaluation:
    """Train a tuned lens and save it in `output`.

    A run is a function of its config: interrupted and resumed, it takes the steps that it
    would have taken, bit for bit on the same device.

    Args:
        config: everything that the numbers depend on.
        output: the run's folder.
        resume: go on with the interrupted run in `output`, or extend the finished one
            there to the greater `config.tokens`.
        wandb: whether Weights & Biases is told the figures.

    Returns:
        Held-out figures of the logit lens and the tuned lens.

    Raises:
        InputError: something that was asked for cannot be had.
        Interrupted: after Ctrl-C or SIGTERM; what was done is saved.
    """
    _require_usable(output, resume)
    accelerator = Accelerator()
    _require_processes(config, accelerator)
    model = load_configured(config.model, accelerator.device)
    config = dataclasses.replace(
        config,
        corpus=with_defaults(config.corpus, model),
        precision=config.precision or _fast_precision(model.device),
    )
    corpora = load_corpora(config.corpus, model.tokenizer)
    held_out = _HeldOut(model, corpora, config, accelerator)
    run = _Run(config, output, model, corpora, held_out, accelerator)
    if resume:
        run.restore()
    run.describe()

    config_now = dataclasses.asdict(config)
    mode = wandb if accelerator.is_main_process else "disabled"
    with Tracker(mode, output.name, config_now, output) as tracker, _stop_flag() as stop:
        if not (output / checkpoint.STATE).exists():
            _first_pass(run)
        _take_steps(run, tracker, stop)
        return run.finish(tracker)


class _Run:
    """One run: what it is made of, how far it is, and how it goes to disk."""

    def __init__(
        self,
        config: TrainConfig,
        output: Path,
        model: FrozenModel,
        corpora: Corpora,
        held_out: "_HeldOut",
        accelerator: Accelerator,
    ) -> None:
        self.config = config
        self.output = output
        self.model = model
        self.corpora = corpora
        self.held_out = held_out
        self.accelerator = accelerator
        # Of the products while training; train has settled what the config left open.
        self.dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
        self.tokens_per_step = config.batch_size * _trained_positions(config)
        self.total_steps = -(-config.tokens // self.tokens_per_step)
        self.total_tokens = self.total_steps * self.tokens_per_step
        self.lens = TunedLens.from_model(model)
        self.fit = MuonFit(self.lens, config, self.total_steps)
        self.progress = Progress()
        self._started = time.monotonic()

    def look(self) -> list[float]:
        """Held-out KL of every layer, also put on the learning curve."""
        figures = self.held_out.score({"tuned": self.lens}).by_layer("tuned", "kl_nats")
        return self._note([estimate.value for estimate in figures])

    def _note(self, kl_nats: list[float]) -> list[float]:
        self.progress.seconds = time.monotonic() - self._started
        point = {"step": self.progress.step, "tokens": self.progress.tokens}
        self.progress.curve.append(point | {"seconds": self.progress.seconds, "kl_nats": kl_nats})
        return kl_nats

    def save(self) -> None:
        """Write what the run needs to go on."""
        self.progress.seconds = time.monotonic() - self._started
        if not self.accelerator.is_main_process:
            return
        tensors = {f"lens/{name}": value for name, value in self.lens.state_dict().items()}
        tensors |= {f"fit/{name}": value for name, value in self.fit.state().items()}
        about = {
            "config": dataclasses.asdict(self.config),
            "model": dataclasses.asdict(self.lens.identity),
            "text": self.corpora.train.about.get("tokens_sha256"),
            "progress": dataclasses.asdict(self.progress),
        }
        checkpoint.save_state(self.output, checkpoint.State(tensors, about))

    def restore(self) -> None:
        """Go on from an interrupted run, or from the lens of a finished one.

        Raises:
            InputError: it was another model, text or config, or has no more to do.
        """
        saved = saved_config(self.output)
        model = dataclasses.replace(saved.model, device=self.config.model.device)
        if dataclasses.replace(saved, tokens=self.config.tokens, model=model) != self.config:
            raise InputError(
                f"{self.output} was trained with other settings; with --resume only --tokens and "
                "--device may change"
            )
        if (self.output / checkpoint.STATE).is_file():
            state = checkpoint.load_state(self.output)
            identity = dataclasses.asdict(self.lens.identity)
            checkpoint.require_same_model(state.about["model"], identity, self.output)
            groups: dict[str, dict[str, Tensor]] = {"lens": {}, "fit": {}}
            for name, value in state.tensors.items():
                group, _, key = name.partition("/")
                groups[group][key] = value
            self.lens.load_state_dict(groups["lens"])
            self.fit.load_state(groups["fit"])
            self.progress = Progress(**state.about["progress"])
            text = state.about["text"]
        else:
            manifest = checkpoint.read_manifest(self.output)
            checkpoint.load_lens(self.lens, self.output)
            self.progress = Progress(**manifest["progress"])
            text = manifest["corpus"]["train"].get("tokens_sha256")
            if self.progress.step >= self.total_steps:
                raise InputError(
                    f"{self.output} is trained on {self.progress.tokens:,} tokens already; ask for "
                    "more with --tokens"
                )
        if text != self.corpora.train.about.get("tokens_sha256"):
            raise InputError(
                f"the text {self.config.corpus.dataset} is not the one that {self.output} was "
                "trained on: it has changed since (the embedded text changes with Python)"
            )
        self._started = time.monotonic() - self.progress.seconds

    def finish(self, tracker: Tracker) -> Evaluation:
        """Score the lens, write it with all that made it, and forget how to resume."""
        lenses = {"logit": LogitLens.from_model(self.model), "tuned": self.lens}
        evaluation = self.held_out.score(lenses)
        final = self._note([e.value for e in evaluation.by_layer("tuned", "kl_nats")])
        tracker.summarise({f"held_out/kl_nats/{layer}": kl for layer, kl in enumerate(final)})
        if self.accelerator.is_main_process:
            sides = {"train": self.corpora.train, "validation": self.corpora.validation}
            about = {
                "config": dataclasses.asdict(self.config),
                "corpus": {name: side.about for name, side in sides.items()},
                "progress": dataclasses.asdict(self.progress),
                "held_out": evaluation.to_json(),
                "provenance": report.provenance(self.model),
            }
            checkpoint.save_lens(self.lens, self.output, about)
            text = report.card(self.output.name, about, evaluation)
            checkpoint.write(self.output / "README.md", text)
            checkpoint.remove_state(self.output)
        return evaluation

    def describe(self) -> None:
        """Say what is about to be done."""
        if not self.accelerator.is_main_process:
            return
        config, identity, text = self.config, self.model.identity, self.corpora.train.about
        say(
            f"model     {identity.name}: {identity.n_layers} layers, d_model {identity.d_model}, "
            f"vocabulary {identity.vocab_size:,}, {config.model.dtype} on {self.model.device}"
        )
        by_default = config.corpus.dataset == DEFAULT_HUB_DATASET
        say(f"text      {text['dataset']}{' (the default; see --dataset)' if by_default else ''}")
        blocks = f"blocks of {config.corpus.seq_len} tokens"
        if text.get("streamed"):
            say(f"          read as it streams by, in {blocks}")
            passes = ""
        else:
            validation = self.corpora.validation.about
            say(
                f"          {text['bytes']:,} bytes, {text['tokens']:,} tokens; {blocks}: "
                f"{text['blocks']:,} to train on, {validation['blocks']:,} held out; "
                f"{text['dropped_tokens']} tokens fill no block"
            )
            share = self.total_tokens / (text["blocks"] * _trained_positions(config))
            passes = f" ({share:.2f} passes over the text)"
        say(
            f"training  {self.total_tokens:,} tokens{passes}, {config.batch_size} blocks a step, "
            f"{config.precision} products"
        )


def _first_pass(run: _Run) -> None:
    """Let the fit see the first tokens of the text, and start new translators from them."""
    config, lens, left = run.config, run.lens, run.config.start_tokens
    if not left:
        return
    sums = LeastSquares(lens.n_layers, lens.identity.d_model)
    batches = run.corpora.train.batches(config.batch_size, config.seed)
    with progress_bar(left, "first pass", show=run.accelerator.is_main_process) as bar:
        while left > 0:
            for states in _states(run, next(batches).input_ids):
                sums.add(states[:-1], states[-1])
            left -= run.tokens_per_step
            bar.update(run.tokens_per_step)
    if run.accelerator.num_processes > 1:
        for part in (sums.inputs, sums.outputs):
            part.copy_(run.accelerator.reduce(part.to(run.accelerator.device), "sum"))
    run.fit.start(sums, translators_too=run.progress.step == 0)


def _take_steps(run: _Run, tracker: Tracker, stop: threading.Event) -> None:
    """The loop, from where the run stands to its last step."""
    config, progress, main = run.config, run.progress, run.accelerator.is_main_process
    unembedding = run.model.unembedding.centred()
    batches = run.corpora.train.batches(config.batch_size, config.seed, progress.position)
    with progress_bar(run.total_tokens, "training", progress.tokens, main) as bar:
        while progress.step < run.total_steps:
            try:
                batch = next(batches)
            except InputError:
                run.save()
                raise
            kl = _backward(run, unembedding, batch.input_ids)
            kl, stopping = _reduce(run, kl, stop.is_set())
            run.fit.step(progress.step)
            progress.step += 1
            progress.tokens += run.tokens_per_step
            progress.position = batch.position
            bar.update(run.tokens_per_step)
            last = progress.step == run.total_steps

            if progress.step % _STEPS_PER_FIGURE == 0:
                mean = kl.mean().item()
                bar.set_postfix_str(f"KL {mean:.3f} nats")
                tracker.log({"train/kl_nats": mean}, progress.step)
            if progress.step % config.evaluate_every == 0 and not last:
                now = run.look()
                if main:
                    mean = sum(now) / len(now)
                    say(f"{progress.tokens:>11,} tokens   held-out KL {mean:.4f} nats")
                figures = {f"held_out/kl_nats/{layer}": value for layer, value in enumerate(now)}
                tracker.log(figures, progress.step)
                run.save()
            if stopping and not last:
                run.save()
                raise Interrupted(
                    f"stopped after {progress.tokens:,} of {run.total_tokens:,} tokens"
                )
    run.save()


def saved_config(folder: Path) -> TrainConfig:
    """The config of the interrupted or finished run in a folder.

    Raises:
        InputError: there is no run, or what is there is damaged.
    """
    interrupted = (folder / checkpoint.STATE).is_file()
    about = checkpoint.load_state(folder).about if interrupted else checkpoint.read_manifest(folder)
    if "config" not in about:
        raise InputError(f"the lens in {folder} was not saved by a training run")
    try:
        return TrainConfig.from_json(about["config"])
    except (KeyError, TypeError) as error:
        raise InputError(f"the config saved in {folder} is damaged: {error}") from error


def _fast_precision(device: torch.device) -> Precision:
    """bf16 where the hardware multiplies it, else fp32."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    if device.type == "cpu":
        capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
        return "bf16" if capabilities.get("amx_bf16") else "fp32"
    return "fp32"


def _require_processes(config: TrainConfig, accelerator: Accelerator) -> None:
    processes = accelerator.num_processes
    if config.batch_size < processes:
        raise InputError(
            f"--batch-size must be at least the number of processes ({processes}), got "
            f"{config.batch_size}"
        )
    if processes > 1 and config.model.device is not None:
        raise InputError(
            f"--device is each process's own where there are {processes}; leave it out"
        )


def _require_usable(output: Path, resume: bool) -> None:
    checkpoint.require_writable(output)
    if resume:
        return
    if (output / checkpoint.STATE).exists():
        raise InputError(
            f"{output} holds an interrupted run: go on with --resume {output}, or choose another "
            "--output"
        )
    if (output / checkpoint.MANIFEST).exists():
        raise InputError(
            f"{output} holds a lens: choose another --output, or extend it with "
            f"--resume {output} and more --tokens"
        )


def _trained_positions(config: TrainConfig) -> int:
    """Positions of one block that are trained on."""
    seq_len = config.corpus.seq_len
    assert seq_len is not None  # with_defaults has set it
    if config.skip_first >= seq_len:
        raise InputError(
            f"--skip-first must be less than --seq-len ({seq_len}), got {config.skip_first}"
        )
    return seq_len - config.skip_first


def _states(
    run: _Run, input_ids: Int[Tensor, "batch seq"]
) -> Iterator[Float[Tensor, "states tokens d_model"]]:
    """All states of this process's share, a micro-batch at a time, in float32."""
    index, processes = run.accelerator.process_index, run.accelerator.num_processes
    mine = input_ids[index::processes].to(run.model.device)
    for rows in mine.split(run.config.micro_batch_size or len(mine)):
        with torch.autocast(run.model.device.type, run.dtype, enabled=run.dtype != torch.float32):
            states = run.model.residual_stream(rows)
        skipped = run.config.skip_first
        yield torch.stack([state[:, skipped:].flatten(0, 1).float() for state in states])


def _backward(
    run: _Run, unembedding: Unembedding, input_ids: Int[Tensor, "batch seq"]
) -> Float[Tensor, " layers"]:
    """Leave this process's share of the gradient; return its share of the mean KL."""
    lens = run.lens
    kl = torch.zeros(lens.n_layers, device=run.model.device)
    for states in _states(run, input_ids):
        translated = torch.stack(
            [lens.transform_hidden(state, layer) for layer, state in enumerate(states[:-1])]
        )
        share = states.shape[1] / run.tokens_per_step
        part = lens_kl(translated, states[-1], unembedding, dtype=run.dtype) * share
        part.mean().backward()
        kl += part.detach()
    return kl


def _reduce(
    run: _Run, kl: Float[Tensor, " layers"], stop: bool
) -> tuple[Float[Tensor, " layers"], bool]:
    """Add up gradients and KL of all processes, in one go; stop if any was asked to."""
    if run.accelerator.num_processes == 1:
        return kl, stop
    gradients = [part.grad for part in run.lens.parameters() if part.grad is not None]
    parts = [*gradients, kl, kl.new_tensor([float(stop)])]
    total = run.accelerator.reduce(torch.cat([part.flatten() for part in parts]), "sum")
    for part, value in zip(parts, total.split([part.numel() for part in parts]), strict=True):
        part.copy_(value.view_as(part))
    return kl, bool(parts[-1].item())


class _HeldOut:
    """The held-out blocks that a run looks at again and again."""

    def __init__(
        self, model: FrozenModel, corpora: Corpora, config: TrainConfig, accelerator: Accelerator
    ) -> None:
        self._model = model
        self._config = config
        self._accelerator = accelerator
        assert config.corpus.seq_len is not None  # with_defaults has set it
        needed = -(-config.evaluate_tokens // (config.corpus.seq_len - 1))
        self._blocks = list(islice(corpora.validation.blocks(), needed))
        self._token_bytes = token_bytes(model.tokenizer)
        if not self._blocks:
            raise InputError(
                f"the held-out side of {config.corpus.dataset} has no block of "
                f"{config.corpus.seq_len} tokens; give more text or a smaller --seq-len"
            )

    def score(self, lenses: dict[str, Lens]) -> Evaluation:
        return evaluate(
            self._model,
            lenses,
            self._blocks,
            self._token_bytes,
            tokens=self._config.evaluate_tokens,
            batch_size=self._config.micro_batch_size or self._config.batch_size,
            accelerator=self._accelerator,
        )


@contextmanager
def _stop_flag() -> Iterator[threading.Event]:
    """Set by Ctrl-C or SIGTERM, so that a step is never cut in two; a second one kills."""
    flag = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return

    def ask(number: int, _frame: object) -> None:
        flag.set()
        signal.signal(number, previous[number])

    previous: dict[int, Any] = {
        number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield flag
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
