"""The function `train`, which takes a config or settings by name."""

from pathlib import Path
from typing import Unpack, overload

from tunedlens.config import TrainConfig, TrainSettings, WandbMode, lists_settings, with_settings
from tunedlens.evaluation import Evaluation
from tunedlens.evaluation.calls import Model
from tunedlens.model import FrozenModel
from tunedlens.training import loop
from tunedlens.training.state_cache import CacheSettings


@overload
def train(
    config: TrainConfig | None = None,
    output: str | Path | None = None,
    *,
    model: Model | None = None,
    resume: bool = False,
    wandb: WandbMode = "disabled",
    cache: CacheSettings | None = None,
    **settings: Unpack[TrainSettings],
) -> Evaluation: ...
@overload
def train(
    model: Model | None = None,
    /,
    output: str | Path | None = None,
    *,
    resume: bool = False,
    wandb: WandbMode = "disabled",
    cache: CacheSettings | None = None,
    **settings: Unpack[TrainSettings],
) -> Evaluation: ...
@lists_settings(TrainConfig())
def train(
    config: TrainConfig | Model | None = None,
    output: str | Path | None = None,
    *,
    model: Model | None = None,
    resume: bool = False,
    wandb: WandbMode = "disabled",
    cache: CacheSettings | None = None,
    **settings: Unpack[TrainSettings],
) -> Evaluation:
    """Train a lens and save it in a folder.

    `train(model, "folder", dataset="my-texts/")` is short for a `TrainConfig` with these settings.
    The result depends only on the config: on the same device, a run that is interrupted and
    resumed takes bit for bit the same steps as one that is not.

    Args:
        config: a `TrainConfig`, or the model: a loaded model, its name on the hub or its folder.
            The run records the name, revision, dtype and device of a loaded model. If it was
            loaded with other options, such as an adapter, pass these as settings instead.
        output: the run's folder; `checkpoints/<model>-<time>` by default.
        model: the model, if the first argument is a config.
        resume: continue the interrupted run in `output`, or extend the finished run there to a
            larger number of `tokens`.
        wandb: whether metrics are sent to Weights & Biases.
        cache: where the model's states are stored for other runs; by default they are not stored.
        settings: fields of `TrainConfig` and of its parts, which replace those of `config`.

    Returns:
        Held-out metrics of the logit lens and the trained lens.

    Raises:
        InputError: a setting is unknown or impossible, or a file cannot be read or written.
        Interrupted: Ctrl-C, SIGTERM or SIGHUP was received, and the run is saved.
        KeyboardInterrupt: one of these was received while there was nothing to save.
    """
    if not isinstance(config, TrainConfig):
        model = config if model is None else model
        config = TrainConfig()
    named: dict[str, object] = dict(settings)
    loaded = model if isinstance(model, FrozenModel) else None
    if loaded is not None:
        named["model"], named["revision"] = loaded.name, loaded.identity.revision
        named["dtype"] = str(loaded.model.dtype).removeprefix("torch.")
        named["device"] = str(loaded.device)
    elif model is not None:
        named["model"] = model
    return loop.train(
        with_settings(config, named), output, model=loaded, resume=resume, wandb=wandb, cache=cache
    )
