"""Logs runs to Weights & Biases."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Self

from tunedlens.config import WandbMode
from tunedlens.errors import first_line
from tunedlens.evaluation import Evaluation
from tunedlens.progress import say

if TYPE_CHECKING:
    from wandb import Run

WANDB_PATIENCE_SECONDS = 5


class Tracker:
    """Sends the metrics of a run to Weights & Biases, or nowhere.

    Tracking never stops a run. If there is no key, or no connection within a few seconds, an
    online run becomes an offline one in `folder`, with a message of one line.
    """

    def __init__(
        self, mode: WandbMode, name: str, config: Mapping[str, object], folder: Path
    ) -> None:
        self._run = None if mode == "disabled" else _start(mode, name, config, folder)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Send metrics of one step."""
        self._try(lambda run: run.log(dict(metrics), step=step))

    def summarise(self, metrics: Mapping[str, float]) -> None:
        """Send metrics of the whole run."""
        self._try(lambda run: run.summary.update(dict(metrics)))

    def report(self, evaluation: Evaluation, pictures: Mapping[str, Path]) -> None:
        """Send an evaluation as a summary, a table and pictures."""

        def send(run: "Run") -> None:
            import wandb

            columns: list[str | int] = ["lens", "layer", "metric", "value", "standard_error"]
            rows = [[getattr(result, str(c)) for c in columns] for result in evaluation.results]
            images = {f"figures/{name}": wandb.Image(str(path)) for name, path in pictures.items()}
            run.log({"metrics": wandb.Table(columns=columns, data=rows), **images})
            summary = {}
            for result in evaluation.results:
                layer = "" if result.layer is None else f"/{result.layer}"
                summary[f"{result.metric}/{result.lens}{layer}"] = result.value
            run.summary.update(summary)

        self._try(send)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Send the remaining metrics, for at most a few seconds."""
        self._try(lambda run: run.finish())

    def _try(self, send: Callable[["Run"], object]) -> None:
        if self._run is None:
            return
        try:
            send(self._run)
        except Exception as error:  # of any kind: tracking must not stop a run
            say(f"wandb failed, and the run continues without it: {first_line(error)}")
            self._run = None


def _start(mode: WandbMode, name: str, config: Mapping[str, object], folder: Path) -> "Run | None":
    import wandb

    settings = wandb.Settings(
        init_timeout=WANDB_PATIENCE_SECONDS,
        login_timeout=WANDB_PATIENCE_SECONDS,
        finish_timeout=6 * WANDB_PATIENCE_SECONDS,
        silent=True,
        console="off",
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return wandb.init(
            project="tunedlens",
            name=name,
            config=dict(config),
            dir=folder,
            mode=mode,
            settings=settings,
        )
    except Exception as error:
        if mode == "offline":
            say(f"wandb failed to start, and the run continues without it: {first_line(error)}")
            return None
        say(f"wandb cannot be reached, so the run is kept offline: {first_line(error)}")
        return _start("offline", name, config, folder)
