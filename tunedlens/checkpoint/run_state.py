"""Interrupted runs on disk: what a run needs to be resumed, as one safetensors file."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import safetensors
import safetensors.torch
from jaxtyping import Float
from torch import Tensor

from tunedlens.errors import InputError
from tunedlens.files import JsonObject, newest_folder, now, write

STATE = Path("state") / "state.safetensors"


class State(NamedTuple):
    """The state of an interrupted run."""

    tensors: dict[str, Float[Tensor, "..."]]
    metadata: JsonObject
    """JSON-able: the config, the model, the progress."""


def save_state(folder: Path, state: State) -> None:
    """Write what a run needs to be resumed, as one file.

    Raises:
        InputError: the folder cannot be written.
    """
    metadata = {"about": json.dumps(state.metadata | {"created": now()})}
    tensors = {name: value.detach().cpu().contiguous() for name, value in state.tensors.items()}
    write(folder / STATE, safetensors.torch.save(tensors, metadata))


def load_state(folder: Path) -> State:
    """Read what `save_state` wrote.

    Raises:
        InputError: there is no interrupted run, or its state is damaged.
    """
    with _opened(folder) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return State(tensors, json.loads(file.metadata()["about"]))


def load_metadata(folder: Path) -> JsonObject:
    """Read the metadata of what `save_state` wrote, without its tensors.

    Raises:
        InputError: there is no interrupted run, or its state is damaged.
    """
    with _opened(folder) as file:
        metadata: JsonObject = json.loads(file.metadata()["about"])
        return metadata


@contextmanager
def _opened(folder: Path) -> Iterator[safetensors.safe_open]:
    path = folder / STATE
    if not path.is_file():
        raise InputError(f"{folder} holds no interrupted run: expected {path}")
    try:
        with safetensors.safe_open(path, "pt") as file:
            yield file
    except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
        raise InputError(f"{path} is damaged: {error}") from error


def newest_state(root: Path) -> Path:
    """The folder under `root` with the run that was saved last.

    Raises:
        InputError: there is none.
    """
    folders = [path.parent.parent for path in root.glob(f"*/{STATE}")]
    found = newest_folder(folders, lambda folder: load_metadata(folder)["created"])
    if found is None:
        raise InputError(f"there is no interrupted run under {root}; give --resume its folder")
    return found


def remove_state(folder: Path) -> None:
    """Remove the state of a run that has finished."""
    shutil.rmtree((folder / STATE).parent, ignore_errors=True)
