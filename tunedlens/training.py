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
from tunedlens.config import TrainConfig
from tunedlens.corpus import Corpora, load_corpora, token_bytes, with_defaults
from tunedlens.errors import InputError
from tunedlens.evaluation import Evaluation, evaluate
from tunedlens.fit import MuonFit
from tunedlens.frozen import FrozenModel, Unembedding, load_model
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


class Interrupted(Exception):  # noqa: N818 - not an error
    """The run was asked to stop; it is saved and can go on."""


def train(
    config: TrainConfig, output: Path, *, resume: bool = False, tracker: Tracker | None = None
) -> Evaluation:
    """Train a tuned lens and save it in `output`.

    A run is a function of its config: interrupted and resumed, it takes the steps that it
    would have taken, bit for bit on the same device.

    Args:
        config: everything that the numbers depend on.
        output: the run's folder.
        resume: go on with the interrupted run in `output`, or extend the finished one
            there to the greater `config.tokens`.
        tracker: told the figures as they come.

    Returns:
        Held-out figures of the logit lens and the tuned lens.

    Raises:
        InputError: something that was asked for cannot be had.
        Interrupted: after Ctrl-C or SIGTERM; what was done is saved.
    """
    _require_usable(output, resume)
    accelerator = Accelerator()
    if config.batch_size < accelerator.num_processes:
        raise InputError(
            f"--batch-size must be at least the number of processes "
            f"({accelerator.num_processes}), got {config.batch_size}"
        )
    model = load_model(
        config.model.model,
        revision=config.model.revision,
        dtype=config.model.dtype,
        device=config.model.device or accelerator.device,
    )
    config = dataclasses.replace(config, corpus=with_defaults(config.corpus, model))
    corpora = load_corpora(config.corpus, model.tokenizer)
    held_out = _HeldOut(model, corpora, config, accelerator)
    tokens_per_step = config.batch_size * _trained_positions(config)
    total_steps = -(-config.tokens // tokens_per_step)
    total_tokens = total_steps * tokens_per_step

    lens = TunedLens.from_model(model)
    fit = MuonFit(lens, config, total_steps)
    progress = _restore(output, config, lens, fit) if resume else Progress()
    if progress.step >= total_steps:
        raise InputError(
            f"{output} is trained on {progress.tokens:,} tokens already; ask for more with --tokens"
        )
    main = accelerator.is_main_process
    if main:
        _describe(model, corpora, config, total_tokens)

    unembedding = model.unembedding.centred()
    batches = corpora.train.batches(config.batch_size, config.seed, progress.position)
    started = time.monotonic() - progress.seconds
    with progress_bar(total_tokens, "training", progress.tokens, main) as bar, _stop_flag() as stop:
        while progress.step < total_steps:
            batch = next(batches)
            kl = _backward(model, lens, unembedding, batch.input_ids, config, accelerator)
            kl, stopping = _reduce(lens, kl, stop.is_set(), accelerator)
            fit.step(progress.step)
            progress.step += 1
            progress.tokens += tokens_per_step
            progress.position = batch.position
            bar.update(tokens_per_step)
            bar.set_postfix_str(f"KL {kl.mean().item():.3f} nats")

            if progress.step % config.evaluate_every == 0 and progress.step < total_steps:
                now = held_out.kl(lens)
                progress.seconds = time.monotonic() - started
                progress.curve.append(_point(progress, now))
                mean = sum(now) / len(now)
                if main:
                    say(f"{progress.tokens:>11,} tokens   held-out KL {mean:.4f} nats")
                    checkpoint.save_state(output, _state(config, lens, fit, progress))
                if main and tracker is not None:
                    tracker.log({"train/kl_nats": kl.mean().item()}, progress.step)
                    figures = {f"held_out/kl_nats/{layer}": v for layer, v in enumerate(now)}
                    tracker.log(figures, progress.step)
            if stopping:
                progress.seconds = time.monotonic() - started
                if main:
                    checkpoint.save_state(output, _state(config, lens, fit, progress))
                raise Interrupted(f"stopped after {progress.tokens:,} of {total_tokens:,} tokens")

    evaluation = held_out.score({"logit": LogitLens.from_model(model), "tuned": lens})
    final = [estimate.value for estimate in evaluation.by_layer("tuned", "kl_nats")]
    progress.seconds = time.monotonic() - started
    progress.curve.append(_point(progress, final))
    if main:
        about = {
            "config": dataclasses.asdict(config),
            "corpus": {"train": corpora.train.about, "validation": corpora.validation.about},
            "progress": dataclasses.asdict(progress),
            "held_out": evaluation.to_json(),
            "provenance": report.provenance(model),
        }
        checkpoint.save_lens(lens, output, about)
        checkpoint.write(output / "README.md", report.card(output.name, about, evaluation))
        checkpoint.remove_state(output)
    return evaluation


def saved_config(folder: Path) -> TrainConfig:
    """The config of the interrupted or finished run in a folder.

    Raises:
        InputError: there is no run, or what is there is damaged.
    """
    if (folder / checkpoint.STATE).is_file():
        return TrainConfig.from_json(checkpoint.load_state(folder).about["config"])
    about = checkpoint.read_manifest(folder)
    if "config" not in about:
        raise InputError(f"the lens in {folder} was not saved by a training run")
    return TrainConfig.from_json(about["config"])


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


def _backward(
    model: FrozenModel,
    lens: TunedLens,
    unembedding: Unembedding,
    input_ids: Int[Tensor, "batch seq"],
    config: TrainConfig,
    accelerator: Accelerator,
) -> Float[Tensor, " layers"]:
    """Leave this process's share of the gradient; return its share of the mean KL."""
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    mine = input_ids[accelerator.process_index :: accelerator.num_processes].to(model.device)
    kl = torch.zeros(lens.n_layers, device=model.device)
    for rows in mine.split(config.micro_batch_size or len(mine)):
        with torch.autocast(model.device.type, dtype, enabled=dtype != torch.float32):
            states = model.residual_stream(rows)
        *hidden, final = (state[:, config.skip_first :].flatten(0, 1).float() for state in states)
        translated = torch.stack(
            [lens.transform_hidden(state, layer) for layer, state in enumerate(hidden)]
        )
        share = len(rows) / len(input_ids)
        part = lens_kl(translated, final, unembedding, dtype=dtype) * share
        part.mean().backward()
        kl += part.detach()
    return kl


def _reduce(
    lens: TunedLens, kl: Float[Tensor, " layers"], stop: bool, accelerator: Accelerator
) -> tuple[Float[Tensor, " layers"], bool]:
    """Add up gradients and KL of all processes, in one go; stop if any was asked to."""
    if accelerator.num_processes == 1:
        return kl, stop
    gradients = [parameter.grad for parameter in lens.parameters() if parameter.grad is not None]
    parts = [*gradients, kl, kl.new_tensor([float(stop)])]
    total = accelerator.reduce(torch.cat([part.flatten() for part in parts]), "sum")
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
        needed = -(-config.evaluate_tokens // (_trained_positions(config) + config.skip_first - 1))
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

    def kl(self, lens: TunedLens) -> list[float]:
        figures = self.score({"tuned": lens}).by_layer("tuned", "kl_nats")
        return [estimate.value for estimate in figures]


def _point(progress: Progress, kl_nats: list[float]) -> dict[str, Any]:
    return {
        "step": progress.step,
        "tokens": progress.tokens,
        "seconds": progress.seconds,
        "kl_nats": kl_nats,
    }


def _state(
    config: TrainConfig, lens: TunedLens, fit: MuonFit, progress: Progress
) -> checkpoint.State:
    tensors = {f"lens/{name}": value for name, value in lens.state_dict().items()}
    tensors |= {f"fit/{name}": value for name, value in fit.state().items()}
    about = {
        "config": dataclasses.asdict(config),
        "model": dataclasses.asdict(lens.identity),
        "progress": dataclasses.asdict(progress),
    }
    return checkpoint.State(tensors, about)


def _restore(output: Path, config: TrainConfig, lens: TunedLens, fit: MuonFit) -> Progress:
    """Fill lens and fit from an interrupted run, or the lens alone from a finished one."""
    saved = saved_config(output)
    model = dataclasses.replace(saved.model, device=config.model.device)
    if dataclasses.replace(saved, tokens=config.tokens, model=model) != config:
        raise InputError(
            f"{output} was trained with other settings; with --resume only --tokens and --device "
            "may change"
        )
    if not (output / checkpoint.STATE).is_file():
        checkpoint.load_lens(lens, output)
        return Progress(**checkpoint.read_manifest(output)["progress"])
    state = checkpoint.load_state(output)
    checkpoint.require_same_model(state.about["model"], dataclasses.asdict(lens.identity), output)
    groups: dict[str, dict[str, Tensor]] = {"lens": {}, "fit": {}}
    for name, value in state.tensors.items():
        group, _, key = name.partition("/")
        groups[group][key] = value
    lens.load_state_dict(groups["lens"])
    fit.load_state(groups["fit"])
    return Progress(**state.about["progress"])


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


def _describe(model: FrozenModel, corpora: Corpora, config: TrainConfig, total_tokens: int) -> None:
    identity, text = model.identity, corpora.train.about
    say(
        f"model     {identity.name}: {identity.n_layers} layers, d_model {identity.d_model}, "
        f"vocabulary {identity.vocab_size:,}, {config.model.dtype} on {model.device}"
    )
    if text.get("streamed"):
        say(f"text      {text['dataset']}, streamed, in blocks of {config.corpus.seq_len} tokens")
        say(f"training  {total_tokens:,} tokens, {config.batch_size} blocks a step")
        return
    available = text["blocks"] * _trained_positions(config)
    say(
        f"text      {text['dataset']}: {text['bytes']:,} bytes, {text['tokens']:,} tokens; "
        f"{text['blocks']:,} blocks of {config.corpus.seq_len} to train on, "
        f"{corpora.validation.about['blocks']:,} held out, "
        f"{text['dropped_tokens']} tokens of the last partial block dropped"
    )
    say(
        f"training  {total_tokens:,} tokens ({total_tokens / available:.2f} passes over the text), "
        f"{config.batch_size} blocks a step"
    )
