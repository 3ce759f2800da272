"""The folder of a run: how a run is saved there, resumed and finished."""

import dataclasses
import tempfile
from datetime import UTC, datetime
from pathlib import Path

from accelerate.utils import broadcast_object_list
from torch import Tensor

from tunedlens import builtin, checkpoint, files, report
from tunedlens.config import ONE_PASS, TrainConfig
from tunedlens.errors import InputError
from tunedlens.evaluation import Evaluation
from tunedlens.lenses import AffineLens, LogitLens
from tunedlens.model import require_same_model, take_probe
from tunedlens.provenance import describe_run
from tunedlens.report import plots
from tunedlens.tracking import Tracker
from tunedlens.training.run import Progress, Run, TrainState, make_optimizer


def new_folder(config: TrainConfig) -> Path:
    """`checkpoints/<model>-<time>`, the same in every process."""
    model = Path(config.model.model or builtin.NAME).name
    (name,) = broadcast_object_list([f"{model}-{datetime.now(UTC):%Y%m%d-%H%M%S-%f}"])
    return checkpoint.ROOT / name


def require_usable(output: Path, *, resume: bool) -> None:
    """Check that the folder can be written to, and that a new run overwrites nothing.

    Raises:
        InputError: it cannot be written to, or it holds a run that is not resumed.
    """
    files.require_writable(output)
    if resume:
        return
    if checkpoint.has_state(output):
        raise InputError(
            f"{output} holds an interrupted run: continue it with --resume {output}, or choose "
            "another --output"
        )
    if (output / checkpoint.MANIFEST).exists():
        raise InputError(
            f"{output} holds a lens: choose another --output, or extend it with "
            f"--resume {output} and more --tokens"
        )


def continued(config: TrainConfig, output: Path) -> TrainConfig:
    """The config of a resumed run: settings that `config` leaves open keep their saved values.

    On another device, a kernel and a micro-batch size that `config` leaves open are chosen again.

    Raises:
        InputError: there is no run to resume, or an earlier version saved it.
    """
    saved = checkpoint.saved_config(output)
    if saved.kernel is None:
        raise InputError(
            f"{output} was trained by an earlier version of tunedlens, whose runs cannot be "
            "resumed; its lens can be used as it is"
        )
    ours, theirs = config.model, saved.model
    if (ours.device, ours.device_map) != (theirs.device, theirs.device_map):
        saved = dataclasses.replace(saved, kernel=None, micro_batch_size=None)
    given = {name: value for name, value in vars(config).items() if value is not None}
    return dataclasses.replace(saved, **given)


def save(run: Run, state: TrainState) -> None:
    """Write what the run needs to be resumed.

    Raises:
        InputError: it cannot be written, or is not finite; the states before it stay.
    """
    state.progress.update_seconds()
    tensors = run.shards.collect_state(state.optimizer.state())
    if not run.is_main:
        return
    metadata = {
        "config": dataclasses.asdict(run.plan),
        "model": dataclasses.asdict(run.model.identity),
        "text": run.splits.train.about.get("tokens_sha256"),
        "chunk": run.objective.chunk,
        "progress": dataclasses.asdict(state.progress),
    }
    checkpoint.save_state(run.output, checkpoint.State(tensors, metadata))


def save_if_possible(run: Run, state: TrainState) -> None:
    """Save the run. If that fails, for example on a full disk, print a message and continue."""
    try:
        save(run, state)
    except InputError as error:
        run.say(f"the run continues without being saved: {error}")


def restore(run: Run) -> TrainState:
    """The state of the interrupted or finished run in the folder.

    Raises:
        InputError: the model, the text or a setting differs, or the run has no more to do.
    """
    _require_same_settings(run)
    lens = run.new_lens()
    if checkpoint.has_state(run.output):
        tensors, saved = checkpoint.load_state(run.output)
        tensors = run.shards.own_state(tensors)
        identity = dataclasses.asdict(run.model.identity)
        require_same_model(saved["model"], identity, f"the lens in {run.output}")
        optimizer = make_optimizer(lens, run.plan)
        try:
            _require_same_shapes(optimizer.state(), tensors)
            optimizer.load_state(tensors)
            progress = Progress.from_json(saved["progress"], f"the state of {run.output}")
            run.objective.chunk, text = saved["chunk"], saved["text"]
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise InputError(
                f"the state of {run.output} is damaged, or was saved by another version of "
                f"tunedlens: {error!r}; start the run again with another --output"
            ) from error
    else:
        manifest = checkpoint.read_manifest(run.output)
        progress = Progress.from_json(manifest["progress"], f"the manifest of {run.output}")
        if (run.plan.tokens or 0) <= progress.tokens or run.plan.fit in ONE_PASS:
            raise InputError(
                f"{run.output} has already been trained on {progress.tokens:,} tokens; give a "
                "larger --tokens"
            )
        progress.ended_early = None
        run.fill_lens(lens, run.output)
        optimizer = make_optimizer(lens, run.plan)
        text = manifest["corpus"]["train"].get("tokens_sha256")
    if text != run.splits.train.about.get("tokens_sha256"):
        raise InputError(
            f"the text {run.plan.corpus.dataset} has changed since {run.output} was trained; "
            "expected the same text (the embedded text depends on the version of Python; sampled "
            "text depends on the device, the number of threads and the versions of libraries)"
        )
    return TrainState(optimizer, progress)


def _require_same_shapes(expected: dict[str, Tensor], tensors: dict[str, Tensor]) -> None:
    """Check that saved tensors have the shapes and dtypes of the expected ones, and are finite."""
    for name, value in expected.items():
        if (tensors[name].shape, tensors[name].dtype) != (value.shape, value.dtype):
            raise ValueError(f"{name} is {tensors[name].dtype} {tuple(tensors[name].shape)}")
    for name, value in tensors.items():
        if not value.isfinite().all():
            raise ValueError(f"{name} is not finite")


_MAY_CHANGE = (
    *("tokens", "device", "device_map", "kernel", "micro_batch_size", "shard_layers"),
    *("fsdp", "trust_remote_code"),
)
"""Settings that a resumed run may change."""


def _require_same_settings(run: Run) -> None:
    saved = _flat(checkpoint.saved_config(run.output))
    changed = [
        f"{name} was {saved[name]!r} and is now {value!r}"
        for name, value in _flat(run.plan).items()
        if value != saved[name] and name not in _MAY_CHANGE
    ]
    if changed:
        raise InputError(
            f"{run.output} was trained with other settings: {'; '.join(changed)}; with --resume "
            "only --tokens, --device, --device-map, --fsdp, --kernel, --micro-batch-size and "
            "--shard-layers may change"
        )


def _flat(config: TrainConfig) -> files.JsonObject:
    """The settings of a config and of its parts, by name."""
    parts = dataclasses.asdict(config)
    model, corpus = parts.pop("model"), parts.pop("corpus")
    return parts | model | corpus


def finish(run: Run, state: TrainState, tracker: Tracker, lens: AffineLens) -> Evaluation:
    """Write the lens, score it, write its card and its learning curve, and remove the states.

    Raises:
        InputError: the folder cannot be written any more; the lens is saved in another one.
    """
    if summary := run.reader.summary():
        run.say(summary)
    train, validation = run.splits.train, run.splits.validation
    state.progress.update_seconds()
    metadata = {
        "config": dataclasses.asdict(run.plan),
        "corpus": {"train": train.about, "validation": validation.about},
        "progress": dataclasses.asdict(state.progress),
        "probe": take_probe(run.model),
        "provenance": describe_run(run.model),
    }
    if run.is_main:
        _save_lens(lens, run.output, metadata)
    kind = "bias-only" if run.plan.bias_only else checkpoint.kind_of(lens)
    lenses = {"logit": LogitLens.from_model(run.model), kind: lens}
    evaluation = run.validation_set.score(lenses, run.costs.table_tokens(state.progress.tokens))
    kl = zip(evaluation.layers_of(kind), evaluation.by_layer(kind, "kl_nats"), strict=True)
    tracker.summarise({f"held_out/kl_nats/{layer}": e.value for layer, e in kl})
    if run.is_main:
        state.progress.update_seconds()
        metadata["progress"] = dataclasses.asdict(state.progress)
        metadata["held_out"] = evaluation.to_json()
        checkpoint.save_lens(lens, run.output, metadata)
        manifest = checkpoint.read_manifest(run.output)
        card = report.card(run.output.name, manifest, evaluation)
        files.write(run.output / "README.md", card)
        plots.draw_learning_curve(state.progress.history, run.output, run.reader.points)
        checkpoint.remove_state(run.output)
    run.accelerator.wait_for_everyone()  # the lens can be read now, in every process
    return evaluation


def _save_lens(lens: AffineLens, output: Path, metadata: files.JsonObject) -> None:
    try:
        checkpoint.save_lens(lens, output, metadata)
    except InputError as error:
        spare = Path(tempfile.mkdtemp(prefix=f"{output.name}-"))
        checkpoint.save_lens(lens, spare, metadata)
        raise InputError(f"{error}; the lens is in {spare}") from error
