"""The folder of a run: where it is, how a run is saved there, and how it is resumed."""

import dataclasses
from datetime import UTC, datetime
from pathlib import Path

from accelerate.utils import broadcast_object_list

from tunedlens import builtin, checkpoint, files
from tunedlens.config import ONE_PASS, TrainConfig
from tunedlens.errors import InputError
from tunedlens.lenses import TunedLens
from tunedlens.model import require_same_model
from tunedlens.training.run import Progress, Run, TrainState, make_optimizer


def new_folder(config: TrainConfig) -> Path:
    """`checkpoints/<model>-<time>`, the same in every process."""
    model = Path(config.model.model or builtin.NAME).name
    (name,) = broadcast_object_list([f"{model}-{datetime.now(UTC):%Y%m%d-%H%M%S-%f}"])
    return checkpoint.ROOT / name


def require_usable(output: Path, *, resume: bool) -> None:
    """Make sure that the folder can be written to, and that a new run overwrites nothing.

    Raises:
        InputError: it cannot be written to, or it holds a run that is not resumed.
    """
    files.require_writable(output)
    if resume:
        return
    if (output / checkpoint.STATE).exists():
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
    """The config of a resumed run, in which open settings are as they were when it was saved.

    On another device, the kernel and the micro-batch are chosen anew.

    Raises:
        InputError: there is no run to resume, or an earlier version saved it.
    """
    saved = checkpoint.saved_config(output)
    if saved.kernel is None:
        raise InputError(
            f"{output} was trained by an earlier version of tunedlens, whose runs cannot be "
            "resumed; its lens can be used as it is"
        )
    if config.model.device != saved.model.device:
        saved = dataclasses.replace(saved, kernel=None, micro_batch_size=None)
        if config.kernel == "attention":
            config = dataclasses.replace(config, kernel=None)
    names = [field.name for field in dataclasses.fields(config)]
    given = {name: getattr(config, name) for name in names if getattr(config, name) is not None}
    return dataclasses.replace(saved, **given)


def save(run: Run, state: TrainState) -> None:
    """Write what the run needs to be resumed."""
    state.update_seconds()
    if not run.is_main:
        return
    metadata = {
        "config": dataclasses.asdict(run.plan),
        "model": dataclasses.asdict(run.model.identity),
        "text": run.splits.train.about.get("tokens_sha256"),
        "chunk": run.objective.chunk,
        "progress": dataclasses.asdict(state.progress),
    }
    checkpoint.save_state(run.output, checkpoint.State(state.optimizer.state(), metadata))


def restore(run: Run) -> TrainState:
    """The state of the interrupted run in the folder, or of the finished one, to extend it.

    Raises:
        InputError: the model, the text or a setting differs, or the run has no more to do.
    """
    _require_same_settings(run)
    lens = TunedLens.from_model(run.model)
    if (run.output / checkpoint.STATE).is_file():
        tensors, saved = checkpoint.load_state(run.output)
        identity = dataclasses.asdict(run.model.identity)
        require_same_model(saved["model"], identity, f"the lens in {run.output}")
        optimizer = make_optimizer(lens, run.plan)
        try:
            optimizer.load_state(tensors)
            progress = Progress.from_json(saved["progress"])
            run.objective.chunk, text = saved["chunk"], saved["text"]
        except (KeyError, TypeError) as error:
            raise InputError(
                f"the state of {run.output} is damaged, or was saved by another version of "
                f"tunedlens: {error!r}; start the run again with another --output"
            ) from error
    else:
        manifest = checkpoint.read_manifest(run.output)
        progress = Progress.from_json(manifest["progress"])
        if (run.plan.tokens or 0) <= progress.tokens or run.plan.fit in ONE_PASS:
            raise InputError(
                f"{run.output} is trained on {progress.tokens:,} tokens already; ask for more "
                "with --tokens"
            )
        checkpoint.fill_lens(lens, run.output)
        optimizer = make_optimizer(lens, run.plan)
        text = manifest["corpus"]["train"].get("tokens_sha256")
    if text != run.splits.train.about.get("tokens_sha256"):
        raise InputError(
            f"the text {run.plan.corpus.dataset} is not the one that {run.output} was trained on: "
            "it has changed since (the embedded text changes with Python)"
        )
    return TrainState(optimizer, progress)


def _require_same_settings(run: Run) -> None:
    saved = dataclasses.asdict(checkpoint.saved_config(run.output))
    planned = dataclasses.asdict(run.plan)
    for settings in (saved, planned):
        for name in ("tokens", "kernel", "micro_batch_size"):
            del settings[name]
        del settings["model"]["device"]
    changed = [name for name, value in planned.items() if value != saved[name]]
    if changed:
        raise InputError(
            f"{run.output} was trained with other settings ({', '.join(changed)}); with --resume "
            "only --tokens, --device, --kernel and --micro-batch-size may change"
        )
