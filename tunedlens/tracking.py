"""What is said while a run goes on: messages, a progress bar, Weights & Biases."""

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

from tqdm import tqdm

from tunedlens.config import WandbMode
from tunedlens.errors import first_line
from tunedlens.evaluation import Evaluation

WANDB_PATIENCE_SECONDS = 5


def say(message: str) -> None:
    """One line on the terminal, above a progress bar if there is one."""
    tqdm.write(message, file=sys.stdout)
    sys.stdout.flush()


def progress_bar(total_tokens: int, description: str, done: int = 0, show: bool = True) -> tqdm:
    """A bar that counts tokens, with their rate and the time left."""
    return tqdm(
        total=total_tokens,
        initial=done,
        desc=description,
        unit="tok",
        unit_scale=True,
        smoothing=0.1,
        disable=not show or not sys.stderr.isatty(),
        dynamic_ncols=True,
        leave=False,
    )


class Tracker:
    """Figures of a run to Weights & Biases, or to nowhere.

    Online falls back to offline, with one line, where there is no key or no connection
    within a few seconds: tracking never stops a run.

    Args:
        mode: online, offline or disabled.
        name: of the run.
        config: what the run depends on.
        folder: where an offline run is kept.
    """

    def __init__(self, mode: WandbMode, name: str, config: Mapping[str, Any], folder: Path) -> None:
        self._run = None if mode == "disabled" else _start(mode, name, config, folder)

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """Figures at one step."""
        self._try(lambda run: run.log(dict(figures), step=step))

    def summarise(self, figures: Mapping[str, float]) -> None:
        """Figures of the whole run."""
        self._try(lambda run: run.summary.update(dict(figures)))

    def report(self, evaluation: Evaluation, figures: Mapping[str, Path]) -> None:
        """An evaluation as a summary, one table, and the figures as images."""

        def send(run: Any) -> None:
            import wandb

            columns: list[str | int] = ["lens", "layer", "metric", "value", "standard_error"]
            rows = [[getattr(result, str(c)) for c in columns] for result in evaluation.results]
            images = {f"figures/{name}": wandb.Image(str(path)) for name, path in figures.items()}
            run.log({"metrics": wandb.Table(columns=columns, data=rows), **images})
            for result in evaluation.results:
                place = "" if result.layer is None else f"/{result.layer}"
                run.summary[f"{result.metric}/{result.lens}{place}"] = result.value

        self._try(send)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Send what is left, as far as that can be done in a few seconds."""
        self._try(lambda run: run.finish())

    def _try(self, send: Callable[[Any], object]) -> None:
        if self._run is None:
            return
        try:
            send(self._run)
        except Exception as error:  # whatever it is, the run is worth more
            say(f"wandb has failed, the run goes on without it: {first_line(error)}")
            self._run = None


def _start(mode: WandbMode, name: str, config: Mapping[str, Any], folder: Path) -> Any:
    import wandb

    options: dict[str, Any] = {
        "project": "tunedlens",
        "name": name,
        "config": dict(config),
        "dir": str(folder),
        "settings": wandb.Settings(
            init_timeout=WANDB_PATIENCE_SECONDS,
            login_timeout=WANDB_PATIENCE_SECONDS,
            finish_timeout=6 * WANDB_PATIENCE_SECONDS,
            silent=True,
            console="off",
        ),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return wandb.init(mode=mode, **options)
    except Exception as error:
        if mode == "offline":
            say(f"wandb cannot be used, the run goes on without it: {first_line(error)}")
            return None
        say(f"wandb is not to be reached, the run is kept offline: {first_line(error)}")
        return _start("offline", name, config, folder)
